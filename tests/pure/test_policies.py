"""What each policy keeps, on small graphs where it can be worked out by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from reprlib import repr as short
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from paper import OUTSIDE, build, chain, graphs, unhurried
from rekindle import (
    Balanced,
    ByDepth,
    EveryN,
    KeepAll,
    KeepNone,
    MemoryOptimal,
    PerModule,
    Plan,
    PolicyError,
    SpeedOptimal,
)
from rekindle.graph import Call, Graph
from rekindle.policy import decider_of, make_plan
from rekindle.policy.scores import memory_scores, speed_scores

# A chain of five evictable values. Descendants 4, 3, 2, 1, 0; scores below.
SCORED = build(
    *(((number,), (number + 1,)) for number in range(5)),
    nbytes={1: 64, 2: 512, 3: 128, 4: 32, 5: 16},
    seconds=(1.0, 4.0, 8.0, 1.0, 0.25),
)
# Everything equal: only the order of the values is left to decide.
ALIKE = build(*(((0,), (number,)) for number in range(1, 6)))
# Value 2 is not evictable, the backward pass makes value 5.
MIXED = build(((0,), (1,)), ((1,), (2,)), ((2,), (3,)), ((3,), (4,)), ((4,), (5,)), kept=(2,), backward=(4,))

# A stem, two blocks with an MLP in the first, a head outside of all blocks, a loss outside of all modules.
ROOT = Call(1, OUTSIDE, "", ("app.Model",))
BLOCK_0 = Call(2, ROOT, "layers.0", ("app.Block",))
MLP = Call(3, BLOCK_0, "layers.0.mlp", ("app.WideMlp", "app.Mlp"))
BLOCK_1 = Call(4, ROOT, "layers.1", ("app.SpecialBlock", "app.Block"))
MODULES = build(
    ((0,), (1,)),  # stem
    ((1,), (2,)),  # block 0
    ((2,), (3,)),  # its MLP
    ((3,), (4,)),  # block 0
    ((4,), (5,)),  # block 1
    ((5,), (6,)),  # block 1
    ((6,), (7,)),  # head
    ((7,), (8,)),  # loss
    calls=(OUTSIDE, ROOT, BLOCK_0, MLP, BLOCK_1),
    call_of=(1, 2, 3, 2, 4, 4, 1, 0),
    saved_in={1: (1,), 3: (3,), 4: (2,), 5: (4,), 8: (0,)},
)


def module(path: str) -> type:
    """A class whose qualified name is that of a module class on paper."""
    package, _, name = path.rpartition(".")
    return type(name, (), {"__module__": package})


Block, SpecialBlock, Mlp, Attention = map(module, ("app.Block", "app.SpecialBlock", "app.Mlp", "app.Attention"))


def kept(policy: Any, graph: Graph) -> list[int]:
    """The numbers of the values that a policy keeps."""
    return sorted(make_plan(policy, graph).kept)


@pytest.mark.parametrize(
    ("policy", "graph", "expected"),
    [
        (KeepAll(), MIXED, [1, 3, 4, 5]),
        (KeepNone(), MIXED, []),
        (EveryN(1), MIXED, [1, 3, 4, 5]),
        (EveryN(2), MIXED, [3, 5]),
        (EveryN(3), MIXED, [4]),
        (EveryN(4), MIXED, [5]),
        (EveryN(5), MIXED, []),
        (ByDepth(1), chain(4), [1, 2, 3]),
        (ByDepth(2), chain(4), [1, 2]),
        (ByDepth(3), chain(4), [1]),
        (ByDepth(4), chain(4), []),
        (ByDepth(1), MIXED, [1, 3]),
        (MemoryOptimal(0.2), SCORED, [2]),
        (MemoryOptimal(0.4), SCORED, [2, 3]),
        (MemoryOptimal(0.6), SCORED, [1, 2, 3]),
        (MemoryOptimal(0.8), SCORED, [1, 2, 3, 4]),
        (MemoryOptimal(1), SCORED, [1, 2, 3, 4, 5]),
        (SpeedOptimal(0.2), SCORED, [3]),
        (SpeedOptimal(0.4), SCORED, [3, 4]),
        (SpeedOptimal(0.6), SCORED, [1, 3, 4]),  # 1 and 5 tie: the earlier
        (SpeedOptimal(0.8), SCORED, [1, 3, 4, 5]),
        (SpeedOptimal(1.0), SCORED, [1, 2, 3, 4, 5]),
        (Balanced(0.2), SCORED, [3]),
        (Balanced(0.4), SCORED, [2, 3]),  # 2 and 4 tie: the earlier
        (Balanced(0.6), SCORED, [2, 3, 4]),
        (Balanced(0.8), SCORED, [1, 2, 3, 4]),
        (Balanced(0.6, memory_weight=0.75), SCORED, [1, 2, 3]),
        (Balanced(0.6, memory_weight=1), SCORED, [1, 2, 3]),
        (Balanced(0.4, memory_weight=0), SCORED, [3, 4]),
        (MemoryOptimal(0.5), ALIKE, [1, 2, 3]),
        (SpeedOptimal(0.5), ALIKE, [1, 2, 3]),
        (Balanced(0.5), ALIKE, [1, 2, 3]),
        (MemoryOptimal(1e-9), ALIKE, [1]),
        (MemoryOptimal(0.5), MIXED, [1, 3]),
        (PerModule(Block), MODULES, [1, 4, 6, 8]),
        (PerModule("layers.*"), MODULES, [1, 4, 6, 8]),
        (PerModule("layers.?"), MODULES, [1, 4, 6, 8]),
        (PerModule("layers.0", SpecialBlock), MODULES, [1, 4, 6, 8]),
        (PerModule(SpecialBlock), MODULES, [1, 3, 4, 6, 8]),
        (PerModule(Mlp), MODULES, [1, 2, 3, 4, 5, 8]),
        (PerModule("layers.*.mlp"), MODULES, [1, 2, 3, 4, 5, 8]),
        (PerModule(Block, Mlp), MODULES, [1, 2, 3, 4, 6, 8]),  # nested: what enters and leaves the MLP, too
        (PerModule("layers.*", "layers.*.*"), MODULES, [1, 2, 3, 4, 6, 8]),
        (PerModule(""), MODULES, [7, 8]),  # the whole model: what it returns, and the loss
        (PerModule(Attention), MODULES, [1, 3, 4, 5, 8]),  # no match: what autograd saves anyway
    ],
    ids=lambda item: type(item).__name__ if isinstance(item, Graph) else repr(item),
)
def test_what_is_kept(policy: Any, graph: Graph, expected: list[int]) -> None:
    """Each policy keeps exactly the values worked out by hand."""
    assert kept(policy, graph) == expected


EVERY_POLICY = [
    KeepAll(),
    KeepNone(),
    EveryN(2),
    ByDepth(2),
    PerModule("a"),
    MemoryOptimal(0.3),
    SpeedOptimal(0.3),
    Balanced(0.3),
]


@unhurried
@given(graphs())
def test_any_graph(graph: Graph) -> None:
    """No graph breaks a policy, its plan is legal, and asking again gives the same."""
    for policy in EVERY_POLICY:
        assert make_plan(policy, graph) == make_plan(policy, graph)


@pytest.mark.parametrize("policy", EVERY_POLICY, ids=repr)
def test_an_empty_graph(policy: Any) -> None:
    """Where there is nothing to decide, nothing is kept."""
    assert kept(policy, build()) == []


# -- scores ------------------------------------------------------------------------------------------------------------


def test_memory_scores() -> None:
    """The formula of MemoryOptimal: bytes times the binary logarithm of one more than the descendants."""
    assert memory_scores(SCORED) == [64 * math.log2(5), 512 * 2.0, 128 * math.log2(3), 32 * 1.0, 0.0]


def test_speed_scores() -> None:
    """The formula of SpeedOptimal: seconds of the op for each byte; an empty value counts as one byte."""
    assert speed_scores(SCORED) == [1 / 64, 4 / 512, 8 / 128, 1 / 32, 0.25 / 16]
    assert speed_scores(build(((), (0,)), nbytes={0: 0}, seconds=(3.0,))) == [3.0]


def test_every_result_of_an_op_costs_the_whole_op() -> None:
    """To bring back one of several results the op must run: its seconds count for each."""
    assert speed_scores(build(((), (0, 1)), nbytes={0: 2, 1: 4}, seconds=(8.0,))) == [4.0, 2.0]


@pytest.mark.parametrize("policy", [MemoryOptimal, SpeedOptimal, Balanced])
@unhurried
@given(
    st.integers(0, 40),
    st.integers(1, 500).flatmap(lambda below: st.tuples(st.integers(1, below), st.just(below))),
)
@example(25, (7, 25))  # as floats, 7 / 25 * 25 is more than 7
def test_the_ratio_is_the_share_kept(policy: Callable[[float], Any], evictable: int, ratio: tuple[int, int]) -> None:
    """The share that is asked for, rounded up to whole values whatever the rounding of floats, is kept."""
    above, below = ratio
    assert len(kept(policy(above / below), chain(evictable))) == math.ceil(Fraction(above, below) * evictable)


@unhurried
@given(graphs(), st.floats(0, 1, exclude_min=True), st.floats(0, 1, exclude_min=True))
def test_a_larger_ratio_keeps_no_less(graph: Graph, one: float, other: float) -> None:
    """What a smaller ratio keeps, a larger one keeps too."""
    less, more = sorted((one, other))
    for policy in (MemoryOptimal, SpeedOptimal, Balanced):
        assert make_plan(policy(less), graph).kept <= make_plan(policy(more), graph).kept


@unhurried
@given(graphs(), st.floats(0, 1, exclude_min=True))
def test_balanced_has_its_two_ends(graph: Graph, ratio: float) -> None:
    """With all the weight on one side, Balanced is the policy of that side."""
    assert kept(Balanced(ratio, memory_weight=1), graph) == kept(MemoryOptimal(ratio), graph)
    assert kept(Balanced(ratio, memory_weight=0), graph) == kept(SpeedOptimal(ratio), graph)


def test_balanced_compares_ranks() -> None:
    """However far one score is above the others, it is only one place ahead."""
    far = build(
        *(((number,), (number + 1,)) for number in range(5)),
        nbytes={1: 64, 2: 512 << 20, 3: 128, 4: 32, 5: 16},
        seconds=(1.0, 4.0, 8.0, 1.0, 0.25),
    )
    assert [kept(Balanced(ratio), far) for ratio in (0.2, 0.4)] == [
        kept(Balanced(ratio), SCORED) for ratio in (0.2, 0.4)
    ]


# -- modules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("layers.*", "layers.0", True),
        ("layers.*", "layers.11", True),
        ("layers.*", "layers.", True),
        ("layers.*", "layers", False),
        ("layers.*", "layers.0.mlp", False),
        ("layers.*", "model.layers.0", False),
        ("*.layers.*", "model.layers.0", True),
        ("*", "head", True),
        ("*", "layers.0", False),
        ("*.*", "layers.0", True),
        ("layers.?", "layers.0", True),
        ("layers.?", "layers.11", False),
        ("layers?0", "layers.0", False),
        ("layers.1?", "layers.12", True),
        ("layers.*.mlp", "layers.0.mlp", True),
        ("layers.*.mlp", "layers.0.attention.mlp", False),
        ("l*s.0", "layers.0", True),
        ("layers.0", "layers.0", True),
        ("layers.0", "layersX0", False),
        ("layers.0", "layers.00", False),
        ("a|b", "a", False),
        ("(a)", "a", False),
        ("[ab]", "a", False),
        ("a\\", "a\\", True),
        ("*\n", "a\n", True),
        ("", "", True),
        ("*", "", True),
        ("", "head", False),
    ],
)
def test_names(pattern: str, path: str, matches: bool) -> None:
    """`*` stands for any characters but dots, `?` for one that is no dot, everything else for itself."""
    assert PerModule(pattern).matches(Call(1, OUTSIDE, path, ("app.Any",))) is matches


def test_no_name_matches_outside_of_all_modules() -> None:
    """What runs in no module is in no match, though its path is empty as that of the outermost module."""
    assert not PerModule("", "*", Block).matches(OUTSIDE)


@pytest.mark.parametrize(
    ("types", "matches"),
    [
        (("app.Block",), True),
        (("app.SpecialBlock", "app.Block"), True),
        (("app.Mlp",), False),
        (("other.Block",), False),
        (("app.BlockList",), False),
        ((), False),
    ],
)
def test_classes(types: tuple[str, ...], matches: bool) -> None:
    """A class stands for itself and its subclasses, and for nothing that only has a similar name."""
    assert PerModule(Block).matches(Call(1, OUTSIDE, "any", types)) is matches


def test_a_nested_class() -> None:
    """Classes are known by their qualified names, so that those defined in functions and classes work as well."""

    class Inner:
        pass

    name = f"{__name__}.test_a_nested_class.<locals>.Inner"
    assert PerModule(Inner).matches(Call(1, OUTSIDE, "", (name,)))


@pytest.mark.parametrize(
    ("blocks", "unmatched"),
    [
        ((Block,), ()),
        ((Attention,), (Attention,)),
        ((Block, "layers.*.attn", Attention, "layers.?"), ("layers.*.attn", Attention)),
    ],
)
def test_unmatched(blocks: tuple[Any, ...], unmatched: tuple[Any, ...]) -> None:
    """A policy can say which of its names and classes no module of a step is meant by."""
    assert PerModule(*blocks).unmatched(MODULES) == unmatched


def test_what_only_another_module_saves_crosses_the_boundary() -> None:
    """A value that no op outside reads, but that autograd saves while an outer module runs, is kept."""
    graph = build(((0,), (1,)), calls=(OUTSIDE, ROOT, BLOCK_0), call_of=(2,), saved_in={1: (1,)})
    assert kept(PerModule(Block), graph) == [1]


def test_two_calls_of_one_module_are_two_blocks() -> None:
    """What passes from one call of a shared module to its next crosses a boundary."""
    again = Call(3, ROOT, "layers.0", ("app.Block",))
    graph = build(((0,), (1,)), ((1,), (2,)), ((2,), (3,)), calls=(OUTSIDE, ROOT, BLOCK_0, again), call_of=(2, 3, 3))
    assert kept(PerModule(Block), graph) == [1]


def test_the_backward_pass_reads_inside() -> None:
    """That a gradient is computed from a value does not make it cross a boundary."""
    graph = build(((0,), (1,)), ((1,), (2,)), calls=(OUTSIDE, ROOT, BLOCK_0), call_of=(2, 0), kept=(2,), backward=(1,))
    assert kept(PerModule(Block), graph) == []


def test_a_per_module_policy_is_a_value() -> None:
    """Equal policies are equal keys, and the repr is the call to write."""
    assert PerModule(Block, "a.*") == PerModule(Block, "a.*") != PerModule("a.*", Block)
    assert len({PerModule(Block), PerModule(Block), PerModule(Mlp)}) == 2
    assert repr(PerModule(Block, "layers.*")) == "PerModule(Block, 'layers.*')"


# -- as the step runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [KeepAll(), KeepNone(), EveryN(2), PerModule(Block)], ids=repr)
def test_some_policies_decide_as_the_step_runs(policy: Any) -> None:
    """Policies that need no graph give a decider for each step, which begins anew."""
    first, second = decider_of(policy), decider_of(policy)
    assert first is not None
    assert second is not None
    decisions = [first.made(OUTSIDE) for _ in range(3)]
    assert [second.made(OUTSIDE) for _ in range(3)] == decisions


@pytest.mark.parametrize(
    "policy",
    [
        ByDepth(2),
        MemoryOptimal(0.2),
        SpeedOptimal(0.2),
        Balanced(0.2),
        pytest.param(lambda graph: [], id="the user's own"),
    ],
)
def test_the_others_need_a_graph(policy: Any) -> None:
    """Policies that look at the whole graph, and the user's own, give no decider."""
    assert decider_of(policy) is None


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0, -0.5, 1.5, float("nan"), float("inf"), True, None, "0.2", 1j, [0.2]], ids=repr)
@pytest.mark.parametrize("policy", [MemoryOptimal, SpeedOptimal, Balanced])
def test_a_ratio_is_a_share(policy: Callable[[Any], Any], ratio: object) -> None:
    """What is no number in (0, 1] is refused when the policy is made, with one that would do."""
    with pytest.raises(PolicyError, match=re.escape(f"ratio is {ratio!r}, but must be in (0, 1]. Write ratio=0.2")):
        policy(ratio)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan"), True, None, "half"], ids=repr)
