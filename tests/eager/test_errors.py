"""Errors say what happened with which values and what to write instead, and lose neither model nor gradients."""

from __future__ import annotations

import gc
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import rekindle
from helpers import Layer, live_activations, same_bits, small_batch, small_model
from rekindle.runtime import replay
from watch import living, modes

pytestmark = pytest.mark.usefixtures("leaving_nothing")


def step(model: nn.Module, session: rekindle.Session | None = None) -> list[Tensor]:
    """Loss and gradients of one step from a fixed random state."""
    model.zero_grad()
    torch.manual_seed(3)
    x = small_batch(7)
    with session if session is not None else nullcontext():
        loss = model(x).square().mean()
        loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def assert_unharmed(model: nn.Module, session: rekindle.Session) -> None:
    """The next step under the session equals a plain one, and nothing is left over."""
    plain = step(model)
    assert all(map(same_bits, plain, step(model, session)))
    assert modes() == 0
    if live_activations():
        gc.collect()  # the errors that this test and those before it have caught are cycles with their frames
    assert live_activations() == 0


@pytest.fixture
def session() -> rekindle.Session:
    """A session that recomputes all it can."""
    return rekindle.Session(rekindle.KeepNone())


# -- what cannot be meant ----------------------------------------------------------------------------------------------

POLICIES = [rekindle.MemoryOptimal, rekindle.SpeedOptimal, rekindle.Balanced]


@pytest.mark.parametrize("ratio", [0, -0.5, 1.5, float("nan"), float("inf"), True, "0.2", None])
@pytest.mark.parametrize("policy", POLICIES)
def test_ratio(policy, ratio):
    """A ratio outside (0, 1] is refused when the policy is made, with the value and the interval."""
    with pytest.raises(rekindle.PolicyError, match=re.escape(repr(ratio))) as caught:
        policy(ratio)
    assert "(0, 1]" in str(caught.value)
    assert "ratio=0.2" in str(caught.value)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_memory_weight(weight):
    """A weight outside [0, 1] is refused; both ends are allowed."""
    with pytest.raises(rekindle.PolicyError, match=r"memory_weight is .* must be in \[0, 1\]"):
        rekindle.Balanced(0.2, memory_weight=weight)
    rekindle.Balanced(0.2, memory_weight=0)
    rekindle.Balanced(0.2, memory_weight=1)


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "3", None])
@pytest.mark.parametrize(("policy", "name"), [(rekindle.EveryN, "n"), (rekindle.ByDepth, "depth")])
def test_count(policy, name, count):
    """Counts are whole numbers of at least 1."""
    with pytest.raises(rekindle.PolicyError, match=f"{name} is {re.escape(repr(count))}.*at least 1.*{name}=4"):
        policy(count)


def test_per_module_without_modules():
    """`PerModule` needs classes or names, and says so if it gets a module."""
    with pytest.raises(rekindle.PolicyError, match=r"PerModule\(Block\)"):
        rekindle.PerModule()
    with pytest.raises(rekindle.PolicyError, match=r"PerModule\(Linear\) for its class"):
        rekindle.PerModule(nn.Linear(1, 1))


@pytest.mark.parametrize("policy", [3, "KeepNone", rekindle.Stats()])
def test_no_policy(policy):
    """What cannot be called is no policy, for a session and for `apply`."""
    for use in (rekindle.Session, lambda policy: rekindle.apply(small_model(1), policy)):
        with pytest.raises(rekindle.PolicyError, match=r"policy is .*rekindle\.KeepNone\(\)"):
            use(policy)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ([99999], "keeps value 99999, but the graph has"),
        ([-1], "keeps value -1"),
        ([0], "keeps value 0, which is not its to decide: a leaf"),
        (None, "returned None"),
        (["a"], r"returned \['a'\]"),
    ],
)
def test_policy_that_returns_nonsense(choice, message):
    """A policy of the user's own that returns no values of the graph is told so, after every step that it should have
    planned; the gradients of the step are there and right."""
    model, session = small_model(2), rekindle.Session(lambda graph: choice)
    plain = step(model)
    for _ in range(2):
        with pytest.raises(rekindle.PolicyError, match=message) as caught:
            step(model, session)
        assert "graph.evictable" in str(caught.value)
        assert all(map(same_bits, plain[1:], (parameter.grad for parameter in model.parameters())))
    assert modes() == 0


