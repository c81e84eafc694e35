"""Fake tensors: a device, a dtype and a geometry, and no bytes. A step can be recorded on them at no cost.

They are the one tensor subclass that the recorder does not ask to desugar: what PyTorch does to a fake tensor is what
it would do to a plain one of the device that the fake claims to be on, down to the kernel of the attention.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from rekindle._errors import RehearsalError
from rekindle.record.activation import Op
from rekindle.record.aliasing import Window, window_of
from rekindle.record.cost import Cost
from rekindle.record.kernels import temporaries, tensors_of
from rekindle.record.modules import ModuleCall, gradient_of
from rekindle.record.recorder import Recorder
from rekindle.record.schema import traits_of
from rekindle.record.sizes import made_nbytes
from rekindle.record.torch_private import (
    FAKE_ERRORS,
    FakeTensor,
    FakeTensorMode,
    efficient_attention,
    flash_attention,
    no_modes,
)
from rekindle.record.writes import written_tensors

Tensor = torch.Tensor

_CURE = (
    "A rehearsal has no data to look at. Record a real step instead: run one in "
    "rekindle.Session(memory_budget=...), which plans from what it sees."
)
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_KNOWN = 1 << 23  # bytes; what larger tensors hold is not followed
_PHILOX = 16  # bytes: the state of a generator on an accelerator is a seed and an offset


class Fakes:
    """Fakes of real tensors. Tensors that share a storage become fakes that share one.

    Attributes:
        mode: under which ops make fake tensors.
        device: where all fakes are, whatever the originals were on.
        kind: of the device that they stand for, which may be another one.
        contents: what some of them hold.
    """

    def __init__(self, device: torch.device, kind: str) -> None:
        self.mode = FakeTensorMode(allow_fallback_kernels=False, allow_non_fake_inputs=True)
        self.device, self.kind = device, kind
        self.contents = Contents()
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # the originals too, so that no other tensor gets their `id`

    def of(self, tensor: Tensor) -> Tensor:
        """The fake of a tensor: always the same one.

        Raises:
            RehearsalError: it has no plain storage, as sparse tensors.
        """
        known = self._made.get(id(tensor))
        if known is not None:
            return known[1]
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError) as error:
            raise RehearsalError(f"a {tensor.layout} tensor cannot be rehearsed with. {_CURE}") from error
        shared = self._storages.get(storage._cdata)
        if shared is None:
            shared = self._storages[storage._cdata] = torch.UntypedStorage(storage.nbytes(), device="meta")
            if not tensor.is_floating_point():
                self.contents.put(shared, storage)
        fake = self.look(shared, window_of(tensor))
        if isinstance(tensor, torch.nn.Parameter):
            fake = torch.nn.Parameter(fake, tensor.requires_grad)
        elif tensor.requires_grad:
            fake.requires_grad_()
        self._made[id(tensor)] = tensor, fake
        return fake

    def forget(self) -> None:
        """Let go of the originals, and of what is known of them: cycles would keep them until somebody collects."""
        self._made.clear()
        self._storages.clear()
        self.contents.forget()

    def look(self, storage: torch.UntypedStorage, window: Window, device: torch.device | None = None) -> Tensor:
        """The fake tensor that is a window onto a fake storage."""
        with torch.no_grad(), no_modes():
            fake: Tensor = FakeTensor(self.mode, _tensor(storage, window), device or self.device)
            return _lazy(fake, window)

    def new(self, tree: Any, device: torch.device) -> Any:
        """What an op would return on `device`, from what it returned for real."""
        if isinstance(tree, (list, tuple)):
            return type(tree)(self.new(item, device) for item in tree)
        if not isinstance(tree, Tensor):
            return tree
        storage = tree.untyped_storage()
        fake = torch.UntypedStorage(storage.nbytes(), device="meta")
        self.contents.put(fake, storage)
        return self.look(fake, window_of(tree), device)

    def copy(self, tree: Any) -> Any:
        """A deep copy in which every tensor is fake.

        Raises:
            RehearsalError: something in it cannot be copied.
        """
        try:
            with _Copying(self):
                return copy.deepcopy(tree)
        except RehearsalError:
            raise
        except Exception as error:
            raise RehearsalError(
                f"the model and its inputs cannot be copied: {type(error).__name__}: {error}. A rehearsal runs on a "
                "copy with fake tensors, so that the original is not touched. Make copy.deepcopy(model) work, or "
                "record a real step: run one in rekindle.Session(memory_budget=...)."
            ) from error

    def copy_gradients(self, model: torch.nn.Module, copied: torch.nn.Module) -> None:
        """Give the parameters of a copy fakes of the gradients that the originals have; deep copies have none.

        Raises:
            RehearsalError: one has no plain storage, as sparse gradients.
        """
        copies = dict(copied.named_parameters())
        for name, parameter in model.named_parameters():
            gradient = gradient_of(parameter)
            if name in copies and gradient is not None:
                copies[name].grad_dtype = gradient.dtype
                copies[name].grad = self.of(gradient)


class _Copying(TorchFunctionMode):
    """Makes the deep copy of a tensor a fake. That of a parameter is made of a clone of its data."""

    def __init__(self, fakes: Fakes) -> None:
        super().__init__()
        self._fakes = fakes

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__deepcopy__:
            tensor, memo = args
            return memo.setdefault(id(tensor), self._fakes.of(tensor))
        if func == _DATA:
            return self._fakes.of(args[0])
        if func is torch.Tensor.clone:
            return args[0]
        return func(*args, **(kwargs or {}))


class Contents:
    """What small tensors of integers and booleans hold: masks, positions, lengths.

    Steps look at those to decide what to do, and can do so in a rehearsal if all that they were made of is known.
    """

    def __init__(self) -> None:
        self._real: dict[int, tuple[weakref.ref[torch.UntypedStorage], torch.UntypedStorage]] = {}

    def put(self, fake: torch.UntypedStorage, real: torch.UntypedStorage) -> None:
        """Note that a fake storage holds what a real one does now."""
        if real.device.type == "meta" or not 0 < real.nbytes() <= _KNOWN:
            return
        with no_modes():
            content = real.cpu() if real.device.type != "cpu" else real.clone()
        key = fake._cdata
        self._real[key] = weakref.ref(fake, lambda _: self._real.pop(key, None)), content

    def forget(self) -> None:
        """Know nothing any more."""
        self._real.clear()

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What an op returns for real; it writes to what is known here.

        Raises:
            LookupError: something that it reads is not known, or it draws at random.
        """
        traits = traits_of(func)
        if traits.random or traits.uninitialised:
            raise LookupError(traits.name)
        with no_modes():
            return func(*self._read(args), **{name: self._read(arg) for name, arg in kwargs.items()})

    def follow(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Note what an op returned and wrote, or that nobody knows."""
        made = tensors_of([result])
        try:
            if not made or not all(map(_may_be_known, made)):
                raise LookupError
            real = tensors_of([self.run(func, args, kwargs)])
        except LookupError:
            for tensor in written_tensors(traits_of(func), args, kwargs):
                self._real.pop(tensor.untyped_storage()._cdata, None)
            return
        for fake, content in zip(made, real, strict=True):
            same = window_of(fake) == window_of(content)
            if fake.untyped_storage()._cdata not in self._real and same:
                self.put(fake.untyped_storage(), content.untyped_storage())

    def _read(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return self._content(tree)
        if isinstance(tree, (list, tuple)):
            return [self._read(item) for item in tree]
        return torch.device("cpu") if isinstance(tree, torch.device) else tree

    def _content(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, FakeTensor):
            return tensor
        window = window_of(tensor)
        return _lazy(_tensor(self._real[tensor.untyped_storage()._cdata][1], window), window)


def _may_be_known(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) and tensor.untyped_storage().nbytes() <= _KNOWN


def _tensor(storage: torch.UntypedStorage, window: Window) -> Tensor:
    """The plain tensor that is a window onto a storage, but for what it does lazily."""
    size, stride, offset, dtype = window[:4]
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, size, stride)


def _lazy(tensor: Tensor, window: Window) -> Tensor:
    if len(window) == 4:
        return tensor
    tensor = tensor.conj() if window[4] else tensor
    return tensor._neg_view() if window[5] else tensor


class AsOnCuda(TorchFunctionMode):
    """Has attention and dropout take the kernels that they would take on a CUDA device.

    PyTorch cannot differentiate fake tensors of a device that is not there, so these claim to be on the CPU.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _cuda_attention(*args, **(kwargs or {}))
        if func is torch.nn.functional.dropout:
            return _cuda_dropout(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _cuda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention for short floats without a mask, else the memory-efficient kernel, as PyTorch prefers them."""
    flash = attn_mask is None and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256
    if flash and query.shape[-1] % 8 == 0:
        out: Tensor = flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        return out
    if enable_gqa and (groups := query.shape[-3] // key.shape[-3]) > 1:
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    bias = attn_mask
    if bias is not None:
        if bias.dtype is torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(~bias, -torch.inf)
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    saves = query.requires_grad or key.requires_grad or value.requires_grad
    out = efficient_attention(query, key, value, bias, saves, dropout_p, is_causal, scale=scale)[0]
    return out


def _cuda_dropout(func: Any, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or inplace or not 0 < p < 1:
        return func(x, p, training, inplace)  # type: ignore[no-any-return]
    return torch.native_dropout(x, p, True)[0]


class FakeRecorder(Recorder):
    """Records a step on fake tensors as if they were plain ones."""

    def __init__(self, fakes: Fakes, *rest: Any) -> None:
        super().__init__(*rest)
        self.leaves.is_parameter = lambda tensor: isinstance(tensor, torch.nn.Parameter)
        self._contents = fakes.contents
        self._state_nbytes = torch.get_rng_state().nbytes if fakes.kind == "cpu" else _PHILOX

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "prim":  # a fake tensor being asked for its device
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten.lift_fresh.default and not types:  # what is written out in code: torch.tensor([1, 2])
            fake = func(*args)
            self._contents.put(fake.untyped_storage(), args[0].untyped_storage())
            return fake
        others = [cls for cls in types if not issubclass(cls, FakeTensor)]
        return super().__torch_dispatch__(func, others, args, kwargs)

    def _state(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[torch.Generator, Tensor]:
        """Bytes for the state of a generator; none is looked at, and none is drawn from."""
        return torch.default_generator, torch.empty(self._state_nbytes, dtype=torch.uint8)

    def _drew(self, op: Op, generator: torch.Generator, state: Tensor) -> bool:
        """Whether a real op would have drawn, by its arguments."""
        named = {argument.name: arg for argument, arg in zip(op.func._schema.arguments, op.args, strict=False)}
        named.update(op.kwargs)
        if not named.get("train", True) or not named.get("training", True):
            return False
        return not any(named.get(name) == 0 for name in ("dropout_p", "dropout"))


class FakeRoom:
    """Runs ops that allocate nothing, and says what they would take."""

    watches = measures = True

    def __init__(self, fakes: Fakes, cost: Cost) -> None:
        self.hungry: set[str] = set()
        self.seconds = 0.0
        self.temporaries = 0
        self._fakes = fakes
        self._cost = cost

    def run(
        self,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        call: ModuleCall,
        random: tuple[torch.Generator, Tensor] | None = None,
    ) -> Any:
        """Run an op.

        Raises:
            RehearsalError: it needs data, or PyTorch does not know what it returns.
        """
        contents = self._fakes.contents
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            try:
                real = contents.run(func, args, kwargs)
            except LookupError:
                raise _cannot(func, call, error) from error
            result = self._fakes.new(real, next(tensor.device for tensor in tensors_of(args)))
        else:
            contents.follow(func, args, kwargs, result)
        if self._fakes.kind == "cpu":
            nbytes = made_nbytes(func, args, kwargs, result)
            self.temporaries = temporaries(func, args, kwargs, nbytes) or 0
        self.seconds = self._cost(func, args, kwargs, result)
        return result

    def rescue(self, error: torch.OutOfMemoryError, *rest: Any) -> Any:
        """Nothing is allocated, so nothing can run out: `error` is raised again."""
        raise error

    def make(self, nbytes: int, func: Any, call: ModuleCall) -> None:
        """There is always room."""


def _cannot(func: Any, call: ModuleCall, error: Exception) -> RehearsalError:
    where = f"{func} in {call.describe()}"
    if isinstance(error, FAKE_ERRORS):
        return RehearsalError(f"{where} depends on the content of a tensor. {_CURE}")
    return RehearsalError(
        f"{where} failed on tensors without data: {type(error).__name__}: {error}. If it works in a real step, record "
        "that instead: run one in rekindle.Session(memory_budget=...), which plans from what it sees."
    )
