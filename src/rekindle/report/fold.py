"""A plan by module: what is kept and recomputed in each, with identical layers folded into one row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from rekindle.graph import Graph, Plan, Timeline, module_of

_DEPTH = 2  # rows below a folded layer


@dataclass(frozen=True, slots=True)
class Row:
    """One module, or several that are treated alike.

    Attributes:
        name: path, with the numbers of those that are alike, such as "model.layers.0-11".
        depth: how many rows it is part of.
        count: how many modules are folded into it, and so into the rows that are part of it.
        kept: bytes kept in all of them.
        recomputed: bytes that are recomputed for the backward pass in all of them.
        seconds: what that takes.
    """

    name: str
    depth: int
    count: int
    kept: int
    recomputed: int
    seconds: float


@dataclass(slots=True)
class _Node:
    """A module with those inside it, by the parts of their paths."""

    inner: dict[str, _Node] = field(default_factory=dict)
    treated: Counter[tuple[str, int, bool]] = field(default_factory=Counter)  # ops, bytes, whether kept
    replays: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def at(self, path: str) -> _Node:
        """The module of a path."""
        node = self
        for part in path.split(".") if path else ():
            node = node.inner.setdefault(part, _Node())
        return node

    def everything(self) -> Iterator[_Node]:
        """The module and all inside it."""
        nodes = [self]
        while nodes:
            node = nodes.pop()
            yield node
            nodes += node.inner.values()

    def alike(self) -> tuple[object, ...]:
        """The same for modules that are treated alike, however long it took."""
        inner = frozenset((name, node.alike()) for name, node in self.inner.items())
        return (frozenset(self.treated.items()), frozenset(self.replays.items()), inner)

    def is_empty(self) -> bool:
        """Whether nothing is kept or recomputed in it."""
        return not any(node.treated or node.replays for node in self.everything())


def rows_of(graph: Graph, plan: Plan, timeline: Timeline) -> list[Row]:
    """The rows of a plan, in the order in which modules run first; those with nothing to decide are left out."""
    root = _Node()
    asked = {demand.value for demand in graph.demands}
    for op in graph.forward:
        root.at(graph.calls[op.call].path)  # in their order
    for value in graph.evictable:
        if plan.keeps(value.number) or value.number in asked:
            name = "" if value.made_by is None else graph.ops[value.made_by].name
            root.at(module_of(graph, value)).treated[name, value.nbytes, plan.keeps(value.number)] += 1
    for number in (number for ops in timeline.replays for number in ops):
        node = root.at(graph.calls[graph.ops[number].call].path)
        node.replays[graph.ops[number].name] += 1
        node.seconds += graph.ops[number].seconds
    return list(_rows([("", root)], 0, 0))


def _rows(named: list[tuple[str, _Node]], depth: int, below: int) -> Iterator[Row]:
    """The row of modules that are treated alike, and those of what is inside them."""
    name, node = _ranges([name for name, _ in named]), named[0][1]
    while len(node.inner) == 1 and not node.treated and not node.replays:
        (part,) = node.inner  # a module that only calls another
        named = [(f"{name}.{part}", each.inner[part]) for name, each in named]
        name, node = f"{name}.{part}".lstrip("."), named[0][1]
    yield _row(name or "(outermost)", depth, [node for _, node in named])
    if below >= _DEPTH:
        return
    last = name.rpartition(".")[2]
    for group in _groups(node):
        numbered = group[0][0].isdecimal()
        merged = [(part, _merged([each.inner[part] for _, each in named])) for part, _ in group]
        inner = [(f"{last}.{part}" if numbered and last else part, each) for part, each in merged]
        yield from _rows(inner, depth + 1, below + 1 if numbered or below else 0)


def _groups(node: _Node) -> list[list[tuple[str, _Node]]]:
    """What is inside a module, numbered modules that are treated alike together."""
    groups: dict[object, list[tuple[str, _Node]]] = {}
    for part, inner in node.inner.items():
        if not inner.is_empty():
            key = inner.alike() if part.isdecimal() else part
            groups.setdefault(key, []).append((part, inner))
    return list(groups.values())


def _merged(nodes: list[_Node]) -> _Node:
    """Modules that are treated alike as one."""
    merged = _Node()
    for node in nodes:
        merged.treated += node.treated
        merged.replays += node.replays
        merged.seconds += node.seconds
    for part in nodes[0].inner:
        merged.inner[part] = _merged([node.inner[part] for node in nodes])
    return merged


def _row(name: str, depth: int, modules: Iterable[_Node]) -> Row:
    modules = list(modules)
    nodes = [node for module in modules for node in module.everything()]
    treated = [(nbytes * count, kept) for node in nodes for (_, nbytes, kept), count in node.treated.items()]
    return Row(
        name,
        depth,
        len(modules),
        sum(nbytes for nbytes, kept in treated if kept),
        sum(nbytes for nbytes, kept in treated if not kept),
        sum(node.seconds for node in nodes),
    )


def _ranges(names: list[str]) -> str:
    """The names of modules that are alike: "0-3, 6"."""
    if len(names) == 1:
        return names[0]
    prefix = names[0].rpartition(".")[0]
    numbers = sorted(int(name.rpartition(".")[2]) for name in names)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"{prefix}.{text}" if prefix else text
