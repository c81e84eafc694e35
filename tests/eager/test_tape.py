"""The graph that a recorded step is written down as."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import rekindle
from helpers import Layer, small_batch, small_model
from rekindle import EvictionPolicy
from rekindle.graph import verify_graph
from rekindle.graph.timeline import ends

pytestmark = pytest.mark.filterwarnings("ignore:PerModule.*no module that ran")  # some models here have no Layer

POLICIES = [None, rekindle.KeepAll(), rekindle.KeepNone(), rekindle.EveryN(2), rekindle.PerModule(Layer)]


def graph_of(policy, forward) -> rekindle.Graph:
    """The graph of one step."""
    session = rekindle.Session(policy)
    with session:
        forward().sum().backward()
    assert session.graph is not None
    return verify_graph(session.graph)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_value_read_again_is_the_same_value(policy):
    """What several ops read has one number, also when nothing recorded outlives the first of them."""
    x = small_batch(0).requires_grad_()
    weight = torch.ones(64, 64, requires_grad=True)

    def forward() -> torch.Tensor:
        y = x @ weight
        y.max()  # its result is small: its op is forgotten at once
        small = y.mean()
        small.neg()
        (x @ weight).max()
        return y.tanh() * small

    graph = graph_of(policy, forward)
    reads = {op.name.split(".")[1]: op.inputs for op in graph.forward}
    made = {op.name.split(".")[1]: op.outputs for op in graph.forward}
    products = [op for op in graph.forward if ".mm." in op.name]
    assert products[0].inputs == products[1].inputs
    assert reads["tanh"] == reads["mean"] == products[0].outputs
    assert reads["mul"] == made["tanh"] + made["mean"]
    assert reads["neg"] == made["mean"]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_an_overwritten_value_is_another(policy):
    """Each in-place write makes a new value, and readers read the version of their time."""
    x = small_batch(0).requires_grad_()

    def forward() -> torch.Tensor:
        y = x * 2
        before = y + 1
        y.mul_(3)
        return before.sin() + (y + 1).sin()

    graph = graph_of(policy, forward)
    first, second = (op.inputs for op in graph.forward if ".add." in op.name and len(op.inputs) == 1)
    assert first != second
    (write,) = (op for op in graph.forward if ".mul_." in op.name)
    assert (write.inputs, write.outputs) == (first, second)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("policy", [None, rekindle.KeepNone()], ids=repr)
def test_a_snapshot_is_a_value(policy, grad):
    """A copy of an input that is about to be overwritten has bytes, from the op that wrote to the last that may be
    repeated from it: plans that did not know of it went over their budgets."""
    weight, x = torch.ones(32, 64, requires_grad=True), small_batch(0)

    def forward() -> torch.Tensor:
        y = (x * 2 * weight).sin()
        with torch.set_grad_enabled(grad):
            x.mul_(3)
        return y

    graph = graph_of(policy, forward)
    (copy,) = (value for value in graph.values if value.why_kept == "a snapshot")
    (write,) = (op for op in graph.ops if ".mul_." in op.name)
    assert (copy.nbytes, copy.made_by) == (x.nbytes, write.number)
    assert copy.dropped is not None
    assert copy.dropped > len(graph.forward)


@pytest.mark.parametrize("sweeps", [False, True])
def test_an_evicted_snapshot_stays_on_paper(sweeps, monkeypatch):
    """What a sweep took of the recorded step is there in a step that follows a plan: plans that counted on it to go
    went over their budgets. One that nothing needs any more goes in both."""
    monkeypatch.setattr("rekindle.runtime.snapshots._COPIED_PER_SECOND", float("inf"))
    weight, x = torch.ones(32, 64, requires_grad=True), small_batch(0)
    session = rekindle.Session(rekindle.KeepNone(), inplace="snapshot")
    with session:
        y = x.exp()
        loss = (y * weight).sum()
        y.add_(1)
        if sweeps:
            assert session.sweep(EvictionPolicy.AGGRESSIVE).evicted == 1
        loss.backward()
    assert session.graph is not None
    (copy,) = (value for value in session.graph.values if value.why_kept == "a snapshot")
    assert (copy.dropped is None) == sweeps


def test_a_stale_snapshot_that_was_swept_stays_on_paper(monkeypatch):
    """A copy that nothing needs is there as long as user code has the mark of what it is a copy of, or until a sweep,
    which a step that follows a plan may do without: plans that counted on it to go went over their budgets."""
    monkeypatch.setattr("rekindle.runtime.snapshots._COPIED_PER_SECOND", float("inf"))
    weight, x = torch.ones(32, 64, requires_grad=True), small_batch(0)
    session = rekindle.Session(rekindle.KeepNone(), inplace="snapshot")
    with session:
        y = x.exp()
        mark = session.mark(y)
        loss = (y * weight).sum()
        y.add_(1)
        loss.backward()
        session.sweep()
    assert not mark.is_live
    assert session.graph is not None
    (copy,) = (value for value in session.graph.values if value.why_kept == "a snapshot")
    assert copy.dropped is None


@pytest.mark.parametrize("sweeps", [False, True])
def test_what_is_marked_stays(sweeps):
    """A marked value is there until its mark and all that may ask for it are gone, whatever a plan says, also if
    a sweep took it of the recorded step: plans that counted on it to go with the tensor went over their budgets."""
    weight, x = torch.ones(32, 64, requires_grad=True), small_batch(0)
    session = rekindle.Session(rekindle.KeepNone())
    with session:
        y = x.exp()
        mark = session.mark(y)
        z = (y * weight).sin()
        del y
        z = z.cos()
        if sweeps:
            assert session.sweep(EvictionPolicy.AGGRESSIVE).checkpoints == 1
        z.sum().backward()
    del mark
    assert session.graph is not None
    (value,) = (session.graph.values[op.outputs[0]] for op in session.graph.ops if ".exp." in op.name)
    assert value.evictable
    assert value.dropped is None


def test_what_is_read_after_a_backward_pass_stays():
    """Nobody can evict a value that an op reads after the backward pass of what it was made for, as long as something
    may be recomputed from it: plans that counted on it to go with user code's tensor went over their budgets."""
    weight, x = torch.ones(32, 64, requires_grad=True), small_batch(0).requires_grad_()

    def forward() -> torch.Tensor:
        y = x.exp()
        y.sum().backward()
        z = y.detach() * 2
        del y
        return z * weight

    graph = graph_of(rekindle.KeepNone(), forward)
    (value,) = (graph.values[op.outputs[0]] for op in graph.ops if ".exp." in op.name)
    assert value.evictable
    assert value.dropped is None or value.dropped > graph.demands[-1].before


