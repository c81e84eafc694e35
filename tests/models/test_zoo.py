"""Architectures of `transformers` trained for two steps within a budget midway between floor and full: the budget holds
by the allocator's own events, and no bit differs from plain training.

`make test` takes one or two of each kind; `make test-full` (REKINDLE_TESTS=full) takes all and writes
docs/model-zoo.md.
"""

from __future__ import annotations

import gc
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.utils import logging

import architectures
import helpers
import rekindle
import zoo_page
from architectures import ARCHITECTURES, DEPART, Architecture
from peak import peak_bytes
from rekindle.graph import Graph
from rekindle.policy import Planner
from rekindle.runtime.room import kept_back
from zoo_page import Row

FULL = os.environ.get("REKINDLE_TESTS") == "full"
STEPS = 2
IN_SHORT = ("llama", "gpt2", "mixtral", "jetmoe", "mamba2", "deberta-v2", "bart", "longformer", "vit", "convnextv2")
IN_SHORT += ("detr", "wav2vec2", "clip", "patchtst", "imagegpt")


@dataclass
class Training:
    """What training left behind, step by step, and the most bytes that there were in each step."""

    left: list[dict[str, Tensor]] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)


def train(architecture: Architecture, managed: AbstractContextManager[Any]) -> Training:
    """Train a fresh model, with another batch in each step."""
    model, training = fresh(architecture), Training()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for number in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        batch, loss = architecture.batch(number), []
        before = standing(model, batch)
        seed(1 + number)
        training.peaks.append(before + peak_bytes(lambda b=batch, to=loss: to.append(step(model, b, managed))))
        left = {"loss": loss[0], **random_state()}
        left |= {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        left |= {name: tensor.detach().clone() for name, tensor in chain(model.named_parameters(), buffers(model))}
        training.left.append(left)
    return training


def fresh(architecture: Architecture) -> nn.Module:
    """The model, its gradients there already, as in all steps but the first."""
    seed(0)
    model = architecture.make().train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return model


def step(model: nn.Module, batch: dict[str, Any], managed: AbstractContextManager[Any]) -> Tensor:
    """One forward and backward."""
    with managed:
        loss = architectures.loss_of(model, batch)
        loss.backward()
    return loss.detach()


def buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers of a model that are there: some are made by the first call."""
    return ((name, buffer) for name, buffer in model.named_buffers() if buffer is not None)


def standing(model: nn.Module, batch: dict[str, Any]) -> int:
    """Bytes that are there before a step: parameters, gradients, buffers and the batch, each storage once."""
    held = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), *batch.values()]
    storages = [tensor.untyped_storage() for tensor in held if isinstance(tensor, Tensor)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def seed(number: int) -> None:
    """Seed all that models draw from."""
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def random_state() -> dict[str, Tensor]:
    """Where the generators are."""
    keys, position = np.random.get_state()[1:3]
    return {"random": torch.get_rng_state(), "random of numpy": torch.tensor([*map(int, keys), position])}


def recorded(architecture: Architecture) -> Graph:
    """The first step, recorded twice in a session with room for all: what runs first is slow."""
    session, model = rekindle.Session(memory_budget="8GiB"), fresh(architecture)
    for _ in range(2):
        seed(1)
        step(model, architecture.batch(0), session)
    assert session.graph is not None
    return session.graph


def session_of(name: str, plan: rekindle.Plan, budget: int) -> rekindle.Session:
    """A session that obeys a plan and refuses any other step, or one that plans for itself if steps differ."""
    return rekindle.Session(memory_budget=budget) if name in DEPART else rekindle.Session(plan=plan)


def different(plain: Training, managed: Training) -> list[str]:
    """What two trainings left that is not the same, bit for bit."""
    wrong = []
    for number, (expected, actual) in enumerate(zip(plain.left, managed.left, strict=True)):
        assert expected.keys() == actual.keys()
        wrong += [f"step {number}: {key}" for key in expected if not helpers.same_bits(expected[key], actual[key])]
    return wrong


@pytest.fixture(scope="module")
def rows() -> Iterator[list[Row]]:
    """The rows of the page. What was there before is not looked at by the garbage collector, which each measurement
    calls."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    gc.collect()
    gc.freeze()
    yield []
    gc.unfreeze()
    gc.collect()
    logging.set_verbosity(level)


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(
            each, marks=[] if FULL or each.name in IN_SHORT else pytest.mark.skip(reason="REKINDLE_TESTS=full")
        )
        for each in ARCHITECTURES
    ],
    ids=str,
)
def test_two_steps_midway(architecture: Architecture, rows: list[Row]) -> None:
    """At the middle between floor and full: loss, gradients, weights, buffers and random states of both steps equal the
    plain ones, the budget holds, ops are replayed, and no step departs from its plan, but where steps differ."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if architecture.warns else "error")
        graph = recorded(architecture)
        planner = Planner(graph)
        plan = planner.plan((planner.floor() + planner.full) // 2)
        assert plan.forecast is not None
        budget = plan.forecast.budget + kept_back(plan.forecast.budget)
        session = session_of(architecture.name, plan, budget)
        plain, managed = train(architecture, nullcontext()), train(architecture, session)
        row = Row.of(architecture, graph, planner, budget, plain.peaks, managed.peaks, session.stats)
    assert different(plain, managed) == []
    assert max(managed.peaks) <= budget
    assert session.stats.ops_replayed > 0
    assert session.stats.failed_recomputes == 0
    assert session.stats.departures == 0 or architecture.name in DEPART
    rows.append(row)


def test_losses_are_numbers() -> None:
    """The comparison is of something: in the short list, losses are finite and weights move."""
    for architecture in (each for each in ARCHITECTURES if each.name in IN_SHORT[:2]):
        first, second = train(architecture, nullcontext()).left
        assert first["loss"].isfinite()
        assert second["loss"].isfinite()
        assert any(not helpers.same_bits(first[key], second[key]) for key in first if key.endswith("weight"))


def test_names() -> None:
    """Each architecture is there once, there are as many as the page promises, and the lists of exceptions name none
    that is not there."""
    names = [architecture.name for architecture in ARCHITECTURES]
    assert len(set(names)) == len(names) >= 40
    assert {*IN_SHORT, *DEPART} <= set(names)
    assert {each.kind for each in ARCHITECTURES if each.name in IN_SHORT} == {each.kind for each in ARCHITECTURES}


@pytest.mark.skipif(not FULL, reason="REKINDLE_TESTS=full runs everything and writes the page")
def test_page(rows: list[Row]) -> None:
    """What a full run found is written to docs/model-zoo.md."""
    if len(rows) < len(ARCHITECTURES):
        pytest.skip("only a part of the architectures was run, or not all passed")
    zoo_page.write(rows)
