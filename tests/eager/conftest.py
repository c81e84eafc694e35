"""Fixtures of the tests that train small models for real."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors here are small: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def leaving_nothing() -> Iterator[None]:
    """What errors hold goes with the last test of the module, so that no other counts it: the graph of a backward pass
    that failed stays until the next one, and then it is a cycle."""
    yield
    torch.ones(1, requires_grad=True).sum().backward()
    gc.collect()


@pytest.fixture
def counting() -> Iterator[None]:
    """Nothing but reference counting frees an object while the test runs, and only objects made in it are counted."""
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()
