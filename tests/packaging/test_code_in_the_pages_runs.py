"""Every ``python`` block of the README and the pages runs, in the order of the page, in one namespace a page.

A block that needs a package of an extra ends the page where it is missing. ``folder`` is a place to write to.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
EXTRAS = ("transformers", "lightning.pytorch", "accelerate")
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if BLOCK.search(path.read_text())]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
@pytest.mark.filterwarnings("ignore:::transformers", "ignore:::accelerate", "ignore:::lightning", "ignore:::peft")
def test_the_blocks_of_a_page_run_one_after_the_other(page, capsys, tmp_path):
    namespace: dict[str, object] = {"__name__": page.stem, "folder": str(tmp_path)}
    for number, block in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")), start=1):
        for package in EXTRAS:
            if f"from {package}" in block:
                pytest.importorskip(package, exc_type=ImportError)
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


def test_the_quick_start_is_in_the_readme():
    assert ROOT / "README.md" in PAGES
