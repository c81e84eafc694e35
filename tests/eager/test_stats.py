"""The statistics: each counter moves by exactly what happened, and the peak is the allocator's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rekindle
from gpt import GPT, Block, GPTConfig
from helpers import Layer, seeded, small_batch, small_model
from nets import LSTM, UNet
from peak import peak_bytes
from watch import log_replays

NBYTES = 32 * 64 * 4
COUNTERS = (
    "checkpoints",
    "evicted",
    "evicted_nbytes",
    "recompute_calls",
    "ops_replayed",
    "failed_recomputes",
    "replay_seconds",
    "peak_nbytes",
)


def counts(stats: rekindle.Stats) -> dict[str, int]:
    """The counters that are not zero, but for the time and the peak."""
    skipped = ("replay_seconds", "peak_nbytes")
    return {name: n for name, n in dataclasses.asdict(stats).items() if n and name not in skipped}


def leaf() -> Tensor:
    """Something to differentiate by."""
    return small_batch(0).requires_grad_()


def test_is_a_dataclass():
    """`Stats` is a dataclass of numbers that starts at zero, has what was promised, and compares by value."""
    stats = rekindle.Stats()
    fields = {field.name: field.default for field in dataclasses.fields(stats)}
    assert fields.keys() >= set(COUNTERS)
    assert set(fields.values()) == {0}
    assert stats == rekindle.Stats()
    assert stats != rekindle.Stats(evicted=1)


def test_repr_and_str():
    """`repr` shows every field; `str` is a line for people, with amounts in readable units."""
    stats = rekindle.Stats(steps=3, evicted=5, evicted_nbytes=3 << 20, ops_replayed=7, peak_nbytes=5 << 30)
    for field in dataclasses.fields(stats):
        assert f"{field.name}={getattr(stats, field.name)}" in repr(stats)
    assert str(stats).startswith("3 steps: peak 5.0 GiB")
    assert "5 evicted (3.0 MiB), 7 ops replayed" in str(stats)
    assert "\n" not in str(stats)


def test_session_prints_them():
    """`print(session)` shows the policy and the statistics over its life."""
    session, x = rekindle.Session(rekindle.EveryN(3)), leaf()
    with session:
        x.sin()
    assert repr(session) == "Session(policy=EveryN(n=3))"
    assert str(session) == f"{session!r}\n{session.stats}"


def test_add():
    """Counters add up, peaks do not: the larger one counts."""
    total = rekindle.Stats(steps=1, evicted=2, replay_seconds=0.5, peak_nbytes=100)
    total.add(rekindle.Stats(steps=1, evicted=3, replay_seconds=0.25, peak_nbytes=70))
    assert total == rekindle.Stats(steps=2, evicted=5, replay_seconds=0.75, peak_nbytes=100)


def test_starts_at_zero():
    """A new session has counted nothing."""
    session = rekindle.Session(rekindle.KeepNone())
    assert session.stats == session.last_step == rekindle.Stats()


def test_steps():
    """Each entry is a step, also one in which nothing happens."""
    session = rekindle.Session()
    for number in range(1, 4):
        with session:
            pass
        assert session.stats == rekindle.Stats(steps=number)
        assert session.last_step == rekindle.Stats(steps=1)


def forward(x: Tensor, length: int = 4) -> Tensor:
    """`length` ops that save what they read: `length - 1` activations are saved, and the last is not."""
    for _ in range(length):
        x = x.sin()
    return x


@pytest.mark.parametrize("policy", [None, rekindle.KeepAll()], ids=repr)
def test_nothing_evicted(policy):
    """Where everything saved is kept nothing is evicted or replayed."""
    session, x = rekindle.Session(policy), leaf()
    with session:
        forward(x).sum().backward()
    assert counts(session.stats) == {"steps": 1} | ({"checkpoints": 4} if policy else {})


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_what_was_asked_for_is_not_evicted(share):
    """A plan lets go of each value once it was asked for last: only what was gone before that counts as evicted."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(6)))
    x = torch.randn(256, 64, generator=seeded(0))

    def steps(budget: int | str) -> rekindle.Session:
        session = rekindle.Session(memory_budget=budget)
        for _ in range(3):
            model.zero_grad()
            with session:
                model(x).sum().backward()
        return session

    loose = steps("1GiB")
    plan = (tight := steps(loose._ledger.leaf_nbytes + int(share * loose.last_step.peak_nbytes))).plan
    assert plan is not None
    assert any(turn.dropped for turn in plan.turns)
    gone = [value for value in plan.graph.evictable if value.saved_in and not plan.keeps(value.number)]
    assert tight.last_step.evicted == len(gone) > 0


