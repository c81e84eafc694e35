"""`rekindle.apply` and `remove`: a model in a training loop that knows nothing of Rekindle."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import rekindle
from helpers import Layer, assert_same, small_batch, small_model, train
from watch import living, modes


def step(model: nn.Module, number: int, _: object) -> Tensor:
    """What a foreign training loop does: it enters no session."""
    loss = model(small_batch(number)).square().mean()
    loss.backward()
    return loss


def global_hooks() -> int:
    """How many hooks PyTorch calls for every module."""
    return len(torch_module._global_forward_hooks) + len(torch_module._global_forward_pre_hooks)


def grads(model: nn.Module) -> list[Tensor | None]:
    """The gradients of all parameters."""
    return [parameter.grad for parameter in model.parameters()]


class Recursive(nn.Module):
    """A module that calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor, times: int = 3) -> Tensor:
        """Apply the layer `times` times and once more."""
        x = self.layer(x).tanh()
        return self(x, times - 1) if times else x


class Failing(nn.Module):
    """Raises in the middle of its forward, when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.error: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Two layers."""
        x = self.first(x).tanh()
        if self.error is not None:
            raise self.error("mine")
        return self.second(x).tanh()


@pytest.fixture
def applied():
    """Applies models, and removes them when the test is over."""
    models: list[nn.Module] = []

    def apply(model, policy=None, **options):
        models.append(model)
        return rekindle.apply(model, policy, **options)

    yield apply
    for model in models:
        try:
            rekindle.remove(model)
        except rekindle.SessionError:
            continue
    assert global_hooks() == 0
    assert modes() == 0


pytestmark = pytest.mark.filterwarnings("ignore:PerModule.*no module that ran")  # some models here have no Layer

