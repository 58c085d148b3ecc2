"""The examples: they run, resume exactly and use every device."""

import importlib.util
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import nbclient
import nbformat
import numpy as np
import pytest

pytestmark = pytest.mark.newest

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
    outputs = [output for cell in tour.cells for output in cell.get("outputs", [])]
    (found,) = re.findall(r"(\d+)% are right", str(outputs))
    assert int(found) > 40
    precisions = re.findall(r"(median of three seeds|machines): (0\.\d+), (0\.\d+)", str(outputs))
    assert [name for name, *_ in precisions] == ["median of three seeds", "machines"]
    assert all(float(value) > 0.99 for _, *values in precisions for value in values)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert (EXAMPLES / "tour.ipynb").stat().st_size < 200_000


def first_cell_without_jaxbce(monkeypatch, directory):
    """Runs it as if jaxbce was missing; returns what it would have run."""
    commands = []
    monkeypatch.chdir(directory)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    tour = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    cell = next(cell for cell in tour.cells if cell.cell_type == "code")
    exec(cell.source, {})
    return commands


def test_the_tour_installs_the_clone_it_lies_in(monkeypatch):
    (command,) = first_cell_without_jaxbce(monkeypatch, EXAMPLES)
    assert command[1:4] == ["-m", "pip", "install"]
    assert command[-1] == f"{EXAMPLES.parent}[examples]"


def test_the_tour_says_from_where_to_install(monkeypatch, tmp_path):
    """Outside a clone there is nothing to install, for jaxbce is on no index."""
    with pytest.raises(ImportError, match=r"is no clone .*pip install .*the/clone\[examples\]"):
        first_cell_without_jaxbce(monkeypatch, tmp_path)


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
    """The example, whose rivals are fitted once."""
    example = load("multilabel_yeast")
    scores = example.rival_scores(*example.load_yeast()[:3])
    example.rival_scores = lambda *_: scores
    return example


@pytest.fixture(scope="module")
def two_epochs(yeast, tmp_path_factory):
    """The workdir of a finished run, to copy, and its metrics."""
    workdir = tmp_path_factory.mktemp("yeast")
    return workdir, yeast.main(["--workdir", str(workdir), "--epochs", "2"])


@pytest.fixture
def finished(two_epochs, tmp_path):
    return shutil.copytree(two_epochs[0], tmp_path / "run")


def checkpoint(yeast, workdir):
    """Every array and the log of the last checkpoint."""
    data = yeast.load_yeast()
    run = yeast.Run(data[0], data[1], 0)
    with yeast.ocp.CheckpointManager(workdir / "checkpoints") as checkpoints:
        yeast.restore(run, checkpoints)
    leaves = jax.tree.leaves(run.state())
    keys = [jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    arrays = [
        np.asarray(jax.random.key_data(leaf) if key else leaf)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return arrays, run.log


def files(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_multilabel_yeast_states_the_figures_of_its_rivals(yeast):
    """In its table, beside those of a whole run."""
    test_labels = yeast.load_yeast()[3]
    rivals = yeast.rival_scores()
    results = [yeast.evaluate(test_labels, scores) for scores in rivals.values()]
    for metric in results[0]:
        (row,) = re.findall(rf"^ +{metric} +(.*)$", yeast.__doc__, re.MULTILINE)
        stated = [float(figure) for figure in row.split()[2:]]
        # Another scikit-learn or another machine grows slightly different trees.
        np.testing.assert_allclose(stated, [result[metric] for result in results], atol=3e-3)


def test_multilabel_yeast_reaches_its_figures_after_two_epochs(two_epochs):
    """The same on jax 0.8 and 0.12; the seed moves them by 0.002."""
    workdir, metrics = two_epochs
    assert metrics == pytest.approx(
        {
            "Hamming loss": 0.2106,
            "micro-F1": 0.5906,
            "macro-F1": 0.2792,
            "ranking loss": 0.1787,
            "LRAP": 0.7448,
            "mAP": 0.4508,
        },
        abs=0.002,
    )
    assert (workdir / "yeast.png").stat().st_size > 10_000


def test_multilabel_yeast_resumes_exactly(yeast, finished, tmp_path):
    whole = yeast.main(["--workdir", str(tmp_path / "whole"), "--epochs", "4"])
    assert yeast.main(["--workdir", str(finished), "--epochs", "4", "--resume"]) == whole
    (arrays, log), (expected, expected_log) = (
        checkpoint(yeast, workdir) for workdir in (finished, tmp_path / "whole")
    )
    jax.tree.map(np.testing.assert_array_equal, arrays, expected)
    assert log == expected_log
    assert len(log["validation loss"]) == 4


@pytest.mark.parametrize(
    ("owner", "name", "epoch"),
    [
        ("example", "load_yeast", 0),
        ("example", "train_step", 1),
        ("orbax", "save", 1),
        ("example", "evaluate", 3),
    ],
    ids=["before training", "in an epoch", "while saving", "after training"],
)
def test_multilabel_yeast_stops_with_one_line(
    yeast, tmp_path, monkeypatch, capsys, owner, name, epoch
):
    """On Ctrl-C. The epoch it is in is finished and saved; --resume goes on from there."""
    place = yeast if owner == "example" else yeast.ocp.CheckpointManager
    original = getattr(place, name)

    def with_interrupt(*args, **options):
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)
        return original(*args, **options)

    options = ["--workdir", str(tmp_path / "run"), "--epochs", "3"]
    monkeypatch.setattr(place, name, with_interrupt)
    with pytest.raises(SystemExit, match=r"^130$"):
        yeast.main(options)
    lines = capsys.readouterr().err.splitlines()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if epoch == 0:
        assert lines[-1] == "stopped before epoch 1 was done"
        assert not (tmp_path / "run").exists()
    else:
        assert lines[-1] == f"stopped after epoch {epoch}; continue with --resume"
        yeast.main([*options, "--resume"])
        assert len(checkpoint(yeast, tmp_path / "run")[1]["training loss"]) == 3


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("--seed 1", "has --seed 0, not 1: give that seed, or run without --resume"),
        ("--epochs 1", "has 2 epochs, more than --epochs 1: give --epochs 2"),
    ],
    ids=["seed", "fewer epochs"],
)
def test_multilabel_yeast_refuses_to_resume_another_run(yeast, finished, options, found):
    """And changes nothing of it."""
    before = files(finished)
    with pytest.raises(SystemExit, match=found):
        yeast.main(["--workdir", str(finished), "--resume", *options.split()])
    assert files(finished) == before


