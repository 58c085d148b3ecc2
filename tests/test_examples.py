"""The examples: they run, resume exactly and use every device."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _as_a_user_runs_them():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_help_and_readme(path):
    command = [sys.executable, str(path), "--help"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--" in output
    assert f"`{path.name}`" in (EXAMPLES / "README.md").read_text()


def test_multilabel_yeast_resumes_exactly(tmp_path, capsys):
    yeast = load("multilabel_yeast")

    def run(workdir, *options):
        return yeast.main(["--workdir", str(tmp_path / workdir), *options])

    whole = run("whole", "--epochs", "4")
    run("parts", "--epochs", "2")
    assert run("parts", "--epochs", "4", "--resume") == whole
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert [json.loads(line)["epoch"] for line in logs[0].splitlines()] == [1, 2, 3, 4]
    assert (tmp_path / "whole" / "yeast.png").stat().st_size > 10_000
    assert whole["micro_f1"] > 0.5
    assert "label frequencies" in capsys.readouterr().out


def test_multilabel_yeast_refuses_to_resume_another_run(tmp_path):
    yeast = load("multilabel_yeast")
    with pytest.raises(SystemExit, match="No checkpoint to resume"):
        yeast.main(["--workdir", str(tmp_path / "none"), "--resume"])


def test_multilabel_digits_compares_four_losses(tmp_path, capsys):
    digits = load("multilabel_digits")
    options = ["--epochs", "1", "--seeds", "0", "--images", "64", "--workdir", str(tmp_path)]
    results = digits.main(options)
    assert all(0 < runs[0]["mAP"] <= 1 for runs in results.values())
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in records] == list(results)
    for picture in ("comparison.png", "predictions.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
    assert "asymmetric" in capsys.readouterr().out
