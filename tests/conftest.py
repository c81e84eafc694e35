"""Where the tests run: on the CPU, or with `--device cuda` those that do not depend on it on an accelerator."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import full_page
from rekindle.record import sizes

_STARTED = time.monotonic()
NOT_ON_CUDA = {
    "[lstm-per-module]": "cuDNN's recurrent layers are never repeated, so nothing is left to evict",
    "[out_max": "the kernel refuses results of such strides",
    "test_strict[foreach_zero": "plain PyTorch does not count the write, and goes on with zeros; a session refuses",
    "test_random_ops_repeat_their_numbers": "names the kernels of the CPU",
    "test_many_threads": "the default device is that of the main thread alone",
    "test_any_budget": "measures the allocator of the CPU",
}
"""Parts of names of tests that `--device cuda` leaves out, and why."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--device`."""
    parser.addoption("--device", default="cpu", help="where tensors are made that say nothing of it: cpu, cuda, ...")


def pytest_configure(config: pytest.Config) -> None:
    """Have what tests make live on the device, and its kernels give the same bits each time."""
    device = config.getoption("--device")
    if device == "cpu":
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.set_default_device(device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # plain PyTorch would not
    config.addinivalue_line("filterwarnings", "ignore:.*deterministic.*:UserWarning")
    weight = torch.ones(8, 8, requires_grad=True)
    (weight @ weight).sum().backward()  # libraries allocate their workspaces now, for both threads that run ops


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what cannot run on an accelerator."""
    if config.getoption("--device") == "cpu":
        return
    for item in items:
        for part, why in NOT_ON_CUDA.items():
            if part in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=why))


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """Write down a full run of everything that passed."""
    if exitstatus or not full_page.is_full(config):
        return
    stats = {outcome: terminalreporter.stats.get(outcome, []) for outcome in ("passed", "skipped")}
    tests = [report.nodeid for reports in stats.values() for report in reports]
    outcomes = {outcome: len(reports) for outcome, reports in stats.items()}
    full_page.write(outcomes, full_page.rooms_of(tests), time.monotonic() - _STARTED, full_page.head())


@pytest.fixture(autouse=True)
def _nothing_measured() -> Iterator[None]:
    """No session knows what one of an earlier test measured."""
    yield
    sizes._SEEN.clear()
