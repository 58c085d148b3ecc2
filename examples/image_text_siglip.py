"""Handwritten digits and their names in eight languages, matched by two small towers.

    pip install -e ".[examples]"                   # in a clone of the repository
    python examples/image_text_siglip.py           # about 1 min of CPU time; --help for options

An image tower and a text tower (a convolution over letters), both Flax NNX, are trained from
scratch with `siglip_loss`: an image shall match the names of its digit and no other. In a batch
many texts name the same digit. "Every match" says which, with `positives`; "own text only" is the
loss as SigLIP has it, in which the others count as wrong. On several devices a mesh shares each
batch: images and texts both stay sharded, and the texts travel from device to device.

Data: the 1797 digits of 8 x 8 pixels bundled with scikit-learn (UCI "Optical Recognition of
Handwritten Digits", CC BY 4.0), split 3 : 1 : 1 by class, and the names in this file. Four more
languages are left out of the training; 17 of their 40 names occur in none of the eight.

Expected on the test part: how often the best of the ten names of a language is the right one, and
the share of right images among the ten that are best for a name. Each figure is the mean over
languages, then the median of seeds 0, 1, 2 and (lowest-highest). The rival knows digits and
languages apart: a support vector machine on the pixels, and for each name the known one that is
spelt most alike.

                  names, known    names, unseen   images, known   images, unseen   CPU time
    every match          0.975           0.945           1.000            0.950       5 s
                 (0.970-0.977)   (0.932-0.965)   (1.000-1.000)    (0.925-0.950)
    own text only        0.969           0.942           1.000            0.948       5 s
                 (0.965-0.977)   (0.920-0.961)   (0.999-1.000)    (0.932-0.975)
    SVM, spelling        0.980           0.956           1.000            0.975     0.1 s

The rival stays ahead, narrowly: 1,078 images are few for a network, and names of digits are spelt
alike in these languages. The example shows how to train two towers with `siglip_loss`, not the best
way to read digits. Saying which texts match is ahead of one text each by less than the seeds
differ.

Settings were chosen on the validation part, in runs of two other seeds that left Swedish and
Spanish out of the training. Misspelt letters, batches of 64 instead of 128 and 60 epochs instead of
20 raised the right names in those two from 0.74 to 0.90. A convolutional image tower changed
little. Of the rival, C = 1 and C = 10 are equal in validation.

Writes to the workdir, one run at a time: `metrics.jsonl` (an object per epoch) and `retrieval.png`
(the best test images of each name in a language that training has never seen).
"""

import argparse
import contextlib
import difflib
import fcntl
import functools
import json
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from tqdm import tqdm

import jaxbce

KNOWN = {
    "English": "zero one two three four five six seven eight nine",
    "German": "null eins zwei drei vier fünf sechs sieben acht neun",
    "Dutch": "nul een twee drie vier vijf zes zeven acht negen",
    "Swedish": "noll ett två tre fyra fem sex sju åtta nio",
    "Danish": "nul en to tre fire fem seks syv otte ni",
    "French": "zéro un deux trois quatre cinq six sept huit neuf",
    "Spanish": "cero uno dos tres cuatro cinco seis siete ocho nueve",
    "Italian": "zero uno due tre quattro cinque sei sette otto nove",
}
UNSEEN = {
    "Portuguese": "zero um dois três quatro cinco seis sete oito nove",
    "Catalan": "zero un dos tres quatre cinc sis set vuit nou",
    "Afrikaans": "nul een twee drie vier vyf ses sewe agt nege",
    "Norwegian": "null en to tre fire fem seks sju åtte ni",
}
SHOWN, DIGITS, LETTERS, LONGEST = "Portuguese", 10, 26, 7
WIDTH, BATCH, LEARNING_RATE = 64, 64, 3e-3
MISSPELT = 0.2  # share of the letters that training replaces
MOST = 24  # texts of a batch that name one digit; 6 on average
BEST = 10
VARIANTS = {"every match": True, "own text only": False}
METRICS = ("names, known", "names, unseen", "images, known", "images, unseen", "CPU seconds")
RIVAL = "SVM, spelling"


