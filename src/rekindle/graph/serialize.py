"""Graphs as versioned JSON: to keep one, to look at it, to plan for it elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rekindle._errors import GraphError
from rekindle.graph.ir import Call, Graph, Op, Value
from rekindle.graph.verify import verify_graph

FORMAT = "rekindle.graph"
VERSION = 1


def graph_to_json(graph: Graph) -> str:
    """The graph as JSON text, one line an item."""
    calls = [{**_plain(call), "parent": call.parent.number if call.parent else None} for call in graph.calls]
    sections = {"calls": calls, "values": map(_plain, graph.values), "ops": map(_plain, graph.ops)}
    lines = [f'"format": {json.dumps(FORMAT)}', f'"version": {VERSION}']
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
    except (json.JSONDecodeError, RecursionError) as error:
        raise GraphError(f"this is no JSON: {error}. Write graphs with rekindle.graph.save_graph.") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise GraphError(f"this JSON holds no graph: its format is not {FORMAT!r}")
    if data.get("version") != VERSION:
        raise GraphError(
            f"the graph has version {data.get('version')!r}, but this Rekindle reads {VERSION}. Record the step again."
        )
    try:
        calls: list[Call] = []
        for row in data["calls"]:
            parent = row.pop("parent")
            calls.append(_make(Call, {**row, "parent": None if parent is None else calls[parent]}))
        values = tuple(_make(Value, row) for row in data["values"])
        graph = Graph(tuple(_make(Op, row) for row in data["ops"]), values, tuple(calls))
        return verify_graph(graph)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, GraphError):
            raise
        raise GraphError(f"the graph is damaged: {type(error).__name__}: {error}") from error


def save_graph(graph: Graph, path: str | os.PathLike[str]) -> None:
    """Write a graph to a file. If that fails, a file that was there before stays whole."""
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(graph_to_json(graph))
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def load_graph(path: str | os.PathLike[str]) -> Graph:
    """Read a graph from a file that `save_graph` wrote.

    Raises:
        GraphError: it holds no graph.
        OSError: it cannot be read.
    """
    try:
        return graph_from_json(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise GraphError(f"{path} is no text file: {error}") from error


def _plain(item: Call | Value | Op) -> dict[str, Any]:
    """The fields that differ from their defaults: most do not."""
    row = asdict(item) if not isinstance(item, Call) else {f.name: getattr(item, f.name) for f in fields(item)}
    defaults = {field.name: field.default for field in fields(item)}
    return {name: value for name, value in row.items() if value != defaults[name]}


def _make(kind: type[Any], row: dict[str, Any]) -> Any:
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in row.items()})
