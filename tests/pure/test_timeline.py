"""A step on paper: bytes at each op, counted by hand on small steps, and storage by storage on steps by chance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paper import build, chain_step, steps, unhurried
from rekindle.graph import Demand, Graph, Op, Plan, Simulator, Value, simulate
from rekindle.graph.plan import Turn
from rekindle.graph.timeline import default_turns, ends

CHAIN = chain_step(3, [4, 2, 8], [1, 2, 3])  # gradients 3, 4 and 5 have 8, 2 and 4 bytes


def op(number: int, reads: Iterable[int], makes: Iterable[int], **more: object) -> Op:
    """An op that takes one second, in the backward pass if `backward` says so."""
    return Op(number, "aten.op", tuple(reads), tuple(makes), **{"seconds": 1.0, **more})  # type: ignore[arg-type]


def turns_of(graph: Graph, turns: Mapping[int, Turn]) -> tuple[Turn, ...]:
    """A turn for each demand, of which most say nothing."""
    return tuple(turns.get(position, Turn()) for position in range(len(graph.demands)))


def test_keep_all() -> None:
    """What is kept stays until it was asked for the last time; nothing is replayed."""
    timeline = simulate(CHAIN, Plan(frozenset({0, 1, 2})))
    assert timeline.live == (4, 4 + 2, 4 + 2 + 8, 4 + 2 + 8 + 8, 4 + 2 + 8 + 2, 4 + 2 + 4)
    assert timeline.replays == ((), (), ())
    assert timeline.seconds == 0


def test_keep_none() -> None:
    """Without turns the first replay holds all that is asked for later: the forward pass is small, the peak is not."""
    timeline = simulate(CHAIN, Plan(frozenset()))
    assert timeline.live == (4, 4 + 2, 2 + 8, 4 + 2 + 8 + 8, 4 + 2 + 8 + 2, 4 + 2 + 4)
    assert timeline.replays == ((0, 1, 2), (), ())
    assert timeline.seconds == 1 + 2 + 3


def test_nothing_retained() -> None:
    """With turns that hold nothing, each demand replays the chain anew, and its values go with their last reader."""
    turns = {position: Turn(dropped=(demand.value,)) for position, demand in enumerate(CHAIN.demands)}
    timeline = simulate(CHAIN, Plan(frozenset(), turns_of(CHAIN, turns)))
    # beside the gradients, the last of the replays has value 1 and 2, or 0 and 1, or 0
    assert timeline.live == (4, 6, 10, 8 + 8, 8 + 4 + 2, 2 + 4 + 4)
    assert timeline.replays == ((0, 1, 2), (0, 1), (0,))
    assert timeline.seconds == 6 + 3 + 1


def test_peak_and_where_it_is() -> None:
    """The peak is the most of all ops, and the first op that has it is named."""
    timeline = simulate(CHAIN, Plan(frozenset({0, 1, 2})))
    assert (timeline.peak, timeline.peak_at) == (22, 3)
    flat = simulate(build(((), (0,)), nbytes={0: 8}), Plan(frozenset()))
    assert (flat.peak, flat.peak_at) == (8, 0)


def test_nothing_happens() -> None:
    """A step without ops has a peak of nothing, at its beginning."""
    timeline = simulate(Graph((), ()), Plan(frozenset()))
    assert (timeline.live, timeline.peak, timeline.peak_at, timeline.seconds) == ((), 0, 0, 0.0)


def test_standing_bytes_are_there_all_the_time() -> None:
    """Parameters and inputs add to every op, kept or not."""
    for kept in ({0, 1, 2}, set[int]()):
        plan = Plan(frozenset(kept))
        raised = simulate(replace(CHAIN, standing=100), plan).live
        assert raised == tuple(100 + nbytes for nbytes in simulate(CHAIN, plan).live)


def test_temporaries_count_while_their_op_runs() -> None:
    """In the step itself and in each replay, and at no other moment."""
    ops = (
        op(0, (), (0,), temporaries=100),
        op(1, (0,), (1,)),
        op(2, (), (2,)),
        op(3, (1, 2), (3,), backward=True, temporaries=7),
    )
    values = (Value(0, 4, 0, dropped=2), Value(1, 2, 1, dropped=2), Value(2, 1, 2), Value(3, 1, 3, evictable=False))
    graph = Graph(ops, values, demands=(Demand(1, 3, 4),))
    assert simulate(graph, Plan(frozenset({1}))).live == (4 + 100, 4 + 2, 2 + 1, 2 + 1 + 1 + 7)
    # before op 3, op 0 runs again beside value 2
    assert simulate(graph, Plan(frozenset())).live == (4 + 100, 4 + 2, 1, 1 + 4 + 100)


def in_place(saves_before: bool) -> Graph:
    """Op 1 writes over value 0; op 4 asks for value 1 in the backward pass, and op 5 for value 0, if it was saved in a
    copy that op 2 made of it."""
    ops = (
        op(0, (), (0,)),
        op(1, (0,), (1,)),
        op(2, (), (2,), temporaries=9),
        op(3, (1, 2), (3,), backward=True),
    )
    values = (
        Value(0, 8, 0, dropped=2, overwritten=1),
        Value(1, 8, 1, dropped=2, overwrites=0),
        Value(2, 0, 2, evictable=False),
        Value(3, 0, 3, evictable=False),
    )
    demands = (Demand(1, 3, 4), *((Demand(0, 4, 4),) if saves_before else ()))
    return Graph(ops, values, demands=demands)


def test_in_place_takes_the_storage_over() -> None:
    """An in-place op has one storage, not two, in the step and in a replay that nobody else needs the original of."""
    graph = in_place(saves_before=False)
    assert simulate(graph, Plan(frozenset({1}))).live == (8, 8, 8 + 9, 8)
    timeline = simulate(graph, Plan(frozenset()))
    assert timeline.live == (8, 8, 9, 8)
    assert timeline.replays == ((0, 1),)


def test_a_checkpoint_that_is_overwritten_is_lost() -> None:
    """Keeping a value does not keep it from an in-place op: afterwards it has to be recomputed like any other."""
    timeline = simulate(in_place(saves_before=False), Plan(frozenset({0})))
    assert timeline.live == (8, 8, 9, 8)
    assert timeline.replays == ((0, 1),)


def test_in_place_works_on_a_copy_of_what_is_needed_later() -> None:
    """Where the original is retained, the replay of an in-place op makes a second storage."""
    graph = in_place(saves_before=True)
    retains = Plan(frozenset(), (Turn(frozenset({0}), (1,)), Turn(dropped=(0,))))
    timeline = simulate(graph, retains)
    assert timeline.live == (8, 8, 9, 8 + 8)
    assert timeline.replays == ((0, 1), ())
    anew = Plan(frozenset(), (Turn(dropped=(1,)), Turn(dropped=(0,))))
    timeline = simulate(graph, anew)
    assert timeline.live == (8, 8, 9, 8)
    assert timeline.replays == ((0, 1), (0,))


def test_in_place_works_on_a_copy_while_others_still_read() -> None:
    """If a later op of the same replay reads the original too, there are two storages until it has."""
    ops = (
        op(0, (), (0,)),
        op(1, (0,), (1,)),
        op(2, (0, 1), (2,)),
        op(3, (), (3,)),
        op(4, (2,), (4,), backward=True),
    )
    values = (
        Value(0, 8, 0, dropped=3, overwritten=1),
        Value(1, 8, 1, dropped=3, overwrites=0),
        Value(2, 1, 2, dropped=3),
        Value(3, 0, 3),
        Value(4, 0, 4, evictable=False),
    )
    graph = Graph(ops, values, demands=(Demand(2, 4, 5),))
    assert simulate(graph, Plan(frozenset())).live == (8, 8, 8 + 1, 0, 8 + 8 + 1)


def test_held_by_user_code() -> None:
    """What user code still holds is neither freed nor replayed, and is a source for what is; then it goes."""
    held = replace(CHAIN, values=(*CHAIN.values[:1], replace(CHAIN.values[1], dropped=5), *CHAIN.values[2:]))
    timeline = simulate(held, Plan(frozenset()))
    assert timeline.replays == ((2,), (), (0,))
    # value 1 stays until before op 5; for demand 1 it is there, so that nothing of ours holds it
    assert timeline.live == (4, 4 + 2, 2 + 8, 2 + 8 + 8, 2 + 8 + 2, 2 + 4 + 4)
    forever = replace(held, values=(*held.values[:1], replace(held.values[1], dropped=None), *held.values[2:]))
    assert simulate(forever, Plan(frozenset())).live == (4, 6, 10, 18, 12, 2 + 2 + 4 + 4)


def test_not_evictable_stays_while_something_may_be_recomputed_from_it() -> None:
    """What cannot be recomputed is held by the ops that would read it again, until the last demand for them is over."""
    ops = (op(0, (), (0,)), op(1, (0,), (1,)), op(2, (), (2,)), op(3, (1,), (3,), backward=True), op(4, (), (4,)))
    values = (
        Value(0, 4, 0, evictable=False, dropped=1),
        Value(1, 2, 1, dropped=2),
        Value(2, 1, 2, evictable=False, dropped=3),
        Value(3, 0, 3, evictable=False),
        Value(4, 0, 4, evictable=False),
    )
    graph = Graph(ops, values, demands=(Demand(1, 3, 4),))
    assert ends(graph) == [4, 2, 3, None, None]
    timeline = simulate(graph, Plan(frozenset()))
    assert timeline.live == (4, 4 + 2, 4 + 1, 4 + 2, 0)
    assert timeline.replays == ((1,),)


def test_two_results_of_one_op() -> None:
    """Both are made by a replay, and the one that nobody asked for goes at once; if both are asked for, one replay will
    do."""
    ops = (
        op(0, (), (0, 1)),
        op(1, (0, 1), (2,)),
        op(2, (0,), (3,), backward=True),
        op(3, (1,), (4,), backward=True),
    )
    values = (
        Value(0, 4, 0, dropped=2),
        Value(1, 2, 0, dropped=2),
        Value(2, 0, 1),
        Value(3, 0, 2, evictable=False),
        Value(4, 0, 3, evictable=False),
    )
    one = Graph(ops, values, demands=(Demand(0, 2, 3),))
    assert simulate(one, Plan(frozenset())).live == (6, 6, 6, 0)
    both = Graph(ops, values, demands=(Demand(0, 2, 3), Demand(1, 3, 4)))
    timeline = simulate(both, Plan(frozenset()))
    assert timeline.live == (6, 6, 6, 2)
    assert timeline.replays == ((0,), ())
    # one is kept: it is made a second time beside, and goes at once
    kept = simulate(both, Plan(frozenset({0})))
    assert kept.live == (6, 6, 4, 6)
    assert kept.replays == ((), (0,))


def orphaned() -> Graph:
    """A node has value 0 in hand through ops 2 and 3; before op 3 another asks for it too."""
    ops = (
        op(0, (), (0,)),
        op(1, (0,), (1,)),
        op(2, (0,), (2,), backward=True),
        op(3, (0,), (3,), backward=True),
        op(4, (), (4,), backward=True),
    )
    values = (Value(0, 8, 0, dropped=2), *(Value(n, 0, n, evictable=False) for n in range(1, 5)))
    return Graph(ops, values, demands=(Demand(0, 2, 4), Demand(0, 3, 4)))


def test_in_the_hands_of_a_node() -> None:
    """What a node of the backward pass has in hand stays until that is done, though we have let go of it."""
    graph = replace(orphaned(), demands=(Demand(0, 2, 4),))
    assert simulate(graph, Plan(frozenset({0}), (Turn(dropped=(0,)),))).live == (8, 8, 8, 8, 0)


def test_orphans() -> None:
    """Dropped while a node has it in hand, and replayed for another: there are two of it, until both nodes are done."""
    drops = Plan(frozenset({0}), (Turn(dropped=(0,)), Turn(dropped=(0,))))
    timeline = simulate(orphaned(), drops)
    assert timeline.live == (8, 8, 8, 8 + 8, 0)
    assert timeline.replays == ((), (0,))
    holds = Plan(frozenset({0}), (Turn(), Turn(dropped=(0,))))  # until the last demand: one is enough
    timeline = simulate(orphaned(), holds)
    assert timeline.live == (8, 8, 8, 8, 0)
    assert timeline.replays == ((), ())


def test_a_second_one_that_no_node_has() -> None:
    """Of two, the one that only we held goes when we let go of it, though a node still has the first in hand."""
    ops = (op(0, (), (0, 1)), *(op(n, (), (n + 1,), backward=n > 1) for n in range(1, 6)))
    gradients = (Value(n, 0, n - 1, evictable=False) for n in range(2, 7))
    values = (Value(0, 8, 0, dropped=1), Value(1, 1, 0, dropped=1), *gradients)
    graph = Graph(ops, values, demands=(Demand(0, 2, 6), Demand(1, 3, 4), Demand(1, 4, 5)))
    plan = Plan(frozenset(), (Turn(dropped=(0,)), Turn(frozenset({0})), Turn(dropped=(0, 1))))
    timeline = simulate(graph, plan)
    assert timeline.replays == ((0,), (0,), ())
    assert timeline.live == (8 + 1, 0, 8 + 1, 8 + 8 + 1, 8 + 8 + 1, 8)


def test_asked_for_after_the_last_op() -> None:
    """What is replayed after the last op counts in its line of the table: there is no later one."""
    graph = replace(CHAIN, demands=(Demand(2, 6, 6),))
    timeline = simulate(graph, Plan(frozenset()))
    assert timeline.replays == ((0, 1, 2),)
    assert timeline.live == (4, 6, 10, 8, 8 + 2, 4 + 2 + 8)  # before it, gradients of 2 and 4 bytes; after, 4


def test_not_evictable_is_never_replayed() -> None:
    """Demands for leaves, and for what is always there, change nothing."""
    first, *others = CHAIN.demands
    asked = replace(CHAIN, demands=(first, Demand(3, 4, 5), *others))
    timeline = simulate(asked, Plan(frozenset()))
    assert timeline.live == simulate(CHAIN, Plan(frozenset())).live
    assert timeline.replays == ((0, 1, 2), (), (), ())


@pytest.mark.parametrize(("limit", "fits"), [(21, False), (22, True), (23, True), (math.inf, True)])
def test_limit(limit: float, fits: bool) -> None:
    """A step is given up if it has one byte more live than the limit, at any op; else the limit changes nothing."""
    plan = Plan(frozenset({0, 1, 2}))
    timeline = Simulator(CHAIN).run(plan, limit)
    assert timeline == (simulate(CHAIN, plan) if fits else None)


def test_limit_counts_replays_after_the_last_op() -> None:
    """Also what is live only after the last op counts."""
    graph = replace(CHAIN, demands=(Demand(2, 6, 6),))
    assert Simulator(graph).run(Plan(frozenset()), 13) is None
    assert Simulator(graph).run(Plan(frozenset()), 14) is not None


def test_bare() -> None:
    """Without what we hold: from when each op makes a value until user code lets go, with what the ops take."""
    assert Simulator(CHAIN).bare() == [4, 4 + 2, 2 + 8, 8, 8 + 2, 2 + 4]
    ops = tuple(replace(op, temporaries=op.number) for op in CHAIN.ops)
    assert Simulator(replace(CHAIN, ops=ops, standing=10)).bare() == [14, 17, 22, 21, 24, 21]
    assert Simulator(in_place(saves_before=True)).bare() == [8, 8, 9, 0]


def test_default_turns() -> None:
    """Without turns, what is asked for again is held until it has been asked for the last time."""
    graph = replace(CHAIN, demands=(Demand(2, 3, 4), Demand(1, 3, 4), Demand(2, 4, 5), Demand(0, 5, 6)))
    assert default_turns(graph) == (
        Turn(frozenset({0, 1, 2})),
        Turn(frozenset({0, 1, 2}), (1,)),
        Turn(frozenset({0, 2}), (2,)),
        Turn(frozenset({0}), (0,)),
    )
    assert simulate(graph, Plan(frozenset({1}))) == simulate(graph, Plan(frozenset({1}), default_turns(graph)))


@given(steps())
def test_nothing_is_live_below_bare(graph: Graph) -> None:
    """What others hold is a lower bound at each op, whatever is planned."""
    bare = Simulator(graph).bare()
    for kept in (frozenset[int](), frozenset(value.number for value in graph.evictable)):
        assert all(low <= live for low, live in zip(bare, simulate(graph, Plan(kept)).live, strict=True))


# -- storage by storage ------------------------------------------------------------------------------------------------


@st.composite
def planned(draw: st.DrawFn) -> tuple[Graph, Plan]:
    """A step, and any plan for it, sensible or not."""
    graph = draw(steps())
    evictable = [value.number for value in graph.evictable]
    some = st.lists(st.sampled_from(evictable), unique=True) if evictable else st.just([])
    turns = tuple(Turn(frozenset(draw(some)), tuple(draw(some))) for _ in graph.demands)
    return graph, Plan(frozenset(draw(some)), turns if draw(st.booleans()) else ())


@settings(unhurried, max_examples=150)
@given(planned())
def test_counts_storages(drawn: tuple[Graph, Plan]) -> None:
    """Bytes, seconds and replays are those of a second, slower bookkeeping that knows each storage and who holds it."""
    graph, plan = drawn
    timeline = simulate(graph, plan)
    slow = Storages(graph, plan).play()
    assert timeline.replays == tuple(slow.replays)
    assert timeline.seconds == slow.seconds
    assert timeline.live == tuple(slow.live)


@dataclass
class Storages:
    """Plays a step with a list of storages; each is there as long as somebody holds it."""

    graph: Graph
    plan: Plan
    sizes: list[int] = field(default_factory=list)
    holders: list[set[object]] = field(default_factory=list)
    found: dict[int, int] = field(default_factory=dict)  # where a value is, as far as we or user code hold it
    live: list[int] = field(default_factory=list)
    replays: list[tuple[int, ...]] = field(default_factory=list)
    seconds: float = 0.0
    high: int = 0

    def play(self) -> Storages:
        """Fill in what is live and what is replayed."""
        graph, last = self.graph, ends(self.graph)
        turns = self.plan.turns or default_turns(graph)
        for number in range(len(graph.ops) + 1):
            for value in [value for value, end in enumerate(last) if end == number]:
                self.release(value, "user")
            for holders in self.holders:
                holders.discard(("node", number))
            self.high = self.now()
            for demand, turn in zip(graph.demands, turns, strict=True):
                if demand.before == number:
                    self.ask(demand, turn)
            if number < len(graph.ops):
                self.run(graph.ops[number])
                self.live.append(self.high)
        self.live[-1:] = [max(self.live[-1], self.high)] if self.live else []
        return self

    def now(self) -> int:
        """Bytes live now."""
        return self.graph.standing + sum(n for n, who in zip(self.sizes, self.holders, strict=True) if who)

    def store(self, value: int, *who: object) -> int:
        """A new storage."""
        self.sizes.append(self.graph.values[value].nbytes)
        self.holders.append(set(who))
        return len(self.sizes) - 1

    def release(self, value: int, who: str) -> None:
        """Somebody lets go of a value."""
        if value in self.found:
            self.holders[self.found[value]].discard(who)
            if not self.holders[self.found[value]] & {"user", "we"}:
                del self.found[value]

    def run(self, op: Op) -> None:
        """An op of the step."""
        for value in op.outputs:
            old = self.graph.values[value].overwrites
            if old in self.found:
                self.holders[self.found.pop(old)].clear()
            self.found[value] = self.store(value, "user", *(["we"] if self.plan.keeps(value) else []))
        self.high = max(self.high, self.now() + op.temporaries)

    def ask(self, demand: Demand, turn: Turn) -> None:
        """A node asks for a value, which is replayed if it is nowhere."""
        if not self.graph.values[demand.value].evictable:
            self.replays.append(())
            return
        ops = self.missing(demand.value) if demand.value not in self.found else []
        self.replays.append(tuple(ops))
        if ops:
            self.replay(ops, demand.value, turn.retained)
        if demand.until > demand.before:
            self.holders[self.found[demand.value]].add(("node", demand.until))
        for value in turn.dropped:
            self.release(value, "we")

    def missing(self, value: int) -> list[int]:
        """The ops that make a value from what is there."""
        lacking = {value}
        for op in reversed(self.graph.ops):
            if lacking.intersection(op.outputs):
                lacking |= {v for v in op.inputs if self.graph.values[v].evictable}.difference(self.found)
        return sorted({self.graph.values[v].made_by or 0 for v in lacking})

    def replay(self, ops: list[int], target: int, retained: frozenset[int]) -> None:
        """Ops run again: what they make is held by the ops that will read it, and by us if we want it."""
        fresh: dict[int, int] = {}
        before = set(self.found)
        for number in ops:
            op = self.graph.ops[number]
            for value in op.outputs:
                old = self.graph.values[value].overwrites
                if old in fresh and self.holders[fresh[old]] == {number}:
                    self.holders[fresh.pop(old)].clear()
                readers = [n for n in ops if n > number and value in self.graph.ops[n].inputs and value not in before]
                fresh[value] = self.store(value, number, *readers)
                if (value in retained or value == target) and value not in before:
                    self.holders[fresh[value]].add("we")
                    self.found[value] = fresh[value]
            self.high = max(self.high, self.now() + op.temporaries)
            self.seconds += op.seconds
            for holders in self.holders:
                holders.discard(number)
