"""`torch.compile` inside a session: the compiled region is opaque, exact, and compiled no oftener than without."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import helpers
import rekindle
from helpers import same_bits, small_batch

pytestmark = [
    pytest.mark.usefixtures("leaving_nothing"),
    # PyTorch's own, of every OptimizedModule that is called while there are global module hooks.
    pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:::torch[.]"),  # what the compiler does to itself
]
BACKENDS = ["eager", "aot_eager", "inductor"]
POLICIES = {
    "keep-all": (rekindle.KeepAll, 1024),
    "keep-none": (rekindle.KeepNone, 1024),
    "keep-none-nor-small": (rekindle.KeepNone, 0),
    "every-2": (lambda: rekindle.EveryN(2), 0),
    "memory-optimal": (lambda: rekindle.MemoryOptimal(0.3), 0),
}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Each test begins with nothing compiled, and leaves nothing behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    gc.collect()


def backend(name: str) -> str:
    """A backend, if this machine can run it."""
    if name == "inductor" and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("Inductor needs a C++ compiler on the CPU, and there is none")
    return name


class Inner(nn.Module):
    """Convolution and what Inductor fuses into it in place; batch statistics; a detached branch that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.out = nn.Linear(4 * 64, 64)

    def forward(self, x: Tensor) -> Tensor:
        """The same size as `x`."""
        y = F.relu(self.conv(x.view(-1, 1, 8, 8)))
        y = self.norm(y) * torch.sigmoid(y)
        return F.gelu(self.out(F.relu(y).flatten(1)) + x)


class Breaking(nn.Module):
    """Dynamo cannot trace it in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), Inner()

    def forward(self, x: Tensor) -> Tensor:
        """In the middle of it Dynamo gives up for a line."""
        x = F.gelu(self.first(x))
        torch._dynamo.graph_break()
        return self.second(x) * x.sin()


class Writing(nn.Module):
    """Writes over what it is given, and over its own buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.register_buffer("calls", torch.zeros(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        """In place."""
        self.calls.add_(1)
        x = x.add_(self.calls[:32])
        return x * torch.tanh(self.layer(x * 2)) + self.calls[:32]


class Twice(nn.Module):
    """Calls a compiled module between eager ones, once with gradients and once without."""

    def __init__(self, inner: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.before, self.inner, self.after = helpers.Layer(), inner(), helpers.Layer()

    def forward(self, x: Tensor) -> Tensor:
        """Eager, compiled, eager."""
        x = self.inner(F.gelu(self.before(x)) + 1)
        with torch.no_grad():
            goal = self.inner(x.detach() * 0.5)
        return F.gelu(self.after(x * 2)) - goal.sin()


INNER: dict[str, Callable[[], nn.Module]] = {
    "sequential": lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh()),
    "fused": Inner,
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 1, 1),
        nn.Flatten(),
    ),  # Inductor's ReLU writes over what an op returned, unseen
    "breaking": Breaking,
    "writing": Writing,
}


def step(model: nn.Module, number: int, managed: helpers.Managed) -> Tensor:
    """A step of training."""
    x = small_batch(number)
    with managed:
        loss = model(x).square().mean()
        loss.backward()
    return loss


def compiled(inner: str, name: str) -> Callable[[], nn.Module]:
    """Makes a model whose middle is compiled."""
    return lambda: Twice(lambda: torch.compile(INNER[inner](), backend=backend(name)))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("inner", INNER)
def test_submodule(inner: str, name: str) -> None:
    """A compiled submodule inside a session trains to the last bit as without, compiled before the session or in it;
    what is eager around it is evicted and replayed as ever."""
    make = compiled(inner, name)
    managed = {}
    for key, (policy, min_nbytes) in POLICIES.items():
        session = rekindle.Session(policy(), min_nbytes=min_nbytes)
        managed[key] = helpers.train(make, step, session)
        if key.startswith("keep-none"):
            helpers.assert_worked(session)
        assert session.stats.failed_recomputes == 0
    plain = helpers.train(make, step)
    for history in managed.values():
        helpers.assert_same(plain, history)
    helpers.assert_same(plain, helpers.train(make, step, rekindle.Session(rekindle.KeepNone())))
    gc.collect()
    assert helpers.live_activations() == 0


