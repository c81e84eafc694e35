"""Graphs as JSON: what is written comes back, and nothing else is taken for a graph."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paper import OUTSIDE, build, chain, diamond, graphs, unhurried
from rekindle import GraphError, load_graph, save_graph
from rekindle.graph import Call, Graph, graph_from_json, graph_to_json, serialize, verify_graph

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
MODULES = build(
    ((0,), (1,)),
    ((1,), (2, 3)),
    calls=(OUTSIDE, root := Call(1, OUTSIDE, "", ("app.Model",)), Call(2, root, "head", ("app.Head", "app.Base"))),
    call_of=(1, 2),
    saved_in={1: (1, 2)},
    kept=(3,),
    backward=(1,),
)
Edit = Callable[[dict[str, Any]], object]


def read_or_refuse(text: str) -> Graph | None:
    """The graph, or None if it was refused as it should be: with a GraphError and nothing else."""
    try:
        return graph_from_json(text)
    except GraphError:
        return None


def paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where everything is in a JSON document."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(deeper for key, item in items for deeper in paths(item, (*path, key)))]


@unhurried
@given(graphs())
def test_round_trip(graph: Graph) -> None:
    """A graph comes back equal, and is written the same way again."""
    text = graph_to_json(graph)
    again = graph_from_json(text)
    assert again == graph
    assert graph_to_json(again) == text


@pytest.mark.parametrize("graph", [build(), chain(3), diamond(), MODULES], ids=["empty", "chain", "diamond", "modules"])
def test_files_round_trip(graph: Graph, tmp_path: Path) -> None:
    """A graph goes through a file unchanged, and the file is all that is left in its folder."""
    path = tmp_path / "graph.json"
    save_graph(graph, path)
    assert load_graph(str(path)) == graph
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_for_people_too() -> None:
    """Each op, value and call has a line of its own, which names only what differs from the defaults."""
    assert graph_to_json(MODULES).splitlines() == [
        "{",
        '"format": "rekindle.graph",',
        '"version": 2,',
        '"standing": 0,',
        '"calls": [',
        '  {"number": 0, "parent": null, "path": "", "types": []},',
        '  {"number": 1, "parent": 0, "path": "", "types": ["app.Model"]},',
        '  {"number": 2, "parent": 1, "path": "head", "types": ["app.Head", "app.Base"]}',
        "],",
        '"values": [',
        '  {"number": 0, "nbytes": 8, "made_by": null, "evictable": false},',
        '  {"number": 1, "nbytes": 8, "made_by": 0, "saved_in": [1, 2]},',
        '  {"number": 2, "nbytes": 8, "made_by": 1},',
        '  {"number": 3, "nbytes": 8, "made_by": 1, "evictable": false}',
        "],",
        '"ops": [',
        '  {"number": 0, "name": "aten.op", "inputs": [0], "outputs": [1], "call": 1, "seconds": 1.0},',
        '  {"number": 1, "name": "aten.op", "inputs": [1], "outputs": [2, 3], "call": 2, "seconds": 1.0, '
        '"backward": true}',
        "],",
        '"demands": [',
        "  ",
        "]",
        "}",
    ]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.update(format="onnx"), "holds no graph"),
        (lambda data: data.pop("format"), "holds no graph"),
        (lambda data: data.update(version=3), "version 3, but this Rekindle reads 2"),
        (lambda data: data.update(version=None), "version None"),
        (lambda data: data.pop("version"), "version None"),
        (lambda data: data.update(version=[9] * 1000), "version [9, 9, 9, 9, 9, 9, ...]"),
        (lambda data: data.pop("ops"), "ops are no list"),
        (lambda data: data.update(values={}), "values are no list"),
        (lambda data: data.update(calls=[[]]), "calls are no list of objects"),
        (lambda data: data.update(calls=[]), "call 0 stands for"),
        (lambda data: data["calls"][2].update(parent=2), "parent 2, which is not before it"),
        (lambda data: data["calls"][2].update(parent=-1), "parent -1, which is not before it"),
        (lambda data: data["calls"][2].update(parent=True), "parent True, which is not before it"),
        (lambda data: data["calls"][2].update(parent="1"), "parent '1', which is not before it"),
        (lambda data: data["calls"][2].pop("parent"), "'parent'"),
        (lambda data: data["calls"][2].update(types="app.Head"), "types of Call"),
        (lambda data: data["values"][1].update(nbytes=1.5), "nbytes of Value"),
        (lambda data: data["values"][1].update(nbytes="8"), "nbytes of Value"),
        (lambda data: data["values"][1].update(made_by=False), "made_by of Value"),
        (lambda data: data["values"][1].update(evictable=1), "evictable of Value"),
        (lambda data: data["values"][1].update(saved_in=[[1]]), "saved_in of Value"),
        (lambda data: data["values"][1].update(color="red"), "'color'"),
        (lambda data: data["values"].pop(), "makes value 3, which does not exist"),
        (lambda data: data["ops"][1].pop("name"), "'name'"),
        (lambda data: data["ops"][1].update(name=None), "name of Op"),
        (lambda data: data["ops"][1].update(inputs=[1.0]), "inputs of Op"),
        (lambda data: data["ops"][1].update(inputs=3), "inputs of Op"),
        (lambda data: data["ops"][1].update(seconds="fast"), "seconds of Op"),
        (lambda data: data["ops"][1].update(seconds=10**400), "op 1 takes 1000"),
        (lambda data: data["ops"].reverse(), "op 1 stands at position 0"),
    ],
)
def test_damage_is_named(edit: Edit, message: str) -> None:
    """A file that was edited badly, or that another version wrote, is refused with a word on what is wrong in it."""
    data = json.loads(graph_to_json(MODULES))
    edit(data)
    with pytest.raises(GraphError, match=re.escape(message)):
        graph_from_json(json.dumps(data))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '"rekindle.graph"',
        "\ufeff{}",
        "[" * 100_000,
        '{"a":' * 100_000,
        "9" * 10_000,
        '{"format": "rekindle.graph", "version": ' + "9" * 10_000 + "}",
        '{"format": "rekindle.graph", "version": ' + "[" * 500 + "]" * 500 + "}",
    ],
    ids=lambda text: f"{text[:24]} ({len(text)})",
)
def test_foreign_text_is_refused(text: str) -> None:
    """What is no JSON, or other JSON, raises GraphError, even where Python's reader raises something of its own."""
    with pytest.raises(GraphError):
        graph_from_json(text)


