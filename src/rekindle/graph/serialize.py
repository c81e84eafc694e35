"""Graphs as versioned JSON: to keep one, to look at it, to plan for it elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from dataclasses import fields
from pathlib import Path
from reprlib import repr as short
from typing import Any, get_args, get_origin, get_type_hints

from rekindle._errors import GraphError
from rekindle.graph.ir import Call, Demand, Graph, Op, Value
from rekindle.graph.verify import verify_graph

FORMAT = "rekindle.graph"
VERSION = 2
_HINTS: dict[type[Any], dict[str, Any]] = {kind: get_type_hints(kind) for kind in (Call, Value, Op, Demand)}


def graph_to_json(graph: Graph) -> str:
    """The graph as JSON text, one line an item."""
    calls = [{**_plain(call), "parent": call.parent.number if call.parent else None} for call in graph.calls]
    sections = {
        "calls": calls,
        "values": map(_plain, graph.values),
        "ops": map(_plain, graph.ops),
        "demands": map(_plain, graph.demands),
    }
    lines = [f'"format": {json.dumps(FORMAT)}', f'"version": {VERSION}', f'"standing": {graph.standing}']
    for name, items in sections.items():
        rows = ",\n  ".join(json.dumps(item) for item in items)
        lines.append(f'"{name}": [\n  {rows}\n]')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def graph_from_json(text: str) -> Graph:
    """The graph that `graph_to_json` wrote.

    Raises:
        GraphError: the text is no JSON, no graph, one of another version, or breaks the rules of a graph.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GraphError(f"this is no JSON: {error}. Write graphs with rekindle.graph.save_graph.") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise GraphError(f"this JSON holds no graph: its format is not {FORMAT!r}")
    if data.get("version") != VERSION:
        raise GraphError(
            f"the graph has version {short(data.get('version'))}, but this Rekindle reads {VERSION}. Record the step "
            "again."
        )
    calls: list[Call] = []
    for row in _rows(data, "calls"):
        calls.append(_make(Call, _with_parent(row, calls)))
    values = tuple(_make(Value, row) for row in _rows(data, "values"))
    ops = tuple(_make(Op, row) for row in _rows(data, "ops"))
    demands = tuple(_make(Demand, row) for row in _rows(data, "demands"))
    standing = data.get("standing")
    if type(standing) is not int or standing < 0:
        raise GraphError(f"the graph is damaged: {short(standing)} bytes that are there all the time")
    return verify_graph(Graph(ops, values, tuple(calls), demands, standing))


def save_graph(graph: Graph, path: str | os.PathLike[str]) -> None:
    """Write a graph to a file. If that fails, a file that was there before stays whole."""
    target = Path(path)
    text = graph_to_json(graph)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with open(draft, "x", encoding="utf-8") as file:  # unlike `tempfile`, which hides files from other users
            file.write(text)
        os.replace(draft, target)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def load_graph(path: str | os.PathLike[str]) -> Graph:
    """Read a graph from a file that `save_graph` wrote.

    Raises:
        GraphError: it holds no graph.
        OSError: it cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise GraphError(f"{path} is no text file: {error}") from error
    return graph_from_json(text)


def _plain(item: Call | Value | Op | Demand) -> dict[str, Any]:
    """The fields that differ from their defaults: most do not."""
    row = {field.name: (getattr(item, field.name), field.default) for field in fields(item)}
    return {name: value for name, (value, default) in row.items() if value != default}


def _rows(data: dict[str, Any], section: str) -> list[dict[str, Any]]:
    rows = data.get(section)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise GraphError(f"the graph is damaged: its {section} are no list of objects")
    return rows


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


def _make(kind: type[Any], row: dict[str, Any]) -> Any:
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    for name, hint in _HINTS[kind].items():
        if name in arguments and not _fits(arguments[name], hint):
            raise GraphError(
                f"the graph is damaged: {name} of {kind.__name__} {short(row)} is not as it should be: {hint}"
            )
    try:
        return kind(**arguments)
    except TypeError as error:  # a field is missing, or there is one that should not be
        raise GraphError(f"the graph is damaged: {error}") from error


def _fits(value: object, hint: Any) -> bool:
    """Whether what was read has the annotated type. Unlike for Python, for JSON no bool is an int."""
    parts = get_args(hint)
    if get_origin(hint) is tuple:
        return type(value) is tuple and all(_fits(item, parts[0]) for item in value)
    if parts:
        return any(_fits(value, part) for part in parts)
    return type(value) is hint or (hint is float and type(value) is int)
