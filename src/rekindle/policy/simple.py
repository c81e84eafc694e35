"""Policies that decide on the go: keep all, keep none, every n-th, and what people do by hand, per module."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from reprlib import repr as short

from rekindle._errors import PolicyError
from rekindle.graph import Graph, Plan
from rekindle.policy.base import CallLike, Decider, check_count, decide_on_paper


@dataclass(frozen=True, slots=True)
class KeepAll:
    """Keep everything, as plain PyTorch does. After the first step no op is recorded any more."""

    def __call__(self, graph: Graph) -> Plan:
        """Keep every evictable value."""
        return Plan(frozenset(value.number for value in graph.evictable))

    def decider(self) -> Decider:
        """The decisions of one step."""
        return _Constant(True)


@dataclass(frozen=True, slots=True)
class KeepNone:
    """Keep nothing: recompute everything from parameters and inputs. Slow, and not the least memory: one long replay
    brings back much at once."""

    def __call__(self, graph: Graph) -> Plan:
        """Keep nothing."""
        return Plan(frozenset())

    def decider(self) -> Decider:
        """The decisions of one step."""
        return _Constant(False)


@dataclass(frozen=True, slots=True)
class EveryN:
    """Keep every `n`-th evictable activation, in the order they are made. `EveryN(1)` keeps all.

    Raises:
        PolicyError: `n` is not a positive int.
    """

    n: int

    def __post_init__(self) -> None:
        check_count("n", self.n)

    def __call__(self, graph: Graph) -> Plan:
        """Keep the n-th, 2n-th, ... evictable value."""
        return decide_on_paper(self.decider(), graph)

    def decider(self) -> Decider:
        """The decisions of one step."""
        return _Every(self.n)


class PerModule:
    """Keep what crosses the boundary of each matching module, evict what is inside, as people do by hand with
    `torch.utils.checkpoint` around each block. Outside of all matches everything is kept.

    `PerModule(Block)` takes module classes, with their subclasses; `PerModule("layers.*")` names as in
    `model.named_modules()`, where `*` and `?` do not cross a dot. Matches may be nested.

    Raises:
        PolicyError: nothing is given, or something that is neither a class nor a name.
    """

    __slots__ = ("_classes", "_names", "blocks")

    def __init__(self, *blocks: type | str) -> None:
        if not blocks:
            raise PolicyError('PerModule needs to know which modules. Write PerModule(Block) or PerModule("layers.*").')
        for block in blocks:
            if not isinstance(block, type | str):
                several = isinstance(block, Iterable) and not hasattr(block, "forward")
                instead = (
                    "PerModule(*blocks) for several" if several else f"PerModule({type(block).__name__}) for its class"
                )
                raise PolicyError(
                    f"PerModule takes module classes and names, not {short(block)}. "
                    f'Write {instead}, or PerModule("layers.*") for names.'
                )
        self.blocks = blocks
        self._classes = frozenset(_qualified(block) for block in blocks if isinstance(block, type))
        names = [_translate(block) for block in blocks if isinstance(block, str)]
        self._names = re.compile("|".join(names) if names else r"(?!)")  # "" is the name of the whole model

    def __call__(self, graph: Graph) -> Plan:
        """Keep the evictable values that cross a boundary, and those outside that autograd saves."""
        return decide_on_paper(self.decider(), graph)

    def decider(self) -> Decider:
        """The decisions of one step."""
        return _Boundaries(self)

    def matches(self, call: CallLike) -> bool:
        """Whether the called module is one of those meant."""
        if not self._classes.isdisjoint(call.types):
            return True
        return bool(call.types) and self._names.fullmatch(call.path) is not None

    def unmatched(self, graph: Graph) -> tuple[type | str, ...]:
        """Those of `blocks` that no module called in the step of `graph` is meant by."""
        return tuple(block for block in self.blocks if not any(map(PerModule(block).matches, graph.calls)))

    def __repr__(self) -> str:
        names = (block.__name__ if isinstance(block, type) else repr(block) for block in self.blocks)
        return f"PerModule({', '.join(names)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PerModule) and self.blocks == other.blocks

    def __hash__(self) -> int:
        return hash(self.blocks)


class _Constant:
    reads = False

    def __init__(self, keep: bool) -> None:
        self._keep = self.makes = keep

    def made(self, call: CallLike) -> bool:
        return self._keep

    def read(self, made_in: CallLike, read_in: CallLike) -> bool:
        return False

    def saved(self, made_in: CallLike, saved_in: CallLike) -> bool:
        return False


class _Every(_Constant):
    def __init__(self, n: int) -> None:
        super().__init__(True)
        self._n = n
        self._seen = 0

    def made(self, call: CallLike) -> bool:
        self._seen += 1
        return self._seen % self._n == 0


class _Boundaries(_Constant):
    reads = True

    def __init__(self, policy: PerModule) -> None:
        super().__init__(False)
        self._matches = policy.matches
        self._inside: dict[int, int] = {}

    def read(self, made_in: CallLike, read_in: CallLike) -> bool:
        return made_in is not read_in and self._innermost(made_in) != self._innermost(read_in)

    def saved(self, made_in: CallLike, saved_in: CallLike) -> bool:
        return not self._innermost(made_in) or self.read(made_in, saved_in)

    def _innermost(self, call: CallLike) -> int:
        """The number of the innermost matching call around `call`; 0 outside of all."""
        found = self._inside.get(call.number)
        if found is None:
            if self._matches(call):
                found = call.number
            else:
                found = self._innermost(call.parent) if call.parent is not None else 0
            self._inside[call.number] = found
        return found


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _translate(pattern: str) -> str:
    """A shell pattern over dotted names as a regular expression; `fnmatch` has wildcards that cross dots."""
    parts = (r"[^.]*" if part == "*" else r"[^.]" if part == "?" else re.escape(part) for part in _split(pattern))
    return "".join(parts)


def _split(pattern: str) -> list[str]:
    return [part for part in re.split(r"([*?])", pattern) if part]
