"""Fuzzing: programs by chance under sessions by chance leave behind what they leave without one, bit for bit.

`make test` runs the same few hundred examples each time; `REKINDLE_TESTS=full` in the environment runs thousands, other
ones each time. What they found is a test of its own beside its subject.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
import torch._dynamo  # else imported in the middle of a step, by a shape function, with frames that stay
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.modules import module as torch_module

import rekindle
from helpers import same_bits
from peak import peak_bytes
from programs import KERNELS, Block, Do, Fault, Program, Twin, anything, kernels, layers, programs, programs_within
from rekindle import FakeReader, Pressure, Session
from rekindle.graph import Graph
from rekindle.record import sizes
from watch import living, modes

FULL = os.environ.get("REKINDLE_TESTS") == "full"
pytestmark = [
    pytest.mark.timeout(1800 if FULL else 300),
    pytest.mark.usefixtures("counting", "leaving_nothing"),
    pytest.mark.filterwarnings("ignore:PerModule"),  # of modules that ran no op
    pytest.mark.filterwarnings("ignore:Use of .* on expanded tensors"),
]
POLICIES: dict[str, Callable[[], Any]] = {
    "none given": lambda: None,
    "keep all": rekindle.KeepAll,
    "keep none": rekindle.KeepNone,
    "every 2": lambda: rekindle.EveryN(2),
    "every 3": lambda: rekindle.EveryN(3),
    "by depth": lambda: rekindle.ByDepth(3),
    "memory": lambda: rekindle.MemoryOptimal(0.3),
    "speed": lambda: rekindle.SpeedOptimal(0.3),
    "balanced": lambda: rekindle.Balanced(0.2),
    "per module": lambda: rekindle.PerModule(Block),
    "per name": lambda: rekindle.PerModule("blocks.0"),
    "own": lambda: _every_other,
    "own nothing": lambda: _nothing,
}


def _every_other(graph: Graph) -> Iterable[int]:
    return [value.number for value in graph.evictable if value.number % 2]


def _nothing(graph: Graph) -> Iterable[int]:
    return []


@dataclass(frozen=True)
class Setting:
    """How a session is made: around the step, or `applied` to the model. `pressure` is in percent."""

    policy: str = "keep none"
    inplace: Literal["strict", "snapshot"] = "strict"
    min_nbytes: int = 0
    verify: bool = False
    pressure: int | None = None
    applied: bool = False

    def twin(self, program: Program) -> tuple[Twin, Session]:
        """A program managed by a new session."""
        options: dict[str, Any] = {
            "inplace": self.inplace,
            "min_nbytes": self.min_nbytes,
            "verify": self.verify,
            "pressure": None if self.pressure is None else Pressure(FakeReader(self.pressure, 100)),
        }
        if self.applied:
            twin = Twin(program, None)
            return twin, twin.apply(POLICIES[self.policy](), **options)
        session = Session(POLICIES[self.policy](), **options)
        return Twin(program, session), session


SETTINGS = st.builds(
    Setting,
    st.sampled_from(sorted(POLICIES)),
    st.sampled_from(["strict", "strict", "snapshot"]),
    st.sampled_from([0, 0, 100, 1024]),
    st.sampled_from([False, False, False, True]),
    st.sampled_from([None, None, None, 80, 95]),
    st.sampled_from([False, False, True]),
)


def fuzzed(examples: int) -> settings:
    """The same examples each time, or in full runs a hundred times as many, others each time."""
    return settings(
        deadline=None,
        max_examples=examples * (100 if FULL else 1),
        derandomize=not FULL,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def differences(plain: dict[str, Any], managed: dict[str, Any]) -> list[str]:
    """The names of what two steps left behind and differs."""
    names = plain.keys() | managed.keys()
    return sorted(name for name in names - {"why"} if not alike(plain.get(name), managed.get(name)))


def alike(one: Any, other: Any) -> bool:
    """Whether they are equal, tensors and their gradients bit for bit."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(one == other)
    return same_bits(one, other) and (not one.is_leaf or alike(one.grad, other.grad))