def test_evictions_count_when_the_bytes_go():
    """An activation counts as evicted at the moment its bytes go, not while the user holds it, and only if saved."""
    session, x = rekindle.Session(rekindle.KeepNone()), leaf()
    with session:
        first = x.sin()
        second = first.sin()
        assert session.last_step.evicted == 0
        del first  # saved by the second sin
        assert (session.last_step.evicted, session.last_step.evicted_nbytes) == (1, NBYTES)
        unsaved = second + 1
        del unsaved
        assert session.last_step.evicted == 1
        second.sum().backward()
    assert counts(session.stats) == {
        "steps": 1,
        "evicted": 1,
        "evicted_nbytes": NBYTES,
        "recompute_calls": 1,
        "ops_replayed": 1,
    }


def test_recomputed_copies_are_no_evictions():
    """What goes after it was recomputed is not evicted a second time, in two backward passes neither."""
    session, x = rekindle.Session(rekindle.KeepNone()), leaf()
    with session:
        loss = forward(x).sum()
        for times in (1, 2, 3):
            loss.backward(retain_graph=True)
            assert counts(session.last_step) == {
                "steps": 1,
                "evicted": 3,
                "evicted_nbytes": 3 * NBYTES,
                "recompute_calls": times,
                "ops_replayed": 3 * times,
            }


def test_life_and_last_step():
    """`stats` adds the steps up, `last_step` is the running or the last one."""
    session, x = rekindle.Session(rekindle.EveryN(2)), leaf()
    one = {"checkpoints": 2, "evicted": 2, "evicted_nbytes": 2 * NBYTES, "recompute_calls": 2, "ops_replayed": 2}
    for number in range(1, 4):
        with session:
            loss = forward(x).sum()
            assert session.last_step.recompute_calls == 0
            loss.backward()
        assert counts(session.last_step) == one | {"steps": 1}
        assert counts(session.stats) == {name: n * number for name, n in one.items()} | {"steps": number}
    assert session.stats.replay_seconds > session.last_step.replay_seconds > 0
    assert session.stats.peak_nbytes >= session.last_step.peak_nbytes > 0


def test_backward_after_the_block():
    """A backward pass after the `with` block counts in the step that was last entered."""
    session, x = rekindle.Session(rekindle.KeepNone()), leaf()
    with session:
        loss = forward(x).sum()
    assert session.last_step.ops_replayed == 0
    loss.backward()
    assert session.last_step.ops_replayed == session.stats.ops_replayed == 3
    with session:
        pass
    assert session.last_step.ops_replayed == 0
    assert session.stats.ops_replayed == 3


def test_stats_are_a_copy():
    """What the caller does to the statistics does not change the session's."""
    session, x = rekindle.Session(rekindle.KeepNone()), leaf()
    with session:
        forward(x)
    session.stats.evicted = 99
    assert session.stats.evicted == 3


def test_snapshots():
    """A copy made before an in-place write counts with its bytes; one that nothing needs is not made."""
    session = rekindle.Session(rekindle.KeepNone())
    x, other, w = small_batch(0), small_batch(1), torch.ones(64, 64, requires_grad=True)
    with session:
        y = x + w[:32]  # recomputed from x
        loss = y.sin().sum()
        del y
        x.mul_(2)
        other.mul_(2)
        loss.backward()
    assert (session.stats.snapshots, session.stats.snapshot_nbytes) == (1, x.nbytes)