@pytest.mark.parametrize("verb", ["compile-inside", "compile-outside", "method"])
def test_applied(verb: str) -> None:
    """`rekindle.apply` and `torch.compile` of one and the same model, in either order: exact, with nothing left open.
    If the session is inside what is compiled it sees nothing; compile a submodule, or apply to the compiled model."""
    models: list[nn.Module] = []

    def make() -> nn.Module:
        model = INNER["fused"]()
        if verb == "compile-outside":
            models.append(rekindle.apply(model, rekindle.KeepNone()))
            return torch.compile(model, backend="aot_eager")
        if verb == "method":
            model.compile(backend="aot_eager")
            models.append(rekindle.apply(model, rekindle.KeepNone()))
            return model
        models.append(rekindle.apply(torch.compile(model, backend="aot_eager"), rekindle.KeepNone()))
        return models[-1]

    def make_plain() -> nn.Module:
        model = INNER["fused"]()
        if verb != "method":
            return torch.compile(model, backend="aot_eager")
        model.compile(backend="aot_eager")
        return model

    plain = helpers.train(make_plain, step)
    managed = helpers.train(make, lambda model, number, _: step(model, number, rekindle.Session(rekindle.KeepNone())))
    session = rekindle.session_of(models[0])
    assert session._thread is None
    rekindle.remove(models[0])
    helpers.assert_same(plain, managed)


class Counter:
    """A backend that runs what it is given, and counts how often it is given something."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


@pytest.mark.parametrize("inner", ["fused", "sequential"])
def test_compiled_once(inner: str) -> None:
    """Many steps in many sessions compile no more than one plain run and one session do: the hooks of a session come
    back under their old keys, which Dynamo looks at."""
    module = torch.compile(INNER[inner](), backend=(counter := Counter()), fullgraph=True)
    x = small_batch(0)
    for _ in range(2):
        for policy in (rekindle.KeepNone(), rekindle.EveryN(2), rekindle.KeepAll()):
            session = rekindle.Session(policy)
            for _ in range(4):
                with session:
                    module(x).sum().backward()
        module(x).sum().backward()
    assert counter.count == 2


def test_nested_sessions_compile_once_each() -> None:
    """A session inside another one has keys of its own, which come back too."""
    module = torch.compile(INNER["sequential"](), backend=(counter := Counter()), fullgraph=True)
    x = small_batch(0)
    for _ in range(4):
        with rekindle.Session(rekindle.KeepNone()):
            module(x).sum().backward()
            with rekindle.Session(rekindle.KeepNone()):
                module(x).sum().backward()
    assert counter.count == 2


@pytest.mark.parametrize("name", BACKENDS)
def test_function(name: str) -> None:
    """A compiled function that is no module, called on what is evictable, and its result written in place."""

    @torch.compile(backend=backend(name))
    def fused(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w).relu_().mul(2).add_(1) + x.sin()

    def run(managed: helpers.Managed) -> list[Tensor]:
        w = small_batch(1, 64).requires_grad_()
        with managed:
            x = F.gelu(small_batch(0) @ w)
            y = fused(x, w).add_(x)
            F.gelu(fused(y.tanh(), w)).square().mean().backward()
        assert w.grad is not None
        return [w.grad]

    session = rekindle.Session(rekindle.KeepNone())
    expected = run(rekindle.Session(rekindle.KeepAll()))
    assert all(map(same_bits, expected, run(session)))
    helpers.assert_worked(session)


def test_inductor_keeps_what_its_ops_made() -> None:
    """The ops that Inductor's code calls are on paper, but none of what they made is evictable: kernels nobody sees
    write over it."""
    make = compiled("fused", "inductor")
    torch.manual_seed(0)
    model, session = make(), rekindle.Session(rekindle.KeepNone(), min_nbytes=0)
    model(small_batch(0)).sum().backward()
    with session:
        model.inner(small_batch(0)).sum().backward()
    assert session.graph is not None
    made = {op.name: [session.graph.values[v].evictable for v in op.outputs] for op in session.graph.forward}
    compiled_ops = {name: made[name] for name in made if "out" in name.rpartition(".")[2] or "convolution" in name}
    assert compiled_ops
    assert not any(any(evictable) for evictable in compiled_ops.values())


def test_session_inside_what_is_compiled() -> None:
    """A session that is entered by the compiled function itself: Dynamo leaves that function to the interpreter."""

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return F.gelu(F.gelu(x @ w) @ w).sum()

    session = rekindle.Session(rekindle.KeepNone())

    @torch.compile(backend="eager")
    def managed(x: Tensor, w: Tensor) -> Tensor:
        with session:
            return plain(x, w)

    gradients: list[Any] = []
    for function in (plain, managed):
        w = small_batch(1, 64).requires_grad_()
        function(small_batch(0), w).backward()
        gradients.append(w.grad)
    assert same_bits(*gradients)
