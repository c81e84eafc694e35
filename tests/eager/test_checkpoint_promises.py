"""What PyTorch's own tests ask of non-reentrant checkpointing, asked of Rekindle.

Each case is a small program that is run plain and under several policies: the same bits, the same number of calls of
the user's functions and hooks. Ordinary training, accumulation, truncation, double backward and reentrant checkpoints
are in `test_exactness.py`, replay counts in `test_replay.py`, memory freed on the way there and in `test_leaks.py`.
"""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import helpers
from helpers import same_bits, seeded, small_batch
from rekindle import EveryN, KeepAll, KeepNone, MemoryOptimal, Session

pytestmark = [
    pytest.mark.usefixtures("leaving_nothing"),
    # PyTorch's own, when it loads what forward-mode derivatives need.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]
Case = Callable[["Run"], list[Tensor]]
CASES: dict[str, Case] = {}
QUIET = {"detached_inputs"}  # nothing is saved there, so nothing is evicted
POLICIES: dict[str, Callable[[], Any]] = {
    "keep-none": KeepNone,
    "every-2": partial(EveryN, 2),
    "memory-optimal": partial(MemoryOptimal, 0.3),
}
again = partial(checkpoint, use_reentrant=False)


class Run:
    """One run of a case: fresh inputs, the session or nothing, and a count of what the user's code did."""

    def __init__(self, managed: helpers.Managed) -> None:
        self.managed = managed
        self.calls: Counter[str] = Counter()
        self.x = small_batch(0).requires_grad_()
        self.w = (small_batch(1, 64) / 8).requires_grad_()
        self.v = (small_batch(2, 64) / 8).requires_grad_()

    def layer(self, x: Tensor, w: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """Saves several activations."""
        self.calls["layer"] += 1
        return torch.sigmoid(F.gelu(x @ (self.w if w is None else w)) * scale).sin() * x

    def count(self, name: str) -> Callable[..., None]:
        """A hook that counts its calls and changes nothing."""

        def hook(*_: object) -> None:
            self.calls[name] += 1

        return hook

    @property
    def gradients(self) -> list[Tensor]:
        """Those of the leaves that have one."""
        return [leaf.grad for leaf in (self.x, self.w, self.v) if leaf.grad is not None]


def case(function: Case) -> Case:
    """Register a case under its name."""
    CASES[function.__name__] = function
    return function


def execute(function: Case, managed: helpers.Managed) -> tuple[list[Tensor], Counter[str]]:
    """What a case computes, and what it counts."""
    torch.manual_seed(0)
    run = Run(managed)
    results = [tensor.detach().clone() for tensor in function(run)]
    return [*results, *run.gradients, torch.get_rng_state()], run.calls


# -- checkpoints inside a session --------------------------------------------------------------------------------------


@case
def nested_twice(run: Run) -> list[Tensor]:
    """A checkpoint in a checkpoint."""
    with run.managed:
        loss = again(lambda x: again(run.layer, run.layer(x)).cos(), run.layer(run.x)).square().mean()
        loss.backward()
    return [loss]


@case
def nested_thrice(run: Run) -> list[Tensor]:
    """And one more, with eager parts between."""

    def outer(x: Tensor) -> Tensor:
        return run.layer(again(lambda y: run.layer(again(run.layer, y.sin())), x.exp().tanh()), run.v)

    with run.managed:
        loss = again(outer, run.layer(run.x)).square().mean()
        loss.backward()
    return [loss]


@case
def nested_with_keywords(run: Run) -> list[Tensor]:
    """Tensors and other things as keyword arguments; dictionaries, numbers and nothing as results."""

    def inner(x: Tensor, *, w: Tensor, options: dict[str, float]) -> dict[str, Any]:
        return {"out": run.layer(x, w=w, scale=options["scale"]), "number": 3, "nothing": None}

    def outer(x: Tensor, *, w: Tensor) -> tuple[Tensor, int]:
        made = again(inner, x, w=w, options={"scale": 0.5})
        return made["out"].tanh() * made["number"], made["number"]

    with run.managed:
        out, number = again(outer, run.layer(run.x), w=run.v)
        loss = out.square().mean() * number
        loss.backward()
    return [loss]


def early_stop(enabled: bool, run: Run) -> list[Tensor]:
    """With early stop the recomputation of a checkpoint ends at the last tensor that is wanted."""

    def function(x: Tensor) -> Tensor:
        y = run.layer(x)
        run.calls["first half"] += 1
        y = y.clone() + 1  # saves nothing
        run.calls["second half"] += 1
        return y

    with run.managed, set_checkpoint_early_stop(enabled):
        loss = again(function, run.layer(run.x)).mean()
        loss.backward()
    return [loss]


CASES["early_stop_on"] = partial(early_stop, True)
CASES["early_stop_off"] = partial(early_stop, False)


@case
def checkpoint_twice_backward(run: Run) -> list[Tensor]:
    """A retained graph runs the function again for each backward pass; no oftener than plain."""
    with run.managed:
        loss = again(run.layer, run.layer(run.x)).square().mean()
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
    loss.backward()
    return [loss]


@case
def checkpoint_sequence(run: Run) -> list[Tensor]:
    """`checkpoint_sequential` with dropout, and its random state."""
    chain = helpers.small_model(3)
    with run.managed:
        loss = checkpoint_sequential(chain, 2, run.layer(run.x), use_reentrant=False).square().mean()
        torch.rand(3)
        loss.backward()
    return [loss, *(p.grad for p in chain.parameters())]


@case
def selective_checkpoint(run: Run) -> list[Tensor]:
    """Selective checkpointing brings dispatch modes of its own."""

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op is torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    with run.managed:
        loss = again(run.layer, run.layer(run.x), context_fn=contexts).square().mean()
        loss.backward()
    return [loss]


@case
def session_inside_checkpoint(run: Run) -> list[Tensor]:
    """The other nesting: what is saved inside is Rekindle's, so the checkpoint never runs its function again."""

    def function(x: Tensor) -> Tensor:
        with run.managed:
            return run.layer(run.layer(x))

    loss = again(function, run.x * 2).square().mean()
    loss.backward()
    run.calls.clear()  # fewer than plain
    return [loss]


@case
def other_hooks_inside(run: Run) -> list[Tensor]:
    """Somebody's saved-tensor hooks inside ours: theirs are asked there, ours elsewhere."""

    def pack(tensor: Tensor) -> Tensor:
        run.calls["pack"] += 1
        return tensor * 2

    with run.managed:
        x = run.layer(run.x)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor / 2):
            x = run.layer(x)
        with torch.autograd.graph.save_on_cpu():
            x = run.layer(x)
        loss = run.layer(x).square().mean()
        loss.backward()
    return [loss]


@case
def other_hooks_outside(run: Run) -> list[Tensor]:
    """And outside of ours."""
    with torch.autograd.graph.save_on_cpu():
        x = run.layer(run.x)
        with run.managed:
            y = run.layer(x)
        loss = run.layer(y).square().mean()
    loss.backward()
    return [loss]


# -- backward in parts -------------------------------------------------------------------------------------------------


@case
def grad_of_parts(run: Run) -> list[Tensor]:
    """`autograd.grad` for some leaves at a time, in any order, and of inner tensors."""
    with run.managed:
        first = run.layer(run.x)
        second = run.layer(first, run.v)
        loss = second.square().mean()
        grads = [
            *torch.autograd.grad(loss, run.v, retain_graph=True),
            *torch.autograd.grad(loss, (first, run.w), retain_graph=True),
            *torch.autograd.grad(second, second, torch.ones_like(second), retain_graph=True),
            *torch.autograd.grad(first.sum(), run.x, retain_graph=True),
        ]
        loss.backward(inputs=[run.w])
    return [loss, *grads]


@case
def several_roots(run: Run) -> list[Tensor]:
    """Several roots with gradients of their own, and one that is not used."""
    with run.managed:
        first = run.layer(run.x)
        second = run.layer(first, run.v)
        torch.autograd.backward([first, second], [torch.ones_like(first), second.detach().cos()])
        unused = torch.autograd.grad(run.layer(run.x).sum(), (run.w, run.v), allow_unused=True)
    assert unused[1] is None
    return [first, second, unused[0]]


@case
def second_derivative(run: Run) -> list[Tensor]:
    """Through a checkpoint, twice."""
    with run.managed:
        out = again(run.layer, run.layer(run.x)).square().sum()
        (slope,) = torch.autograd.grad(out, run.x, create_graph=True)
        (curve,) = torch.autograd.grad(slope.square().sum(), run.x, create_graph=True)
        loss = (slope * curve).mean()
        loss.backward()
    return [loss, slope, curve]


@case
def batched_gradients(run: Run) -> list[Tensor]:
    """A backward pass under vmap: what is unpacked has no batch dimension."""
    with run.managed:
        out = run.layer(run.layer(run.x), run.v)
        roots = torch.stack([torch.ones_like(out), out.detach().cos()])
        grads = torch.autograd.grad(out, (run.x, run.w), roots, is_grads_batched=True, retain_graph=True)
        jacobian = torch.autograd.functional.jacobian(
            lambda x: run.layer(x, run.v)[0, :4], run.x[:2].detach(), vectorize=True
        )
    return [*grads, jacobian]


@case
def forward_mode(run: Run) -> list[Tensor]:
    """Forward-mode derivatives beside reverse-mode ones."""
    with run.managed, torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(run.x, torch.ones_like(run.x))
        out = run.layer(run.layer(dual))
        primal, tangent = torch.autograd.forward_ad.unpack_dual(out)
        loss = primal.square().mean() + tangent.square().mean()
        loss.backward()
    return [loss, tangent]


@case
def detached_inputs(run: Run) -> list[Tensor]:
    """Nothing that comes in needs a gradient, or all of it is detached on the way: no gradient, no error."""
    with run.managed:
        plain = run.x.detach()
        out = again(lambda x: (x.sin() * x).exp(), plain)
        assert not out.requires_grad
        kept = run.layer(run.x).detach()
        with torch.no_grad():
            quiet = run.layer(run.x)
    return [out, kept, quiet]


@case
def partly_detached(run: Run) -> list[Tensor]:
    """One input needs a gradient, one not; one result is detached inside the checkpoint."""

    def function(x: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        y = run.layer(x)
        return y * goal, y.detach().cos()

    with run.managed:
        out, side = again(function, run.layer(run.x), run.x.detach())
        assert not side.requires_grad
        loss = (out * side).square().mean()
        loss.backward()
    return [loss]


@case
def grad_mode_toggles(run: Run) -> list[Tensor]:
    """Gradients off and on in the middle of a chain."""
    with run.managed:
        x = run.layer(run.x)
        with torch.no_grad():
            y = run.layer(x)
            with torch.enable_grad():
                z = run.layer(x * y)
        with torch.inference_mode():
            goal = run.layer(z).sum()
        loss = (z - y).square().mean() * float(goal)
        with torch.inference_mode():
            run.layer(small_batch(7))
        loss.backward()
    return [loss]


@case
def draws_in_between(run: Run) -> list[Tensor]:
    """What is drawn between forward and backward, or a new seed, changes no dropout mask."""
    with run.managed:
        loss = F.dropout(run.layer(F.dropout(run.x, 0.3)), 0.5).square().mean()
        torch.manual_seed(7)
        noise = torch.rand(5)
        loss.backward()
    return [loss, noise, torch.rand(2)]


# -- hooks -------------------------------------------------------------------------------------------------------------


@case
def tensor_hooks(run: Run) -> list[Tensor]:
    """Hooks on tensors run once for each backward pass, see and change the gradient; retained gradients are there."""
    with run.managed:
        first = run.layer(run.x)
        first.register_hook(lambda grad: grad * 0.5 + 1)
        first.register_hook(run.count("hook"))
        first.retain_grad()
        second = run.layer(first)
        torch.autograd.graph.register_multi_grad_hook((first, second), run.count("multi"))
        run.w.register_post_accumulate_grad_hook(run.count("accumulated"))
        second.square().mean().backward()
    assert first.grad is not None
    return [first.grad]


@case
def node_hooks(run: Run) -> list[Tensor]:
    """Hooks on nodes of the graph, before and after they run."""
    with run.managed:
        out = run.layer(run.layer(run.x))
        node = out.grad_fn
        assert node is not None
        node.register_prehook(run.count("before"))
        node.register_hook(run.count("after"))
        loss = out.square().mean()
        loss.backward()
    return [loss]


@case
def module_hooks(run: Run) -> list[Tensor]:
    """Hooks on modules of every kind run once: no forward is ever run again."""
    model = helpers.small_model(2)
    model[0].register_forward_pre_hook(run.count("pre"), with_kwargs=True)
    model[0].register_forward_hook(run.count("forward"), with_kwargs=True)
    model[1].register_full_backward_pre_hook(run.count("backward pre"))
    model[1].register_full_backward_hook(run.count("backward"))
    model[1].register_forward_hook(lambda module, args, out: out * 2)
    with run.managed:
        loss = model(run.layer(run.x)).square().mean()
        loss.backward()
    return [loss, *(p.grad for p in model.parameters())]


@case
def saved_tensors_on_request(run: Run) -> list[Tensor]:
    """What autograd saved can be looked at before and after a backward pass, as often as one likes, with its shape,
    strides and history."""
    with run.managed:
        x = run.layer(run.x).t()
        out = x.sin()
        node = out.grad_fn
        seen = [node._saved_self, node._saved_self]
        out.sum().backward(retain_graph=True)
        seen.append(node._saved_self)
    assert all(saved.stride() == x.stride() and saved.grad_fn is x.grad_fn for saved in seen)
    return seen


# -- functions of the user ---------------------------------------------------------------------------------------------


class Everything(torch.autograd.Function):
    """Saves an input, an output, a view, an intermediate, nothing; keeps tensors on `ctx`; looks twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Two results, one of them without a derivative."""
        inner = torch.sigmoid(x @ w)
        out, side = inner * x * scale, inner.round()
        ctx.mark_non_differentiable(side)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w, out, inner.t()[::2], None)
        ctx.inner, ctx.scale, ctx.look_twice = inner, scale, scale != 0.5
        return out, side

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, other: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        """Not the true derivative; it only has to be the same twice."""
        assert other is None
        x, w, out, part, nothing = ctx.saved_tensors
        if ctx.look_twice:
            assert all(map(same_bits, ctx.saved_tensors[:4], (x, w, out, part)))
        assert nothing is None
        assert ctx.needs_input_grad == (True, True, False)
        return (grad * ctx.inner + out) @ w.t() + part.sum(), x.t() @ (grad * ctx.inner * ctx.scale), None


class Cube(torch.autograd.Function):
    """In the newer style, differentiable twice."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """x cubed."""
        return x * x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Save the input and the output."""
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Its derivative, and a little of its output."""
        x, y = ctx.saved_tensors
        return grad * (3 * x * x + 0.01 * y)


@case
def own_function(run: Run) -> list[Tensor]:
    """Saved tensors of every kind in a custom function, with activations on both sides."""
    with run.managed:
        out, side = Everything.apply(run.layer(run.x), run.v, 0.7)
        loss = run.layer(out * side).square().mean()
        loss.backward()
    return [loss]


@case
def own_function_in_checkpoint(run: Run) -> list[Tensor]:
    """The same inside somebody's checkpoint, which lets nobody look twice."""
    with run.managed:
        out, side = again(lambda x: Everything.apply(run.layer(x), run.v, 0.5), run.layer(run.x))
        loss = run.layer(out * side).square().mean()
        loss.backward()
    return [loss]


@case
def own_function_twice(run: Run) -> list[Tensor]:
    """A custom function that is differentiated twice."""
    with run.managed:
        out = Cube.apply(run.layer(run.x)).sin()
        (slope,) = torch.autograd.grad(out.sum(), run.x, create_graph=True)
        loss = Cube.apply(slope).square().mean()
        loss.backward()
    return [loss, slope]


# -- anomaly mode ------------------------------------------------------------------------------------------------------


@case
def anomaly(run: Run) -> list[Tensor]:
    """Anomaly mode changes nothing when nothing is wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it is slow
        with run.managed, torch.autograd.set_detect_anomaly(True):
            loss = again(run.layer, run.layer(run.x)).square().mean()
            loss.backward()
    return [loss]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CASES)
def test_as_plain(name: str, policy: str) -> None:
    """In the first step and in the next: every result, gradient and random number has the plain run's bits, and the
    user's functions and hooks ran as often; nothing stays alive."""
    expected, calls = execute(CASES[name], nullcontext())
    session = Session(POLICIES[policy](), min_nbytes=0)
    for _ in range(2):
        results, counted = execute(CASES[name], session)
        assert len(results) == len(expected)
        assert all(map(same_bits, results, expected))
        assert counted == calls
    if policy == "keep-none" and name not in QUIET:
        helpers.assert_worked(session)
    assert session.stats.failed_recomputes == 0
    if policy == "keep-none":
        gc.collect()
        assert helpers.live_activations() == 0


@pytest.mark.parametrize("policy", [KeepAll(), KeepNone()], ids=repr)
def test_anomaly_is_found(policy: Any) -> None:
    """Anomaly mode names the op whose backward made the first NaN, and shows where its forward was called."""
    run = Run(Session(policy, min_nbytes=0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with run.managed, torch.autograd.set_detect_anomaly(True):
            out = torch.sqrt(run.layer(run.x) * 0).sum() * 0
            with pytest.raises(RuntimeError, match=r"SqrtBackward0.*returned nan"):
                out.backward()
    assert any("torch.sqrt(run.layer(run.x) * 0)" in str(warning.message) for warning in caught)
    del out, caught


def test_freed_graph() -> None:
    """A second backward pass through a graph that was not retained is PyTorch's own error, not one of ours."""
    run = Run(Session(KeepNone(), min_nbytes=0))
    with run.managed:
        loss = run.layer(run.layer(run.x)).sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


def test_numerical_gradients() -> None:
    """PyTorch's own `gradcheck` and `gradgradcheck` pass on a function that runs in a session."""
    session = Session(KeepNone(), min_nbytes=0)
    w = torch.randn(3, 3, dtype=torch.double, generator=seeded(1))

    def function(x: Tensor) -> Tensor:
        with session:
            return torch.tanh(F.gelu(x @ w) * x).exp()

    x = torch.randn(2, 3, dtype=torch.double, generator=seeded(0)).requires_grad_()
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)
    helpers.assert_worked(session)


@pytest.mark.parametrize(("asked", "replayed"), [("x", 6), ("w", 3), ("v", 3), ("nothing saved", 0)])
def test_replays_stop_early(asked: str, replayed: int) -> None:
    """Only what leads to what is asked for is replayed: parts of a gradient cost parts of the recomputation."""
    w, v, x = (small_batch(seed, 64).requires_grad_() for seed in (1, 2, 3))
    session = Session(KeepNone())
    with session:
        loss = (x @ w).sin().exp().sum() + (x @ v).cos().tanh().sum()
        torch.autograd.grad(loss, {"x": x, "w": w, "v": v, "nothing saved": loss}[asked])
    assert session.last_step.ops_replayed == replayed
