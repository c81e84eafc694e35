"""Each fact about PyTorch that `record/torch_private.py` states, checked against the PyTorch that is installed.

A new PyTorch that breaks one of them fails here first, with the name of the fact.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import Doubled, small_batch
from rekindle.record import torch_private
from rekindle.record.aliasing import Ledger, window_of
from rekindle.record.recorder import Recorder
from rekindle.record.torch_private import (
    FAKE_ERRORS,
    Around,
    FakeTensor,
    FakeTensorMode,
    alias,
    any_hooked,
    around_backward,
    at_recorded_level,
    body_of,
    called_by_engine,
    current_graph_task,
    current_node,
    faking,
    hooked,
    hooks_refused,
    in_func_transform,
    left,
    never_compile,
    no_modes,
    nodes_made,
    put_back,
    reaches,
    set_versions,
    when_backward_ends,
    without_dispatch_modes,
)
from watch import modes


class Watch(TorchDispatchMode):
    """Calls a function with the result of each op, from inside the handler."""

    def __init__(self, look: Callable[[Any, Any], None]) -> None:
        super().__init__()
        self.look = look

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.look(func, result)
        return result


class Names(Watch):
    """Collects the names of the ops."""

    def __init__(self) -> None:
        self.names: list[str] = []
        super().__init__(lambda func, result: self.names.append(func.overloadpacket.__name__))


# -- version counters --------------------------------------------------------------------------------------------------


def made_inside(make: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """A tensor, and what `make` makes of it inside the handler of an op that reads it."""
    found: list[Tensor] = []
    tensor = torch.ones(3)
    with Watch(lambda func, result: found.append(make(tensor))):
        tensor.neg()
    return tensor, found[0]


def test_detach_in_a_handler_has_its_own_version():
    """The reason for `alias`: a plain `detach` in a handler does not see the writes that come after."""
    tensor, detached = made_inside(Tensor.detach)
    assert detached.data_ptr() == tensor.data_ptr()
    tensor.add_(1)
    assert (tensor._version, detached._version) == (1, 0)


def test_alias_shares_the_version():
    """`alias` makes a detached alias that counts the same writes, both ways."""
    tensor, other = made_inside(alias)
    assert other.data_ptr() == tensor.data_ptr()
    assert not other.requires_grad
    tensor.add_(1)
    other.add_(1)
    assert tensor._version == other._version == 2


def test_alias_works_outside_of_a_handler():
    """`mark` calls it there."""
    tensor = torch.ones(3, requires_grad=True)
    other = alias(tensor)
    with torch.no_grad():
        tensor.add_(1)
    assert other._version == tensor._version == 1
    assert not other.requires_grad


def test_detach_without_modes_shares_the_version():
    """`without_dispatch_modes` hides a block from modes, and aliases made in it share their version counter."""
    with Names() as mode:
        tensor = torch.ones(3)
        with without_dispatch_modes():
            other = tensor.detach()
            torch.zeros(3)
        tensor.add_(1)
    assert other._version == tensor._version == 1
    assert mode.names == ["ones", "add_"]


def test_version_of_an_op_that_writes():
    """The version of what an in-place op wrote goes up after its handler has returned, so `first_read` must wait."""
    versions: list[int] = []
    tensor = torch.ones(3)
    with Watch(lambda func, result: versions.append(tensor._version)):
        tensor.add_(1)
    assert versions == [0]
    assert tensor._version == 1


def test_data_has_its_own_version():
    """A write through `.data` is invisible to the version counter: only the recorder sees it."""
    tensor = torch.ones(3)
    tensor.data.add_(1)
    assert tensor._version == 0


def test_increment_version():
    """The public way to count a write by hand reaches all that share the counter, and no `.data`."""
    tensor = torch.ones(3)
    view, data = tensor[1:], tensor.data
    torch.autograd.graph.increment_version(view)
    assert (tensor._version, view._version, data._version) == (1, 1, 0)


def test_set_versions():
    """A counter that was moved to see who shares it is moved back, for all that share it."""
    tensor = torch.ones(3)
    view = tensor[1:]
    torch.autograd.graph.increment_version([tensor])
    set_versions([view], [0])
    assert (tensor._version, view._version) == (0, 0)


# -- dispatch level ----------------------------------------------------------------------------------------------------


def recorded_ops(block: Callable[[], object]) -> list[str]:
    """The ops of a block as a mode sees them."""
    with Names() as mode:
        block()
    return mode.names


def test_recorded_level_is_below_modes():
    """At the recorded level no mode sees anything."""
    x = torch.ones(3)

    def repeat() -> None:
        with at_recorded_level():
            torch.ops.aten.add.Tensor(x, x)

    torch_private._LEVEL.clear()  # nor how the level is found
    assert recorded_ops(repeat) == []


def test_recorded_level_is_below_autograd():
    """At the recorded level nothing is recorded for a backward pass."""
    x = torch.ones(3, requires_grad=True)
    with at_recorded_level():
        y = torch.ops.aten.mul.Tensor(x, x)
    assert y.grad_fn is None
    assert torch.ops.aten.mul.Tensor(x, x).grad_fn is not None


def test_recorded_level_is_below_autocast():
    """At the recorded level autocast casts nothing: what was cast in the forward pass is recorded cast."""
    x = torch.ones(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.ops.aten.mm.default(x, x).dtype == torch.bfloat16
        with at_recorded_level():
            assert torch.ops.aten.mm.default(x, x).dtype == torch.float32
        assert torch.ops.aten.mm.default(x, x).dtype == torch.bfloat16


def test_recorded_level_is_that_of_a_handler():
    """The dispatcher's state at the recorded level is the one that a handler is called with."""
    levels: list[tuple[str, str]] = []

    def note(func: Any, result: Any) -> None:
        included = torch._C._dispatch_tls_local_include_set()
        excluded = torch._C._dispatch_tls_local_exclude_set()
        levels.append((str(included), str(excluded)))

    with torch.no_grad(), Watch(note):
        torch.empty(0)
    torch_private._LEVEL.clear()
    with at_recorded_level():
        included = torch._C._dispatch_tls_local_include_set()
        excluded = torch._C._dispatch_tls_local_exclude_set()
    assert levels == [(str(included), str(excluded))]


