"""Graphs as versioned JSON: to keep one, to look at it, to plan for it elsewhere. Plans are written the same way."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from reprlib import repr as short
from typing import Any, get_args, get_origin, get_type_hints

from rekindle._errors import GraphError
from rekindle.graph.ir import Call, Demand, Graph, Op, Value
from rekindle.graph.verify import verify_graph

FORMAT = "rekindle.graph"
VERSION = 2


def graph_to_json(graph: Graph) -> str:
    """The graph as JSON text, one line an item."""
    calls = [{**plain(call), "parent": call.parent.number if call.parent else None} for call in graph.calls]
    head = {"format": FORMAT, "version": VERSION, "standing": graph.standing}
    sections = {
        "calls": calls,
        "values": [plain(value) for value in graph.values],
        "ops": [plain(op) for op in graph.ops],
        "demands": [plain(demand) for demand in graph.demands],
    }
    return document(head, sections)


def graph_from_json(text: str) -> Graph:
    """The graph that `graph_to_json` wrote.

    Raises:
        GraphError: the text is no JSON, no graph, one of another version, or breaks the rules of a graph.
    """
    data = parse(text, "Write graphs with rekindle.graph.save_graph.")
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise GraphError(f"this JSON holds no graph: its format is not {FORMAT!r}")
    if data.get("version") != VERSION:
        raise GraphError(
            f"the graph has version {short(data.get('version'))}, but this Rekindle reads {VERSION}. Record the step "
            "again."
        )
    calls: list[Call] = []
    for row in rows_of(data, "calls"):
        calls.append(make(Call, _with_parent(row, calls)))
    values = tuple(make(Value, row) for row in rows_of(data, "values"))
    ops = tuple(make(Op, row) for row in rows_of(data, "ops"))
    demands = tuple(make(Demand, row) for row in rows_of(data, "demands"))
    standing = data.get("standing")
    if type(standing) is not int or standing < 0:
        raise GraphError(f"the graph is damaged: {short(standing)} bytes that are there all the time")
    return verify_graph(Graph(ops, values, tuple(calls), demands, standing))


def save_graph(graph: Graph, path: str | os.PathLike[str]) -> None:
    """Write a graph to a file. If that fails, a file that was there before stays whole."""
    write_text(path, graph_to_json(graph))


def load_graph(path: str | os.PathLike[str]) -> Graph:
    """Read a graph from a file that `save_graph` wrote.

    Raises:
        GraphError: it holds no graph.
        OSError: it cannot be read.
    """
    return graph_from_json(read_text(path))


# -- what plans are written with, too ----------------------------------------------------------------------------------


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Put a text into a file. If that fails, a file that was there before stays whole."""
    target = Path(path)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with open(draft, "x", encoding="utf-8") as file:  # unlike `tempfile`, which hides files from other users
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # a disk may say that it is full as late as this
        os.replace(draft, target)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file.

    Raises:
        GraphError: it is no text.
        OSError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise GraphError(f"{path} is no text file: {error}") from error


def document(
    head: Mapping[str, Any], sections: Mapping[str, Sequence[Any]], inner: Mapping[str, str] | None = None
) -> str:
    """JSON text with a line for each item of each section, and with `inner` documents."""
    lines = [f"{json.dumps(name)}: {json.dumps(item)}" for name, item in head.items()]
    for name, items in sections.items():
        rows = ",\n  ".join(json.dumps(item) for item in items)
        lines.append(f'"{name}": [\n  {rows}\n]')
    lines += [f'"{name}": {text.rstrip()}' for name, text in (inner or {}).items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def parse(text: str, cure: str) -> Any:
    """What a JSON text says.

    Raises:
        GraphError: it is none; `cure` says where such texts come from.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GraphError(f"this is no JSON: {error}. {cure}") from error


def plain(item: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults: most do not."""
    row = {field.name: (getattr(item, field.name), field.default) for field in fields(item)}
    return {name: value for name, (value, default) in row.items() if value != default}


def rows_of(data: dict[str, Any], section: str, what: str = "graph") -> list[dict[str, Any]]:
    """The objects of a section.

    Raises:
        GraphError: it is missing, or holds something else.
    """
    rows = data.get(section)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise GraphError(f"the {what} is damaged: its {section} are no list of objects")
    return rows


def make(kind: type[Any], row: dict[str, Any], what: str = "graph") -> Any:
    """The dataclass that an object of the JSON text stands for.

    Raises:
        GraphError: a field is missing, unknown, or of another type than it should be.
    """
    hints = _hints(kind)  # type: ignore[arg-type] # mypy takes no class with Any for hashable
    arguments = {name: _collected(value, hints.get(name)) for name, value in row.items()}
    for name, hint in hints.items():
        if name in arguments and not _fits(arguments[name], hint):
            raise GraphError(
                f"the {what} is damaged: {name} of {kind.__name__} {short(row)} is not as it should be: {hint}"
            )
    try:
        return kind(**arguments)
    except TypeError as error:  # a field is missing, or there is one that should not be
        raise GraphError(f"the {what} is damaged: {error}") from error


@cache
def _hints(kind: Hashable) -> dict[str, Any]:
    return get_type_hints(kind)


def _collected(value: object, hint: Any) -> object:
    """A list of the JSON text as the collection that the field wants."""
    if not isinstance(value, list):
        return value
    if get_origin(hint) is frozenset and all(type(item) is int for item in value):
        return frozenset(value)
    return tuple(value)


def _with_parent(row: dict[str, Any], calls: list[Call]) -> dict[str, Any]:
    """The row of a call with its parent in place of the parent's number."""
    number = row.get("parent")
    if number is None:
        return row
    if type(number) is not int or not 0 <= number < len(calls):
        raise GraphError(
            f"the graph is damaged: call {len(calls)} names parent {short(number)}, which is not before it"
        )
    return {**row, "parent": calls[number]}


def _fits(value: object, hint: Any) -> bool:
    """Whether what was read has the annotated type. Unlike for Python, for JSON no bool is an int."""
    parts = get_args(hint)
    if (origin := get_origin(hint)) in (tuple, frozenset):
        return type(value) is origin and all(_fits(item, parts[0]) for item in value)  # type: ignore[attr-defined]
    if parts:
        return any(_fits(value, part) for part in parts)
    return type(value) is hint or (hint is float and type(value) is int)
