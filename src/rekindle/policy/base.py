"""What a policy is: a function from the graph of a step to what is kept, and for some also a decision on the go."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import index
from reprlib import repr as short
from typing import Protocol, TypeAlias, runtime_checkable

from rekindle._errors import GraphError, PolicyError
from rekindle.graph import Graph, Plan, verify_plan

PolicyLike: TypeAlias = "Callable[[Graph], Plan | Iterable[int]]"
"""A policy, or any function of the user's own: from a graph to a plan, or to the numbers of the values to keep."""


class CallLike(Protocol):
    """A module call, on paper (`graph.Call`) or running (`record.modules.ModuleCall`)."""

    @property
    def number(self) -> int:
        """Position among the calls of the step; 0 is what runs outside of all modules."""

    @property
    def path(self) -> str:
        """Qualified name relative to the outermost module."""

    @property
    def types(self) -> tuple[str, ...]:
        """Qualified names of its class and their bases, nearest first; empty outside of all modules."""

    @property
    def parent(self) -> CallLike | None:
        """The call it was made in."""


class Decider(Protocol):
    """The decisions of one step, made as it runs, from what has been seen of it so far."""

    makes: bool
    """Whether `made` is to be asked; if not, it is always no."""
    reads: bool
    """Whether `read` is to be asked; if not, it is always no."""

    def made(self, call: CallLike) -> bool:
        """Whether an evictable activation becomes a checkpoint as it is made. Asked once for each, in their order."""

    def read(self, made_in: CallLike, read_in: CallLike) -> bool:
        """Whether an activation becomes a checkpoint as an op reads it."""

    def saved(self, made_in: CallLike, saved_in: CallLike) -> bool:
        """Whether an activation becomes a checkpoint as autograd saves it."""


@runtime_checkable
class OnTheGo(Protocol):
    """A policy that needs no graph: it decides as the step runs, from the first step on."""

    def decider(self) -> Decider:
        """The decisions of one step."""


def decider_of(policy: PolicyLike) -> Decider | None:
    """A decider for one step, if the policy decides on the go.

    Raises:
        PolicyError: `policy` is not a policy.
    """
    check_policy(policy)
    on_the_go: object = policy
    return on_the_go.decider() if isinstance(on_the_go, OnTheGo) else None


def decide_on_paper(decider: Decider, graph: Graph) -> Plan:
    """What `decider` keeps of the step that a graph tells of: the same as when the step runs. What plain backward ops
    read is not asked about, since they are not recorded to be repeated."""
    kept: set[int] = set()
    for op in graph.ops:
        call = graph.calls[op.call]
        for number in op.inputs if decider.reads and not op.backward else ():
            value = graph.values[number]
            if value.made_by is None or not value.evictable or number in kept:
                continue
            if decider.read(graph.calls[graph.ops[value.made_by].call], call):
                kept.add(number)
        for number in op.outputs:
            value = graph.values[number]
            if not value.evictable:
                continue
            if decider.made(call) or any(decider.saved(call, graph.calls[saved]) for saved in value.saved_in):
                kept.add(number)
    return Plan(frozenset(kept))


def make_plan(policy: PolicyLike, graph: Graph) -> Plan:
    """The plan of `policy` for `graph`, checked.

    Raises:
        PolicyError: `policy` is not a policy, or returns neither a plan nor numbers of evictable values of the graph.
    """
    check_policy(policy)
    chosen = policy(graph)
    try:
        kept = frozenset(map(_number, chosen.kept if isinstance(chosen, Plan) else chosen))
    except TypeError as error:
        raise PolicyError(
            f"policy {policy!r} returned {short(chosen)}. Return the numbers of the values to keep, such as "
            "[value.number for value in graph.evictable if value.nbytes > 2**20]."
        ) from error
    try:
        return verify_plan(graph, Plan(kept))
    except GraphError as error:
        raise PolicyError(f"policy {policy!r}: {error}. Choose from graph.evictable.") from error


def check_policy(policy: object) -> None:
    """See that a policy is one.

    Raises:
        PolicyError: `policy` cannot be called with a graph, or is a class where an instance is meant.
    """
    if isinstance(policy, type):
        raise PolicyError(f"policy is the class {policy.__name__}. Write {policy.__name__}(...) to make a policy.")
    if not callable(policy):
        raise PolicyError(
            f"policy is {policy!r}, which cannot be called. Write a policy such as rekindle.PerModule(Block) or "
            "rekindle.KeepNone(), or a function from a Graph to the numbers of the values to keep."
        )


def check_share(name: str, share: object, *, zero: bool = False) -> None:
    """See that a share is one.

    Raises:
        PolicyError: `share` is no number in (0, 1], or [0, 1] if `zero`.
    """
    if isinstance(share, int | float) and not isinstance(share, bool) and (0 < share <= 1 or (zero and share == 0)):
        return
    limits = "[0, 1]" if zero else "(0, 1]"
    raise PolicyError(f"{name} is {share!r}, but must be in {limits}. Write {name}=0.2 for a fifth.")


def check_count(name: str, count: object) -> None:
    """See that a count is one.

    Raises:
        PolicyError: `count` is no positive int.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise PolicyError(f"{name} is {count!r}, but must be a whole number of at least 1. Write {name}=4, say.")


def _number(number: object) -> int:
    if isinstance(number, bool):  # a mask over the values, say: its numbers would be 0 and 1
        raise TypeError(f"{number} is no number of a value")
    return index(number)  # type: ignore[arg-type]