def assert_clean(session: Session, applied: bool = False) -> None:
    """No mode, no hook, no tape is left. What is `applied` may wait for a backward pass."""
    assert modes() == 0
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    if applied:
        return
    assert not torch_module._global_forward_hooks
    assert not torch_module._global_forward_pre_hooks
    assert session._thread is None
    assert session._recorder.tape is None


def assert_nothing_lives(collect: bool) -> None:
    """Nobody holds a record any more. What a failed backward pass held goes with the next one."""
    for _ in range(2 * collect):
        torch.ones(1, requires_grad=True).sum().backward()
        gc.collect()
    assert not living()


def refusals(left: dict[str, Any]) -> list[str | None]:
    """The kinds of errors that a step met."""
    return [left.get("backward"), *(kind for name in left if name.endswith("log") for _, kind in left[name])]


def overwritten(left: dict[str, Any]) -> bool:
    """Whether PyTorch refused to go on with something that was written over."""
    return "overwritten" in refusals(left)


def check(program: Program, setting: Setting) -> None:
    """Run it plain and managed. What plain PyTorch refuses as overwritten, a session refuses too, or gives the numbers
    that are right as if all that is saved were copied; a session that takes snapshots always does the latter. What a
    kernel wrote over that nobody saw, a session may refuse to recompute from, or its checksums, and nothing else."""
    unseen = any(do.what in KERNELS for block in program.blocks for do in block)
    gc.collect()
    gc.freeze()
    if setting.inplace == "snapshot" and program.carry == "attached":
        program = replace(program, carry="detached")  # nobody takes snapshots while the optimizer steps
    managed, session = setting.twin(program)
    plain = Twin(program, None, setting.inplace == "snapshot")
    copies = None if setting.inplace == "snapshot" else Twin(program, None, copies=True)
    for number in range(len(program.ends)):
        expected, actual = plain.step(number), managed.step(number)
        right = expected if copies is None else copies.step(number)
        wrong = differences(expected, actual)
        if wrong and unseen and (overwritten(actual) or (setting.verify and refusals(actual) != refusals(expected))):
            return
        if wrong and program.carry == "attached" and overwritten(actual):
            return  # of a weight that was updated since, and that plain PyTorch has not saved: an embedding's table
        if wrong and overwritten(expected):
            wrong = differences(right, actual)
            plain = copies or plain
        elif copies is not None and refusals(right) != refusals(expected):
            if program.carry == "attached":
                return  # their graphs go on from here in other states
            copies.take_over(plain)
        assert not wrong, (number, wrong, actual.get("why"), expected.get("why"))
        if setting.applied:
            session.end()  # if no backward pass came by
        assert_clean(session, setting.applied)
        rough = bool(program.fault) or "backward" in actual or actual.get("log")
        del expected, actual, right
        if program.carry != "attached":
            assert_nothing_lives(bool(rough))
        if plain is copies:
            break
    if setting.applied:
        rekindle.remove(managed.net)
        assert_clean(session)
    theirs = [weakref.ref(tensor.untyped_storage()) for tensor in plain.net.state_dict().values()]
    del managed, plain, copies
    assert_nothing_lives(collect=True)
    leaked = sum(storage.nbytes() for reference in theirs if (storage := reference()) is not None)
    assert session._ledger.total_nbytes <= leaked  # nobody frees what some writes in place tie to their own graph
    assert session.snapshots.nbytes == 0


def program_of(*instructions: Do, ends: int, width: int, holds: bool = False) -> Program:
    """One that was found, in a single block."""
    return Program((instructions,), ("sum",) * ends, width, False, "", holds, False, None)


ADD, GELU = Do("add", 0, 0, 0), Do("gelu", 0, 0, 0)
SELF_ADDS = program_of(
    *(Do("add", 0, 0, 0), Do("add", 0, 0, 0), Do("batch_norm", 0, 0, 0), Do("add", 0, 0, 0), Do("add", 0, 0, 0)),
    *(Do("add", 0, 0, 0), Do("addcmul", 0, 0, 1), Do("add_", 0, 1, 0)),
    ends=2,
    width=8,
)

STEPPED_BEFORE = Program(
    ((ADD, Do("batch_norm", 0, 0, 0), GELU),), ("pieces", "sum"), 8, False, "attached", False, False, None
)
"""The second backward pass reaches the first step, whose weights were updated since: the session refuses to recompute
from them what PyTorch refuses to compute with them."""