def test_a_weight_is_a_share_or_zero(weight: Any) -> None:
    """What is no number in [0, 1] is refused, with one that would do."""
    message = f"memory_weight is {weight!r}, but must be in [0, 1]. Write memory_weight=0.2"
    with pytest.raises(PolicyError, match=re.escape(message)):
        Balanced(0.2, memory_weight=weight)


@pytest.mark.parametrize("count", [0, -1, 2.0, True, None, "4"], ids=repr)
@pytest.mark.parametrize(("policy", "name"), [(EveryN, "n"), (ByDepth, "depth")])
def test_a_count_is_a_positive_int(policy: Callable[[Any], Any], name: str, count: object) -> None:
    """What is no positive int is refused, with one that would do."""
    message = f"{name} is {count!r}, but must be a whole number of at least 1. Write {name}=4"
    with pytest.raises(PolicyError, match=re.escape(message)):
        policy(count)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ((), 'Write PerModule(Block) or PerModule("layers.*")'),
        ((Block(),), 'Write PerModule(Block) for its class, or PerModule("layers.*") for names'),
        ((3,), 'Write PerModule(int) for its class, or PerModule("layers.*") for names'),
        ((Block, None), "not None"),
        (([Block, Mlp],), "Write PerModule(*blocks) for several"),
        (((Block, Mlp),), "Write PerModule(*blocks) for several"),
    ],
)
def test_blocks_are_classes_and_names(blocks: tuple[Any, ...], message: str) -> None:
    """Module objects, lists and nothing at all are refused, with what to write instead."""
    with pytest.raises(PolicyError, match=re.escape(message)):
        PerModule(*blocks)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (KeepNone, "policy is the class KeepNone. Write KeepNone(...)"),
        (MemoryOptimal, "policy is the class MemoryOptimal. Write MemoryOptimal(...)"),
        (None, "policy is None, which cannot be called. Write a policy such as rekindle.PerModule(Block)"),
        ("balanced", "policy is 'balanced', which cannot be called"),
        (0.2, "policy is 0.2, which cannot be called"),
        (Plan(frozenset()), "which cannot be called"),
    ],
)
def test_what_is_no_policy(policy: Any, message: str) -> None:
    """A class without its brackets, a name, a number or a plan are no policies; the message says what is."""
    for ask in (decider_of, lambda policy: make_plan(policy, SCORED)):
        with pytest.raises(PolicyError, match=re.escape(message)):
            ask(policy)


