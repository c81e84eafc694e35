"""The one place for PyTorch APIs that are not public, each with the reason it is needed.

Tested on torch 2.13.0 (CPU) and 2.11.0 (CPU, CUDA). `tests/eager/test_torch_private.py` checks each fact stated here,
so that a new torch version which breaks one fails there first.

* Version counters. A tensor made inside `__torch_dispatch__` has a version counter of its own, because the kernel that
  shares it (`ADInplaceOrView`) has already run. `alias` switches that kernel back on for one `detach`. Which tensors
  share a counter only shows when it moves; `set_versions` moves it back.
* Dispatch level. Recorded calls were seen below autograd, autocast and every mode; they must be repeated there, or
  autocast would cast twice and our own recorder would record the repetition.
* Dynamo. `TorchDispatchMode` wraps its handler in `torch._dynamo.disable`, a third of what a mode costs per op.
  `never_compile` tells Dynamo's frame evaluator the same once and for all.
* Reports of the allocators. Temporaries inside a kernel show up nowhere else. `torch.profiler` reads them too, but
  takes milliseconds to start; the older profiler beneath it takes microseconds. Only one can be on: while the user's
  profiler runs, nothing is measured.
* References to a storage. Whether letting go of a tensor frees its bytes depends on who else looks at them.
* Graph tasks. The engine numbers each backward pass and runs callbacks at its end. There is no public way to learn
  either. FSDP and DDP use the same two calls.
* The beginning of a backward pass. The engine takes a copy of the modes that are active, so who wants to be out of one
  has to leave before. `around_backward` puts a function in the place through which `backward` and `grad` call the
  engine, as PyTorch's own `torch.compiler` does, while a session is entered on some thread. A `TorchFunctionMode` would
  be public, but does not see `torch.autograd.backward`, costs a microsecond for each call of PyTorch in the forward
  pass, and has Dynamo compile everything once more.
* Hooks of the backward pass. Modules and tensors have theirs in attributes that are not documented.
* Calls of modules. PyTorch runs its `always_call` hooks after an Exception, but not after a KeyboardInterrupt; only the
  stack of frames tells that such a call is over. Global pre-hooks are not shown keyword arguments, though most models
  are called with them; the frame that calls such a hook has them.
* What is active. Modes and saved-tensor hooks are left in the order opposite to that in which they were entered. Who
  leaves them in the middle of a step has to know that nobody entered others since.
* Members of modules. `parameters()`, `buffers()` and `modules()` take most of a millisecond for a model of some hundred
  modules; the dictionaries that they read take a tenth of that.
* Disabled hooks. Code that cannot bear saved-tensor hooks disables them, and says why to whoever asks.
* Compiled code. Inductor's kernels are seen by no dispatcher, and write into what the ops around them made. Only the
  stack of frames tells that an op was called by such code.
* Keys of hooks. Dynamo guards the keys of the global module hooks, so a hook that comes back has to come back under the
  key it had, or each step would compile again.
* Nodes. The engine knows which node of the graph it is running, and nodes have numbers and names; the numbers count up
  on each thread, so that those of a stretch of code are known by theirs. Formulas of some of them ask whether a
  dispatch mode is active, and the engine puts back after each node whatever that has changed of it.
* Lazy conjugation. A handler runs with the kernels excluded that carry it out, though what it calls may need them.
* Fake tensors. A step without bytes: they are what PyTorch's own compiler traces with, and have no public home.
* Bodies of overloads. Calling an overload is a Python call whose only line calls the dispatcher: one call too many for
  what is done at every op.
* Streams. Asking for the current one makes an object, twenty times the cost of asking for its number.
* oneDNN. Which short floats it convolves depends on the CPU, and decides what a convolution takes for itself.
* Fused attention. Which kernel a CUDA device takes is decided by a device that may not be there.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch._C._autograd import _disable_profiler_legacy, _enable_profiler_legacy, _profiler_enabled
from torch._C._dynamo import eval_frame
from torch._C._profiler import ProfilerConfig, ProfilerState
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.hooks import RemovableHandle

_AD_INPLACE_OR_VIEW = torch._C.DispatchKey.ADInplaceOrView
_LAZY = (torch._C.DispatchKey.Conjugate, torch._C.DispatchKey.Negative)

current_graph_task: Callable[[], int] = torch._C._current_graph_task_id
"""The number of the backward pass running on this thread, -1 outside of one."""


stream_number: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)
"""The number of the stream that is current on a CUDA device."""


def body_of(overload: Any) -> Callable[..., Any]:
    """What calling an overload calls in turn; the overload itself where that is not there."""
    body: Callable[..., Any] = getattr(overload, "_op", overload)
    return body


def current_node() -> int:
    """The number of the autograd node running on this thread, -1 outside of a backward pass."""
    node: Any = torch._C._current_autograd_node()
    return int(node._sequence_nr()) if node is not None else -1


flash_attention: Callable[..., Any] = torch.ops.aten._scaled_dot_product_flash_attention.default
"""The attention of CUDA devices for short floats without a mask. Its first result is the output."""
efficient_attention: Callable[..., Any] = torch.ops.aten._scaled_dot_product_efficient_attention.default
"""The attention of CUDA devices for all else. Its first result is the output."""
SHORT_FLOATS_BY_ONEDNN: frozenset[torch.dtype] = frozenset(
    dtype
    for dtype, name in ((torch.bfloat16, "_is_mkldnn_bf16_supported"), (torch.float16, "_is_mkldnn_fp16_supported"))
    if hasattr(torch.ops.mkldnn, name) and getattr(torch.ops.mkldnn, name)()
)
"""The short types that oneDNN convolves on this CPU; none where PyTorch was built without it."""
FAKE_ERRORS = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedOperatorException,
    fake_tensor.UnsupportedFakeTensorException,
)
"""What fake tensors raise for ops whose result, or its shape, they cannot tell."""
no_modes: Callable[[], AbstractContextManager[Any]] = _disable_current_modes
"""Runs one block outside of all modes. A fake tensor finds the mode that it belongs to by itself."""


@contextmanager
def faking(mode: FakeTensorMode) -> Iterator[None]:
    """Runs one block in which ops make fake tensors.

    These are not known as such to those who ask for `torch._subclasses.FakeTensor`: Transformers does, and then takes
    another way than in a real step (it builds masks that it would leave out). What fails is not logged, only raised.
    """
    known, log = torch._subclasses.FakeTensor, logging.getLogger(fake_tensor.__name__)
    was_disabled, log.disabled = log.disabled, True
    torch._subclasses.FakeTensor = _Nobody  # type: ignore[misc, assignment]
    try:
        with mode:
            yield
    finally:
        log.disabled = was_disabled
        torch._subclasses.FakeTensor = known  # type: ignore[misc]


class _Nobody:
    """What no tensor is."""


def step_aside(
    mode: TorchDispatchMode, nodes: Collection[str] | None, back: Callable[[str, Any], None] | None = None
) -> str:
    """Take `mode` away until the running autograd node ends, if its name is among `nodes`; if these are None, if it is
    one of PyTorch's own, generated from a formula: those are numbered, as custom functions are not. Not if there are
    other modes: plain PyTorch would run under these.

    With `back`, the mode is there again for what autograd does with the gradients that the node returned: they are
    added up, if others have come. `back(name, gradients)` is called before. Returns the name of the node if
    the mode was taken away now and comes back so, else nothing.
    """
    if not _is_alone(mode) or (node := torch._C._current_autograd_node()) is None:
        return ""
    name: str = node.name()
    if not (name[-1].isdigit() if nodes is None else name in nodes):
        return ""
    torch._C._pop_torch_dispatch_stack(None)
    if back is None:
        return ""
    _come_back(mode, node, name, back)
    return name


def _is_alone(mode: TorchDispatchMode) -> bool:
    """Whether `mode` is the one dispatch mode that is active."""
    return torch._C._len_torch_dispatch_stack() == 1 and torch._C._get_dispatch_stack_at(0) is mode


def _come_back(mode: TorchDispatchMode, node: Any, name: str, back: Callable[[str, Any], None]) -> None:
    graph_task = current_graph_task()

    def hook(gradients: Any, _: Any) -> None:
        handle.remove()
        if current_graph_task() == graph_task:  # else the node failed then, and runs again
            torch._C._push_on_torch_dispatch_stack(mode)
            back(name, gradients)

    handle = node.register_hook(hook)


Around: TypeAlias = Callable[[Sequence[Any], bool, bool], AbstractContextManager[None]]
_autograd: Any = torch.autograd
_run_backward: Callable[..., Any] = torch.autograd.graph._engine_run_backward
_around: dict[int, list[Around]] = {}  # by thread, the newest last
_around_lock = threading.Lock()


def _run_backward_around(outputs: Any, gradients: Any, retain: bool, create: bool, *rest: Any, **more: Any) -> Any:
    with ExitStack() as stack:
        for around in tuple(_around.get(threading.get_ident(), ())):
            stack.enter_context(around(outputs, retain, create))
        return _run_backward(outputs, gradients, retain, create, *rest, **more)


@contextmanager
def around_backward(around: Around) -> Iterator[None]:
    """Runs one block in which each backward pass that this thread begins runs in `around(outputs, retain_graph,
    create_graph)`, inside of what was asked for earlier. `outputs` is what it begins from.

    Not if somebody else has taken that place.
    """
    thread = threading.get_ident()
    try:
        with _around_lock:
            if _autograd._engine_run_backward is _run_backward:
                _autograd._engine_run_backward = _run_backward_around
            _around.setdefault(thread, []).append(around)
        yield
    finally:
        with _around_lock:
            _around[thread].remove(around)
            if not _around[thread]:
                del _around[thread]
            if not _around and _autograd._engine_run_backward is _run_backward_around:
                _autograd._engine_run_backward = _run_backward


def nodes_made() -> int:
    """The number that the next autograd node gets that is made on this thread."""
    return int(torch._C._autograd._get_sequence_nr())


def reaches(outputs: Sequence[Any], first: int, end: int) -> bool:
    """Whether a backward pass that begins from `outputs`, tensors or edges of the graph, comes by a node whose number
    is from `first` on and before `end`. Nodes lead to those of smaller numbers, if one thread has made them all."""
    waiting = [output.grad_fn if isinstance(output, torch.Tensor) else output.node for output in outputs]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        number = node._sequence_nr()
        if first <= number < end:
            return True
        if number >= end:  # those that add to a gradient have the largest number, and lead nowhere
            waiting += [following for following, _ in node.next_functions]
    return False


@contextmanager
def left(mode: TorchDispatchMode) -> Iterator[None]:
    """Runs one block out of `mode`, if no other is active."""
    if not _is_alone(mode):
        yield
        return
    torch._C._pop_torch_dispatch_stack(None)
    try:
        yield
    finally:
        torch._C._push_on_torch_dispatch_stack(mode)


def called_by_engine() -> bool:
    """Whether the engine's own code called the op which is dispatched now, and no hook or custom function."""
    try:
        caller = sys._getframe(2)
    except ValueError:  # the engine's own threads
        return True
    return caller.f_code is _run_backward.__code__


