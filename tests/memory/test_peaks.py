"""Memory really falls, told by the allocator's events and by nobody else; `benchmarks/peak_memory.py` has the figures.

For each model the plain step, PyTorch's own checkpoints around its blocks, and `PerModule` of the same blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

import peers
import rekindle

Make = Callable[[], peers.Workload]

# Each random op keeps the state of its generator, PyTorch one state for each block: nothing beside the activations of a
# model in full size, but a percent of a small one with dropout.
STATE_NBYTES = torch.get_rng_state().nbytes + 64


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: peers.gpt2(layers=4, width=128, heads=4, length=128, vocabulary=512), id="gpt2"),
        pytest.param(lambda: peers.llama(layers=4, width=128, heads=4, length=128, vocabulary=512), id="llama"),
        pytest.param(lambda: peers.resnet(layers=(1, 2, 2, 1), width=16, classes=10, batch=4, size=64), id="resnet"),
    ],
)
def test_small_model(make: Make) -> None:
    """Less than plain, no more than PyTorch's own checkpoints, the same bits, and Rekindle's own count is right."""
    check(make(), states=True)


@pytest.mark.slow
@pytest.mark.parametrize("make", [peers.gpt2, peers.llama, peers.resnet], ids=["gpt2", "llama", "resnet50"])
def test_full_model(make: Make) -> None:
    """The same for the models of the benchmark in full size."""
    check(make())


def check(workload: peers.Workload, states: bool = False) -> None:
    """Compare the three ways to run a step of `workload`."""
    session = rekindle.Session(policy=rekindle.PerModule(workload.block))
    expected = workload.outcome(nullcontext())
    assert [key for key, digest in workload.outcome(session).items() if digest != expected[key]] == []

    plain = workload.peak(nullcontext())
    peer = workload.peak(peers.Checkpointed(workload.blocks()))
    ours = workload.peak(session)
    assert session.graph is not None
    random = sum(op.random for op in session.graph.forward) if states else 0
    assert ours <= peer + random * STATE_NBYTES
    assert peer < plain
    assert session.last_step.peak_nbytes == pytest.approx(ours, rel=0.02)
