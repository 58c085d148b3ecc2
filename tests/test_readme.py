"""The README runs: its Python blocks here, its Quick start in `.ci/run`."""

import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.splitlines()[-1][:40])
def test_python_block_runs(block):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        exec(compile(block, "README.md", "exec"), {})


def test_quick_start_is_one_block_of_two_commands():
    section = README.split("## Quick start")[1].split("\n## ")[0]
    (block,) = blocks("bash", section)
    assert len(block.strip().splitlines()) == 2


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()