FROZEN_WRITTEN = Program(((ADD, Do("weight"), Do("add_", 0, 2), ADD),), ("sum",) * 4, 128, False, "", False, True, None)
"""A frozen weight is written to with a gradient, and is no leaf from there on."""

LOOKED_AT = program_of(Do("weight"), Do("tanh", 0, 3, 0), Do("look", 0, 1, 3), Do("sigmoid_", 3), ends=1, width=8)
"""What autograd saved is looked at through its node, and written to."""

CARRIED_WRITTEN = Program(
    ((GELU, Do("batch_norm"), Do("add_", 3), ADD),),
    ("sum", "sum"),
    *(8, False, "detached", False, False, Fault(1, 3, False, False)),
)
"""What is carried over is written to with a gradient, in a step that fails after it."""


@fuzzed(200)
@example(SELF_ADDS, Setting("keep all", "strict", 0, False, None))
@example(STEPPED_BEFORE, Setting("every 3"))
@example(FROZEN_WRITTEN, Setting("every 2"))
@example(LOOKED_AT, Setting("per name", "snapshot", verify=True))
@example(CARRIED_WRITTEN, Setting("balanced"))
@given(programs(), SETTINGS)
def test_any_program(program: Program, setting: Setting) -> None:
    """Outputs, losses, gradients, inputs that are written to, buffers, random states; errors where plain PyTorch has
    them; nothing is left behind."""
    check(program, setting)


UNSEEN = program_of(Do("diagonal_", 2, 1, 3, 5), Do("kernel_detached_", 2, 3, 1), ends=1, width=8)
"""Nothing has read what was written in place when a kernel writes over it."""

SPARED = program_of(Do("assign_", 1, 2, 2), Do("kernel_detached_", 1, 0, 3, 6), Do("batch_norm_alone"), ends=1, width=8)
"""A leaf is written to where nothing has read it, and then everywhere, before anybody has asked for its version."""

REFUSED_BEFORE = Program(
    (
        (
            *(Do("kernel_", 0, 2, 0, 3), Do("permuted", 1, 1, 0, 7), Do("mm", 0, 3, 0, 1)),
            *(Do("kernel_detached_", 3, 2, 0, 1), Do("batch_norm"), Do("tanh", 3, 2, 1)),
            *(Do("kernel_", 1, 0, 3, 7), Do("kernel_", 2, 3, 1, 7), Do("kernel_detached_", 3, 0, 2, 3)),
            *(Do("linear", 0, 3, 0, 1), Do("kernel_", 0, 2, 0, 3), Do("permuted", 1, 1, 0, 7)),
        ),
    ),
    ("twice", "twice", "outside"),
    *(8, False, "attached", False, True, Fault(1, 1, False, False)),
)
"""A backward pass is refused, and the next one goes on from what it has left."""


@fuzzed(100)
@example(UNSEEN, Setting("every 2"))
@example(SPARED, Setting("every 3"))
@example(REFUSED_BEFORE, Setting("balanced", pressure=95))
@given(programs((anything, layers, kernels)), SETTINGS)
def test_any_unseen_write(program: Program, setting: Setting) -> None:
    """Kernels that no dispatcher shows write over anything, and only `mark_dirty` tells: no number is wrong."""
    check(program, setting)


@dataclass(frozen=True)
class Limit:
    """A budget: a share of what the first step takes beside what is there anyway, with room for all. While the test's
    own profiler is on, a session can only guess what ops need for themselves, if that is not `known`."""

    share: float = 0.5
    policy: str = "none given"
    inplace: Literal["strict", "snapshot"] = "strict"
    min_nbytes: int = 0
    known: bool = True


LIMITS = st.builds(
    Limit,
    st.sampled_from([1.1, 1.0, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.4]),
    st.sampled_from(["none given"] * 4 + ["keep none", "every 2", "memory", "own"]),
    st.sampled_from(["strict", "strict", "snapshot"]),
    st.sampled_from([0, 512, 1024]),
    st.booleans(),
)


