"""Threads: a session each, at the same time, and one session in one thread after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rekindle
from helpers import Layer, live_activations, same_bits, small_batch, small_model

POLICIES = [rekindle.KeepNone(), rekindle.PerModule(Layer), rekindle.EveryN(2), rekindle.Balanced(0.3)]


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """Run each in a thread of its own, all released at the same moment; their results."""
    results: list[Any] = [None] * len(works)
    gate = threading.Barrier(len(works))

    def run(number: int) -> None:
        gate.wait()
        try:
            results[number] = works[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def models(count: int) -> list[nn.Module]:
    """Models without dropout: threads share the default generator, with Rekindle or without."""
    torch.manual_seed(0)
    made = [small_model(2) for _ in range(count)]
    for model in made:
        model.eval()
    return made


def train(model: nn.Module, seed: int, session: rekindle.Session | None = None) -> list[Tensor]:
    """The parameters after a few steps."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for number in range(8):
        optimizer.zero_grad()
        x = small_batch(100 * seed + number)
        with session if session is not None else nullcontext():
            loss = model(x).square().mean()
            if number % 2:
                loss.backward()
        if not number % 2:
            loss.backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_a_session_for_each_thread():
    """Sessions of different policies in several threads at once train exactly, and each counts its own."""
    count = len(POLICIES)
    plain = [train(model, seed) for seed, model in enumerate(models(count))]
    sessions = [rekindle.Session(policy) for policy in POLICIES]
    work = [
        lambda model=model, seed=seed: train(model, seed, sessions[seed]) for seed, model in enumerate(models(count))
    ]
    for expected, actual in zip(plain, at_once(*work), strict=True):
        assert not isinstance(actual, BaseException), actual
        assert all(map(same_bits, expected, actual))
    assert [session.stats.steps for session in sessions] == [8] * count
    assert all(session.stats.ops_replayed > 0 for session in sessions)
    assert live_activations() == 0


def test_an_applied_model_for_each_thread():
    """So do applied models."""
    plain = [train(model, seed) for seed, model in enumerate(models(3))]
    managed = [rekindle.apply(model, policy) for model, policy in zip(models(3), POLICIES, strict=False)]
    work = [lambda model=model, seed=seed: train(model, seed) for seed, model in enumerate(managed)]
    for expected, actual in zip(plain, at_once(*work), strict=True):
        assert not isinstance(actual, BaseException), actual
        assert all(map(same_bits, expected, actual))
    for model in managed:
        assert rekindle.session_of(model).stats.ops_replayed > 0
        rekindle.remove(model)


def test_other_threads_are_left_alone():
    """What another thread computes while a session is entered is neither recorded nor evicted."""
    session = rekindle.Session(rekindle.KeepNone())
    (model, other) = models(2)
    plain = train(other, 1)
    (_, other) = models(2)
    results: list[Any] = []

    def elsewhere(*_: object) -> None:
        results.append(at_once(lambda: train(other, 1))[0])

    hook = model[1].register_forward_hook(elsewhere)
    x = small_batch(0)
    with session:
        loss = model(x).sum()
        hook.remove()
        loss.backward()
    assert all(map(same_bits, plain, results[0]))
    assert session.graph is not None
    assert len(session.graph.forward) < 100
    paths = [call.path for call in session.graph.calls if call.types]
    assert len(paths) == len(set(paths))  # no call of the other model's, which has the same names


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_one_thread_after_the_other(policy):
    """One session may be used in one thread after the other."""
    session = rekindle.Session(policy)
    plain, (model,) = train(models(1)[0], 0), models(1)
    (actual,) = at_once(lambda: train(model, 0, session))
    assert all(map(same_bits, plain, actual))
    again, (model,) = at_once(lambda: train(models(1)[0], 5))[0], models(1)
    assert all(map(same_bits, again, train(model, 5, session)))


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_backward_in_another_thread(policy):
    """Backward may run in another thread than forward, inside the `with` block's time or after it."""
    session, (model,) = rekindle.Session(policy), models(1)
    x = small_batch(0)
    expected = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    for inside in (True, False, True):
        with session:
            loss = model(x).square().mean()
            if inside:
                (actual,) = at_once(lambda loss=loss: torch.autograd.grad(loss, list(model.parameters())))
        if not inside:
            (actual,) = at_once(lambda loss=loss: torch.autograd.grad(loss, list(model.parameters())))
        assert not isinstance(actual, BaseException), actual
        assert all(map(same_bits, expected, actual))
    del loss
    assert live_activations() == 0


def test_two_backwards_at_once():
    """Two threads may run backward through graphs of one session at the same time."""
    session, (model,) = rekindle.Session(rekindle.KeepNone()), models(1)
    batches = [small_batch(seed) for seed in range(4)]
    parameters = list(model.parameters())
    expected = [torch.autograd.grad(model(x).square().mean(), parameters) for x in batches]
    with session:
        losses = [model(x).square().mean() for x in batches]
    results = at_once(*(lambda loss=loss: torch.autograd.grad(loss, parameters) for loss in losses))
    for left, right in zip(expected, results, strict=True):
        assert not isinstance(right, BaseException), right
        assert all(map(same_bits, left, right))


def test_only_one_of_many_may_enter():
    """Of many threads that enter one session at once exactly one gets in; the others are told."""
    tries = 4
    for _ in range(20):
        session, all_tried = rekindle.Session(rekindle.KeepNone()), threading.Barrier(tries)

        def enter(session=session, all_tried=all_tried) -> str:
            try:
                with session:
                    all_tried.wait(10)
                    return "entered"
            except rekindle.SessionError:
                all_tried.wait(10)
                return "refused"

        assert sorted(at_once(*[enter] * tries)) == ["entered", *["refused"] * (tries - 1)]