def test_recorded_level_can_be_found_inside_a_mode():
    """The level is the same whether it is looked up with no mode active, inside one, or under autocast."""
    found = []
    for context in (torch.no_grad(), Names(), torch.autocast("cpu"), torch.enable_grad()):
        torch_private._LEVEL.clear()
        with context, at_recorded_level():
            included = torch._C._dispatch_tls_local_include_set()
            excluded = torch._C._dispatch_tls_local_exclude_set()
            found.append((str(included), str(excluded)))
    assert len(set(found)) == 1


def test_recorded_level_ends_with_its_block():
    """After the block autograd, autocast and modes work as before, also after an exception in it."""
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="mine"), at_recorded_level():
        raise ValueError("mine")
    assert (x * x).grad_fn is not None
    assert recorded_ops(lambda: x * x) == ["mul"]


def test_same_bits_at_the_recorded_level():
    """A kernel called there gives the bits that it gave in the forward pass, for composite calls too."""
    x, w = small_batch(0), small_batch(1, 64)
    expected = torch.nn.functional.linear(x, w)
    with at_recorded_level():
        assert torch.equal(torch.ops.aten.mm.default(x, w.t()), expected)


# -- dynamo ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marked", [False, True])
def test_never_compile(marked):
    """Dynamo stays out of a marked function and of all that it calls, though it would compile it otherwise."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def inner(x: Tensor) -> Tensor:
        return x.sin() + 1

    def outer(x: Tensor) -> Tensor:
        return inner(x)

    if marked:
        never_compile(outer)
    torch.compile(outer, backend=backend)(torch.ones(3))
    torch.compiler.reset()
    assert len(graphs) == (0 if marked else 1)


def test_handlers_need_not_be_wrapped():
    """`TorchDispatchMode` wraps the handler of a class in `torch._dynamo.disable`, unless the class declines."""

    class Declines(Names):
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    class Accepts(Names):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    assert not hasattr(Declines.__torch_dispatch__, "__wrapped__")
    assert hasattr(Accepts.__torch_dispatch__, "__wrapped__")
    assert not hasattr(Recorder.__torch_dispatch__, "__wrapped__")


def test_hooks_come_back_under_their_keys():
    """A global module hook that was removed can be put back under the key it had, with its flag and in the last place,
    and be removed again."""
    module_hooks = torch.nn.modules.module
    flags, hooks = module_hooks._global_forward_hooks_always_called, module_hooks._global_forward_hooks
    calls: list[str] = []
    handle = module_hooks.register_module_forward_hook(lambda *_: calls.append("first"), always_call=True)
    key = handle.id
    handle.remove()
    assert key not in hooks
    assert key not in flags
    later = module_hooks.register_module_forward_hook(lambda *_: calls.append("later"))
    put_back(handle, lambda *_: calls.append("again"))
    assert flags[key] is True
    torch.nn.Identity()(1)
    for either in (handle, later):
        either.remove()
    torch.nn.Identity()(1)
    assert calls == ["later", "again"]
    assert not hooks
    assert not flags


# -- the engine --------------------------------------------------------------------------------------------------------


def in_backward(block: Callable[[], object], x: Tensor | None = None) -> Tensor:
    """A tensor in whose backward pass `block` runs."""
    x = torch.ones(3, requires_grad=True) if x is None else x
    y = x * 2
    y.register_hook(lambda grad: block() and None)
    return y.sum()


def test_graph_tasks_have_numbers():
    """A backward pass has one number from begin to end, another one than any before; outside of one it is -1."""
    numbers: list[int] = []
    assert current_graph_task() == -1
    for _ in range(2):
        x = torch.ones(3, requires_grad=True)
        y = x * 2
        for tensor in (y, x):
            tensor.register_hook(lambda grad: numbers.append(current_graph_task()))
        y.sum().backward()
    assert numbers[0] == numbers[1] != numbers[2] == numbers[3]
    assert -1 not in numbers
    assert current_graph_task() == -1


def test_nested_graph_tasks():
    """A backward pass inside a backward pass has a number of its own, and the outer one gets its back."""
    numbers: list[int] = []

    def nested() -> None:
        numbers.append(current_graph_task())
        with torch.enable_grad():
            in_backward(lambda: numbers.append(current_graph_task())).backward()
        numbers.append(current_graph_task())

    in_backward(nested).backward()
    outer, inner, again = numbers
    assert outer == again != inner


def test_when_backward_ends():
    """The callback comes once, after the last hook of the pass it was queued in, and not in the next."""
    events: list[str] = []
    x = torch.ones(3, requires_grad=True)
    x.register_hook(lambda grad: events.append("leaf"))
    in_backward(lambda: when_backward_ends(lambda: events.append("end")), x).backward()
    assert events == ["leaf", "end"]
    (x * 2).sum().backward()
    assert events == ["leaf", "end", "leaf"]


def test_when_a_backward_fails():
    """It does not come if the pass raises."""
    events: list[str] = []

    def fail() -> None:
        when_backward_ends(lambda: events.append("end"))
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        in_backward(fail).backward()
    assert events == []
    (torch.ones(3, requires_grad=True) * 2).sum().backward()
    assert events == []


def test_callbacks_run_where_modes_are():
    """A mode that is active around `backward()` is active in unpack hooks and in the end's callbacks too."""
    seen: list[int] = []
    x = torch.ones(3, requires_grad=True)

    def unpack(tensor: Tensor) -> Tensor:
        seen.append(modes())
        when_backward_ends(lambda: seen.append(modes()))
        return tensor

    with Names(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        x.sin().sum().backward()
    assert seen == [1, 1]


def test_nodes_have_numbers():
    """The engine names the node that runs: the same for all it unpacks, another for the next; -1 outside."""
    numbers: list[int] = []

    def unpack(tensor: Tensor) -> Tensor:
        numbers.append(current_node())
        return tensor

    x, y = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        ((x * y).sin()).sum().backward()
    sine, *product = numbers
    assert len(product) == 2
    assert product[0] == product[1] != sine
    assert -1 not in numbers
    assert current_node() == -1


def test_unpacked_tensors_are_rewrapped():
    """Autograd wraps what an unpack hook returns anew: the returned tensor itself may die while its bytes live."""
    died: list[bool] = []
    x = torch.ones(3, requires_grad=True)

    def unpack(tensor: Tensor) -> Tensor:
        result = tensor.clone()
        died.append(False)
        weakref.finalize(result, lambda: died.__setitem__(0, True)).atexit = False
        return result

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        x.sin().sum().backward()
    assert died == [True]


# -- torch.func --------------------------------------------------------------------------------------------------------


def test_in_func_transform():
    """A transform of `torch.func` is seen from inside, in all its kinds, and is over when it is over."""
    seen: list[bool] = []

    def f(x: Tensor) -> Tensor:
        seen.append(in_func_transform())
        return x.square().sum()

    assert not in_func_transform()
    torch.func.grad(f)(torch.ones(3))
    torch.func.vmap(f)(torch.ones(3, 3))
    torch.func.vmap(torch.func.grad(f))(torch.ones(3, 3))
    assert seen == [True, True, True]
    assert not in_func_transform()


def test_transforms_refuse_hooks_by_a_known_message():
    """The session recognises the refusal by its words."""
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with pytest.raises(RuntimeError, match=r"torch\.func.*saved tensor hooks"), hooks:
        torch.func.grad(lambda x: x.square().sum())(torch.ones(3))


def test_hooks_refused():
    """Where hooks are disabled the reason can be read, and entering hooks raises it."""
    assert hooks_refused() is None
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.autograd.graph.disable_saved_tensors_hooks("mine"):
        assert hooks_refused() == "mine"
        with pytest.raises(RuntimeError, match="mine"), hooks:
            pass
    assert hooks_refused() is None


def test_modes_and_hooks():
    """The modes that are active and the innermost saved-tensor hooks can be read, as those objects that were entered;
    neither changes the other."""
    assert torch_private.modes_and_hooks() == ((), None)
    pack, unpack = (lambda tensor: tensor), (lambda tensor: tensor)
    with Names() as outer, torch.autograd.graph.saved_tensors_hooks(pack, unpack), Names() as inner:
        assert torch_private.modes_and_hooks() == ((outer, inner), (pack, unpack))
        with torch.autograd.graph.saved_tensors_hooks(unpack, pack):
            assert torch_private.modes_and_hooks() == ((outer, inner), (unpack, pack))
    assert torch_private.modes_and_hooks() == ((), None)


def test_members_of_a_module():
    """The same modules, parameters and buffers are found as PyTorch finds, shared ones and missing ones too."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2))
    model.append(model[0])
    model[2].weight = model[0].weight
    modules, parameters, buffers = torch_private.members_of(model)
    assert set(map(id, modules)) == set(map(id, model.modules()))
    assert len(modules) == len(set(map(id, modules)))
    assert set(map(id, parameters)) == set(map(id, model.parameters()))
    assert set(map(id, buffers)) == set(map(id, model.buffers()))


# -- storages and weak references --------------------------------------------------------------------------------------


def test_storages_are_one_object():
    """A storage is the same Python object each time while it lives, so it can be referred to weakly."""
    tensor = torch.ones(3)
    storage = weakref.ref(tensor.untyped_storage())
    key = tensor.untyped_storage()._cdata
    assert storage() is tensor.untyped_storage() is tensor[1:].untyped_storage()
    assert tensor.t().detach().untyped_storage()._cdata == key
    view = tensor[1:]
    del tensor
    assert storage() is not None
    del view
    assert storage() is None


def test_tensors_survive_in_autograd():
    """A tensor that only autograd's C++ side holds is still the same Python object, so a weak reference finds it."""
    x = torch.ones(3, requires_grad=True)
    y = x.exp()
    key, found = id(y), weakref.ref(y)
    z = y.sin()
    del y
    alive = found()
    assert alive is None or id(alive) == key
    del z


def test_death_of_a_storage_is_told_at_once():
    """The ledger counts bytes down at the moment the last tensor on a storage goes."""
    ledger = Ledger(lambda activation, nbytes: None)
    tensor = torch.ones(4)
    ledger.track(tensor.untyped_storage(), None, tensor.nbytes)
    view = tensor[1:]
    del tensor
    assert ledger.live_nbytes == 16
    del view
    assert ledger.live_nbytes == 0
    assert not ledger.storages


def test_windows():
    """A window tells of lazy conjugation and negation, which share the storage."""
    tensor = torch.ones(2, 3, dtype=torch.complex64)
    assert len(window_of(tensor)) == 4
    assert window_of(tensor.conj())[4:] == (True, False)
    assert window_of(tensor.conj().imag)[4:] == (False, True)
    assert tensor.conj().untyped_storage()._cdata == tensor.untyped_storage()._cdata


def test_sparse_has_no_storage():
    """Tensors without a storage raise one of two errors, which is how the recorder knows them."""
    for tensor in (torch.eye(3).to_sparse(), torch.eye(3).to_mkldnn()):
        with pytest.raises((NotImplementedError, RuntimeError)):
            tensor.untyped_storage()


def test_hooks_follow_only_their_thread():
    """Modes and saved-tensor hooks belong to the thread that entered them."""
    seen: list[int] = []
    with Names():
        thread = threading.Thread(target=lambda: seen.append(modes()))
        thread.start()
        thread.join()
    assert seen == [0]


# -- fake tensors ------------------------------------------------------------------------------------------------------


def test_a_fake_tensor_is_a_window_onto_a_meta_storage() -> None:
    """Views of a fake tensor share its storage, aliases its version counter, and its storage dies with it."""
    mode = FakeTensorMode()
    fake = FakeTensor(mode, torch.empty(4, 4, device="meta"), torch.device("cpu"))
    assert fake.device.type == "cpu"
    storage = fake.untyped_storage()
    assert (storage.device.type, storage.nbytes()) == ("meta", 64)
    with faking(mode):
        view, other = fake.t(), fake.detach()
        view.add_(1)
    assert view.untyped_storage()._cdata == storage._cdata
    assert other._version == fake._version == 1
    dead = weakref.ref(storage)
    del storage, fake, view, other
    assert dead() is None


def test_an_alias_of_a_fake_tensor() -> None:
    """`alias` makes one from inside a dispatch that is fake itself and shares storage and version counter."""
    found: list[torch.Tensor] = []

    class Aliasing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.neg.default:
                found.append(alias(args[0]))
            return func(*args, **(kwargs or {}))

    mode = FakeTensorMode()
    fake = FakeTensor(mode, torch.empty(4, device="meta"), torch.device("cpu"))
    with faking(mode), Aliasing():
        torch.neg(fake)
        fake.add_(1)
    assert type(found[0]) is FakeTensor
    assert found[0].untyped_storage()._cdata == fake.untyped_storage()._cdata
    assert found[0]._version == fake._version == 1


@pytest.mark.parametrize(
    "step",
    [
        lambda fake: fake.sum().item(),
        lambda fake: torch.nonzero(fake),
        lambda fake: torch.masked_select(fake, fake > 0),
    ],
)
def test_what_fake_tensors_cannot_tell(step) -> None:
    """Ops whose result or its shape depends on data raise one of these."""
    mode = FakeTensorMode(allow_fallback_kernels=False)
    fake = FakeTensor(mode, torch.empty(4, device="meta"), torch.device("cpu"))
    with faking(mode), pytest.raises(FAKE_ERRORS):
        step(fake)


def test_constants_are_lifted() -> None:
    """What is written out in code is handed as a real tensor to `lift_fresh`, which returns a fake one."""
    found: list[torch.Tensor] = []

    class Lifts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.lift_fresh.default:
                assert not types
                found.append(args[0])
            return func(*args, **(kwargs or {}))

    with faking(FakeTensorMode()), Lifts():
        assert type(torch.tensor([1, 2])) is FakeTensor
    assert found[0].tolist() == [1, 2]


def test_fake_tensors_are_not_known_as_such() -> None:
    """Inside `faking`, who asks the package for the class is told of another; all is put back, also after an error, and
    Transformers does ask so."""
    from transformers.utils.import_utils import is_fake_tensor

    mode, known, log = FakeTensorMode(), torch._subclasses.FakeTensor, logging.getLogger(FakeTensor.__module__)
    fake = FakeTensor(mode, torch.empty(4, device="meta"), torch.device("cpu"))
    assert is_fake_tensor(fake)

    def fail() -> None:
        assert not is_fake_tensor(fake)
        assert log.disabled
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), faking(mode):
        fail()
    assert is_fake_tensor(fake)
    assert torch._subclasses.FakeTensor is known
    assert not log.disabled


