"""Every Python block in README.md and docs/ runs, and prints what the page says it prints.

The blocks of a page run one after the other in one namespace, with nothing prepared. A block of `text` right after a
block of Python is its output.
"""

from __future__ import annotations

import contextlib
import gc
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)(?P<path>[^)#]+)")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pages
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a reader would who pastes one after the other."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": page.stem}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start("code"))
        code = compile("\n" * line + block["code"], str(page), "exec")  # errors show the line of the page
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if block["output"] is not None:
            assert printed.getvalue() == block["output"], f"line {line + 1} of {page.name} prints something else"
    namespace.clear()
    gc.collect()  # sessions and what pages keep of them; other tests count what is alive


@pages
def test_links_lead_somewhere(page: Path) -> None:
    """Relative links name files that exist."""
    paths = [link["path"] for link in LINK.finditer(page.read_text(encoding="utf-8"))]
    assert [path for path in paths if not (page.parent / path).exists()] == []
