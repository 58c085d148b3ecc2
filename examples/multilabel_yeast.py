"""Multi-label classification of yeast genes with Flax NNX, optax and `jaxbce.bce_with_logits`.

    pip install -e ".[examples]"                   # in a clone of the repository
    python examples/multilabel_yeast.py            # about 25 s on a 2-core CPU; --help for options

A two-layer network predicts which of 14 functional classes a gene has from 103 numbers. The batch
is sharded over all devices that JAX has. `--resume` continues a run bit for bit on the same
devices: the learning rate is constant; seed, epoch and step alone decide batches and dropout.

Data: the yeast set of Elisseeff & Weston, "A kernel method for multi-labelled classification"
(2001), 2417 genes, as distributed by the MULAN repository (mulan.sourceforge.net) and carried,
without a licence of its own, by the PyPI package river 0.26.1 (BSD-3-Clause). Rows 0 to 916 are the
canonical test part; 300 of the other 1500, drawn with a fixed seed, are the validation part.

Expected on the test part: the median of seeds 0, 1, 2 and (lowest-highest), at threshold 0.5.

                    network                   logistic regression   label frequencies
    Hamming loss    0.1933 (0.1925-0.1945)    0.1991                0.2330
    micro-F1        0.6448 (0.6411-0.6474)    0.6301                0.4783
    macro-F1        0.3781 (0.3762-0.3821)    0.3404                0.1222
    ranking loss    0.1661 (0.1655-0.1663)    0.1752                0.2100
    LRAP            0.7656 (0.7649-0.7672)    0.7549                0.7050
    mAP             0.5010 (0.4975-0.5034)    0.4576                0.3037

Settings were chosen without the test part: of two widths, two input dropouts and three weight
decays those with the lowest validation loss, a mean over five random splits of the 1500 rows; C of
the logistic regression by Hamming loss, micro-F1 and mAP on the same splits. A run tests the epoch
with the lowest validation loss.

Writes to the workdir, one run at a time: `metrics.jsonl` (an object per epoch), Orbax checkpoints
of the last and the best epoch, and `yeast.png`: left the training and validation loss, right each
label's average precision beside the logistic regression's. `--resume` needs the log as well as the
checkpoints, and refuses a log that does not fit them.
"""

import argparse
import contextlib
import fcntl
import gzip
import importlib.util
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from orbax.checkpoint import checkpoint_managers
from sklearn import metrics as skm
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from tqdm import tqdm

import jaxbce

FEATURES, LABELS, TEST_ROWS, VALIDATION_ROWS = 103, 14, 917, 300
HIDDEN, INPUT_DROPOUT, DROPOUT = 256, 0.4, 0.5
BATCH, LEARNING_RATE, WEIGHT_DECAY = 48, 1e-3, 0.5
MAX_POS_WEIGHT = 10.0
THRESHOLD = 0.5
REGRESSION_C = 0.01


Array = TypeVar("Array", np.ndarray, jax.Array)


class Split(NamedTuple, Generic[Array]):
    """Rows of the set: NumPy arrays on the host, JAX arrays once on the devices."""

    features: Array
    labels: Array


class Data(NamedTuple):
    train: Split[np.ndarray]
    validation: Split[np.ndarray]
    test: Split[np.ndarray]