@pytest.mark.parametrize(
    "choice",
    [[2, 3], (3, 2), {2, 3}, frozenset({2, 3}), Plan(frozenset({2, 3})), {2: "a", 3: "b"}.keys(), Plan([2, 3])],  # type: ignore[arg-type]
    ids=repr,
)
def test_a_function_is_a_policy(choice: Any) -> None:
    """A user's own function may return a plan or any collection of numbers; the plan is a proper one."""
    plan = make_plan(lambda graph: choice, SCORED)
    assert plan == Plan(frozenset({2, 3}))
    assert hash(plan) == hash(Plan(frozenset({2, 3})))


def test_a_function_gets_the_graph() -> None:
    """A user's own function sees the graph, and may choose from it lazily."""
    assert kept(lambda graph: (value.number for value in graph.evictable if value.nbytes > 100), SCORED) == [2, 3]


@pytest.mark.parametrize(
    "choice",
    [None, 3, "23", ["2"], [2.0], [1.5], [True, False, True], [None], [[2]], Plan(None)],  # type: ignore[arg-type]
    ids=repr,
)
def test_garbage_is_refused(choice: Any) -> None:
    """What is no collection of numbers is refused, quoted, and answered with what to return. No guess is made."""
    message = "Return the numbers of the values to keep, such as [value.number for value in graph.evictable"
    with pytest.raises(PolicyError, match=re.escape(message)) as caught:
        make_plan(lambda graph: choice, SCORED)
    assert short(choice) in str(caught.value)