class Split(NamedTuple):
    images: np.ndarray  # [N, 64], 8 x 8 pixels in [0, 1]
    digits: np.ndarray  # [N]


def load_data() -> tuple[Split, Split, Split]:
    """Train, validation and test part, 3 : 1 : 1 by class."""
    images, digits = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    part = np.empty(len(digits), int)
    for digit in range(DIGITS):
        rows = np.random.default_rng(digit).permutation(np.flatnonzero(digits == digit))
        part[rows] = np.resize([0, 0, 0, 1, 2], len(rows))
    train, validation, test = (Split(images[part == i], digits[part == i]) for i in range(3))
    return train, validation, test


def letters(names: str) -> np.ndarray:
    """The ten names as numbers [10, LONGEST]: 1 to 26, without accents, padded with 0."""
    rows = np.zeros((DIGITS, LONGEST), np.int32)
    for row, name in zip(rows, names.split(), strict=True):
        plain = unicodedata.normalize("NFD", name).encode("ascii", "ignore")
        row[: len(plain)] = np.frombuffer(plain, np.uint8) - ord("a") + 1
    return rows


class ImageTower(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.strokes = nnx.Linear(64, 2 * WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(2 * WIDTH, rngs=rngs)
        self.output = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.output(nnx.relu(self.norm(self.strokes(images))))


class TextTower(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.letters = nnx.Embed(LETTERS + 1, WIDTH // 2, rngs=rngs)
        self.syllables = nnx.Conv(WIDTH // 2, 2 * WIDTH, (3,), rngs=rngs)
        self.norm = nnx.LayerNorm(2 * WIDTH, rngs=rngs)
        self.output = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, texts: jax.Array) -> jax.Array:
        syllables = self.syllables(self.letters(texts)).max(axis=1)
        return self.output(nnx.relu(self.norm(syllables)))


def unit(embeddings: jax.Array) -> jax.Array:
    return embeddings * jax.lax.rsqrt(jnp.sum(embeddings**2, axis=1, keepdims=True) + 1e-12)


class Towers(nnx.Module):
    """Embeddings of unit length; the bias starts at the share of pairs that match."""

    def __init__(self, share: float, rngs: nnx.Rngs) -> None:
        self.image, self.text = ImageTower(rngs), TextTower(rngs)
        self.log_scale = nnx.Param(jnp.log(jnp.float32(10)))
        self.bias = nnx.Param(jnp.log(jnp.float32(share / (1 - share))))

    def __call__(self, images: jax.Array, texts: jax.Array) -> tuple[jax.Array, jax.Array]:
        return unit(self.image(images)), unit(self.text(texts))


@functools.cache
def adam(steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))


@functools.cache
def make_train_step(mesh: Mesh | None) -> Callable[..., jax.Array]:
    """A step on one device, or on all of the mesh, compiled once for all runs."""
    devices: dict[str, Any] = {} if mesh is None else {"mesh": mesh, "axis": "batch"}

    @nnx.jit
    def train_step(
        model: Towers,
        optimizer: nnx.Optimizer[Towers],
        images: jax.Array,
        texts: jax.Array,
        positives: jax.Array | None,
    ) -> jax.Array:
        def loss_fn(model: Towers) -> jax.Array:
            pairs = model(images, texts)
            scale, bias = model.log_scale[...], model.bias[...]
            return jaxbce.siglip_loss(*pairs, scale, bias, positives=positives, **devices)

        loss: jax.Array
        loss, gradients = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, gradients)
        return loss

    return train_step


@nnx.jit
def similarities(model: Towers, images: jax.Array, texts: jax.Array) -> jax.Array:
    image, text = model(images, texts)
    return image @ text.T


def scores_of(model: Towers, split: Split, languages: dict[str, str]) -> dict[str, np.ndarray]:
    """By language, the similarity [N, 10] of each image and each name."""
    names = np.concatenate([letters(line) for line in languages.values()])
    scores = similarities(model, jnp.asarray(split.images), jnp.asarray(names))
    found = np.split(np.asarray(scores), len(languages), axis=1)
    return dict(zip(languages, found, strict=True))


def misspell(texts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """With some letters replaced, so that a tower learns names and not their exact spelling."""
    others = rng.integers(1, LETTERS + 1, texts.shape, np.int32)
    return np.where((texts > 0) & (rng.random(texts.shape) < MISSPELT), others, texts)


def rival(train: Split, split: Split, languages: dict[str, str]) -> dict[str, np.ndarray]:
    """The score of the digit of the known name that is spelt most alike."""
    pixels = SVC(C=10).fit(train.images, train.digits)
    of_digit = pixels.decision_function(split.images)
    known = {name: digit for line in KNOWN.values() for digit, name in enumerate(line.split())}

    def alike(name: str) -> int:
        return known[difflib.get_close_matches(name, known, n=1, cutoff=0)[0]]

    return {
        language: of_digit[:, [alike(name) for name in names.split()]]
        for language, names in languages.items()
    }


def name_accuracy(scores: dict[str, np.ndarray], digits: np.ndarray) -> float:
    """How often the best of the ten names is the right one."""
    return float(np.mean([(found.argmax(axis=1) == digits).mean() for found in scores.values()]))


def image_precision(scores: dict[str, np.ndarray], digits: np.ndarray) -> float:
    """The share of right images among the BEST of a name."""
    best = [np.argsort(-found, axis=0)[:BEST] for found in scores.values()]
    return float(np.mean([digits[rows] == np.arange(DIGITS) for rows in best]))


def evaluate(
    of_languages: Callable[[dict[str, str]], Any], digits: np.ndarray, started: float
) -> dict[str, float]:
    """METRICS of what gives the scores of the images for the names of some languages."""
    scores = [of_languages(languages) for languages in (KNOWN, UNSEEN)]
    values = [
        metric(part, digits) for metric in (name_accuracy, image_precision) for part in scores
    ]
    values.append(time.process_time() - started)
    return dict(zip(METRICS, values, strict=True))


def train(
    data: Split,
    validation: Split,
    every_match: bool,
    seed: int,
    epochs: int,
    after_epoch: Callable[[dict[str, Any]], None],
) -> Towers:
    devices = jax.device_count()
    mesh = None
    if devices > 1:
        mesh = jax.make_mesh((devices,), ("batch",), axis_types=(AxisType.Auto,))
    batch = BATCH // devices * devices

    def place(array: np.ndarray | jax.Array) -> jax.Array:
        """Rows over the devices."""
        by_row = None if mesh is None else NamedSharding(mesh, PartitionSpec("batch"))
        placed: jax.Array = jax.device_put(array, by_row)
        return placed

    names = np.stack([letters(line) for line in KNOWN.values()])
    steps = len(data.images) // batch
    model = Towers(1 / DIGITS if every_match else 1 / batch, nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, adam(epochs * steps), wrt=nnx.Param)
    train_step = make_train_step(mesh)
    rng = np.random.default_rng(seed)
    for epoch in range(epochs):
        order = rng.permutation(len(data.images))[: steps * batch].reshape(steps, batch)
        losses = []
        for rows in order:
            digits = data.digits[rows]
            texts = misspell(names[rng.integers(len(names), size=batch), digits], rng)
            positives = None
            if every_match:
                same = digits[:, None] == digits
                positives = place(jaxbce.positives_from_multi_hot(same, MOST))
            arrays = place(data.images[rows]), place(texts), positives
            losses.append(train_step(model, optimizer, *arrays))
        accuracy = name_accuracy(scores_of(model, validation, KNOWN), validation.digits)
        loss = float(np.mean(losses))
        after_epoch({"epoch": epoch + 1, "loss": loss, "validation accuracy": accuracy})
    return model


def print_table(results: dict[str, list[dict[str, float]]]) -> None:
    """The median over the seeds and, below it, lowest-highest."""
    print(f"{'test part':<15}" + "".join(f"{name:>18}" for name in METRICS))
    for name, runs in results.items():
        columns = [sorted(run[metric] for run in runs) for metric in METRICS]
        print(f"{name:<15}" + "".join(f"{np.median(column):>18.3f}" for column in columns))
        if len(runs) > 1:
            spread = (f"({column[0]:.3f}-{column[-1]:.3f})" for column in columns)
            print(" " * 15 + "".join(f"{text:>18}" for text in spread))


def plot_retrieval(test: Split, scores: np.ndarray, path: Path) -> None:
    """The best images of each name of the language SHOWN, those of another digit in red."""
    figure = Figure(figsize=(8, 8.5), layout="constrained")
    rows = figure.subplots(DIGITS, BEST)
    for digit, (name, row) in enumerate(zip(UNSEEN[SHOWN].split(), rows, strict=True)):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=13)
        for image, axes in zip(np.argsort(-scores[:, digit])[:BEST], row, strict=True):
            right = test.digits[image] == digit
            axes.imshow(test.images[image].reshape(8, 8), cmap="gray_r" if right else "Reds")
            axes.set(xticks=[], yticks=[])
            for side in axes.spines.values():
                side.set(color="0.8" if right else "tab:red", linewidth=1 if right else 3)
    figure.suptitle(f"The best test images for each name in {SHOWN}, unseen in training")
    figure.savefig(path, dpi=130)


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
        description="Matches images of digits and their names with Flax NNX and siglip_loss.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=60, help="epochs of each run")
    seeds = "each decides weights and batches of one run per variant"
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help=seeds)
    workdir = "where the run is written; one that is there is overwritten"
    add("--workdir", type=Path, default=Path("runs/image_text"), help=workdir)
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")
    if not all(0 <= seed < 2**32 for seed in args.seeds):
        parser.error(f"--seeds must be from 0 to 2**32 - 1, got {args.seeds}")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, list[dict[str, float]]]:
    """Runs the program; returns the test metrics of each variant, one dict per seed."""
    args = parse_arguments(argv)
    started = time.perf_counter()
    with locked(args.workdir):
        data, validation, test = load_data()
        results: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
        runs = [(seed, name) for seed in args.seeds for name in VARIANTS]
        bar = tqdm(total=len(runs) * args.epochs, desc="training", unit="epoch", disable=None)
        pictured: dict[str, np.ndarray] = {}
        with bar, (args.workdir / "metrics.jsonl").open("w") as file:
            for seed, name in runs:

                def after_epoch(record: dict[str, Any], seed: int = seed, name: str = name) -> None:
                    print(json.dumps({"loss of": name, "seed": seed, **record}), file=file)
                    bar.update()

                began = time.process_time()
                model = train(data, validation, VARIANTS[name], seed, args.epochs, after_epoch)
                of_languages = functools.partial(scores_of, model, test)
                results[name].append(evaluate(of_languages, test.digits, began))
                pictured = pictured or of_languages(UNSEEN)
        plain = functools.partial(rival, data, test)
        results[RIVAL] = [evaluate(plain, test.digits, time.process_time())]
        print_table(results)
        picture = args.workdir / "retrieval.png"
        plot_retrieval(test, pictured[SHOWN], picture)
    seconds = time.perf_counter() - started
    devices = f"{jax.device_count()} device(s) of {jax.default_backend()}"
    print(f"{seconds:.1f} s on {devices}; see {picture}")
    return results


if __name__ == "__main__":
    main()