def test_no_modes_hides_all_of_them() -> None:
    """Inside, ops are real ones that no mode sees; outside of it, all is as before."""
    mode = FakeTensorMode()
    with faking(mode):
        with no_modes():
            assert torch.ones(2).tolist() == [1, 1]
        assert isinstance(torch.ones(2), FakeTensor)


def test_bodies_of_overloads():
    """The body of an overload does what calling it does, under a mode too; what has no body is its own."""
    x = small_batch(0)
    overload = torch.ops.aten.add.Tensor
    with Names() as names:
        result = body_of(overload)(x, x, alpha=2)
    assert torch.equal(result, overload(x, x, alpha=2))
    assert names.names == ["add"]
    assert body_of(len) is len


def test_arguments_of_a_call() -> None:
    """A global forward pre-hook finds the keyword arguments of the call too, as earlier hooks have left them."""
    module, seen = torch.nn.Bilinear(2, 2, 2), []
    first = register_module_forward_pre_hook(lambda module, args: (args[0] + 1,))
    hook = register_module_forward_pre_hook(lambda module, args: seen.append(torch_private.arguments_of(module)))
    try:
        module(torch.ones(1, 2), input2=torch.ones(3, 2)[:1])
    finally:
        first.remove()
        hook.remove()
    ((args, kwargs),) = seen
    assert [arg.tolist() for arg in args] == [[[2.0, 2.0]]]
    assert kwargs.keys() == {"input2"}
    with pytest.raises(LookupError, match="no call of Bilinear is running"):
        torch_private.arguments_of(module)