def test_policy_that_raises():
    """An exception of the user's own policy is theirs: it comes through as it is."""

    def policy(graph):
        raise KeyError("mine")

    model, session = small_model(1), rekindle.Session(policy)
    with pytest.raises(KeyError, match="mine"):
        step(model, session)
    assert modes() == 0


# -- marks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (torch.ones(3, 5), "shape [3, 5] and dtype torch.float32: the session never saw it"),
        (torch.eye(2).to_sparse(), "torch.sparse_coo tensor of shape [2, 2]"),
        (3, "a int"),
    ],
)
def test_mark_of_a_stranger(thing, words, session):
    """A tensor that the session never saw cannot be marked; the step goes on and is exact."""
    model = small_model(2)

    def forward_and_mark(*_: object) -> None:
        with pytest.raises(rekindle.UnknownTensor, match=re.escape(words)) as caught:
            session.mark(thing)
        assert "inside the `with` block" in str(caught.value)

    plain = step(model)
    hook = model[1].register_forward_hook(forward_and_mark)
    assert all(map(same_bits, plain, step(model, session)))
    hook.remove()
    assert_unharmed(model, session)


@pytest.mark.parametrize("policy", [rekindle.KeepNone(), rekindle.KeepAll()], ids=repr)
def test_mark_outside_of_a_session(policy):
    """Marks belong inside the `with` block, before, between and after steps."""
    session = rekindle.Session(policy)
    for _ in range(3):
        with pytest.raises(rekindle.UnknownTensor, match="the session is not entered"):
            session.mark(torch.ones(3))
        with session:
            y = small_batch(0) * 2
        with pytest.raises(rekindle.UnknownTensor, match="the session is not entered"):
            session.mark(y)


# -- out of turn -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [rekindle.KeepNone(), rekindle.KeepAll(), rekindle.ByDepth(1)], ids=repr)
def test_entered_twice(policy):
    """A session that is entered cannot be entered again, whatever its policy; the step it is in goes on."""
    model, session = small_model(2), rekindle.Session(policy)
    plain = step(model)

    def enter(*_: object) -> None:
        with pytest.raises(rekindle.SessionError, match="already entered, on this thread"), session:
            pass

    hook = model[1].register_forward_hook(enter)
    for _ in range(3):
        assert all(map(same_bits, plain, step(model, session)))
    hook.remove()
    assert_unharmed(model, session)


def test_entered_from_another_thread(session):
    """Nor from another thread, which is told to make a session of its own."""
    model = small_model(2)
    messages = []

    def enter() -> None:
        with pytest.raises(rekindle.SessionError) as caught, session:
            pass
        messages.append(str(caught.value))

    def from_thread(*_: object) -> None:
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()

    plain = step(model)
    hook = model[1].register_forward_hook(from_thread)
    assert all(map(same_bits, plain, step(model, session)))
    hook.remove()
    assert len(messages) == 1
    assert "on another thread" in messages[0]
    assert "rekindle.Session for each thread" in messages[0]
    assert_unharmed(model, session)


def test_applied_twice():
    """`apply` on an applied model names the class, the policy it has, and `remove`."""
    model = rekindle.apply(small_model(1), rekindle.KeepNone())
    session = rekindle.session_of(model)
    message = r"Sequential is applied already, with Session\(policy=KeepNone\(\)\).*rekindle.remove\(model\)"
    with pytest.raises(rekindle.SessionError, match=message):
        rekindle.apply(model, rekindle.KeepAll())
    assert rekindle.session_of(model) is session
    rekindle.remove(model)


@pytest.mark.parametrize("verb", [rekindle.remove, rekindle.session_of])
def test_not_applied(verb):
    """`remove` and `session_of` of a model that is not applied name the class, and `apply`."""
    model = small_model(1)
    for _ in range(2):
        with pytest.raises(rekindle.SessionError, match=r"Sequential is not applied.*rekindle.apply\(model"):
            verb(model)
        rekindle.remove(rekindle.apply(model))