def load_yeast() -> Data:
    """Reads the file in river, splits it and standardises by the mean and deviation of `train`."""
    river = importlib.util.find_spec("river")
    if river is None or river.origin is None:
        raise SystemExit("The data come with river: install it with `pip install river==0.26.1`.")
    with gzip.open(Path(river.origin).parent / "datasets" / "yeast.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",", skiprows=1, dtype=np.float32)
    features, labels = np.split(table, [FEATURES], axis=1)
    order = TEST_ROWS + np.random.default_rng(0).permutation(len(table) - TEST_ROWS)
    validation, train = np.split(order, [VALIDATION_ROWS])
    features = (features - features[train].mean(axis=0)) / features[train].std(axis=0)
    parts = (train, validation, np.arange(TEST_ROWS))
    return Data(*(Split(features[rows], labels[rows]) for rows in parts))


class Classifier(nnx.Module):
    """Two dense layers; dropout on the features and on the hidden units when given a key."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(FEATURES, HIDDEN, rngs=rngs)
        self.output = nnx.Linear(HIDDEN, LABELS, rngs=rngs)
        self.input_dropout = nnx.Dropout(INPUT_DROPOUT)
        self.hidden_dropout = nnx.Dropout(DROPOUT)

    def __call__(self, features: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        if dropout_key is None:
            return self.output(nnx.relu(self.hidden(features)))
        input_key, hidden_key = jax.random.split(dropout_key)
        features = self.input_dropout(features, rngs=input_key)
        hidden = nnx.relu(self.hidden(features))
        return self.output(self.hidden_dropout(hidden, rngs=hidden_key))


@nnx.jit
def train_step(
    model: Classifier,
    optimizer: nnx.Optimizer[Classifier],
    batch: Split[jax.Array],
    pos_weight: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Updates the model on one batch; the optimizer's step count makes the dropout key unique."""
    dropout_key = jax.random.fold_in(key, optimizer.step[...])

    def loss_of(model: Classifier) -> jax.Array:
        logits = model(batch.features, dropout_key)
        return jaxbce.bce_with_logits(logits, batch.labels, pos_weight=pos_weight)

    loss: jax.Array
    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def predict(
    model: Classifier, split: Split[jax.Array], pos_weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the mean loss and the probabilities."""
    logits = model(split.features)
    loss = jaxbce.bce_with_logits(logits, split.labels, pos_weight=pos_weight)
    return loss, nnx.sigmoid(logits)


def mean_average_precision(labels: np.ndarray, scores: np.ndarray | jax.Array) -> float:
    return float(skm.average_precision_score(labels, np.asarray(scores), average="macro"))


def evaluate(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """The six metrics of the table."""
    labels = labels.astype(int)
    decisions = (scores >= THRESHOLD).astype(int)
    values = {
        "hamming_loss": skm.hamming_loss(labels, decisions),
        "micro_f1": skm.f1_score(labels, decisions, average="micro", zero_division=0),
        "macro_f1": skm.f1_score(labels, decisions, average="macro", zero_division=0),
        "ranking_loss": skm.label_ranking_loss(labels, scores),
        "lrap": skm.label_ranking_average_precision_score(labels, scores),
        "map": mean_average_precision(labels, scores),
    }
    return {name: float(value) for name, value in values.items()}


class Trainer:
    """The model, its optimizer, their place on the devices and their checkpoints."""

    def __init__(self, data: Data, seed: int, weigh_positives: bool, directory: Path) -> None:
        devices = jax.device_count()
        mesh = jax.make_mesh((devices,), ("batch",), axis_types=(AxisType.Auto,))
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.by_row = NamedSharding(mesh, PartitionSpec("batch"))
        self.batch_size = -(-BATCH // devices) * devices
        self.data = data
        self.seed = seed
        self.key = jax.device_put(jax.random.key(seed), self.replicated)
        self.validation = jax.device_put(data.validation, self.replicated)
        self.pos_weight = jax.device_put(positive_weights(data, weigh_positives), self.replicated)
        self.model = Classifier(nnx.Rngs(seed))
        assert self.model.output.bias is not None
        self.model.output.bias[...] = jaxbce.prior_bias(data.train.labels)
        tx = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.optimizer = nnx.Optimizer(self.model, tx, wrt=nnx.Param)
        self.set_state(jax.device_put(self.state(), self.replicated))
        self.checkpoints = open_checkpoints(directory)

    def state(self) -> dict[str, Any]:
        return {"model": nnx.state(self.model), "optimizer": nnx.state(self.optimizer)}

    def set_state(self, state: dict[str, Any]) -> None:
        nnx.update(self.model, state["model"])
        nnx.update(self.optimizer, state["optimizer"])

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Trains one epoch, in an order that only the seed and the epoch decide; validates it."""
        features, labels = self.data.train
        order = np.random.default_rng((self.seed, epoch)).permutation(len(features))
        losses = []
        for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = jax.device_put(Split(features[rows], labels[rows]), self.by_row)
            losses.append(train_step(self.model, self.optimizer, batch, self.pos_weight, self.key))
        validation_loss, scores = predict(self.model, self.validation, self.pos_weight)
        return {
            "train_loss": float(jnp.stack(losses).mean()),
            "validation_loss": float(validation_loss),
            "validation_map": mean_average_precision(self.data.validation.labels, scores),
        }

    def restore(self, epoch: int) -> None:
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.replicated), self.state()
        )
        self.set_state(self.checkpoints.restore(epoch, args=ocp.args.StandardRestore(target)))

    def test_scores(self) -> np.ndarray:
        """Probabilities on the test part, of the epoch with the lowest validation loss."""
        self.checkpoints.wait_until_finished()
        self.restore(self.checkpoints.best_step())
        test = jax.device_put(self.data.test, self.replicated)
        return np.asarray(predict(self.model, test, self.pos_weight)[1])


