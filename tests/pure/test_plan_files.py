"""Plans as files: what is saved comes back, and nothing else is taken for a plan."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paper import chain_step, steps, unhurried
from rekindle import GraphError, Plan, save_graph
from rekindle.graph import Forecast, Graph, Turn, plan
from rekindle.policy import Planner

FULL = os.environ.get("REKINDLE_TESTS") == "full"
Edit = Callable[[dict[str, Any]], object]


@cache
def planned(graph: Graph | None = None) -> Plan:
    """A plan halfway between the floor and all that the step needs."""
    planner = Planner(graph or chain_step(8, [8, 1, 9, 2] * 2))
    return planner.plan((planner.floor() + planner.full) // 2)


@unhurried
@given(steps())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, graph: Graph) -> None:
    """A plan comes back equal, with its turns, its promise and its graph, and is written the same way again."""
    path = tmp_path_factory.getbasetemp() / "plan.json"
    kept = frozenset(value.number for value in graph.evictable[::2])
    turns = tuple(Turn(kept, tuple(sorted(kept))) for _ in graph.demands)
    written = Plan(kept, turns, Forecast(9, 8, 0.1, 0.05), graph)
    written.save(path)
    read = Plan.load(str(path))
    assert (read, read.graph) == (written, graph)
    text = path.read_text()
    read.save(path)
    assert path.read_text() == text


def test_a_planned_step_goes_through_a_file(tmp_path: Path) -> None:
    """The planner's own plans can be saved, and the file is all that is left in its folder."""
    written = planned()
    path = tmp_path / "plan.json"
    written.save(path)
    read = Plan.load(path)
    assert read == written
    assert read.graph == written.graph is not None
    assert any(turn.dropped for turn in read.turns)
    assert list(tmp_path.iterdir()) == [path]


def test_plans_compare_without_their_graphs() -> None:
    """Two plans that decide alike are equal, hash alike and print no graph in their repr."""
    written = planned()
    bare = replace(written, graph=None)
    assert bare == written
    assert hash(bare) == hash(written)
    assert "Graph(" not in repr(written)


def test_a_plan_without_a_graph_is_not_saved(tmp_path: Path) -> None:
    """A policy's plan says what to do to be saved; no file appears."""
    with pytest.raises(GraphError, match="no graph to be saved with"):
        Plan(frozenset({1})).save(tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []


def test_an_illegal_plan_is_not_saved(tmp_path: Path) -> None:
    """A plan that its own graph refuses leaves the older file whole."""
    path = tmp_path / "plan.json"
    planned().save(path)
    with pytest.raises(GraphError, match="keeps value 99"):
        replace(planned(), kept=frozenset({99})).save(path)
    assert Plan.load(path) == planned()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.update(format="rekindle.graph"), "holds no plan"),
        (lambda data: data.pop("format"), "holds no plan"),
        (lambda data: data.update(version=0), "version 0, but this Rekindle reads 1"),
        (lambda data: data.pop("version"), "version None"),
        (lambda data: data["graph"].update(version=1), "version 1, but this Rekindle reads 2"),
        (lambda data: data.pop("graph"), "holds no graph"),
        (lambda data: data.pop("turns"), "turns are no list"),
        (lambda data: data["turns"].pop(), "7 turns, but the graph has 8 demands"),
        (lambda data: data["turns"][0].update(retained=[1.0]), "retained of Turn"),
        (lambda data: data["turns"][0].update(retained=[99]), "turn 0 of the plan retains value 99"),
        (lambda data: data["turns"][1].update(dropped=[12]), "turn 1 of the plan drops value 12, which is not its"),
        (lambda data: data["turns"][1].update(dropped=[True]), "dropped of Turn"),
        (lambda data: data["turns"][1].update(color="red"), "'color'"),
        (lambda data: data.update(kept=None), "retained of Turn"),
        (lambda data: data.update(kept=["1"]), "retained of Turn"),
        (lambda data: data.update(kept=[-1]), "the plan keeps value -1"),
        (lambda data: data.update(forecast=[1]), "its forecast is [1]"),
        (lambda data: data["forecast"].pop("peak"), "'peak'"),
        (lambda data: data["forecast"].update(peak=-1), "-1 bytes"),
        (lambda data: data["forecast"].update(seconds=float("nan")), "nan seconds"),
        (lambda data: data["forecast"].update(bound=-1.0), "-1.0 seconds"),
    ],
)
def test_damage_is_named(edit: Edit, message: str, tmp_path: Path) -> None:
    """A file that is whole but says what no plan says, or that another version wrote, is refused with a word on it."""
    path = tmp_path / "plan.json"
    planned().save(path)
    data = json.loads(path.read_text())
    edit(data)
    data.pop("digest")
    path.write_text(json.dumps({**data, "digest": plan._digest(data)}))
    with pytest.raises(GraphError, match=re.escape(message)):
        Plan.load(path)