# -- what was changed between forward and backward ---------------------------------------------------------------------


def optimizer(model: nn.Module) -> None:
    """A whole optimizer step."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), 0.1).step()


def no_grad(model: nn.Module) -> None:
    """A write to a bias, which autograd does not save."""
    with torch.no_grad():
        model[0].up.bias.mul_(2)


def saved(model: nn.Module) -> None:
    """A write to a weight, which autograd saves."""
    with torch.no_grad():
        model[1].down.weight.mul_(2)


def copied(model: nn.Module) -> None:
    """What `load_state_dict` does."""
    model.load_state_dict({name: tensor * 2 for name, tensor in model.state_dict().items()})


@pytest.mark.parametrize(
    ("write", "kind", "words"),
    [
        (optimizer, rekindle.RecomputeError, ["after backward()"]),
        (no_grad, rekindle.LeafModified, ["aten.addmm", "module '0.up' (Linear)", "0.up.bias", "after backward()"]),
        (saved, rekindle.RekindleError, ["1.down.weight", "module '1.down' (Linear)", "after backward()"]),
        (copied, rekindle.RecomputeError, ["after backward()"]),
    ],
)
def test_parameter_modified(write, kind, words, session):
    """A parameter written between forward and backward is an error that names op, module and parameter and the cure;
    the write itself stands, and the next step is exact."""
    model = small_model(2)
    with session:
        loss = model(small_batch(0)).sum()
    write(model)
    after = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(kind) as caught:
        loss.backward()
    for word in words:
        assert word in str(caught.value)
    assert all(map(torch.equal, after, model.parameters()))
    del loss, caught
    assert_unharmed(model, session)


@pytest.mark.parametrize("write", [optimizer, saved])
def test_parameter_modified_inside(write, session):
    """The same inside the session, where plain autograd refuses too."""
    model = small_model(2)
    with session:
        loss = model(small_batch(0)).sum()
        write(model)
        with pytest.raises(rekindle.RecomputeError, match=r"after backward\(\)") as caught:
            loss.backward()
    del loss, caught
    assert_unharmed(model, session)


def test_write_that_plain_autograd_allows(session):
    """A bias written inside the session, which plain autograd allows, as it does not save it: a copy is kept, and the
    gradients are those of the plain run."""
    results = []
    for managed in (False, True):
        torch.manual_seed(0)
        model = small_model(2)
        with session if managed else nullcontext():
            loss = model(small_batch(0)).sum()
            no_grad(model)
            loss.backward()
        results.append([parameter.grad for parameter in model.parameters()])
    assert all(map(same_bits, *results))
    assert session.stats.snapshots == 1


def test_data_write_inside(session):
    """A write through `.data`, which no version counter tells of, is seen inside the session."""
    results = []
    for managed in (False, True):
        torch.manual_seed(0)
        model = small_model(2)
        with session if managed else nullcontext():
            loss = model(small_batch(0)).sum()
            model[0].up.bias.data.mul_(2)
            model[1].down.weight.data.mul_(2)
            loss.backward()
        results.append([parameter.grad for parameter in model.parameters()])
    assert all(map(same_bits, *results))


def test_data_write_outside_is_not_seen(session):
    """The one write that nothing tells of: through `.data`, after the `with` block and before backward. Plain autograd
    does not see it either; Rekindle recomputes from what is there then. Should this ever raise, say so in the docs."""
    model = small_model(1)
    with session:
        loss = model(small_batch(0)).sum()
    model[0].up.bias.data.mul_(2)
    loss.backward()


def test_input_modified(session):
    """An input written after the `with` block is named by its shape and dtype, and the op that read it."""
    x, w = small_batch(0), torch.ones(64, 64, requires_grad=True)
    with session:
        loss = (x.exp() @ w).sum()
    x.mul_(2)
    with pytest.raises(rekindle.LeafModified, match=r"aten.exp.default in no module .* float32\[32, 64\]"):
        loss.backward()
    assert w.grad is None


@pytest.mark.parametrize("inside", [True, False])
def test_activation_modified(inside, session):
    """A saved activation overwritten in the sight of autograd is an error, as in plain PyTorch."""
    w = torch.ones(64, 64, requires_grad=True)
    with session:
        y = (small_batch(0) @ w).exp()
        loss = y.sin().sum()
        if inside:
            y.detach().mul_(2)
    if not inside:
        y.detach().mul_(2)
    with pytest.raises(rekindle.SavedTensorModified, match=r"float32\[32, 64\].*aten.exp.*inplace operation"):
        loss.backward()
    assert w.grad is None


def test_activation_modified_by(session):
    """The message names the op that overwrote a saved activation, and its module."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Hardtanh(inplace=True))
    with session:
        loss = model(small_batch(0)).sum()
    with pytest.raises(rekindle.SavedTensorModified, match=r"aten.hardtanh_.default in module '2' \(Hardtanh\)"):
        loss.backward()