def test_multilabel_yeast_with_nothing_to_resume_leaves_nothing(yeast, tmp_path):
    with pytest.raises(SystemExit, match=r"No run to resume in .*: run without --resume"):
        yeast.main(["--workdir", str(tmp_path / "new"), "--resume"])
    assert not (tmp_path / "new").exists()


def test_multilabel_yeast_says_what_it_replaces(yeast, finished, monkeypatch, capsys):
    """Before it does: the run that was there goes when the first checkpoint is removed."""
    said = []
    delete = yeast.ocp.CheckpointManager.delete

    def record_and_delete(*args):
        said.append(capsys.readouterr().out)
        delete(*args)

    monkeypatch.setattr(yeast.ocp.CheckpointManager, "delete", record_and_delete)
    yeast.main(["--workdir", str(finished), "--epochs", "1"])
    assert said == [f"Replaces the run of 2 epochs in {finished}; --resume continues one.\n"]
    assert len(checkpoint(yeast, finished)[1]["training loss"]) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("multilabel_yeast_linen", {"Hamming loss": 0.2036, "micro-F1": 0.6205, "mAP": 0.4611}),
        ("equinox_multilabel", {"Hamming loss": 0.1982, "micro-F1": 0.6357, "mAP": 0.4699}),
    ],
    ids=["Linen", "Equinox"],
)
def test_a_short_yeast_example_reaches_its_figures_after_four_epochs(name, expected, capsys):
    example = load(name)
    metrics = example.main(["--epochs", "4", "--seed", "1"])
    assert metrics == pytest.approx(expected, abs=0.002)
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
    options = ["--epochs", "4", "--images", "1000", "--workdir", str(tmp_path)]
    results = digits.main(options)
    assert list(results) == [*digits.CHOSEN, digits.RIVAL]
    *networks, rival = (run["mAP"] for (run,) in results.values())
    np.testing.assert_allclose(networks, [0.611, 0.679, 0.650, 0.631], atol=0.06)
    np.testing.assert_allclose(rival, 0.961, atol=0.01)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in records] == np.repeat([*digits.CHOSEN], 4).tolist()
    for picture in ("curves.png", "predictions.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
    assert "asymmetric" in capsys.readouterr().out


def test_multilabel_digits_searches_settings_by_the_validation_part(tmp_path, capsys, monkeypatch):
    """With the same number of settings for each loss. The best, not the first, is on top."""
    digits = load("multilabel_digits")
    assert {len(searched) for searched in digits.SEARCHED.values()} == {12}
    assert all(chosen in digits.SEARCHED[name] for name, chosen in digits.CHOSEN.items())
    searched = [digits.Setting(0.0, False, {}), digits.Setting(5e-3, False, {})]
    monkeypatch.setattr(digits, "SEARCHED", {**digits.SEARCHED, "BCE": searched})
    for name in list(digits.SEARCHED)[1:]:
        monkeypatch.setitem(digits.SEARCHED, name, [digits.CHOSEN[name]])
    options = ["--search", "--epochs", "2", "--images", "320", "--workdir", str(tmp_path)]
    results = digits.main(options)
    best, worst = (run["validation mAP"] for run in results["BCE"])
    assert best > worst
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(str(tuple(searched[1])))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {record["seed"] for record in records} == {digits.SEARCH_SEED}
    assert len(records) == 2 * len(lines)


def test_image_text_siglip_finds_names_it_has_not_seen(tmp_path, capsys):
    """On all eight virtual devices; chance is 0.1."""
    siglip = load("image_text_siglip")
    options = ["--epochs", "10", "--seeds", "0", "--workdir", str(tmp_path)]
    results = siglip.main(options)
    (found,), (rival,) = results["every match"], results[siglip.RIVAL]
    assert found["names, known"] > 0.8
    assert found["names, unseen"] > 0.7
    assert abs(rival["names, known"] - 0.980) < 0.005
    assert abs(rival["names, unseen"] - 0.956) < 0.005
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [*range(1, 11)] * 2
    assert (tmp_path / "retrieval.png").stat().st_size > 10_000
    assert "8 device(s)" in capsys.readouterr().out


def test_distributed_head_agrees_with_one_device():
    command = [sys.executable, str(EXAMPLES / "distributed_head.py"), "--steps", "2"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "of the positives are among the 4 top labels" in output
    assert "2 processes, mesh {'batch': 2, 'labels': 2}: largest difference" in output
