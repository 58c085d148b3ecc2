"""What this machine cannot measure again names the commit at which it was measured."""

import json
import pathlib
import re

import contenders
import pytest
from test_compilers import BOUNDS

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
RESULTS = {path.stem: json.loads(path.read_text()) for path in BENCHMARKS.glob("results/*.json")}
SECTIONS = (BENCHMARKS / "README.md").read_text().split("\n## ")[1:]
OURS = ("jaxbce", *contenders.LOSSES)


def records(made):
    """Of all the file, or one for each of its parts."""
    return [made] if "commit" in made else list(made.values())


@pytest.mark.parametrize("name", sorted(RESULTS))
def test_a_result_names_its_commit(name):
    found = records(RESULTS[name]["made"])
    assert found
    assert all(re.fullmatch("[0-9a-f]{7,40}", record["commit"]) for record in found)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.splitlines()[0])
def test_every_section_of_figures_names_its_commit(section):
    assert re.search("commits? `[0-9a-f]{7,40}`", section)


@pytest.mark.parametrize("name", ["tpu", "h100"])
def test_by_the_compilers_every_loss_reads_once_and_writes_once(name):
    rows = [row for row in RESULTS[name]["rows"] if row["contender"].startswith(OURS)]
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert all(row["bytes / bound"] <= 1.02 for row in rows)


@pytest.mark.parametrize("target", sorted(BOUNDS))
def test_by_the_compilers_the_head_keeps_its_bounds(target):
    """Also those of an H100, whose compiler CI has not."""
    rows = RESULTS[f"head_{target}"]["rows"]
    ratios = {row["case"]: row["ratio"] for row in rows}
    compared_with = {row["beside"] for row in rows}
    assert ratios.keys() == BOUNDS[target].keys() | compared_with | {"dense optax"}
    assert all(0 < ratios[case] <= bound for case, bound in BOUNDS[target].items())
