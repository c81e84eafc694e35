"""Train twice, plain and with a session, and see that not one bit differs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

import rekindle

Managed = AbstractContextManager[Any]
Step = Callable[[nn.Module, int, Managed], Tensor | Sequence[Tensor]]
"""One training step up to its gradients: (model, number of the step, session or nothing) -> what else to compare."""


class Layer(nn.Module):
    """A pre-norm residual MLP with dropout: the block of the small models."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Refine `x`."""
        return x + self.dropout(self.down(torch.nn.functional.gelu(self.up(self.norm(x)))))


class Doubled(torch.autograd.Function):
    """Somebody's own formula."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def small_model(layers: int = 4, width: int = 64) -> nn.Sequential:
    """A chain of layers whose activations take 8 KiB and more."""
    return nn.Sequential(*(Layer(width) for _ in range(layers)), nn.Linear(width, width))


def seeded(seed: int) -> torch.Generator:
    """A generator of its own, on the device where tensors are made."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def small_batch(seed: int, rows: int = 32, width: int = 64) -> Tensor:
    """Random rows, made without touching the global random state."""
    return torch.randn(rows, width, generator=seeded(seed))


@dataclass(frozen=True)
class Snapshot:
    """All that one training step left behind."""

    results: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    parameters: dict[str, Tensor]
    random: dict[str, Tensor]


def train(
    make: Callable[[], nn.Module],
    step: Step,
    session: rekindle.Session | None = None,
    *,
    steps: int = 3,
    seed: int = 0,
    rate: float = 0.05,
) -> list[Snapshot]:
    """Train a fresh model from `seed`, with SGD between the steps so that an error in one shows in the next."""
    torch.manual_seed(seed)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    history = []
    for number in range(steps):
        optimizer.zero_grad()
        results = step(model, number, session if session is not None else nullcontext())
        results = [results] if isinstance(results, Tensor) else results
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        gradients = {name: None if grad is None else grad.clone() for name, grad in gradients.items()}
        random = random_states()
        optimizer.step()
        history.append(
            Snapshot(
                {str(index): result.detach().clone() for index, result in enumerate(results)},
                gradients,
                {name: buffer.clone() for name, buffer in model.named_buffers()},
                {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
                random,
            )
        )
    return history


def others_nbytes() -> int:
    """Bytes that are allocated already where tensors are made, as far as anybody can tell: budgets are beside them."""
    device = torch.get_default_device()
    return 0 if device.type == "cpu" else torch.accelerator.memory_allocated(device)


def random_states() -> dict[str, Tensor]:
    """What the default generators will draw next, of the CPU and of an accelerator, if there is one."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Have the default generators go on from states that `random_states` returned."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def assert_same(plain: Iterable[Snapshot], managed: Iterable[Snapshot]) -> None:
    """Two histories of training are equal bit for bit, or the message names the first tensors that are not."""
    for number, (expected, actual) in enumerate(zip(plain, managed, strict=True)):
        wrong = []
        for kind in (field.name for field in fields(Snapshot)):
            left, right = getattr(expected, kind), getattr(actual, kind)
            assert left.keys() == right.keys()
            wrong += [f"{kind} {name}: {_difference(left[name], right[name])}" for name in left]
        wrong = [line for line in wrong if not line.endswith(": ")]
        assert not wrong, f"step {number} differs in {len(wrong)} tensors:\n" + "\n".join(wrong[:10])


def assert_same_training(
    make: Callable[[], nn.Module],
    step: Step,
    policy: Any,
    *,
    steps: int = 3,
    plain: list[Snapshot] | None = None,
    **options: Any,
) -> rekindle.Session:
    """Training under `policy` equals plain training, replays never failed, and nothing of it stays alive."""
    session = rekindle.Session(policy=policy, **options)
    managed = train(make, step, session, steps=steps)
    assert_same(train(make, step, steps=steps) if plain is None else plain, managed)
    assert session.stats.failed_recomputes == 0
    assert live_activations() == 0
    return session


def assert_worked(session: rekindle.Session) -> None:
    """The session did what it is for: it evicted activations and replayed ops."""
    stats = session.stats
    assert stats.evicted > 0, stats
    assert stats.evicted_nbytes > 0, stats
    assert stats.recompute_calls > 0, stats
    assert stats.ops_replayed > 0, stats


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal in type, shape and every bit: NaN equals NaN, and 0.0 does not equal -0.0."""
    if left.dtype != right.dtype or left.shape != right.shape or left.layout != right.layout:
        return False
    if left.is_sparse:
        left, right = left.coalesce(), right.coalesce()
        return same_bits(left.indices(), right.indices()) and same_bits(left.values(), right.values())
    if left.layout is torch.sparse_csr:
        parts = ((x.crow_indices(), x.col_indices(), x.values()) for x in (left, right))
        return all(map(same_bits, *parts))
    return torch.equal(_bytes(left), _bytes(right))


def live_activations() -> int:
    """How many of Rekindle's activations exist now, without collecting cycles first: there must be none."""
    return sum(type(thing) is rekindle.Activation for thing in gc.get_objects())


def _bytes(tensor: Tensor) -> Tensor:
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)  # sizes of 1 have any stride


def _difference(left: Tensor | None, right: Tensor | None) -> str:
    if left is None or right is None:
        return "" if left is right else "a gradient on one side only"
    if same_bits(left, right):
        return ""
    if left.shape != right.shape or left.dtype != right.dtype or left.layout != right.layout:
        return f"{left.dtype}{list(left.shape)} became {right.dtype}{list(right.shape)}"
    return f"off by up to {(left.to_dense() - right.to_dense()).abs().max().item():.3g}"
