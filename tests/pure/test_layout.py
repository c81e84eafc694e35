"""How the house is built, read from its sources: who may import whom, what is private, what is documented."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

import rekindle

PACKAGE = Path(rekindle.__file__).parent
ROOT = Path(__file__).parents[2]
FRONT_DOOR = ""  # the package's own `__init__`: the users of Rekindle stand before it, and so do the last two rooms
ROOMS = (
    "_errors",
    "_bytes",
    "graph",
    "policy",
    "report",
    "record",
    "runtime",
    "compile",
    "distributed",
    "_api",
    "selfcheck",
    FRONT_DOOR,
    "integrations",
    "cli",
)
TORCH_FREE = ("_errors", "_bytes", "graph", "policy", "report")

# Imports that run against each other, for the sake of annotations only.
MUTUAL = {
    ("graph.verify", "graph.plan"): "a plan is checked when it is read from a file, by what knows a legal plan",
    ("record.aliasing", "record.activation"): "a storage knows its activation, whose window is onto a storage",
}

# Private parts of PyTorch that are reached outside of record/torch_private.py, and why they are not wrapped there.
PRIVATE_MODULES = {
    ("record.recorder", "torch.utils._python_dispatch"): "TorchDispatchMode, a base class, has no public home",
    ("record.schema", "torch._ops"): "OpOverload, a class to test against, has no public home",
}
PRIVATE_ATTRIBUTES = {
    "_version": "of a tensor; read for most arguments of every op, where a call more would cost",
    "_base": "of a tensor; only views of one tensor are known to count their writes together",
    "_cdata": "of a storage: the only identity it has; read for most arguments of every op, too",
    "_schema": "of an overload; PyTorch's own documentation of dispatch modes uses it",
    "_neg_view": "of a tensor; the public neg() computes",
}
PRIVATE_OVERRIDES = {
    ("record.recorder", "Recorder", "_should_skip_dynamo"): "asked of the class by its base",
}


Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One module of the package: `name` is relative to it, such as `graph.ir`, and empty for the front door."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def room(self) -> str:
        """The folder or top-level module it belongs to."""
        return self.name.partition(".")[0]

    def __repr__(self) -> str:
        return self.name or "front door"


def _read(path: Path) -> Source:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return Source(name, path, ast.parse(path.read_text(encoding="utf-8")))


SOURCES = {source.name: source for source in map(_read, sorted(PACKAGE.rglob("*.py")))}
each_source = pytest.mark.parametrize("source", SOURCES.values(), ids=repr)
public_torch_only = pytest.mark.parametrize(
    "source", [source for source in SOURCES.values() if source.name != "record.torch_private"], ids=repr
)


def imported(source: Source) -> Iterator[str]:
    """The full names of all modules that a module imports, wherever it does: in functions, under TYPE_CHECKING."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source} has a relative import in line {node.lineno}"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole.removeprefix("rekindle.") in SOURCES else str(node.module)


def imported_here(source: Source) -> set[str]:
    """Those of them that belong to the package, by their names in it."""
    inside = (name for name in imported(source) if name.partition(".")[0] == "rekindle")
    return {name.removeprefix("rekindle").removeprefix(".") for name in inside}