def hooked(tensor: torch.Tensor) -> bool:
    """Whether hooks were registered on a tensor that run in the backward pass."""
    return tensor._backward_hooks is not None or tensor._post_accumulate_grad_hooks is not None


def any_hooked(module: torch.nn.Module) -> bool:
    """Whether a module, or anything inside it, has hooks that run in the backward pass."""
    shared = torch.nn.modules.module
    if shared._global_backward_hooks or shared._global_backward_pre_hooks:
        return True
    modules, parameters, _ = members_of(module)
    return any(part._backward_hooks or part._backward_pre_hooks for part in modules) or any(map(hooked, parameters))


@contextmanager
def conjugating() -> Iterator[None]:
    """Have lazy conjugation carried out by what is called inside `__torch_dispatch__`."""
    guard = torch._C._SetExcludeDispatchKeyGuard
    with guard(_LAZY[0], False), guard(_LAZY[1], False):
        yield


without_dispatch_modes: Callable[[], AbstractContextManager[Any]] = torch._C._DisableTorchDispatch
"""Hides one block from every `TorchDispatchMode`; autograd still sees it, so aliases share their version counter."""


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """A detached alias that shares the version counter, made from inside `__torch_dispatch__`."""
    with torch._C._SetExcludeDispatchKeyGuard(_AD_INPLACE_OR_VIEW, False):
        return tensor.detach()