def test_values_are_not_their_numbers() -> None:
    """A function that returns the values themselves is told to return their numbers."""
    with pytest.raises(PolicyError, match=r"Return the numbers of the values to keep"):
        make_plan(lambda graph: graph.evictable, SCORED)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ([6], "the plan keeps value 6, but the graph has 6 values. Choose from graph.evictable"),
        ([-1], "the plan keeps value -1, but the graph has 6 values. Choose from graph.evictable"),
        ([0], "the plan keeps value 0, which is not its to decide: a leaf. Choose from graph.evictable"),
        (Plan(frozenset({0})), "a leaf. Choose from graph.evictable"),
    ],
    ids=repr,
)
def test_numbers_that_mean_nothing_are_refused(choice: Any, message: str) -> None:
    """Numbers of no evictable value are refused, and the message names the policy that returned them."""

    def careless(graph: Graph) -> Any:
        return choice

    with pytest.raises(PolicyError, match=re.escape(message)) as caught:
        make_plan(careless, SCORED)
    assert "careless" in str(caught.value)


def test_what_a_function_raises_stays_what_it_is() -> None:
    """An error in a user's own function is not dressed up as one of Rekindle's."""
    with pytest.raises(ZeroDivisionError):
        make_plan(lambda graph: [1 // 0], SCORED)