def test_what_was_changed_is_refused(tmp_path: Path) -> None:
    """A legal plan that is not the one that was written is refused: its promise would not hold."""
    path = tmp_path / "plan.json"
    planned().save(path)
    data = json.loads(path.read_text())
    data["kept"] = data["kept"][1:]
    path.write_text(json.dumps(data))
    with pytest.raises(GraphError, match="changed since it was written"):
        Plan.load(path)


@unhurried
@given(st.data())
def test_a_cut_off_or_flipped_file_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """No beginning of a file, and none with another character anywhere, is taken for another plan."""
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    written = planned()
    written.save(path)
    text = path.read_text().rstrip()
    place = data.draw(st.integers(0, len(text) - 1))
    path.write_text(text[:place] + data.draw(st.sampled_from(["", "0" + text[place + 1 :], "x" + text[place + 1 :]])))
    try:
        read = Plan.load(path)
    except GraphError:
        return
    assert (read, read.graph) == (written, written.graph)  # the character was the same


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"\x80\x02\xff", b"{}", b"9" * 10_000, b"[" * 100_000])
def test_foreign_files_are_refused(content: bytes, tmp_path: Path) -> None:
    """What is no plan at all raises GraphError and nothing else."""
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(GraphError):
        Plan.load(path)


def test_a_graph_is_no_plan(tmp_path: Path) -> None:
    """The file of a graph is told apart from that of a plan."""
    path = tmp_path / "graph.json"
    save_graph(chain_step(3), path)
    with pytest.raises(GraphError, match="holds no plan"):
        Plan.load(path)


# -- nothing of a file is run or half believed -------------------------------------------------------------------------