POLICIES = [
    rekindle.KeepAll(),
    rekindle.KeepNone(),
    rekindle.EveryN(3),
    rekindle.PerModule(Layer),
    rekindle.Balanced(0.2),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_trains_exactly_in_a_foreign_loop(policy, applied):
    """A loop that never heard of Rekindle gets the same losses, gradients and random state, bit for bit."""
    assert_same(train(small_model, step), train(lambda: applied(small_model(), policy), step))
    assert not living()


def test_works_after_forward_returned(applied):
    """The session is over when forward returns; evicted activations come back in a backward pass called later."""
    model = applied(small_model(), rekindle.KeepNone())
    loss = model(small_batch(0)).sum()
    assert modes() == 0
    assert rekindle.session_of(model).stats.ops_replayed == 0
    loss.backward()
    assert rekindle.session_of(model).stats.ops_replayed > 0


def test_returns_the_same_object(applied):
    """`apply` and `remove` give back the very module, its class and its attributes unchanged."""
    model = small_model()
    cls, attributes, keys = type(model), dict(vars(model)), list(model.state_dict())
    assert applied(model, rekindle.KeepNone()) is model
    model(small_batch(0)).sum().backward()
    assert type(model) is cls
    assert vars(model).keys() == attributes.keys()
    assert list(model.state_dict()) == keys
    assert rekindle.remove(model) is model


def test_hooks_of_others_run_as_before(applied):
    """Hooks on the module run once per forward, in their order, and are still there after `remove`."""
    seen = []
    model = small_model(2)
    model.register_forward_pre_hook(lambda *_: seen.append("pre"))
    model.register_forward_hook(lambda *_: seen.append("post"))
    model.register_full_backward_hook(lambda *_: seen.append("backward"))
    applied(model, rekindle.KeepNone())
    model(small_batch(0).requires_grad_()).sum().backward()
    assert seen == ["pre", "post", "backward"]
    rekindle.remove(model)
    model(small_batch(0).requires_grad_()).sum().backward()
    assert seen == ["pre", "post", "backward"] * 2


def test_pickles_as_before(applied):
    """An applied model pickles to the same bytes, and what is loaded is a plain model."""
    model = small_model(2)
    before = pickle.dumps(model)
    applied(model, rekindle.KeepNone())
    model(small_batch(0))
    assert pickle.dumps(model) == before
    with pytest.raises(rekindle.SessionError):
        rekindle.session_of(pickle.loads(before))


def test_saves_as_before(applied):
    """`torch.save` of an applied model's `state_dict` is what it was."""
    model = small_model(2)
    files = [io.BytesIO(), io.BytesIO()]
    torch.save(model.state_dict(), files[0])
    applied(model, rekindle.KeepNone())
    torch.save(model.state_dict(), files[1])
    assert files[0].getvalue() == files[1].getvalue()


def test_copies_are_plain(applied):
    """A deep copy of an applied model is not applied, and trains on its own."""
    model = applied(small_model(2), rekindle.KeepNone())
    twin = copy.deepcopy(model)
    twin(small_batch(0)).sum().backward()
    assert rekindle.session_of(model).stats.steps == 0
    with pytest.raises(rekindle.SessionError):
        rekindle.session_of(twin)


def test_module_paths_begin_at_the_model(applied):
    """Module paths are those of `model.named_modules()`, so `PerModule("0")` means `model[0]`."""
    model = applied(small_model(2), rekindle.PerModule("0"))
    model(small_batch(0)).sum().backward()
    session = rekindle.session_of(model)
    assert session.graph is not None
    paths = {call.path for call in session.graph.calls}
    assert paths == {name for name, _ in model.named_modules()}
    assert {value.name for value in session.graph.values if value.name} == {n for n, _ in model.named_parameters()}
    assert 0 < session.stats.evicted <= 5


def test_remove_undoes_it(applied):
    """After `remove` no hook is left, no mode is active, and no activation is evicted."""
    model = applied(small_model(), rekindle.KeepNone())
    session = rekindle.session_of(model)
    rekindle.remove(model)
    assert global_hooks() == 0
    model(small_batch(0)).sum().backward()
    assert session.stats.steps == 0


def test_remove_between_forward_and_backward(applied):
    """What was evicted before `remove` is still recomputed after it."""
    plain, managed = small_model(), small_model()
    managed.load_state_dict(plain.state_dict())
    applied(managed, rekindle.KeepNone())
    losses = []
    for model in (plain, managed):
        torch.manual_seed(1)
        losses.append(model(small_batch(0)).sum())
    rekindle.remove(managed)
    for loss in losses:
        loss.backward()
    assert all(map(torch.equal, grads(plain), grads(managed)))


def test_apply_again_after_remove(applied):
    """A removed model can be applied again, with another policy."""
    model = applied(small_model(), rekindle.KeepAll())
    rekindle.remove(model)
    applied(model, rekindle.KeepNone())
    model(small_batch(0)).sum().backward()
    assert rekindle.session_of(model).stats.ops_replayed > 0


@pytest.mark.parametrize("policy", POLICIES[1:], ids=repr)
def test_a_module_that_calls_itself(policy, applied):
    """The outermost call is the step; the inner calls of the same module belong to it."""

    def recursive(model: nn.Module, number: int, _: object) -> Tensor:
        loss = model(small_batch(number)).square().mean()
        loss.backward()
        return loss

    managed = []

    def make() -> nn.Module:
        managed.append(applied(Recursive(), policy))
        return managed[0]

    assert_same(train(Recursive, recursive), train(make, recursive))
    assert rekindle.session_of(managed[0]).stats.steps == 3


def test_two_applied_models(applied):
    """Two applied models, one feeding the other, have a session each and train exactly."""

    def make() -> nn.Module:
        return nn.ModuleList([small_model(2), small_model(2)])

    def both(model: nn.Module, number: int, _: object) -> Tensor:
        loss = model[1](model[0](small_batch(number)).tanh()).square().mean()
        loss.backward()
        return loss

    def make_applied() -> nn.Module:
        models = make()
        applied(models[0], rekindle.KeepNone())
        applied(models[1], rekindle.PerModule(Layer))
        sessions.extend(map(rekindle.session_of, models))
        return models

    sessions: list[rekindle.Session] = []
    assert_same(train(make, both), train(make_applied, both))
    assert [session.stats.steps for session in sessions] == [3, 3]
    assert all(session.stats.ops_replayed > 0 for session in sessions)


@pytest.mark.parametrize("outer", POLICIES, ids=repr)
def test_nested_applied_models(outer, applied):
    """An applied model inside an applied model: each looks after its own activations, and all is exact."""

    def make_applied() -> nn.Module:
        model = small_model()
        applied(model[1], rekindle.KeepNone())
        return applied(model, outer)

    assert_same(train(small_model, step), train(make_applied, step))


def test_applied_model_inside_a_session(applied):
    """An applied model called inside somebody's session trains exactly."""

    def make_applied() -> nn.Module:
        model = small_model()
        applied(model[1], rekindle.KeepNone())
        return model

    def inside(model: nn.Module, number: int, session: object) -> Tensor:
        with session:
            loss = model(small_batch(number)).square().mean()
            loss.backward()
        return loss

    managed = train(make_applied, inside, rekindle.Session(rekindle.EveryN(2)))
    assert_same(train(small_model, inside), managed)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exceptions_in_forward_pass_through(error, applied, counting):
    """The user sees the error of forward and no other; the next step is managed and exact, nothing stays alive."""
    plain, managed = Failing(), Failing()
    managed.load_state_dict(plain.state_dict())
    applied(managed, rekindle.KeepNone())
    managed.error = error
    for _ in range(2):
        with pytest.raises(error, match="mine"):
            managed(small_batch(0))
    managed.error = None
    for model in (plain, managed):
        model(small_batch(0)).sum().backward()
    assert all(map(torch.equal, grads(plain), grads(managed)))
    assert rekindle.session_of(managed).last_step.ops_replayed > 0
    assert not living()
    assert modes() == 0


def test_exception_in_a_pre_hook(applied):
    """An error in somebody's pre-hook, before forward has begun, leaves no session open."""
    model = applied(small_model(2), rekindle.KeepNone())

    def fail(*_):
        raise ValueError("mine")

    hook = model.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="mine"):
        model(small_batch(0))
    assert modes() == 0
    hook.remove()
    model(small_batch(0)).sum().backward()
    assert rekindle.session_of(model).last_step.ops_replayed > 0