# -- the beginning of a backward pass ----------------------------------------------------------------------------------


PASSES: dict[str, tuple[Callable[[Tensor], Any], bool, bool]] = {
    "backward": (lambda x: x.sin().sum().backward(), False, False),
    "backward twice": (lambda x: x.sin().sum().backward(create_graph=True), True, True),
    "backward again": (lambda x: x.sin().sum().backward(retain_graph=True), True, False),
    "autograd.backward": (lambda x: torch.autograd.backward([x.sin().sum()]), False, False),
    "grad": (lambda x: torch.autograd.grad(x.sin().sum(), x), False, False),
    "grad twice": (lambda x: torch.autograd.grad(x.sin().sum(), [x], create_graph=True), True, True),
    "grad again": (lambda x: torch.autograd.grad(x.sin().sum(), [x], retain_graph=True), True, False),
    "grads batched": (lambda x: torch.autograd.grad(x.sin(), x, torch.eye(3), is_grads_batched=True), False, False),
}
"""Each way to begin a backward pass, whether it keeps the graph, and whether it makes one."""


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("way", PASSES)
def test_around_backward(way: str) -> None:
    """Each backward pass that the thread begins in the block, however it is begun, runs in the context given; none
    after it, nor those of other threads."""
    begin, keeps, makes = PASSES[way]
    x, seen = torch.ones(3, requires_grad=True), list[tuple[bool, bool]]()

    @contextmanager
    def around(outputs: Sequence[Tensor], retain_graph: bool, create_graph: bool) -> Iterator[None]:
        assert current_graph_task() == -1
        assert [type(output.grad_fn) for output in outputs] in ([type(x.sum().grad_fn)], [type(x.sin().grad_fn)])
        seen.append((retain_graph, create_graph))
        yield

    engine = torch.autograd._engine_run_backward
    with around_backward(around):
        begin(x)
        other = threading.Thread(target=begin, args=(x,))
        other.start()
        other.join()
    begin(x)
    assert seen == [(keeps, makes)]
    assert torch.autograd._engine_run_backward is engine


