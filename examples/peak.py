"""Peak memory of a piece of code, told by PyTorch's allocator and by nobody else."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes `run` had allocated for itself at any moment, temporaries inside kernels included."""
    gc.collect()
    return _cuda_peak(run, device) if device.startswith("cuda") else _cpu_peak(run)


def _cpu_peak(run: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recording:
        run()
    # The public `recording.events()` adds up the allocator's events per op, and the peak inside an op would be lost.
    events = recording.profiler.kineto_results.events()
    changes: list[tuple[int, int]] = [
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]" and event.device_type() == torch.profiler.DeviceType.CPU
    ]
    changes.sort(key=lambda change: change[0])
    return max(accumulate((nbytes for _, nbytes in changes), initial=0))


def _cuda_peak(run: Callable[[], object], device: str) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before