def test_recompute_errors_are_runtime_errors():
    """Whoever catches autograd's own errors catches these: plain PyTorch raises RuntimeError for the same mistakes."""
    for kind in (rekindle.LeafModified, rekindle.SavedTensorModified, rekindle.RecomputeMismatch):
        assert issubclass(kind, rekindle.RecomputeError)
        assert issubclass(kind, RuntimeError)


# -- replays that fail -------------------------------------------------------------------------------------------------


def in_replay(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Tensor], object]) -> None:
    """Have the replay of one op do something else to its result."""
    call = replay._call

    def spy(op, args, kwargs, run):
        if name not in str(op.func):
            return call(op, args, kwargs, run)
        return call(op, args, kwargs, lambda *details: change(run(*details)))

    monkeypatch.setattr(replay, "_call", spy)


def test_op_fails_when_repeated(session, monkeypatch):
    """An op that fails when it is repeated is named with its module; the cause is chained; it is counted."""

    def fail(result: Tensor) -> None:
        raise ValueError("kernel said no")

    model = small_model(2)
    with monkeypatch.context() as patch:
        in_replay(patch, "gelu", fail)
        message = r"aten.gelu.default in module '0' \(Layer\) ran in the forward pass but failed.*kernel said no"
        with pytest.raises(rekindle.RecomputeError, match=message) as caught:
            step(model, session)
    assert isinstance(caught.value.__cause__, ValueError)
    assert session.stats.failed_recomputes == 1
    del caught
    assert_unharmed(model, session)


def test_op_makes_something_else_when_repeated(session, monkeypatch):
    """An op that makes another size when it is repeated is named with both sizes, and `mark` is the cure."""
    model = small_model(2)
    with monkeypatch.context() as patch:
        in_replay(patch, "gelu", lambda result: result.double())
        with pytest.raises(rekindle.RecomputeMismatch, match=r"made 16384 bytes .* and 32768 .*session.mark") as caught:
            step(model, session)
    del caught
    assert_unharmed(model, session)


# -- places where sessions cannot work ---------------------------------------------------------------------------------

TRANSFORMS = {
    "grad": lambda f: torch.func.grad(f)(small_batch(0)),
    "vjp": lambda f: torch.func.vjp(f, small_batch(0)),
    "jacrev": lambda f: torch.func.jacrev(f)(small_batch(0, rows=2, width=3)),
    "hessian": lambda f: torch.func.hessian(f)(small_batch(0, rows=2, width=3)),
}
OTHERS = {
    "vmap": lambda f: torch.func.vmap(f)(small_batch(0)),
    "jvp": lambda f: torch.func.jvp(f, (small_batch(0),), (small_batch(1),)),
    "functionalize": lambda f: torch.func.functionalize(f)(small_batch(0)),
}


jit = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, of jvp


def square(x: Tensor) -> Tensor:
    """A function to transform."""
    return x.square().sum()


@jit
@pytest.mark.parametrize("transform", [*TRANSFORMS, *OTHERS])
def test_entered_inside_a_transform(transform, session):
    """A session is refused inside each transform of `torch.func`, and is usable afterwards."""

    def managed(x: Tensor) -> Tensor:
        with session:
            return square(x)

    with pytest.raises(rekindle.UnsupportedContext, match=r"inside a torch.func transform.*torch.autograd.grad"):
        {**TRANSFORMS, **OTHERS}[transform](managed)
    assert_unharmed(small_model(1), session)