def names_in(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that is written in a module, such as `torch.utils._python_dispatch.TorchDispatchMode`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            text = ast.unparse(node)
            if re.fullmatch(r"[\w.]+", text):
                yield text


def is_private(name: str) -> bool:
    """Whether a name is not meant for others; names with underscores on both sides belong to Python."""
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def documented(source: Source) -> Iterator[tuple[str, Documented]]:
    """The public classes, functions and methods of a module, with their names."""
    containers: list[tuple[str, ast.Module | ast.ClassDef]] = [("", source.tree)]
    while containers:
        prefix, container = containers.pop()
        for node in container.body:
            if not isinstance(node, Documented) or node.name.startswith("_"):
                continue
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                containers.append((f"{prefix}{node.name}.", node))


# -- who may import whom -----------------------------------------------------------------------------------------------


@each_source
def test_every_module_has_a_room(source: Source) -> None:
    """No folder or module stands outside of the order of the house."""
    assert source.room in ROOMS


@each_source
def test_imports_point_one_way(source: Source) -> None:
    """A module imports from its own room and from those that a step passes through before it, and from no other."""
    before = ROOMS[: ROOMS.index(source.room) + 1]
    wrong = {name for name in imported_here(source) if name.partition(".")[0] not in before}
    assert wrong == set()


@each_source
def test_every_import_is_there(source: Source) -> None:
    """What a module imports from the package is a module of it, so that the tests here overlook nothing."""
    assert imported_here(source) <= SOURCES.keys()


def test_no_module_imports_itself_in_a_circle() -> None:
    """The modules can be put in an order in which each imports only earlier ones, but for the pairs explained above."""
    edges = {source.name: imported_here(source) for source in SOURCES.values()}
    for module, other in MUTUAL:
        edges[module].remove(other)
    assert len(list(graphlib.TopologicalSorter(edges).static_order())) == len(SOURCES)


@pytest.mark.parametrize(("module", "other"), MUTUAL)
def test_mutual_imports_are_for_annotations_only(module: str, other: str) -> None:
    """An import that is allowed to close a circle stands under TYPE_CHECKING, and the circle is still there."""
    importing = [
        node.test if isinstance(node, ast.If) else node
        for node in SOURCES[module].tree.body
        if f"from rekindle.{other} import" in ast.unparse(node)
    ]
    assert [ast.unparse(node) for node in importing] == ["TYPE_CHECKING"]
    assert module in imported_here(SOURCES[other])


@pytest.mark.parametrize("source", [source for source in SOURCES.values() if source.room in TORCH_FREE], ids=repr)
def test_deciding_needs_no_torch(source: Source) -> None:
    """What decides imports no torch, not even for annotations."""
    assert "torch" not in {name.partition(".")[0] for name in imported(source)}


def test_deciding_loads_no_torch() -> None:
    """Nor does anything that it imports: with the front door left out, torch is not loaded."""
    present = [room for room in TORCH_FREE if room in {source.room for source in SOURCES.values()}]
    program = f"""
import importlib, sys, types
house = types.ModuleType("rekindle")
house.__path__ = [{str(PACKAGE)!r}]
sys.modules["rekindle"] = house
for room in {present!r}:
    importlib.import_module("rekindle." + room)
print(sorted(name for name in sys.modules if name.partition(".")[0] == "torch"))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


# -- what is private ---------------------------------------------------------------------------------------------------


@public_torch_only
def test_private_modules_of_torch(source: Source) -> None:
    """Modules of PyTorch with an underscore are used in record/torch_private.py, and where the table above says why."""
    used = {name for name in (*imported(source), *names_in(source.tree)) if name.partition(".")[0] == "torch"}
    private = {name for name in used if any(map(is_private, name.split(".")))}
    assert private == {name for module, name in PRIVATE_MODULES if module == source.name}


@public_torch_only
def test_private_attributes_of_others(source: Source) -> None:
    """A private attribute is one that the same module defines, or one of PyTorch's that the table above explains."""
    defined = {node.name for node in ast.walk(source.tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            defined.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            defined.add(node.target.id)
    read = {node.attr for node in ast.walk(source.tree) if isinstance(node, ast.Attribute) and is_private(node.attr)}
    modules = {part for module, name in PRIVATE_MODULES if module == source.name for part in name.split(".")}
    assert read - defined - modules - PRIVATE_ATTRIBUTES.keys() == set()


def test_private_methods_of_torch_are_not_overridden_unawares() -> None:
    """A private method of ours that replaces one of a PyTorch base class is one that the table above explains."""
    overridden = {
        (source.name, cls.__name__, name)
        for source in SOURCES.values()
        if source.name != "record.torch_private"
        for cls in vars(importlib.import_module(f"rekindle.{source.name}".rstrip("."))).values()
        if isinstance(cls, type) and cls.__module__ == f"rekindle.{source.name}"
        for name in vars(cls)
        if is_private(name)
        for base in cls.__mro__[1:]
        if base.__module__.partition(".")[0] == "torch" and name in vars(base)
    }
    assert overridden == PRIVATE_OVERRIDES.keys()


def test_every_explained_attribute_is_used() -> None:
    """The table explains nothing that is gone."""
    used = {node.attr for s in SOURCES.values() for node in ast.walk(s.tree) if isinstance(node, ast.Attribute)}
    assert PRIVATE_ATTRIBUTES.keys() <= used


# -- what is documented ------------------------------------------------------------------------------------------------


@each_source
def test_every_public_thing_has_a_docstring(source: Source) -> None:
    """Modules, and public classes, functions and methods, say what they are."""
    assert ast.get_docstring(source.tree)
    assert [name for name, node in documented(source) if not ast.get_docstring(node)] == []


def test_docs_name_every_room() -> None:
    """docs/layout.md names each folder and top-level module, in code, and the folders in the order of the house."""
    text = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
    code = re.findall(r"```.*?```|`[^`\n]+`|^#+ .*$", text, flags=re.DOTALL | re.MULTILINE)
    words = [word.removeprefix("src/rekindle/") for part in code for word in re.findall(r"[\w./]+", part)]
    rooms = {source.room for source in SOURCES.values()} - {FRONT_DOOR}
    here = [f"{room}/" if (PACKAGE / room).is_dir() else f"{room}.py" for room in ROOMS if room in rooms]
    assert [name for name in here if name not in words] == []
    folders = [name for name in here if name.endswith("/")]
    assert sorted(folders, key=words.index) == folders


# -- the front door ----------------------------------------------------------------------------------------------------


def test_the_front_door_is_sorted() -> None:
    """Names at the front door are listed in order, each once."""
    assert rekindle.__all__ == sorted(set(rekindle.__all__))


def test_the_front_door_lists_what_is_there() -> None:
    """`__all__` is exactly what can be seen there, but for the rooms behind it."""
    public = {
        name for name, item in vars(rekindle).items() if not name.startswith("_") and not isinstance(item, ModuleType)
    }
    assert set(rekindle.__all__) == public


@pytest.mark.parametrize("room", ["graph", "policy", "report"])
def test_the_other_doors_list_what_is_there(room: str) -> None:
    """The same holds for the folders that re-export names."""
    module = importlib.import_module(f"rekindle.{room}")
    public = {
        name for name, item in vars(module).items() if not name.startswith("_") and not isinstance(item, ModuleType)
    }
    assert set(module.__all__) == public - {"annotations"}
    assert module.__all__ == sorted(module.__all__)


@pytest.mark.parametrize("name", rekindle.__all__)
def test_everything_at_the_front_door_is_documented(name: str) -> None:
    """`help(rekindle.anything)` tells something of its own."""
    item = getattr(rekindle, name)
    assert inspect.getdoc(item)
    assert item.__doc__ is not torch.nn.Module.__doc__