def test_marks_count_as_checkpoints():
    """A mark counts as one checkpoint, however often it is set."""
    session, x = rekindle.Session(rekindle.KeepNone()), leaf()
    with session:
        y = x.sin()
        for _ in range(3):
            session.mark(y)
        forward(y).sum().backward()
    assert session.stats.checkpoints == 1


def test_replayed_ops_are_counted_one_by_one(monkeypatch):
    """`ops_replayed` is the number of kernels called again, over all steps."""
    log = log_replays(monkeypatch)
    session, model = rekindle.Session(rekindle.PerModule(Layer)), small_model()
    for seed in range(3):
        x = small_batch(seed)
        with session:
            model(x).sum().backward()
    assert session.stats.ops_replayed == len(log) == 3 * session.last_step.ops_replayed > 0


# -- the peak ----------------------------------------------------------------------------------------------------------


def test_peak_of_a_chain():
    """Two activations are alive at a time when nothing is kept; all of them are when everything is."""
    peaks = {}
    for policy in (None, rekindle.KeepNone()):
        session, x = rekindle.Session(policy), leaf()
        with session:
            result = forward(x, 10)
            peaks[policy] = session.last_step.peak_nbytes
            del result
    assert peaks == {None: 10 * NBYTES, rekindle.KeepNone(): 2 * NBYTES}


def test_peak_is_above_what_was_there():
    """What was alive before the step does not count: parameters, inputs, results of an earlier step."""
    session = rekindle.Session(rekindle.KeepNone())
    x = leaf()
    with session:
        held = x.sin()
    assert session.last_step.peak_nbytes == NBYTES
    with session:
        x.sin()
    assert session.last_step.peak_nbytes == NBYTES
    assert session.stats.peak_nbytes == NBYTES
    del held


def test_peak_of_a_step_is_its_own():
    """A small step after a large one has a small peak, and the session keeps the largest."""
    session, x = rekindle.Session(), leaf()
    for length in (12, 3):
        with session:
            forward(x, length).sum().backward()
        peaks = session.last_step.peak_nbytes, session.stats.peak_nbytes
    assert peaks[0] < peaks[1] / 2


def tokens(rows: int, length: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """A text of random tokens, and the tokens that follow."""
    text = torch.randint(0, vocabulary, (rows, length + 1), generator=seeded(0))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def images(size: int) -> tuple[Tensor, Tensor]:
    """Random images, and a class for each pixel."""
    generator = seeded(0)
    return torch.randn(2, 3, size, size, generator=generator), torch.randint(0, 3, (2, size, size), generator=generator)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], type]] = {
    "mlp": (lambda: small_model(6, 256), (small_batch(0, 512, 256),), Layer),
    "gpt": (lambda: GPT(GPTConfig(64, 128, 4, 4, 128)), tokens(2, 128, 64), Block),
    "lstm": (lambda: LSTM(64, 64), tokens(8, 32, 64), nn.LSTM),
    "unet": (lambda: UNet(8), images(48), nn.Sequential),
}
POLICIES: dict[str, Callable[[type], Any]] = {
    "none": lambda block: None,
    "KeepNone": lambda block: rekindle.KeepNone(),
    "EveryN": lambda block: rekindle.EveryN(3),
    "PerModule": rekindle.PerModule,
    "Balanced": lambda block: rekindle.Balanced(0.2),
}


def measured(net: str, policy: str) -> tuple[int, int]:
    """The peak of the third step, as Rekindle says and as the allocator says. Gradients are there before."""
    make, args, block = NETS[net]
    torch.manual_seed(0)
    model, session = make(), rekindle.Session(POLICIES[policy](block))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        with session:
            loss = model(*args)
            (loss if loss.dim() == 0 else loss.square().mean()).backward()

    step()
    step()
    allocated = peak_bytes(step)
    return session.last_step.peak_nbytes, allocated


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("net", NETS)
def test_peak_agrees_with_the_allocator(net, policy):
    """Rekindle's peak is within 2% of what the allocator's own events say, temporaries of kernels included."""
    ours, allocated = measured(net, policy)
    assert abs(ours - allocated) <= 0.02 * allocated, f"{ours} and {allocated} bytes"