def test_applied_inside_a_transform():
    """So is the forward of an applied model."""
    model = rekindle.apply(small_model(1), rekindle.KeepNone())
    with pytest.raises(rekindle.UnsupportedContext, match=r"torch.autograd.grad"):
        torch.func.grad(lambda x: model(x).sum())(small_batch(0))
    session = rekindle.session_of(model)
    rekindle.remove(model)
    assert_unharmed(model, session)


@jit
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform_inside_a_session(transform, session):
    """The transforms that refuse saved-tensor hooks are refused with the cure, and the session ends properly."""
    with pytest.raises(rekindle.UnsupportedContext, match=r"torch.autograd.grad.*outside of the `with` block"), session:
        TRANSFORMS[transform](square)
    assert_unharmed(small_model(1), session)


def test_transform_inside_an_applied_model():
    """PyTorch raises its own error then, to which a note with the cure is added."""

    class Transforming(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.func.grad(square)(x)

    model = rekindle.apply(Transforming(), rekindle.KeepNone())
    with pytest.raises(RuntimeError, match="saved tensor hooks") as caught:
        model(small_batch(0))
    assert any("outside of the `with` block" in note for note in caught.value.__notes__)
    rekindle.remove(model)
    assert modes() == 0


@jit
@pytest.mark.parametrize("transform", ["vmap", "jvp"])
def test_other_transforms_inside_a_session(transform, session):
    """The transforms that need no saved tensors work inside a session, exactly."""
    plain = OTHERS[transform](square)
    with session:
        managed = OTHERS[transform](square)
    for left, right in zip(*((r if isinstance(r, tuple) else (r,)) for r in (plain, managed)), strict=True):
        assert same_bits(left, right)


def test_gradient_through_vmap(session):
    """What `vmap` computes from a parameter inside a session has the plain run's gradient."""
    grads = []
    for managed in (False, True):
        w = small_batch(1, rows=64).requires_grad_()
        with session if managed else nullcontext():
            torch.func.vmap(lambda row, w=w: (row @ w).tanh().exp().sum())(small_batch(0)).sum().backward()
        grads.append(w.grad)
    assert same_bits(*grads)
    assert session.stats.ops_replayed > 0


@pytest.fixture
def capturing(monkeypatch) -> Iterator[None]:
    """PyTorch says that a CUDA graph is being captured on this stream."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    yield
    monkeypatch.undo()


def test_cuda_graph_capture(capturing, session, monkeypatch):
    """A session is refused while a CUDA graph is captured, and is usable afterwards."""
    with pytest.raises(rekindle.UnsupportedContext, match=r"CUDA graph.*evictions.*without the session"), session:
        pass
    assert modes() == 0
    monkeypatch.undo()
    assert_unharmed(small_model(1), session)


def test_hooks_disabled(session):
    """A session is refused where somebody disabled saved-tensor hooks, with their reason, and is usable afterwards."""
    disabled = torch.autograd.graph.disable_saved_tensors_hooks("Mine.")
    refused = pytest.raises(rekindle.UnsupportedContext, match=r"Mine\..*disable_saved_tensors_hooks")
    with disabled, refused, session:
        pass
    assert_unharmed(small_model(1), session)


# -- the tree ----------------------------------------------------------------------------------------------------------


def test_every_error_is_one_of_ours():
    """All exceptions that the package exports are subclasses of `RekindleError`."""
    errors = [
        thing
        for name in rekindle.__all__
        if isinstance(thing := getattr(rekindle, name), type) and issubclass(thing, Exception)
    ]
    assert len(errors) > 8
    assert all(issubclass(error, rekindle.RekindleError) for error in errors)


def test_nothing_is_left_of_an_error(session, counting):
    """An error keeps no activation alive once it was handled."""
    model = small_model(2)
    with session:
        loss = model(small_batch(0)).sum()
    no_grad(model)
    try:
        loss.backward()
    except rekindle.LeafModified:
        pass
    else:
        pytest.fail("not refused")
    del loss
    assert not living()


def test_layer_is_what_the_messages_name():
    """The tests above rely on the shape of the small model."""
    assert isinstance(small_model(1)[0], Layer)