def test_around_backward_inside_of_another() -> None:
    """The outer one is entered first, the inner one inside of it, until it ends."""
    x, seen = small_batch(0).requires_grad_(), list[str]()

    def around(name: str) -> Around:
        return lambda outputs, retain_graph, create_graph: nullcontext(seen.append(name))

    with around_backward(around("outer")):
        with around_backward(around("inner")):
            x.sum().backward()
        x.sum().backward()
    assert seen == ["outer", "inner", "outer"]


def test_around_backward_leaves_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody else has taken the engine's place, nothing is put there; and what somebody puts there meanwhile
    stays, and still works after the block."""
    x, seen = small_batch(0).requires_grad_(), list[str]()

    def place(name: str) -> Callable[..., Any]:
        inner = torch.autograd._engine_run_backward

        def run(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return inner(*args, **kwargs)

        return run

    def around(outputs: Sequence[Tensor], retain_graph: bool, create_graph: bool) -> AbstractContextManager[None]:
        return nullcontext(seen.append("ours"))

    theirs = place("theirs")
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "_engine_run_backward", theirs)
        with around_backward(around):
            x.sum().backward()
        assert torch.autograd._engine_run_backward is theirs
    assert seen == ["theirs"]
    seen.clear()
    with monkeypatch.context() as patch:
        with around_backward(around):
            patch.setattr(torch.autograd, "_engine_run_backward", place("later"))
            x.sum().backward()
        x.sum().backward()
        with around_backward(around):
            x.sum().backward()
    assert seen == ["later", "ours", "later", "later", "ours"]
    with around_backward(around):  # the patch has put back what it found
        pass
    assert torch.autograd._engine_run_backward is torch.autograd.graph._engine_run_backward


def test_reaches() -> None:
    """Numbers of nodes tell whether a backward pass comes by what a stretch of code made: through views, writes in
    place and custom functions. Passes through other graphs, older or newer, do not."""
    x, other = small_batch(0).requires_grad_(), small_batch(1).requires_grad_()
    older = other.sin()
    first = nodes_made()
    inner = Doubled.apply(x.cos() * older.detach())
    end = nodes_made()
    written = other * 2
    written[0].mul_(inner[0])
    for loss in (inner, inner.t(), (inner.exp() + older).sum(), written.sum()):
        assert reaches([loss], first, end)
        assert reaches([older, loss], first, end)
        assert reaches([GradientEdge(loss.grad_fn, 0)], first, end)
    for loss in (older, older.exp(), (other * 3).sum(), x, inner.detach(), inner.detach() * other):
        assert not reaches([loss], first, end)


def test_reaches_looks_at_each_node_once() -> None:
    """A graph with as many ways through it as would take for ever is looked at in no time."""
    x = small_batch(0).requires_grad_()
    first = nodes_made()
    for _ in range(200):
        x = x + x
    assert not reaches([x], first, first)


@pytest.mark.parametrize("above", [False, True])
def test_left(above: bool) -> None:
    """A mode that is left before a backward pass sees none of its ops, and all after it; it is not left where another
    is active too."""
    x, ours, theirs = small_batch(0).requires_grad_(), Names(), Names()
    with ours, theirs if above else nullcontext():
        loss = x.sin().sum()
        ours.names.clear()
        with left(ours):
            loss.backward()
        assert bool(ours.names) is above
        x.detach().sin()
        assert ours.names[-1] == "sin"


def test_a_mode_left_is_back_after_an_error() -> None:
    """Whatever happens in the block."""
    mode = Names()
    with mode:
        with pytest.raises(ZeroDivisionError), left(mode):
            1 / modes()
        assert modes() == 1


def test_called_by_engine() -> None:
    """Formulas of PyTorch's and the accumulation of gradients are called by the engine; what hooks and custom functions
    run is not."""
    calls: dict[str, list[bool]] = {}

    class Callers(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if current_graph_task() != -1:
                calls.setdefault(str(func), []).append(called_by_engine())
            return func(*args, **(kwargs or {}))

    def backward(y: Tensor) -> set[bool]:
        calls.clear()
        with Callers():
            y.sum().backward()
        return {call for name, found in calls.items() for call in found if name != "aten.expand.default"}

    x = small_batch(0).requires_grad_()
    for _ in range(2):
        assert backward(x.sin().cos()) == {True}
    assert backward(Doubled.apply(x.sin())) == {True, False}
    y = x.sin()
    y.register_hook(lambda grad: grad * 2)
    assert backward(y) == {True, False}
    x.register_post_accumulate_grad_hook(lambda x: setattr(x, "grad", x.grad * 2))
    assert backward(x.sin()) == {True, False}


def test_hooked() -> None:
    """Hooks of the backward pass are known by their tensors and modules, and nothing else is."""
    for register in (
        lambda tensor: tensor.register_hook(print),
        lambda tensor: tensor.register_post_accumulate_grad_hook(print),
    ):
        tensor = small_batch(0).requires_grad_()
        assert not hooked(tensor)
        register(tensor)
        assert hooked(tensor)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model.register_forward_hook(lambda *_: None)
    model[0].register_state_dict_pre_hook(lambda *_: None)
    assert not any_hooked(model)
    for register in (
        model[0].register_full_backward_hook,
        model[1].register_full_backward_pre_hook,
        model[1].bias.register_hook,
        torch.nn.modules.module.register_module_full_backward_hook,
        torch.nn.modules.module.register_module_full_backward_pre_hook,
    ):
        handle = register(print)
        assert any_hooked(model)
        handle.remove()
    model[0].weight.register_post_accumulate_grad_hook(print)
    assert any_hooked(model)