@pytest.mark.parametrize("policy", [None, rekindle.KeepNone()], ids=repr)
def test_what_cannot_be_made_again_stays(policy):
    """A value that no replay can make goes with the last that was made of it, not when user code lets go of it: plans
    that counted on it to go went over their budgets."""
    x = small_batch(0)

    def forward() -> torch.Tensor:
        order = x.sort(1).indices
        picked = x.gather(1, order)
        del order
        weight = torch.ones(64, requires_grad=True)
        y = (x * weight).sin()
        y = y + picked.sum()
        del picked
        return y.sin()

    graph = graph_of(policy, forward)
    order = graph.values[next(op for op in graph.ops if ".sort." in op.name).outputs[1]]
    (picked,) = (graph.values[op.outputs[0]] for op in graph.ops if ".gather." in op.name)
    assert not order.evictable
    added = next(op.number for op in graph.ops if ".add." in op.name)
    assert order.dropped == picked.dropped == added + 1


@pytest.mark.parametrize("policy", [None, rekindle.KeepNone()], ids=repr)
def test_what_is_written_in_parts_is_a_value(policy):
    """A storage that parts are written to, and that so cannot be recomputed, has bytes as long as something may be
    recomputed from it: plans that took it for a leaf went over their budgets. DeepSeek joins its keys like this."""
    x, weight = small_batch(0), torch.ones(32, 64, requires_grad=True)

    def forward() -> torch.Tensor:
        both = torch.empty(32, 64)
        both[:, :32] = x[:, 32:]
        both[:, 32:] = x[:, :32]
        return (both * 2 * weight).sin()

    graph = graph_of(policy, forward)
    made = graph.values[next(op for op in graph.ops if ".empty." in op.name).outputs[0]]
    for write in (op for op in graph.ops if ".copy_." in op.name):
        assert write.inputs[0] == made.number
        (number,) = write.outputs
        assert graph.values[number].overwrites == made.number
        made = graph.values[number]
        assert (made.nbytes, made.evictable) == (x.nbytes, False)
        assert made.why_kept == "from an empty tensor that no recorded op has filled"
    (double, _) = (op for op in graph.forward if ".mul." in op.name)
    assert double.inputs == (made.number,)
    last = max(demand.until for demand in graph.demands)
    assert ends(graph)[made.number] == last > len(graph.forward)


@pytest.mark.parametrize("write", [torch.Tensor.mul_, torch.Tensor.zero_], ids=["reads", "overwrites"])
def test_a_write_to_what_stands_is_no_value(write):
    """An input that is written to has no bytes beside those that stand."""
    x, weight = small_batch(0), torch.ones(32, 64, requires_grad=True)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            write(x, *([2] if write is torch.Tensor.mul_ else []))
        return (x * weight).sin()

    graph = graph_of(None, forward)
    read = next(op for op in graph.forward if ".mul." in op.name).inputs
    assert [graph.values[number].made_by for number in read] == [None, None]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_graph_does_not_depend_on_the_policy(policy):
    """The forward pass on paper is the same whatever was kept while it was recorded."""
    torch.manual_seed(0)
    model, x = small_model(2), small_batch(0)
    plain, graph = graph_of(None, lambda: model(x)), graph_of(policy, lambda: model(x))
    assert forward_of(plain) == forward_of(graph)


def forward_of(graph: rekindle.Graph) -> list[object]:
    """What the forward pass is, but for the seconds, and for what lived on into the backward pass."""
    ops = [(op.name, op.inputs, op.outputs, op.call) for op in graph.forward]
    values = [graph.values[number] for op in graph.forward for number in (*op.inputs, *op.outputs)]
    end = len(graph.forward)
    return [
        *ops,
        *(replace(v, dropped=v.dropped if v.dropped is not None and v.dropped < end else None) for v in values),
    ]
