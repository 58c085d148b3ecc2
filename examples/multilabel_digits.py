"""Four losses on images of several handwritten digits: which of ten digits are present?

    pip install -e ".[examples]"                   # in a clone of the repository
    python examples/multilabel_digits.py           # about 50 s of CPU time; --help for options

A small convolutional network (Flax NNX) is trained from scratch with plain binary cross-entropy,
with `balanced_pos_weight`, with `focal_loss` and with `asymmetric_loss`, from three seeds
each. Everything else is the same: images, batches, network, optimizer, epochs.

Data: the 1797 digits of 8 x 8 pixels bundled with scikit-learn (UCI "Optical Recognition of
Handwritten Digits", CC BY 4.0). They are split 3 : 1 : 1 by class, and only then are 0 to 4 of a
part placed on each canvas of 24 x 24 pixels of that part: no digit image is in two. A digit
is present in 18 % of the images.

Expected on the test part: the median of seeds 0, 1, 2 and (lowest-highest). F1 is at the threshold
that is best in validation, one for all labels; the program also prints it at 0.5.

                     mAP                      micro-F1                 macro-F1
    BCE              0.9179 (0.9037-0.9337)   0.8655 (0.8600-0.8778)   0.8644 (0.8500-0.8718)
    BCE, pos_weight  0.9676 (0.9603-0.9728)   0.9179 (0.9075-0.9275)   0.9169 (0.8977-0.9263)
    focal            0.8155 (0.8027-0.8270)   0.7613 (0.7383-0.7632)   0.7499 (0.7349-0.7520)
    asymmetric       0.9537 (0.9314-0.9625)   0.9059 (0.8754-0.9090)   0.9041 (0.8693-0.9075)

BCE with pos_weight wins every column, asymmetric comes second, plain BCE third and focal loss last.
The runs are short, four epochs, so how fast a loss learns counts as much as where it ends; longer
training was not compared. Network, learning rate and batch were chosen by the validation mAP of
plain BCE. The hyper-parameters of the losses are the published ones, tuned for none: alpha = 0.25
of focal loss weights positives down. At threshold 0.5 focal and asymmetric loss lose 11 to 16
points of F1: their outputs are scores and not probabilities, so choose the threshold on validation
data.

Writes to the workdir, one run at a time: `metrics.jsonl` (an object per epoch), `comparison.png`
(every metric, loss and seed) and `predictions.png` (test images over the probabilities of two of
the losses).
"""

import argparse
import contextlib
import fcntl
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from sklearn import metrics as skm
from sklearn.datasets import load_digits
from tqdm import tqdm

import jaxbce

DIGIT, CANVAS, LABELS, MOST = 8, 24, 10, 4
VALIDATION_IMAGES, TEST_IMAGES = 1000, 2000
CHANNELS = (32, 64)
BATCH, LEARNING_RATE = 32, 5e-3
THRESHOLDS = np.linspace(0.05, 0.95, 91)
METRICS = ("mAP", "micro-F1", "macro-F1", "micro-F1 at 0.5", "macro-F1 at 0.5")
SHOWN = ("BCE", "asymmetric")
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red")

Loss = Callable[[jax.Array, jax.Array], jax.Array]


class Split(NamedTuple):
    images: np.ndarray  # [N, CANVAS, CANVAS, 1], in [0, 1]
    labels: np.ndarray  # [N, LABELS], which digits are present


class Data(NamedTuple):
    train: Split
    validation: Split
    test: Split


def compose(digits: np.ndarray, classes: np.ndarray, count: int, seed: int) -> Split:
    """`count` canvases, each with 0 to MOST of `digits` where they do not touch."""
    rng = np.random.default_rng(seed)
    images = np.zeros((count, CANVAS, CANVAS, 1), np.float32)
    labels = np.zeros((count, LABELS), np.float32)
    for image, label in zip(images, labels, strict=True):
        for row in rng.integers(len(digits), size=rng.integers(MOST + 1)):
            top, left = rng.integers(CANVAS - DIGIT + 1, size=2)
            while image[top : top + DIGIT, left : left + DIGIT].any():
                top, left = rng.integers(CANVAS - DIGIT + 1, size=2)
            image[top : top + DIGIT, left : left + DIGIT, 0] = digits[row]
            label[classes[row]] = 1
    return Split(images, labels)


def load_data(train_images: int) -> Data:
    """Splits the 1797 digits 3 : 1 : 1 by class, then composes the images of each part."""
    digits, classes = load_digits(return_X_y=True)
    digits = (digits / 16).astype(np.float32).reshape(-1, DIGIT, DIGIT)
    part = np.empty(len(digits), int)
    for label in range(LABELS):
        rows = np.random.default_rng(label).permutation(np.flatnonzero(classes == label))
        part[rows] = np.resize([0, 0, 0, 1, 2], len(rows))
    counts = (train_images, VALIDATION_IMAGES, TEST_IMAGES)
    return Data(
        *(compose(digits[part == i], classes[part == i], n, seed=i) for i, n in enumerate(counts))
    )