def positive_weights(data: Data, weigh_positives: bool) -> jax.Array:
    """Negatives / positives of each label in training, at most MAX_POS_WEIGHT; or ones."""
    if not weigh_positives:
        return jnp.ones(LABELS)
    return jaxbce.balanced_pos_weight(data.train.labels, max_weight=MAX_POS_WEIGHT)


def open_checkpoints(directory: Path) -> ocp.CheckpointManager:
    """A manager that keeps the last epoch and the one with the lowest validation loss."""

    def validation_loss(record: dict[str, float]) -> float:
        return record["validation_loss"]

    kept = [
        checkpoint_managers.LatestN(1),
        checkpoint_managers.BestN(get_metric_fn=validation_loss, reverse=True, n=1),
    ]
    options = ocp.CheckpointManagerOptions(
        best_fn=validation_loss,
        best_mode="min",
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(kept),
    )
    return ocp.CheckpointManager(directory.resolve(), options=options)


def train(data: Data, args: argparse.Namespace) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Trains up to args.epochs; returns one record per epoch and the scores on the test part."""
    log, directory = args.workdir / "metrics.jsonl", args.workdir / "checkpoints"
    settings = {"seed": args.seed, "pos_weight": args.pos_weight}
    if not args.resume:
        if directory.exists():
            shutil.rmtree(directory)
        log.unlink(missing_ok=True)
    trainer = Trainer(data, args.seed, args.pos_weight, directory)
    records = resume(trainer, log, settings) if args.resume else []
    if len(records) > args.epochs:
        raise SystemExit(
            f"The run in {args.workdir} has {len(records)} epochs, more than --epochs "
            f"{args.epochs}: give --epochs {len(records)} or more."
        )
    epochs = range(len(records) + 1, args.epochs + 1)
    progress = tqdm(epochs, "training", unit="epoch", disable=None)
    with log.open("a") as file:
        for epoch in progress:
            record = {"epoch": epoch, **settings, **trainer.train_epoch(epoch)}
            records.append(record)
            # The epoch before is saved by now: the log is never more than one epoch ahead.
            trainer.checkpoints.wait_until_finished()
            print(json.dumps(record), file=file, flush=True)
            state = ocp.args.StandardSave(trainer.state())
            trainer.checkpoints.save(epoch, args=state, metrics=record)
            summary = f"validation loss {record['validation_loss']:.4f}"
            progress.set_postfix_str(summary, refresh=False)
            if progress.disable and epoch % 10 == 0:
                print(f"epoch {epoch}/{args.epochs}: {summary}", flush=True)
    scores = trainer.test_scores()
    trainer.checkpoints.close()
    return records, scores


def resume(trainer: Trainer, log: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Restores the last checkpoint, cuts the log back to it and returns the log's records."""
    last = trainer.checkpoints.latest_step()
    if last is None:
        raise SystemExit(f"No checkpoint to resume from in {log.parent}: run without --resume.")
    saved = trainer.checkpoints.metrics(last)
    found = {name: saved[name] for name in settings}
    if found != settings:
        raise SystemExit(
            f"The run in {log.parent} has {found}, not {settings}: give the options it was started "
            "with, or run without --resume to start anew."
        )
    records = read_log(log, saved, settings)
    # Written beside the log and then put in its place: on a full disk the log is not lost.
    shortened = log.with_suffix(".new")
    shortened.write_text("".join(json.dumps(record) + "\n" for record in records))
    shortened.replace(log)
    trainer.restore(last)
    return records