class Bomb:
    """Pickled, it leaves a file behind where it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_not_opened(protocol: int, tmp_path: Path) -> None:
    """A pickle is refused, and what it would run does not run; so is one in an archive, as `torch.save` writes them."""
    path, exploded = tmp_path / "plan.json", tmp_path / "exploded"
    content = pickle.dumps(Bomb(exploded), protocol)
    path.write_bytes(content)
    with pytest.raises(GraphError):
        Plan.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    with pytest.raises(GraphError):
        Plan.load(path)
    assert not exploded.exists()
    pickle.loads(content)
    assert exploded.exists()


def small_plan() -> Plan:
    """One whose file has some hundred bytes."""
    return planned(chain_step(3, [8, 1, 9]))


def load_or_refuse(path: Path, content: bytes) -> Plan | None:
    """The plan, or None if it was refused with a GraphError."""
    path.write_bytes(content)
    try:
        return Plan.load(path)
    except GraphError:
        return None


def test_every_beginning_is_refused(tmp_path: Path) -> None:
    """A file that was cut off at any byte holds no plan; only the end of the last line may be missing."""
    path = tmp_path / "plan.json"
    small_plan().save(path)
    content = path.read_bytes()
    whole = len(content.rstrip())
    assert [k for k in range(len(content)) if load_or_refuse(path, content[:k])] == list(range(whole, len(content)))


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    """A file in which any one bit is another holds no plan, or is the same to the letter for JSON: white space."""
    path, written = tmp_path / "plan.json", small_plan()
    written.save(path)
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in range(8) if FULL else (place % 8, 5):  # bit 5 turns letters into capitals
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            read = load_or_refuse(path, bytes(flipped))
            assert read is None or (read, read.graph) == (written, written.graph), (place, bit)
            assert read is None or content[place : place + 1].isspace(), (place, bit)


def test_every_pair_of_bytes_that_changes_places(tmp_path: Path) -> None:
    """Nor does one in which neighbours have changed places, or a byte came twice or was lost."""
    path, written = tmp_path / "plan.json", small_plan()
    written.save(path)
    content = path.read_bytes()
    for k in range(len(content) - 1):
        swapped = content[:k] + content[k + 1 : k + 2] + content[k : k + 1] + content[k + 2 :]
        for other in (swapped, content[:k] + content[k + 1 :], content[:k] + content[k : k + 1] + content[k:]):
            read = load_or_refuse(path, other)
            assert read is None or (read, read.graph) == (written, written.graph), k


@pytest.mark.parametrize("depth", [10, 300, 900, 3000, 100_000])
@pytest.mark.parametrize("pair", ["[]", '{"a":}'])
def test_deep_nesting_is_refused(pair: str, depth: int, tmp_path: Path) -> None:
    """What is nested as deep as anybody likes is a GraphError where a graph should be, too."""
    inner = pair[:-1] * depth + "0" + pair[-1] * depth
    data = f'{{"format": "rekindle.plan", "version": 1, "graph": {inner}, "digest": ""}}'
    assert load_or_refuse(tmp_path / "plan.json", data.encode()) is None


# -- a full disk -------------------------------------------------------------------------------------------------------


def full(*args: object, **options: object) -> None:
    """What a system call does for which there is no room."""
    raise OSError(errno.ENOSPC, "no space left on device")


def interrupted(*args: object, **options: object) -> None:
    """Ctrl-C in a system call."""
    raise KeyboardInterrupt


def on_a_full_device(draft: Path, mode: str, **options: Any) -> IO[str]:
    """A new file whose bytes go to a device that is full: the system itself says so, when they leave the buffer."""
    draft.touch(exist_ok=False)
    return open("/dev/full", "w", **options)


FAILING: dict[str, tuple[str, Callable[..., object]]] = {
    "open": ("open", full),
    "fsync": ("os.fsync", full),
    "replace": ("os.replace", full),
    "interrupted fsync": ("os.fsync", interrupted),
    "interrupted replace": ("os.replace", interrupted),
}
if Path("/dev/full").exists():
    FAILING["device"] = ("open", on_a_full_device)


@pytest.mark.parametrize("before", [True, False], ids=["over another", "new"])
@pytest.mark.parametrize("fails", FAILING)
def test_a_full_disk_leaves_the_old_file_whole(
    fails: str, before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the disk is found to be full, the plan that was there before can still be read, and nothing is left
    beside it; where none was, none is."""
    path = tmp_path / "plan.json"
    if before:
        planned().save(path)
    name, function = FAILING[fails]
    with monkeypatch.context() as patched:
        patched.setattr(f"rekindle.graph.serialize.{name}", function, raising=name != "open")
        with pytest.raises(KeyboardInterrupt if function is interrupted else OSError) as caught:
            planned(chain_step(9, [8, 1, 9] * 3)).save(path)
    if function is not interrupted:
        assert isinstance(caught.value, OSError)
        assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == [path] * before
    assert not before or Plan.load(path) == planned()


@pytest.mark.parametrize("limit", [0, 1, 1000, 2000])
def test_a_file_that_may_not_grow(limit: int, tmp_path: Path) -> None:
    """The same where a part was written before the system refused the rest."""
    resource = pytest.importorskip("resource", reason="other systems limit no file")
    path = tmp_path / "plan.json"
    planned().save(path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    larger = planned(chain_step(20, 8))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            larger.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert Plan.load(path) == planned()
    assert list(tmp_path.iterdir()) == [path]


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is renamed over the old one after its bytes were written through, so that a crash leaves one of them."""
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])
    planned().save(tmp_path / "plan.json")
    assert calls == ["fsync", "replace"]
