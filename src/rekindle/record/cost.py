"""Seconds and FLOPs of an op, from its arguments alone.

Problem: a plan for a device that is not there needs to know what recomputing costs on it.
Source: the roofline model (Williams, Waterman, Patterson: "Roofline: an insightful visual performance model", CACM
2009): an op takes as long as its arithmetic at the peak rate or its bytes at the peak bandwidth, whichever is longer,
and no less than a launch. FLOPs are PyTorch's own formulas (`torch.utils.flop_counter`); bytes are those of the
arguments and results, each moved once. Rates are published ones, without sparsity:

* A100 SXM, 80 GB: NVIDIA A100 Tensor Core GPU data sheet (2021).
* H100 SXM, 80 GB: NVIDIA H100 Tensor Core GPU data sheet (2022), H100 architecture white paper, table 2.
* H200 SXM, 141 GB: NVIDIA H200 Tensor Core GPU data sheet (2024).
* RTX 4090: NVIDIA Ada GPU architecture white paper, appendix A; tensor cores that add up in float32.
* CPU: for each thread 32 FLOP a cycle of float32 at 3 GHz (two AVX2 units, Intel's optimization manual, section 2), and
  two channels of DDR4-3200 (JEDEC JESD79-4), of which one thread gets no more than twelve cache lines every 80 ns.

Regime: tells dear ops from cheap ones; to choose what to recompute no more is needed. What is recorded in a real step
has measured seconds instead, unless the session is told otherwise.
Known gaps: no kernel reaches the peak. Causal attention counts as full. Caches are not modelled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from rekindle._errors import RehearsalError
from rekindle.record.kernels import nbytes_of, tensors_of
from rekindle.record.schema import traits_of

Tensor = torch.Tensor
Cost: TypeAlias = Callable[[Any, Sequence[Any], dict[str, Any], Any], float]
"""Seconds of one op, from its overload, its arguments and what it returned."""

_GATHERS = frozenset(f"aten::{name}" for name in ("embedding", "index", "index_select", "gather"))
_CONVOLUTIONS = frozenset(("aten::convolution", "aten::convolution_backward"))
_ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


@dataclass(frozen=True)
class Device:
    """What a device can do.

    Attributes:
        name: what users call it.
        type: what PyTorch calls its kind.
        nbytes: its memory; 0 for the CPU, which has what the machine has.
        bandwidth: bytes of memory it reads or writes in a second.
        flops: floating-point operations in a second, by the name of the type that is multiplied; "tf32" is float32 in
            tensor cores, where the user allows that.
        launch: seconds below which no kernel ends, from Python.
    """

    name: str
    type: str
    nbytes: int
    bandwidth: float
    flops: Mapping[str, float]
    launch: float

    def rate(self, dtype: str) -> float:
        """FLOP/s of a type; that of float32 for one that is not listed."""
        return self.flops.get(dtype, self.flops["float32"])


def _gpu(
    name: str, gigabytes: float, bandwidth: float, half: float, tf32: float, single: float, double: float
) -> Device:
    tera = {"float16": half, "bfloat16": half, "tf32": tf32, "float32": single, "float64": double}
    return Device(
        name, "cuda", int(gigabytes * 1e9), bandwidth * 1e9, {key: rate * 1e12 for key, rate in tera.items()}, 5e-6
    )


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu("a100", 80, 2039, half=312, tf32=156, single=19.5, double=19.5),
        _gpu("h100", 80, 3350, half=989.4, tf32=494.7, single=66.9, double=66.9),
        _gpu("h200", 141, 4800, half=989.4, tf32=494.7, single=66.9, double=66.9),
        _gpu("rtx4090", 24, 1008, half=165.2, tf32=82.6, single=82.6, double=1.29),
    )
}
"""The devices that can be planned for without being there. Gigabytes are taken as powers of ten, which leaves some
room for what the driver keeps."""


def find_device(device: str | torch.device) -> Device:
    """What the device of that name can do: one from `DEVICES` in any spelling, "cpu", or an accelerator that is here.

    Raises:
        RehearsalError: nothing is known about it.
    """
    name = str(device).lower()
    if name == "cpu":
        return _cpu()
    if name.partition(":")[0] == "cuda" and torch.cuda.is_available():
        name = torch.cuda.get_device_properties(device).name.lower()
    plain = "".join(character for character in name if character.isalnum())
    for known in DEVICES.values():
        if known.name in plain:
            return known
    names = ", ".join(map(repr, [*DEVICES, "cpu"]))
    raise RehearsalError(f"nothing is known about what device {str(device)!r} can do. Write one of {names}.")


def seconds(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, device: Device) -> float:
    """What an op takes on a device, by its roofline. Nothing for an op that computes nothing, as a view."""
    nbytes = bytes_moved(func, args, kwargs, result)
    work = flops(func, args, kwargs, result)
    if not nbytes and not work:
        return 0.0
    return max(device.launch, work / device.rate(_multiplied(func, args)), nbytes / device.bandwidth)


class Roofline:
    """Seconds of the ops of a real step by the rooflines of the devices that they run on, which are here."""

    def __init__(self) -> None:
        self._devices: dict[torch.device, Device] = {}

    def __call__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> float:
        """Seconds of one op, from its overload, its arguments and what it returned.

        Raises:
            RehearsalError: nothing is known about the device.
        """
        tensors = tensors_of([result, *args, *kwargs.values()])
        place = tensors[0].device if tensors else torch.device("cpu")
        if place.type == "meta":
            return 0.0
        device = self.of(place)
        try:
            return seconds(func, args, kwargs, result, device)
        except (NotImplementedError, RuntimeError):  # no storage: sparse, opaque layouts
            return device.launch

    def of(self, place: torch.device) -> Device:
        """What a device can do.

        Raises:
            RehearsalError: nothing is known about it.
        """
        known = self._devices.get(place)
        if known is None:
            known = self._devices[place] = find_device(place)
        return known


def flops(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Floating-point operations of an op that multiplies matrices in some way; 0 for others, which memory bounds."""
    name = _name(func)
    if name.startswith(_ATTENTION):
        backward = name.endswith("backward")
        forward = sdpa_flop_count(*(tensor.shape for tensor in tensors_of(args)[1 if backward else 0 :][:3]))
        return int(forward * 5 // 2) if backward else int(forward)  # five products instead of two
    formula = flop_registry.get(getattr(func, "overloadpacket", None))
    return int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0


def bytes_moved(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Bytes that an op reads and writes, each once."""
    traits = traits_of(func)
    read = [*tensors_of(args), *tensors_of(kwargs.values())]
    made = tensors_of([result])
    known = {tensor.untyped_storage()._cdata for tensor in read}
    fresh = [tensor for tensor in made if tensor.untyped_storage()._cdata not in known]
    if traits.uninitialised or not (fresh or traits.writes):
        return 0
    written = sum(map(_extent, made))
    if _name(func) in _GATHERS:
        return 2 * written
    return written + sum(map(_extent, read))


def _extent(tensor: Tensor) -> int:
    """Bytes of the elements of a tensor; those that an expanded one shows again are there once."""
    return min(nbytes_of(tensor), tensor.untyped_storage().nbytes())


def _multiplied(func: Any, args: Sequence[Any]) -> str:
    dtype = next((tensor.dtype for tensor in tensors_of(args) if tensor.is_floating_point()), torch.float32)
    if dtype is torch.float32:
        convolves = _name(func) in _CONVOLUTIONS
        allowed = torch.backends.cudnn.allow_tf32 if convolves else torch.backends.cuda.matmul.allow_tf32
        return "tf32" if allowed else "float32"
    return str(dtype).removeprefix("torch.")


def _name(func: Any) -> str:
    schema = getattr(func, "_schema", None)
    return "" if schema is None else str(schema.name)


def _cpu() -> Device:
    threads = torch.get_num_threads()
    bandwidth = min(51.2e9, 9.6e9 * threads)
    return Device("cpu", "cpu", 0, bandwidth, {"float32": 96e9 * threads, "float64": 48e9 * threads}, 2e-6)