@unhurried
@given(st.text())
def test_any_text_is_refused(text: str) -> None:
    """No text found by chance is a graph or a crash."""
    assert read_or_refuse(text) is None


@unhurried
@given(st.data())
def test_a_cut_off_file_is_refused(data: st.DataObject) -> None:
    """No beginning of a file is taken for a graph."""
    text = graph_to_json(MODULES).rstrip()
    assert read_or_refuse(text[: data.draw(st.integers(0, len(text) - 1))]) is None


@unhurried
@given(st.data(), JSON)
def test_anything_anywhere(data: st.DataObject, item: Any) -> None:
    """A document with anything put anywhere is refused, or is a legal graph that keeps its types."""
    tree = json.loads(graph_to_json(MODULES))
    *way, last = data.draw(st.sampled_from(paths(tree)[1:]))
    place = tree
    for key in way:
        place = place[key]
    place[last] = item
    graph = read_or_refuse(json.dumps(tree))
    if graph is not None:
        assert verify_graph(graph) is graph
        assert json.loads(graph_to_json(graph)) == json.loads(graph_to_json(graph_from_json(graph_to_json(graph))))
        assert all(type(value.nbytes) is int and type(value.evictable) is bool for value in graph.values)
        assert all(type(number) is int for op in graph.ops for number in (*op.inputs, *op.outputs))


@unhurried
@given(st.binary(max_size=64))
def test_any_file_is_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """A file of any bytes raises GraphError, also if it is no text."""
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(content)
    with pytest.raises(GraphError):
        load_graph(path)


def test_a_binary_file_is_named(tmp_path: Path) -> None:
    """The message for a file that is no text says which file it is."""
    path = tmp_path / "model.pt"
    path.write_bytes(b"\x80\x02\xff")
    with pytest.raises(GraphError, match=r"model\.pt is no text file"):
        load_graph(path)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    """What cannot be read at all stays the error that everybody knows."""
    with pytest.raises(FileNotFoundError):
        load_graph(tmp_path / "nothing")


def _full_disk(*args: Any, **options: Any) -> IO[str]:
    with open(*args, **options) as file:
        file.write("half")
    raise OSError(errno.ENOSPC, "no space left on device")


def _failing_replace(source: object, target: object) -> None:
    raise PermissionError(errno.EPERM, "not permitted")


@pytest.mark.parametrize("fails", ["open", "replace", "text"])
def test_a_failing_write_leaves_the_old_file_whole(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a graph cannot be written, the file that was there is as before, and nothing is left beside it."""
    path = tmp_path / "graph.json"
    save_graph(chain(1), path)
    graph = diamond()
    if fails == "open":
        monkeypatch.setattr(serialize, "open", _full_disk, raising=False)
    elif fails == "replace":
        monkeypatch.setattr(serialize.os, "replace", _failing_replace)
    else:
        graph = replace(graph, ops=(replace(graph.ops[0], name=object()), *graph.ops[1:]))  # type: ignore[arg-type]
    with pytest.raises((OSError, TypeError)):
        save_graph(graph, path)
    monkeypatch.undo()
    assert load_graph(path) == chain(1)
    assert list(tmp_path.iterdir()) == [path]


def test_saving_where_no_folder_is(tmp_path: Path) -> None:
    """A folder that does not exist is not made."""
    with pytest.raises(FileNotFoundError):
        save_graph(chain(1), tmp_path / "no" / "graph.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="other systems have no umask to speak of")
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o000])
def test_the_umask_decides_who_may_read(umask: int, tmp_path: Path) -> None:
    """A saved graph may be read by whom any other new file may be read."""
    before = os.umask(umask)
    try:
        save_graph(chain(1), tmp_path / "graph.json")
    finally:
        os.umask(before)
    assert (tmp_path / "graph.json").stat().st_mode & 0o777 == 0o666 & ~umask
