"""The documentation runs: every Python block of the README and of `docs/`."""

import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language, text):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


CASES = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(blocks("python", page.read_text()))
]


@pytest.mark.parametrize("block", CASES)
def test_python_block_runs(block):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        exec(compile(block, "block", "exec"), {"__name__": "block"})


def test_quick_start_is_one_block_of_two_commands():
    section = README.split("## Quick start")[1].split("\n## ")[0]
    (block,) = blocks("bash", section)
    assert len(block.strip().splitlines()) == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for path in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / path).exists(), path


def test_the_readme_is_short():
    assert len(README.splitlines()) < 250
