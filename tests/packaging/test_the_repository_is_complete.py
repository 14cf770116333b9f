"""What a person finds on arriving: commands that exist, one version, types that ship, nothing tied to one machine."""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path

import pytest

import ghostgrad

ROOT = Path(__file__).resolve().parents[2]
TEXT = {".py", ".md", ".txt", ".toml", ".cfg", ".yml", ".yaml", ""}
OUR_FOLDERS = ["src", "tests", "docs", "examples", "benchmarks", ".ci"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def our_files() -> list[Path]:
    found = [
        path for path in ROOT.iterdir() if path.is_file() and path.suffix in TEXT and not path.name.startswith(".git")
    ]
    for folder in OUR_FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix in TEXT]
    return [path for path in found if not {"_build", "__pycache__"} & set(path.parts)]


def test_the_type_marker_ships_with_the_package():
    assert (Path(ghostgrad.__file__).parent / "py.typed").exists()


def test_there_is_one_version():
    version = importlib.metadata.version("ghostgrad")
    assert f'version = "{version}"' in read("pyproject.toml")
    assert ghostgrad.__version__ == version


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_make_command_in_the_text_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), flags=re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", "\n".join(re.findall(r"`[^`]+`|^```.*?^```", read(page), re.M | re.S))))
    assert {"demo", "test"} <= set(re.findall(r"make ([a-z-]+)", read("README.md")))
    assert named <= targets


def test_continuous_integration_runs_the_command_of_the_readme():
    script = read(".ci/run")
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert "make test\n" in script
    assert "make test-trainers\n" in script
    for step in ("lint", "types", "docs"):
        assert step in script


def test_links_between_pages_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_nothing_names_a_machine():
    # Spelled in pieces, so that this file does not hold what it looks for.
    tied = re.compile("|".join(["/wo" + "rk/", "/ho" + "me/", "/ro" + "ot/", "/o" + "pt/", "local" + "host"]))
    for path in our_files():
        assert not tied.search(path.read_text(encoding="utf-8", errors="ignore")), path


def test_nothing_is_left_to_be_filled_in():
    blank = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "@[A-Z]+" + "@"]))
    for path in our_files():
        assert not blank.search(path.read_text(encoding="utf-8", errors="ignore")), path