class Network(nnx.Module):
    """Two convolutions; a place of the second sees one digit, and the best place counts."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        first, second = CHANNELS
        self.strokes = nnx.Conv(1, first, (4, 4), strides=(2, 2), padding="VALID", rngs=rngs)
        self.strokes_norm = nnx.LayerNorm(first, rngs=rngs)
        self.shapes = nnx.Conv(first, second, (3, 3), padding="VALID", rngs=rngs)
        self.shapes_norm = nnx.LayerNorm(second, rngs=rngs)
        self.output = nnx.Linear(second, LABELS, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        features = nnx.relu(self.strokes_norm(self.strokes(images)))
        features = nnx.relu(self.shapes_norm(self.shapes(features)))
        return self.output(features).max(axis=(1, 2))


@functools.cache
def adam(steps: int) -> optax.GradientTransformation:
    """One for all runs, so that `train_step` is compiled once per loss."""
    return optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))


@nnx.jit(static_argnames="loss_fn")
def train_step(
    model: Network,
    optimizer: nnx.Optimizer[Network],
    images: jax.Array,
    labels: jax.Array,
    loss_fn: Loss,
) -> jax.Array:
    loss: jax.Array
    loss, gradients = nnx.value_and_grad(lambda model: loss_fn(model(images), labels))(model)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def predict(model: Network, images: jax.Array) -> jax.Array:
    return nnx.sigmoid(model(images))


def losses_to_compare(train_labels: np.ndarray) -> dict[str, Loss]:
    """The four losses with their published settings."""
    pos_weight = jaxbce.balanced_pos_weight(train_labels)
    return {
        "BCE": jaxbce.bce_with_logits,
        "BCE, pos_weight": functools.partial(jaxbce.bce_with_logits, pos_weight=pos_weight),
        "focal": functools.partial(jaxbce.focal_loss, gamma=2.0, alpha=0.25),
        "asymmetric": functools.partial(jaxbce.asymmetric_loss, stop_focus_gradient=True),
    }


def mean_average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    return float(skm.average_precision_score(labels, scores, average="macro"))


def f1(labels: np.ndarray, scores: np.ndarray, threshold: float, average: str) -> float:
    return float(skm.f1_score(labels, scores >= threshold, average=average, zero_division=0))


def evaluate(data: Data, validation: np.ndarray, test: np.ndarray) -> dict[str, float]:
    """METRICS on the test part; each F1 at the threshold best for it in validation, and at 0.5."""
    values = [mean_average_precision(data.test.labels, test)]
    for average in ("micro", "macro"):
        found = [f1(data.validation.labels, validation, t, average) for t in THRESHOLDS]
        values.append(f1(data.test.labels, test, THRESHOLDS[np.argmax(found)], average))
    values += [f1(data.test.labels, test, 0.5, average) for average in ("micro", "macro")]
    return dict(zip(METRICS, values, strict=True))


def train(
    data: Data, loss_fn: Loss, seed: int, epochs: int, after_epoch: Callable[[dict[str, Any]], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Trains one network; returns its probabilities on the validation and the test part."""
    images, labels = data.train
    steps = len(images) // BATCH
    model = Network(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, adam(epochs * steps), wrt=nnx.Param)
    for epoch in range(1, epochs + 1):
        order = np.random.default_rng((seed, epoch)).permutation(len(images))
        values = []
        for rows in order[: steps * BATCH].reshape(steps, BATCH):
            batch = jnp.asarray(images[rows]), jnp.asarray(labels[rows])
            values.append(train_step(model, optimizer, *batch, loss_fn=loss_fn))
        validation = np.asarray(predict(model, jnp.asarray(data.validation.images)))
        after_epoch(
            {
                "epoch": epoch,
                "train_loss": float(jnp.stack(values).mean()),
                "validation_map": mean_average_precision(data.validation.labels, validation),
            }
        )
    return validation, np.asarray(predict(model, jnp.asarray(data.test.images)))


def compare(
    data: Data, args: argparse.Namespace
) -> tuple[dict[str, list[dict[str, float]]], dict[str, np.ndarray]]:
    """Trains every loss with every seed; returns the metrics, and the first seed's test scores."""
    losses = losses_to_compare(data.train.labels)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in losses}
    scores: dict[str, np.ndarray] = {}
    runs = [(seed, name) for seed in args.seeds for name in losses]
    bar = tqdm(total=len(runs) * args.epochs, desc="training", unit="epoch", disable=None)
    with bar, (args.workdir / "metrics.jsonl").open("w") as file:
        for seed, name in runs:

            def after_epoch(record: dict[str, Any], seed: int = seed, name: str = name) -> None:
                print(json.dumps({"loss": name, "seed": seed, **record}), file=file, flush=True)
                bar.set_postfix_str(f"{name}, seed {seed}", refresh=False)
                bar.update()

            validation, test = train(data, losses[name], seed, args.epochs, after_epoch)
            results[name].append(evaluate(data, validation, test))
            scores.setdefault(name, test)
            if bar.disable:
                value = results[name][-1]["mAP"]
                print(f"{name}, seed {seed}: test mAP {value:.4f}", flush=True)
    return results, scores