def set_versions(tensors: Sequence[torch.Tensor], versions: Sequence[int]) -> None:
    """Set the version counters of tensors."""
    torch._C._autograd._unsafe_set_version_counter(tuple(tensors), tuple(versions))


def never_compile(function: Callable[..., Any]) -> None:
    """Keep Dynamo out of a function and of all that it calls."""
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))


def when_backward_ends(callback: Callable[[], None]) -> None:
    """Call `callback` when the backward pass that runs now has finished. It is not called if that pass raises."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def calls_running(module: torch.nn.Module) -> int:
    """How many calls of a module are on the stack of this thread."""
    code = torch.nn.Module._call_impl.__code__
    count, frame = 0, sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        count += frame.f_code is code and frame.f_locals.get("self") is module
    return count


def arguments_of(module: torch.nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the innermost call of a module, asked for by one of the global forward pre-hooks."""
    code = torch.nn.Module._call_impl.__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == code.co_filename and frame.f_locals.get("self") is module:
            known = frame.f_locals
            if "args" in known and "kwargs" in known:
                return tuple(known["args"]), dict(known["kwargs"])
        frame = frame.f_back
    raise LookupError(f"no call of {type(module).__name__} is running")


def members_of(module: torch.nn.Module) -> tuple[list[torch.nn.Module], list[torch.Tensor], list[torch.Tensor]]:
    """A module and all inside it, with their parameters and their buffers; those that several modules share, once for
    each."""
    modules: dict[int, torch.nn.Module] = {}
    waiting: list[Any] = [module]
    parameters: list[torch.Tensor] = []
    buffers: list[torch.Tensor] = []
    while waiting:
        part = waiting.pop()
        if part is None or id(part) in modules:
            continue
        modules[id(part)] = part
        waiting += part._modules.values()
        parameters += [tensor for tensor in part._parameters.values() if tensor is not None]
        buffers += [tensor for tensor in part._buffers.values() if tensor is not None]
    return list(modules.values()), parameters, buffers