def test_remove_after_an_interrupt(applied):
    """A KeyboardInterrupt, of which PyTorch tells no hook, leaves a session that `remove` closes."""
    model = applied(Failing(), rekindle.KeepNone())
    model.error = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        model(small_batch(0))
    rekindle.remove(model)
    assert modes() == 0


def test_failed_forward_is_not_planned_from(applied):
    """A policy that plans from a whole step does not plan from one that failed half way."""
    model = applied(Failing(), rekindle.ByDepth(1))
    model.error = ValueError
    with pytest.raises(ValueError, match="mine"):
        model(small_batch(0))
    assert rekindle.session_of(model).plan is None


def test_evaluation_leaves_nothing(applied, counting):
    """Forwards without a backward, with gradients or without, leave no record once their result is gone."""
    model = applied(small_model().eval(), rekindle.KeepNone())
    with torch.no_grad():
        for _ in range(3):
            result = model(small_batch(0))
    assert not living()
    result = model(small_batch(0))
    del result
    assert not living()


def test_last_graph_is_freed_with_the_result(applied, counting):
    """A second forward without backward frees the first one's graph: the records do not add up."""
    model = applied(small_model(), rekindle.KeepNone())
    counts = []
    for _ in range(4):
        result = model(small_batch(0))
        counts.append(living())
    assert counts[1] == counts[2] == counts[3]
    del result
    assert not living()


def test_ends_with_the_model(counting):
    """A model that is gone without `remove` leaves no hook behind."""
    model = rekindle.apply(small_model(1), rekindle.KeepNone())
    model(small_batch(0)).sum().backward()
    gone = weakref.ref(model)
    del model
    assert gone() is None
    assert global_hooks() == 0


def test_second_thread_is_refused(applied):
    """While one thread runs an applied model, another gets an error that says so, and the first is not disturbed."""
    model = applied(Failing(), rekindle.KeepNone())
    refused = []

    def intrude(*_):
        def run() -> None:
            with pytest.raises(rekindle.SessionError, match="another thread") as caught:
                model(small_batch(0))
            refused.append(caught)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    hook = model.first.register_forward_hook(intrude)
    loss = model(small_batch(0)).sum()
    hook.remove()
    loss.backward()
    assert len(refused) == 1
    assert rekindle.session_of(model).last_step.ops_replayed > 0
    assert modes() == 0