def print_table(results: dict[str, list[dict[str, float]]]) -> None:
    """The median over the seeds and, below it, lowest-highest."""
    print(f"{'test part':<17}" + "".join(f"{name:>18}" for name in METRICS))
    for name, runs in results.items():
        columns = [sorted(run[metric] for run in runs) for metric in METRICS]
        print(f"{name:<17}" + "".join(f"{np.median(column):>18.4f}" for column in columns))
        spread = (f"({column[0]:.4f}-{column[-1]:.4f})" for column in columns)
        print(" " * 17 + "".join(f"{text:>18}" for text in spread))


def clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def plot_comparison(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """A dot per seed and a line at the median, for each metric and loss."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, (color, (name, runs)) in enumerate(zip(COLORS, results.items(), strict=True)):
        place = np.arange(len(METRICS)) + 0.18 * (i - 1.5)
        values = np.array([[run[metric] for metric in METRICS] for run in runs])
        medians = np.median(values, axis=0)
        axes.hlines(medians, place - 0.07, place + 0.07, colors=color, linewidth=3, label=name)
        axes.plot(place, values.T, "o", color=color, markersize=4, alpha=0.6)
    axes.set_xticks(np.arange(len(METRICS)), METRICS)
    axes.set(
        title=f"Test part: median (line) of {len(runs)} seeds (dots)", ylabel="higher is better"
    )
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, ncols=len(results), loc="upper center", bbox_to_anchor=(0.5, -0.08))
    clean(axes)
    figure.savefig(path, dpi=150)


def plot_predictions(test: Split, scores: dict[str, np.ndarray], path: Path) -> None:
    """The first eight test images, each over its probabilities; present digits are bold."""
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    rows = figure.subplots(4, 4, height_ratios=(1.4, 1, 1.4, 1))
    pictures, charts = rows[[0, 2]].ravel(), rows[[1, 3]].ravel()
    for i, (picture, chart) in enumerate(zip(pictures, charts, strict=True)):
        picture.imshow(test.images[i, :, :, 0], cmap="gray_r")
        picture.set(xticks=[], yticks=[])
        for offset, name in zip((-0.2, 0.2), SHOWN, strict=True):
            color = COLORS[list(scores).index(name)]
            chart.bar(np.arange(LABELS) + offset, scores[name][i], 0.4, color=color, label=name)
        chart.axhline(0.5, color="black", linewidth=0.5, linestyle=":")
        chart.set(ylim=(0, 1), xticks=range(LABELS), yticks=(0, 0.5, 1))
        for tick, present in zip(chart.get_xticklabels(), test.labels[i], strict=True):
            tick.set(fontweight="bold" if present else "normal", alpha=1 if present else 0.4)
        clean(chart)
    charts[0].set_ylabel("probability")
    handles, names = charts[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(SHOWN), frameon=False)
    figure.suptitle("Test images and predicted probabilities; digits that are present in bold")
    figure.savefig(path, dpi=120)


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
        description="Compares four losses on images of several digits with Flax NNX and jaxbce.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=4, help="epochs of each run")
    seeds = "each decides weights and batches of one run per loss"
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help=seeds)
    add("--images", type=int, default=4000, help=f"training images, at least {BATCH}")
    workdir = "where the run is written; one that is there is overwritten"
    add("--workdir", type=Path, default=Path("runs/digits"), help=workdir)
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")
    if not all(0 <= seed < 2**32 for seed in args.seeds):
        parser.error(f"--seeds must be from 0 to 2**32 - 1, got {args.seeds}")
    if args.images < BATCH:
        parser.error(f"--images must be at least {BATCH}, got {args.images}")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, list[dict[str, float]]]:
    """Runs the program; returns the test metrics of every loss, one dict per seed."""
    args = parse_arguments(argv)
    started = time.perf_counter()
    with locked(args.workdir):
        data = load_data(args.images)
        results, scores = compare(data, args)
        print_table(results)
        pictures = [args.workdir / "comparison.png", args.workdir / "predictions.png"]
        plot_comparison(results, pictures[0])
        plot_predictions(data.test, scores, pictures[1])
    seconds = time.perf_counter() - started
    print(f"{seconds:.1f} s on {jax.default_backend()}; see {pictures[0]} and {pictures[1]}")
    return results


if __name__ == "__main__":
    main()