def read_log(log: Path, saved: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The records up to `saved`, that of the last checkpoint; refuses a log that does not fit.

    An epoch is logged before it is saved, so a run that was stopped can leave one line more,
    perhaps cut short: it is left out, and its epoch is trained again.
    """
    last = saved["epoch"]

    def refuse(found: str) -> NoReturn:
        raise SystemExit(
            f"{log} does not fit the checkpoint of epoch {last}: {found}. Put the log of this run "
            "back, or run without --resume to start anew."
        )

    if not log.exists():
        refuse("it is missing")
    text = log.read_text(errors="replace")
    lines = text.splitlines()
    if len(lines) == last + 1 and not text.endswith("\n"):
        lines.pop()
    if len(lines) not in (last, last + 1):
        refuse(f"it has {len(lines)} line(s)")
    for epoch, line in enumerate(lines, 1):
        expected = saved if epoch == last else {"epoch": epoch, **settings}
        if not is_record(line, expected):
            refuse(f"its line {epoch} is {line[:80]!r}")
    return [json.loads(line) for line in lines[:last]]


def is_record(line: str, expected: dict[str, Any]) -> bool:
    """Whether a line of the log holds what is expected and both losses."""
    try:
        record = json.loads(line)
    except ValueError:
        return False
    match record:
        case {"train_loss": float(), "validation_loss": float()}:
            return bool(expected.items() <= record.items())
    return False


def baseline_scores(data: Data) -> dict[str, np.ndarray]:
    """Test scores of two baselines, fitted on the same rows as the network."""
    frequencies = np.broadcast_to(data.train.labels.mean(axis=0), data.test.labels.shape)
    regression = OneVsRestClassifier(LogisticRegression(C=REGRESSION_C)).fit(*data.train)
    probabilities = regression.predict_proba(data.test.features)
    return {"label frequencies": frequencies, "logistic regression": probabilities}


def print_table(results: dict[str, dict[str, float]]) -> None:
    headings = ("Hamming ↓", "micro-F1 ↑", "macro-F1 ↑", "ranking ↓", "LRAP ↑", "mAP ↑")
    print(f"{'test part':<20}" + "".join(f"{heading:>12}" for heading in headings))
    for name, values in results.items():
        print(f"{name:<20}" + "".join(f"{value:>12.4f}" for value in values.values()))


def plot(
    records: list[dict[str, Any]], labels: np.ndarray, scores: dict[str, np.ndarray], path: Path
) -> None:
    """Left the losses by epoch, right the test average precision of each label."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))

    epochs = [record["epoch"] for record in records]
    validation = [record["validation_loss"] for record in records]
    best = int(np.argmin(validation))
    left.plot(epochs, [record["train_loss"] for record in records], label="training (dropout on)")
    left.plot(epochs, validation, label="validation")
    left.plot(epochs[best], validation[best], "ko", label=f"kept: epoch {epochs[best]}")
    left.set(title="Loss", xlabel="epoch", ylabel="binary cross-entropy")

    frequencies = labels.mean(axis=0)
    order = np.argsort(-frequencies)
    place = np.arange(LABELS)
    looks = ((-0.2, "tab:green"), (0.2, "tab:gray"))
    for (offset, color), (name, values) in zip(looks, scores.items(), strict=True):
        precisions = skm.average_precision_score(labels, values, average=None)
        right.bar(place + offset, precisions[order], width=0.4, color=color, label=name)
    ends = (place - 0.4, place + 0.4)
    right.hlines(frequencies[order], *ends, colors="black", label="label frequency")
    right.set_xticks(place, [f"class {label + 1}" for label in order], rotation=45, ha="right")
    right.set(title="Average precision by label, test part", ylim=(0, 1))

    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of the workdir; the system frees it however this process ends."""
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(
                f"Another run is at work in {workdir}: wait for it or give another --workdir."
            ) from None
        yield


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a multi-label classifier on the yeast set with Flax NNX and jaxbce.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=80, help="epochs in total, with those already done")
    add("--seed", type=int, default=0, help="decides weights, batches and dropout")
    workdir = "where the run is written; without --resume, a run that is there is overwritten"
    add("--workdir", type=Path, default=Path("runs/yeast"), help=workdir)
    weight = f"weight positives by negatives / positives of the label, at most {MAX_POS_WEIGHT:g}"
    add("--pos-weight", action="store_true", help=weight)
    again = "continue the run in workdir, exactly as if it had never stopped"
    add("--resume", action="store_true", help=again)
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be from 0 to 2**32 - 1, got {args.seed}")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the program; returns the network's metrics on the test part."""
    args = parse_arguments(argv)
    started = time.perf_counter()
    with locked(args.workdir):
        data = load_yeast()
        records, network = train(data, args)
        scores = {"network": network, **baseline_scores(data)}
        results = {name: evaluate(data.test.labels, values) for name, values in scores.items()}
        print_table(results)
        picture = args.workdir / "yeast.png"
        compared = {name: scores[name] for name in ("network", "logistic regression")}
        plot(records, data.test.labels, compared, picture)
    seconds = time.perf_counter() - started
    print(
        f"{seconds:.1f} s on {jax.device_count()} {jax.default_backend()} device(s); see {picture}"
    )
    return results["network"]


if __name__ == "__main__":
    main()
