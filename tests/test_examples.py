"""The examples: they run, resume exactly and use every device."""

import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import nbclient
import nbformat
import numpy as np
import pytest

pytestmark = pytest.mark.thorough

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True, scope="module")
def _as_a_user_runs_them():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tour_runs():
    """As in a fresh hosted machine, but for the installation."""
    tour = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    nbclient.NotebookClient(tour, timeout=600, kernel_name="python3").execute()
    texts = [output.get("data", {}) for cell in tour.cells for output in cell.get("outputs", [])]
    (found,) = re.findall(r"(\d+)% are right", str(texts))
    assert int(found) > 40
    assert sum("image/png" in data for data in texts) == 4
    assert (EXAMPLES / "tour.ipynb").stat().st_size < 200_000


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_help_and_readme(path, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        load(path.stem).main(["--help"])
    assert "--" in capsys.readouterr().out
    assert f"`{path.name}`" in (EXAMPLES / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("multilabel_yeast", "--epochs -3"),
        ("multilabel_yeast", "--epochs 0"),
        ("multilabel_yeast", "--seed -1"),
        ("multilabel_yeast", "--seed 4294967296"),
        ("multilabel_yeast_linen", "--epochs -3"),
        ("multilabel_yeast_linen", "--epochs 0"),
        ("multilabel_yeast_linen", "--seed -1"),
        ("multilabel_yeast_linen", "--seed 4294967296"),
        ("equinox_multilabel", "--epochs 0"),
        ("equinox_multilabel", "--seed -1"),
        ("multilabel_digits", "--epochs 0"),
        ("multilabel_digits", "--seeds 0 -1"),
        ("multilabel_digits", "--seeds 4294967296"),
        ("multilabel_digits", "--images 31"),
        ("image_text_siglip", "--epochs 0"),
        ("image_text_siglip", "--seeds 0 -1"),
        ("debian_dependencies", "--epochs 0"),
        ("debian_dependencies", "--seeds 0 -1"),
        ("debian_dependencies", "--seeds 4294967296"),
        ("distributed_head", "--steps 0"),
        ("distributed_head", "--seed -1"),
        ("distributed_head", "--processes 0"),
        ("distributed_head", "--processes 3"),
        ("distributed_head", "--process-id 2"),
        ("distributed_head", "--process-id -1"),
    ],
)
def test_meaningless_numbers_are_refused(name, options, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        load(name).main(options.split())
    option, *values = options.split()
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {option} must" in message
    assert values[-1] in message.split("got")[1]


@pytest.mark.parametrize(
    ("name", "first_step"),
    [
        ("multilabel_yeast", "load_yeast"),
        ("multilabel_digits", "load_data"),
        ("image_text_siglip", "load_data"),
        ("debian_dependencies", "read_available"),
    ],
)
def test_a_second_run_in_the_workdir_is_refused(name, first_step, tmp_path, monkeypatch):
    """Until the first one ends, here by Ctrl-C: then the workdir is free."""
    example = load(name)

    def second_run_started(*_):
        raise AssertionError

    def start_a_second_run(*_):
        monkeypatch.setattr(example, first_step, second_run_started)
        with pytest.raises(SystemExit, match=r"Another run is at work in .*give another --workdir"):
            example.main(["--workdir", str(tmp_path)])
        raise KeyboardInterrupt

    for _ in range(2):
        monkeypatch.setattr(example, first_step, start_a_second_run)
        with pytest.raises((KeyboardInterrupt, SystemExit), match=r"^$|^stopped"):
            example.main(["--workdir", str(tmp_path)])


@pytest.fixture(scope="module")
def yeast():
    return load("multilabel_yeast")


@pytest.fixture(scope="module")
def two_epochs(yeast, tmp_path_factory):
    """The workdir of a finished run, to copy."""
    workdir = tmp_path_factory.mktemp("yeast")
    yeast.main(["--workdir", str(workdir), "--epochs", "2"])
    return workdir


def test_multilabel_yeast_resumes_exactly(yeast, two_epochs, tmp_path, monkeypatch, capsys):
    """Also after a crash between the log and the checkpoint of an epoch."""

    def run(workdir, *options):
        return yeast.main(["--workdir", str(tmp_path / workdir), "--epochs", "4", *options])

    whole = run("whole")
    log = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert [json.loads(line)["epoch"] for line in log.splitlines()] == [1, 2, 3, 4]
    assert (tmp_path / "whole" / "yeast.png").stat().st_size > 10_000
    assert whole["micro_f1"] > 0.5
    assert "label frequencies" in capsys.readouterr().out

    shutil.copytree(two_epochs, tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(yeast.ocp.CheckpointManager, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run("parts", "--resume")
    assert (tmp_path / "parts" / "metrics.jsonl").read_text() == "".join(log.splitlines(True)[:3])
    assert run("parts", "--resume") == whole
    assert (tmp_path / "parts" / "metrics.jsonl").read_text() == log


@pytest.mark.parametrize("length", [1, 30, None], ids=["one byte", "a part", "a whole line"])
def test_multilabel_yeast_drops_the_line_of_an_epoch_not_saved(
    yeast, two_epochs, tmp_path, monkeypatch, length
):
    workdir = tmp_path / "run"
    shutil.copytree(two_epochs, workdir)
    log = workdir / "metrics.jsonl"
    lines = log.read_text().splitlines(True)
    log.write_text("".join([*lines, lines[1].replace('"epoch": 2', '"epoch": 3')[:length]]))
    monkeypatch.setattr(yeast.Trainer, "train_epoch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        yeast.main(["--workdir", str(workdir), "--resume"])
    assert log.read_text() == "".join(lines)


BROKEN_LOGS = {
    "missing": (None, "it is missing"),
    "empty": (lambda lines: [], r"it has 0 line\(s\)"),
    "shortened": (lambda lines: lines[:1], r"it has 1 line\(s\)"),
    "two lines too many": (lambda lines: lines * 2, r"it has 4 line\(s\)"),
    "no JSON": (lambda lines: ["{", lines[1]], "its line 1 is '{'"),
    "no record": (lambda lines: ["[1]", lines[1]], r"its line 1 is '\[1\]'"),
    "no loss": (lambda lines: ['{"epoch": 1}', lines[1]], "its line 1 is"),
    "wrong order": (lambda lines: lines[::-1], """its line 1 is '{"epoch": 2"""),
    "one epoch twice": (lambda lines: [*lines, lines[1]], """its line 3 is '{"epoch": 2"""),
    "another seed": (
        lambda lines: [lines[0].replace('"seed": 0', '"seed": 1'), lines[1]],
        "its line 1",
    ),
    "another run": (lambda lines: [lines[0], lines[1].replace("0.", "1.")], "its line 2"),
}


@pytest.mark.parametrize(("edit", "found"), BROKEN_LOGS.values(), ids=BROKEN_LOGS)
def test_multilabel_yeast_refuses_a_log_that_does_not_fit(yeast, two_epochs, tmp_path, edit, found):
    workdir = tmp_path / "run"
    shutil.copytree(two_epochs, workdir)
    log = workdir / "metrics.jsonl"
    if edit is None:
        log.unlink()
    else:
        log.write_text("".join(line + "\n" for line in edit(log.read_text().splitlines())))
    before = sorted(workdir.rglob("*")), log.exists() and log.read_text()
    with pytest.raises(SystemExit, match=f"does not fit the checkpoint of epoch 2: {found}"):
        yeast.main(["--workdir", str(workdir), "--epochs", "3", "--resume"])
    assert (sorted(workdir.rglob("*")), log.exists() and log.read_text()) == before


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("--seed 1", "'seed': 0, .* not .*'seed': 1"),
        ("--pos-weight", "'pos_weight': False.* not .*'pos_weight': True"),
        ("--epochs 1", "has 2 epochs, more than --epochs 1: give --epochs 2"),
    ],
    ids=["seed", "pos-weight", "fewer epochs"],
)
def test_multilabel_yeast_refuses_to_resume_another_run(
    yeast, two_epochs, tmp_path, options, found
):
    shutil.copytree(two_epochs, tmp_path / "run")
    with pytest.raises(SystemExit, match=found):
        yeast.main(["--workdir", str(tmp_path / "run"), "--resume", *options.split()])


def test_multilabel_yeast_starts_anew(yeast, two_epochs, tmp_path, monkeypatch):
    """Without --resume the run that was there goes, log and checkpoints, before the first epoch."""
    workdir = tmp_path / "run"
    shutil.copytree(two_epochs, workdir)
    monkeypatch.setattr(yeast.Trainer, "train_epoch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        yeast.main(["--workdir", str(workdir)])
    assert (workdir / "metrics.jsonl").read_text() == ""
    with pytest.raises(SystemExit, match=r"No checkpoint to resume from in .*: run without"):
        yeast.main(["--workdir", str(workdir), "--resume"])


@pytest.mark.parametrize("name", ["multilabel_yeast_linen", "equinox_multilabel"])
def test_a_short_yeast_example_beats_the_label_frequencies(name, capsys):
    example = load(name)
    metrics = example.main(["--epochs", "4", "--seed", "1"])
    assert metrics["micro-F1"] > 0.55
    assert metrics["mAP"] > 0.4
    assert example.main(["--epochs", "4", "--seed", "1"]) == metrics
    assert "label frequencies" in capsys.readouterr().out


def available(packages=120):
    """What apt-cache prints, of two kinds of packages; every source builds two."""
    paragraphs = []
    for i in range(packages):
        kind, library = (("game", "libgame1 (>= 2)"), ("web server", "libweb | libother"))[
            i % 4 // 2
        ]
        paragraphs.append(
            f"Package: package{i}\nSource: source{i // 2} (1.0-{i})\nPre-Depends: base:any\n"
            f"Depends: {library}, base\nDescription: a {kind}\n written: by hand\nSection: misc\n"
        )
    return "\n".join([*paragraphs, "Package: alone\nDescription: depends on nothing\n"])


def test_debian_dependencies_are_parsed_and_split_by_source():
    debian = load("debian_dependencies")
    packages = debian.parse_packages(available() + "\n" + available())
    assert len(packages) == 120
    assert packages[0] == ("source0", ["package0", "misc", "a", "game"], ["base", "libgame1"])
    assert packages[2].dependencies == ["base", "libweb"]
    sources = [{p.source for p in packages if debian.is_test(p) is test} for test in (True, False)]
    assert all(sources)
    assert not sources[0] & sources[1]


def saved_model(debian, workdir, epoch):
    names = [f"model {i}" for i in range(debian.MEMBERS)]
    parts = debian.ocp.args.Composite(**dict.fromkeys(names, debian.ocp.args.StandardRestore()))
    with debian.open_checkpoints(workdir) as checkpoints:
        restored = checkpoints.restore(epoch, args=parts)
    return [restored[name] for name in names]


@pytest.fixture
def debian(tmp_path):
    """The example and its run on few packages, in a folder of tmp_path."""
    example = load("debian_dependencies")
    (tmp_path / "available").write_text(available())

    def run(workdir, *options):
        where = ("--workdir", str(tmp_path / workdir), "--available", str(tmp_path / "available"))
        return example.main([*where, "--seeds", "1", "--epochs", "3", *options])

    return example, run


def interrupt_in_epoch(debian, monkeypatch, epoch):
    train_epoch = debian.Trainer.train_epoch

    def interrupted(trainer, this):
        if this == epoch:
            raise KeyboardInterrupt
        return train_epoch(trainer, this)

    monkeypatch.setattr(debian.Trainer, "train_epoch", interrupted)


def test_debian_dependencies_resumes_exactly_and_predicts(debian, tmp_path, monkeypatch, capsys):
    example, run = debian
    whole = run("whole", "--compare")
    assert whole["head.update"] == whole["chunked loss"] == whole["dense optax head"]
    with monkeypatch.context() as patch:
        interrupt_in_epoch(example, patch, 2)
        with pytest.raises(SystemExit, match=r"^stopped after epoch 1; continue with --resume$"):
            run("parts")
    resumed = run("parts", "--resume")
    assert resumed == {name: whole[name] for name in ("label frequencies", "head.update")}
    weights = [saved_model(example, tmp_path / workdir, 3) for workdir in ("whole", "parts")]
    jax.tree.map(np.testing.assert_array_equal, *weights)
    question = ("--predict", "a web server")
    best = run("whole", *question)
    assert run("parts", *question) == best
    assert {name for name, _ in best[:2]} == {"base", "libweb"}
    assert "label frequencies" in capsys.readouterr().out
    assert run("new", *question) == best
    for options in (("--epochs", "2"), ("--seeds", "0")):
        with pytest.raises(SystemExit, match=r"is not one of these data.*without --resume"):
            run("parts", "--resume", *options)
    (tmp_path / "parts" / "names.json").write_text("{")
    for option in (question, ("--resume",)):
        with pytest.raises(SystemExit, match=r"names.json is missing or broken .*without --resume"):
            run("parts", *option)


def test_debian_dependencies_says_what_it_replaces(debian, monkeypatch, capsys):
    example, run = debian
    run("run")
    assert "replaces" not in capsys.readouterr().out
    interrupt_in_epoch(example, monkeypatch, 1)
    with pytest.raises(SystemExit, match=r"^stopped before epoch 1 was saved$"):
        run("run")
    assert re.search(r"replaces the run in .*run, saved after epoch 3", capsys.readouterr().out)


def test_debian_dependencies_trains_the_same_in_every_way_with_less_memory():
    debian = load("debian_dependencies")
    debian.MEMBERS = 1
    rng = np.random.default_rng(0)
    names = [str(i) for i in range(20_000)]
    # Every label occurs, as those of a training part do.
    positives = np.resize(rng.permutation(len(names)), (len(names) // 8, 8))
    words = rng.integers(0, len(names), positives.shape)
    part = debian.Part(words.astype(np.int32), positives.astype(np.int32))
    data = debian.Data(names, names, part, part)
    runs = [debian.Trainer(data, 0, way, 2) for way in debian.WAYS]
    update, chunked, dense = (run.megabytes() for run in runs)
    assert update + 10 < chunked  # the gradient of the head is 10.2 MB
    assert chunked + 20 < dense  # the logits are 20.5 MB
    losses = [[run.train_epoch(epoch) for epoch in (1, 2)] for run in runs]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    np.testing.assert_allclose(losses[0], losses[2], rtol=1e-5)


def test_debian_dependencies_says_what_it_needs(tmp_path, monkeypatch):
    debian = load("debian_dependencies")
    with pytest.raises(SystemExit, match=r"No run to resume in .*without --resume"):
        debian.main(["--workdir", str(tmp_path / "new"), "--resume"])
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="needs the package lists of a Debian or Ubuntu machine"):
        debian.main(["--workdir", str(tmp_path)])


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


def test_image_text_siglip_finds_names_it_has_not_seen(tmp_path, capsys):
    """On all eight virtual devices; chance is 0.1."""
    options = ["--epochs", "10", "--seeds", "0", "--workdir", str(tmp_path)]
    results = load("image_text_siglip").main(options)
    (found,) = results["every match"]
    assert found["names, known"] > 0.8
    assert found["names, unseen"] > 0.7
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [*range(1, 11)] * 2
    assert (tmp_path / "retrieval.png").stat().st_size > 10_000
    assert "8 device(s)" in capsys.readouterr().out


def test_distributed_head_agrees_with_one_device():
    command = [sys.executable, str(EXAMPLES / "distributed_head.py"), "--steps", "2"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "of the positives are among the 4 top labels" in output
    assert "2 processes, mesh {'batch': 2, 'labels': 2}: largest difference" in output