def within(program: Program, limit: Limit) -> Session:
    """A session with that budget."""
    loose = Session(memory_budget="1GiB", min_nbytes=limit.min_nbytes, inplace=limit.inplace)
    Twin(program, loose).step(0)
    budget = loose._ledger.leaf_nbytes + int(limit.share * loose._ledger.peak_nbytes)
    if not limit.known:
        sizes._SEEN.clear()
    return Session(POLICIES[limit.policy](), memory_budget=budget, min_nbytes=limit.min_nbytes, inplace=limit.inplace)


class Allocated:
    """Runs a step, and has the allocator say how many bytes it had for itself at its peak."""

    peak = 0

    def __call__(self, step: Callable[[], None]) -> None:
        self.peak = peak_bytes(step)


def check_budget(program: Program, limit: Limit) -> None:
    """Run it plain and within a budget, which is never exceeded. Where it cannot be met, that is said, and the next
    step goes on from where plain PyTorch is."""
    gc.collect()
    gc.freeze()
    session = within(program, limit)
    budget = session.memory_budget
    assert budget is not None
    managed, plain = Twin(program, session), Twin(program, None, limit.inplace == "snapshot")
    for number in range(len(program.ends)):
        expected = plain.step(number)
        if overwritten(expected):
            return
        allocated = Allocated()
        try:
            actual = managed.step(number, allocated)
        except rekindle.BudgetInfeasible:
            managed.take_over(plain)
        else:
            wrong = differences(expected, actual)
            assert not wrong, (number, wrong, actual.get("why"), expected.get("why"))
            standing = sum(tensor.nbytes for tensor in managed.net.state_dict().values())
            assert standing + allocated.peak <= budget, (number, standing + allocated.peak - budget, session.last_step)
            assert session._highest() <= budget or not limit.known
        assert_clean(session)
        del expected
        actual = {}
        gc.collect()
    del managed, plain
    assert_nothing_lives(collect=True)
    assert session._ledger.total_nbytes == 0


ASKED_EARLY = program_of(Do("cat", 2, 0, 0), GELU, GELU, GELU, Do("add", 0, 0, 0), GELU, ends=4, width=128)
"""What `cat` reads is asked for before what it made."""

TAKES_UNSEEN = program_of(
    *(
        Do("bernoulli_p", 0, 0, 0),
        Do("dropout", 0, 0, 0),
        GELU,
        Do("embedding", 0, 0, 0),
        Do("rand_like", 0, 0, 0),
        ADD,
    ),
    *(Do("log_softmax", 0, 0, 0), ADD, ADD, Do("group_norm", 0, 0, 0), Do("max_all", 0, 0, 2), Do("tanh", 2, 0, 1)),
    *(GELU, Do("scale", 0, 0, 0), Do("add", 0, 0, 1), ADD),
    ends=4,
    width=128,
)
"""The node of `max_all` runs without the recorder, and what it returns is added to another gradient."""

READ_FOR_NOTHING = Program(
    (
        (
            *(Do("chunk", 2, 0, 2), Do("bmm", 0, 0, 0), Do("linear", 0, 0, 1), Do("weight_view", 0, 0, 0)),
            *(Do("cat", 3, 0, 0, 2), Do("rand_like", 1, 3, 0), Do("index", 3, 1, 0, 2), Do("bmm", 0, 1, 0, 5)),
            *(Do("exp_", 0, 1, 2, 6), Do("slice", 2, 2, 0, 1)),
        ),
    ),
    *(("sum",) * 4, 128, True, "", False, False, None),
)
"""A value that the plan keeps is read by an op whose result dies, and then by another."""

DOUBLE = Program(
    (
        (
            *(ADD, ADD, Do("cat", 0, 0, 0), GELU, Do("embedding", 0, 0, 0), Do("permuted", 0, 0, 0), ADD),
            *(Do("normal_", 0, 1, 2), Do("rms_norm", 0, 3, 0), Do("normal_", 0, 1, 2)),
        ),
        (
            *(Do("group_norm", 0, 1, 0, 3), Do("dropout", 0, 3, 0, 4), Do("scatter_", 3, 0, 1, 4)),
            *(Do("norm", 1, 1, 1, 4), Do("dropout", 2, 0, 0, 7), Do("bernoulli_p", 0, 3, 0, 4)),
        ),
    ),
    *(("double",) * 4, 128, True, "", True, False, None),
)
"""Nodes that ran under `create_graph` had held again what the plan had just let go of."""

