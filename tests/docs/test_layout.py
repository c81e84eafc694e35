"""docs/layout.md names what is there."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "src" / "rekindle"


@pytest.mark.parametrize("module", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_is_named(module: Path) -> None:
    """By its file name, and its folder by its own."""
    assert f"`{module.name}`" in PAGE or f"/{module.name}`" in PAGE
    folder = module.parent.relative_to(PACKAGE)
    assert folder == Path() or f"`{folder}/`" in PAGE


@pytest.mark.parametrize("place", ["tests", "benchmarks", "examples"])
def test_every_folder_beside_the_package_is_named(place: str) -> None:
    """With the folders in it that hold Python files."""
    for file in (ROOT / place).rglob("*.py"):
        assert f"`{file.parent.relative_to(ROOT)}/`" in PAGE