def in_compiled_code() -> bool:
    """Whether code that Inductor made called the op which is dispatched now."""
    inductor = sys.modules.get("torch._inductor.output_code")
    if inductor is None:
        return False
    stop = torch.nn.Module._call_impl.__code__  # such code calls no module
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not stop:
        if frame.f_code.co_filename == inductor.__file__:
            return True
        frame = frame.f_back
    return False


def put_back(handle: RemovableHandle, hook: Callable[..., Any]) -> None:
    """Register a hook again, under the key of one that was removed."""
    for place, item in ((handle.hooks_dict_ref, hook), *((extra, True) for extra in handle.extra_dict_ref)):
        hooks = place()
        assert hooks is not None
        hooks[handle.id] = item


def in_func_transform() -> bool:
    """Whether a `torch.func` transform is active, under which saved-tensor hooks are refused."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def use_count(storage: torch.UntypedStorage) -> int:
    """How many tensors look at a storage, and one more for the Python object that was passed here."""
    return int(torch._C._storage_Use_Count(storage._cdata))


class AllocatorWatch:
    """Adds up what the allocators of the CPU and of CUDA report on this thread inside a `with` block.

    Attributes:
        nbytes: allocated and not freed.
        peak_nbytes: the most there was at any moment.
        worked: False if another profiler was on, and nothing was added up.
    """

    __slots__ = ("nbytes", "peak_nbytes", "worked")

    _config = ProfilerConfig(
        ProfilerState.CPU, False, True, False, False, False, torch._C._profiler._ExperimentalConfig()
    )

    def __enter__(self) -> AllocatorWatch:
        self.nbytes = self.peak_nbytes = 0
        self.worked = not _profiler_enabled()
        if self.worked:
            _enable_profiler_legacy(self._config)
        return self

    def __exit__(self, *error: object) -> None:
        if not self.worked:
            return
        for record in chain.from_iterable(_disable_profiler_legacy()):
            if str(record.kind()) == "memory_alloc":
                self.nbytes += record.cpu_memory_usage() + record.cuda_memory_usage()
                self.peak_nbytes = max(self.peak_nbytes, self.nbytes)


def hooks_refused() -> str | None:
    """Why saved-tensor hooks are refused here, by `torch.autograd.graph.disable_saved_tensors_hooks`; None if not."""
    message: str | None = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    return message


def modes_and_hooks() -> tuple[tuple[Any, ...], tuple[Any, Any] | None]:
    """The dispatch modes that are active on this thread, the innermost last, and the innermost saved-tensor hooks."""
    modes = tuple(torch._C._get_dispatch_stack_at(i) for i in range(torch._C._len_torch_dispatch_stack()))
    hooks: tuple[Any, Any] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return modes, hooks


class _Probe(TorchDispatchMode):
    """Reads the dispatcher's thread-local state as a mode's handler sees it."""

    include: Any
    exclude: Any

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper would import all of Dynamo

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.include = torch._C._dispatch_tls_local_include_set()
        self.exclude = torch._C._dispatch_tls_local_exclude_set()
        return func(*args, **(kwargs or {}))


def _handler_level() -> tuple[Any, Any]:
    probe = _Probe()  # type: ignore[no-untyped-call]
    with _disable_current_modes(), probe, torch.no_grad():  # no mode is to see this op, our recorder least of all
        torch.empty(0)
    include = probe.include
    for key in (torch._C.DispatchKey.Python, torch._C.DispatchKey.PythonTLSSnapshot):
        include = include.remove(key)
    return include, probe.exclude


_LEVEL: list[tuple[Any, Any]] = []


def at_recorded_level() -> AbstractContextManager[Any]:
    """Run a block where recorded calls were seen: below autograd, autocast, functorch and every mode."""
    if not _LEVEL:
        _LEVEL.append(_handler_level())
    return torch._C._ForceDispatchKeyGuard(*_LEVEL[0])


never_compile(_run_backward_around)