MARKED = Program(
    (
        (Do("rms_norm", 0, 1, 0, 5),),
        (
            *(Do("batch_norm", 0, 1, 0, 7), Do("scale", 0, 0, 0, 3), Do("mark", 0, 1, 2, 7)),
            *(Do("layer_norm", 0, 2, 0, 2), GELU, Do("batch_norm", 0, 1, 0, 5), Do("batch_norm_alone", 0, 3, 0, 7)),
        ),
    ),
    *(("sum",) * 4, 128, False, "", False, False, None),
)
"""User code holds the activation that `mark` returned, and so its bytes, longer than the tensor."""

MARKED_INPUT = Program(
    (
        (
            Do("mm_t", 2, 0, 0, 6),
            Do("mark", 1, 2, 2),
            Do("rand_like", 3, 0, 2),
            Do("leaky_", 1, 0, 1),
            Do("norm", 0, 1, 0),
        ),
    ),
    *(("sum",) * 4, 128, True, "", True, False, None),
)
"""An input that is marked is written over. Its snapshot becomes stale, and goes for want of room only."""

MARKED_BEFORE = program_of(Do("mark"), Do("batch_norm_alone"), Do("gelu", 0, 0, 3), Do("square", 3), ends=3, width=128)
"""A marked value is read once, by what never asks for it."""

BRANCH = program_of(Do("rand_like", 2, 0, 0), Do("branch", 0, 2), Do("tanh", 3, 1, 3), ends=4, width=128)
"""By its data, a step goes as another plan says than the one that it began with."""

READ_AFTER = Program(
    (
        (
            Do("batch_norm_alone"),
            Do("inner_gradient", 0, 0, 1),
            Do("gelu", 2, 0, 1),
            Do("dropout"),
        ),
    ),
    *(("grad",) * 4, 128, False, "", False, False, None),
)
"""A value is read after a backward pass has asked for it the last time."""

TURNED = replace(
    program_of(
        *(
            Do("bmm", 0, 1, 0, 7),
            Do("noisy_attention", 0, 0, 0, 1),
            Do("cumsum", 3, 0, 1, 4),
            Do("dropout", 0, 2, 2, 4),
        ),
        *(Do("batch_norm_alone", 0, 0, 0, 0), Do("gelu", 0, 0, 0, 0), Do("bmm", 0, 0, 0, 0)),
        ends=4,
        width=128,
    ),
    ends=("pieces",) * 4,
)
"""The gradient that comes to a `gelu` lies in memory in another order than what it read."""


@fuzzed(50)
@example(ASKED_EARLY, Limit(1.1))
@example(TAKES_UNSEEN, Limit(0.9))
@example(TAKES_UNSEEN, Limit(0.9, known=False))
@example(READ_FOR_NOTHING, Limit(1.0))
@example(DOUBLE, Limit(0.8, inplace="snapshot", min_nbytes=1024))
@example(MARKED, Limit(0.8, min_nbytes=512))
@example(MARKED_INPUT, Limit(1.0, inplace="snapshot", min_nbytes=512))
@example(MARKED_BEFORE, Limit(1.1))
@example(MARKED_BEFORE, Limit(1.1, inplace="snapshot"))
@example(BRANCH, Limit(1.1))
@example(BRANCH, Limit(1.1, inplace="snapshot"))
@example(READ_AFTER, Limit(1.1))
@example(READ_AFTER, Limit(1.1, inplace="snapshot"))
@example(FROZEN_WRITTEN, Limit(1.1))
@example(TURNED, Limit(0.9, known=False))
@given(programs_within(), LIMITS)
def test_any_budget(program: Program, limit: Limit) -> None:
    """Any program within any budget: no bit differs, and the allocator's own peak stays below."""
    check_budget(program, limit)


HUNT = {"any": (check, (programs(), SETTINGS)), "budget": (check_budget, (programs_within(), LIMITS))}
