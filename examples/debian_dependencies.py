"""Predicts what a Debian package depends on from its description: 30,000 labels on a CPU.

    pip install -e ".[examples]"                   # in a clone of the repository
    apt-get update                                  # as root, once
    python examples/debian_dependencies.py          # --help shows the options
    python examples/debian_dependencies.py --predict "web server written in Python"

Model: word vectors weighted by tf-idf, a residual layer, and a head with one row for each label.
`MultiLabelHead.update` trains the head inside its pass over the labels and hands the gradient of
the features down to the encoder. The prediction is the mean of the logits of six such models.

Data: the package lists of the machine, `apt-cache dumpavail`, each package under its own licence;
nothing of them is stored here. The text is the name, the section and the first line of Description.
The labels are the names in Pre-Depends and Depends, of alternatives the first. A hash of the source
package puts a fifth of the sources into the test part. Packages with no label of the training part
are left out.

Expected on Debian 12 with its security updates, November 2026: 44,501 packages to train, 10,773 to
test, 15,000 words, 29,999 labels. Medians of seeds 0, 1, 2 (lowest-highest):

                       precision at 1         precision at 3         precision at 5         CPU time
    label frequencies  0.4360                 0.2362                 0.1860                      0 s
    PECOS XR-Linear    0.7626                 0.4842                 0.3574                      6 s
    six of its trees   0.7728                 0.4923                 0.3658                    100 s
    this example       0.7647 (0.7641-0.7672) 0.4889 (0.4875-0.4892) 0.3636 (0.3633-0.3639)    320 s

PECOS is libpecos 1.2.8, a tree of linear classifiers: same split, words and tf-idf. With its
defaults it is fifty times as fast and a little behind. The mean of six trees, with another seed
each and 50 beams, stays ahead of this example. So take PECOS for sparse features such as these, and
a head like this one where an encoder is trained with it. The example also reads the words in the
names of the labels. In the grouping of labels by PECOS they did not help (0.7581, 0.4811, 0.3582).

The run takes four minutes on 2 cores. A step of one model takes 90 ms and holds 89 MB at its peak,
by XLA's memory analysis. With gradients of the chunked loss it holds 103 MB and takes as long. With
a dense optax head it holds 248 MB and takes 2.3 times as long (jax 0.12.0.1, beside other work).
Width, epochs, number of models and dropped words were chosen on a fifth of the training part, split
off by another byte of the hash.

Writes to the workdir, one run at a time: `names.json`, the words and labels, and a checkpoint of
the last epoch of the first seed. `--predict` needs nothing else. `--resume` continues that run bit
for bit. `--compare` trains the same weights in two other ways, from gradients of the chunked loss
and with a dense optax head, and prints the time and the memory of a step.
"""

import argparse
import collections
import contextlib
import fcntl
import functools
import hashlib
import json
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tqdm import tqdm

import jaxbce
from jaxbce.nnx import MultiLabelHead

NEEDS = (
    "This example needs the package lists of a Debian or Ubuntu machine (run `apt-get update`), or "
    "the output of its `apt-cache dumpavail` in a file given by --available."
)
NAMES = "names.json"
VOCABULARY, TEST_PART, CUTOFFS = 15_000, 5, (1, 3, 5)
WIDTH, BATCH, LEARNING_RATE, DROPPED = 128, 256, 5e-3, 0.25
MEMBERS, EPOCHS = 6, 3


Run = dict[str, Any]  # a model and its two optimizers
State = dict[str, nnx.State[Any, Any]]
Step = Callable[[Run, jax.Array, jax.Array], jax.Array]  # changes the run, returns its loss
Results = dict[str, list[list[float]]]  # by way and seed, the precision at each of CUTOFFS


class Encoder(nnx.Module):
    """Word vectors, weighted by tf-idf and summed; then a residual layer."""

    def __init__(self, num_words: int, rngs: nnx.Rngs) -> None:
        vectors = jax.random.normal(rngs.params(), (num_words + 1, WIDTH)) / WIDTH**0.5
        self.vectors = nnx.Param(vectors)
        self.rarity = nnx.Variable(jnp.zeros(num_words + 1))
        self.norm = nnx.RMSNorm(WIDTH, use_scale=False, rngs=rngs)
        self.hidden = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        zeros = nnx.initializers.zeros
        self.change = nnx.Linear(WIDTH, WIDTH, use_bias=False, kernel_init=zeros, rngs=rngs)

    def bag(self, words: jax.Array) -> jax.Array:
        """The weights of a row have unit length; the padding has the weight 0."""
        weights = self.rarity[...][words]
        total = jnp.einsum("bw,bwd->bd", weights, self.vectors[...][words])
        return total / jnp.maximum(jnp.linalg.norm(weights, axis=1, keepdims=True), 1e-6)

    def __call__(self, words: jax.Array) -> jax.Array:
        bag = self.bag(words)
        return bag + self.change(nnx.gelu(self.hidden(self.norm(bag))))


class Classifier(nnx.Module):
    def __init__(self, num_words: int, num_labels: int, rngs: nnx.Rngs) -> None:
        self.encoder = Encoder(num_words, rngs)
        self.head = MultiLabelHead(WIDTH, num_labels, transpose_kernel=True, rngs=rngs)


def update_step(run: Run, words: jax.Array, positives: jax.Array) -> jax.Array:
    """The head steps inside its pass over the labels; its gradients never exist as a whole."""
    model = run["model"]
    loss: jax.Array
    loss, gradients = model.head.update_with_encoder(
        run["head optimizer"], model.encoder, words, positives=positives, reduction="batchmean"
    )
    run["encoder optimizer"].update(model.encoder, gradients)
    return loss


class Package(NamedTuple):
    source: str
    words: list[str]
    dependencies: list[str]


class Part(NamedTuple):
    """Rows of ids, padded: words with the size of the vocabulary, dependencies with -1."""

    words: np.ndarray
    positives: np.ndarray


class Names(NamedTuple):
    """What a run is known by, and what the rows of its checkpoint stand for."""

    seed: int
    epochs: int
    words: list[str]
    labels: list[str]


class Data(NamedTuple):
    words: list[str]
    labels: list[str]
    train: Part
    test: Part


def read_available(path: Path | None) -> str:
    """What apt knows of every available package, one paragraph each."""
    if path is not None:
        return path.read_text()
    if shutil.which("apt-cache") is None:
        raise SystemExit(NEEDS)
    return subprocess.check_output(["apt-cache", "dumpavail"], text=True)


def parse_packages(text: str) -> list[Package]:
    """The packages that depend on something, each once."""
    packages: dict[str, Package] = {}
    for paragraph in text.split("\n\n"):
        # A line that starts with a space continues the field above: none that is read here.
        lines = (line.split(": ", 1) for line in paragraph.split("\n") if ": " in line)
        fields = {key: value for key, value in lines if not key.startswith(" ")}
        relations = f"{fields.get('Pre-Depends', '')},{fields.get('Depends', '')}"
        dependencies = parse_dependencies(relations)
        if "Package" not in fields or not dependencies:
            continue
        name = fields["Package"]
        source = fields.get("Source", name).split(" ")[0]
        description = fields.get("Description", fields.get("Description-en", ""))
        text_of = " ".join((name, fields.get("Section", ""), description))
        packages.setdefault(name, Package(source, split_words(text_of), dependencies))
    return list(packages.values())


def parse_dependencies(relations: str) -> list[str]:
    """Names in a list such as "libc6 (>= 2.34), python3:any, exim4 | mail-transport-agent"."""
    first_choices = (relation.split("|")[0] for relation in relations.split(","))
    names = (re.split(r"[\s:(\[]", choice.strip(), maxsplit=1)[0] for choice in first_choices)
    return list(dict.fromkeys(name for name in names if name))


def split_words(text: str) -> list[str]:
    """Each word once."""
    return list(dict.fromkeys(re.findall(r"[a-z0-9+#]+", text.lower())))


def is_test(package: Package) -> bool:
    """By the source package, so that no source is in both parts."""
    return hashlib.sha256(package.source.encode()).digest()[0] % TEST_PART == 0


def load(text: str) -> Data:
    """Splits; numbers the words and labels of the training part, the most frequent first."""
    packages = parse_packages(text)
    train = [package for package in packages if not is_test(package)]
    test = [package for package in packages if is_test(package)]
    if not train or not test:
        raise SystemExit(NEEDS)
    words = most_frequent(package.words for package in train)[:VOCABULARY]
    labels = most_frequent(package.dependencies for package in train)
    return Data(words, labels, encode(train, words, labels), encode(test, words, labels))


def most_frequent(lists: Iterable[list[str]]) -> list[str]:
    return [item for item, _ in collections.Counter(i for row in lists for i in row).most_common()]


def encode(packages: list[Package], words: list[str], labels: list[str]) -> Part:
    """Ids; packages left without a label are left out."""
    label_ids = pad([package.dependencies for package in packages], labels, fill=-1)
    word_ids = pad([package.words for package in packages], words, fill=len(words))
    labelled = (label_ids >= 0).any(axis=1)
    return Part(word_ids[labelled], label_ids[labelled])


def pad(rows: list[list[str]], names: list[str], fill: int) -> np.ndarray:
    """The numbers of the names in each row, as an int32 array as wide as the longest row."""
    number = {name: i for i, name in enumerate(names)}
    numbered = [[number[name] for name in row if name in number] for row in rows]
    table = np.full((len(rows), max(map(len, numbered))), fill, np.int32)
    for row, ids in zip(table, numbered, strict=True):
        row[: len(ids)] = ids
    return table


def start_from_counts(model: Classifier, data: Data) -> None:
    """Rarity is log(packages / packages with the word), the bias the base rate of a label.

    The vector of a label starts as that of the words in its name, plus the mean of the packages
    that depend on it. A label that occurs once then needs few steps.
    """
    words, positives = data.train
    counts = np.bincount(words.ravel(), minlength=len(data.words) + 1).clip(1)
    counts[-1] = len(words)
    model.encoder.rarity[...] = jnp.asarray(np.log(len(words) / counts), jnp.float32)
    assert model.head.bias is not None
    num_labels = len(data.labels)
    model.head.bias[...] = jaxbce.prior_bias(positives=positives, num_labels=num_labels)
    bag = nnx.jit(lambda model, part: model.encoder.bag(part))
    features = in_parts(functools.partial(bag, model), words)
    rows, columns = np.nonzero(positives >= 0)
    labels = positives[rows, columns]
    centred = features - features.mean(axis=0)
    total = jax.ops.segment_sum(jnp.asarray(centred)[rows], labels, num_labels)
    mean = total / np.bincount(labels, minlength=num_labels)[:, None]
    names = pad([split_words(label) for label in data.labels], data.words, fill=len(data.words))
    model.head.kernel[...] = mean + in_parts(functools.partial(bag, model), names)


def in_parts(function: Callable[[jax.Array], jax.Array], words: np.ndarray) -> np.ndarray:
    """The function of all rows, a part at a time."""
    starts = range(0, len(words), 1024)
    return np.concatenate([function(jnp.asarray(words[i : i + 1024])) for i in starts])


def chunked_loss(model: Classifier, words: jax.Array, positives: jax.Array) -> jax.Array:
    return model.head.loss(model.encoder(words), positives=positives, reduction="batchmean")


def dense_loss(model: Classifier, words: jax.Array, positives: jax.Array) -> jax.Array:
    """The same number from optax, which needs dense logits and labels."""
    labels = jaxbce.multi_hot(positives, model.head.num_labels)
    logits = model.head(model.encoder(words))
    losses: jax.Array = optax.sigmoid_binary_cross_entropy(logits, labels)
    return losses.sum(axis=-1).mean()


def gradient_step(
    loss: Callable[..., jax.Array], run: Run, words: jax.Array, positives: jax.Array
) -> jax.Array:
    """Gradients of everything, then the optimizers."""
    model = run["model"]
    value: jax.Array
    value, gradients = nnx.value_and_grad(loss)(model, words, positives)
    for part in ("encoder", "head"):
        run[f"{part} optimizer"].update(getattr(model, part), gradients[part])
    return value


WAYS: dict[str, Step] = {
    "head.update": update_step,
    "chunked loss": functools.partial(gradient_step, chunked_loss),
    "dense optax head": functools.partial(gradient_step, dense_loss),
}


@nnx.jit(static_argnames="k")
def top_labels(models: list[Classifier], words: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k likeliest dependencies: probabilities and labels.

    The mean of the models' logits is one head on all their features side by side.
    """
    features = jnp.concatenate([model.encoder(words) for model in models], axis=1)
    heads = [model.head for model in models]
    kernel = jnp.concatenate([head.kernel[...] for head in heads], axis=1) / len(heads)
    bias = sum(jnp.asarray(head.bias) for head in heads) / len(heads)
    logits, labels = jaxbce.linear_top_k(features, kernel, bias, k=k, transpose_kernel=True)
    return nnx.sigmoid(logits), labels


def states(run: Run) -> State:
    return {name: nnx.state(module) for name, module in run.items()}


def set_states(run: Run, state: State) -> None:
    for name, part in state.items():
        nnx.update(run[name], part)


class Trainer:
    """Some models and their optimizers, trained in one of the WAYS."""

    def __init__(self, data: Data, seed: int, way: str, epochs: int) -> None:
        self.data = data
        self.seed = seed
        self.way = way
        self.epochs = epochs
        self.batch = min(BATCH, len(data.train.words))
        self.steps = len(data.train.words) // self.batch
        adam = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, self.steps * epochs))
        rngs = nnx.Rngs(seed)
        self.members: list[Run] = []
        for _ in range(MEMBERS):
            model = Classifier(len(data.words), len(data.labels), rngs)
            start_from_counts(model, data)
            optimizers = {
                f"{name} optimizer": nnx.Optimizer(part, adam, wrt=nnx.Param)
                for name, part in (("encoder", model.encoder), ("head", model.head))
            }
            self.members.append({"model": model, **optimizers})
        graphs = {name: nnx.graphdef(module) for name, module in self.members[0].items()}

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state: State, words: jax.Array, positives: jax.Array) -> tuple[State, jax.Array]:
            run = {name: nnx.merge(graphs[name], part) for name, part in state.items()}
            loss = WAYS[way](run, words, positives)
            return states(run), loss

        example = (part[: self.batch] for part in data.train)
        self.step = step.lower(states(self.members[0]), *example).compile()
        self.seconds: list[float] = []

    def everything(self) -> Run:
        """All members, by names of their own."""
        members = enumerate(self.members)
        return {f"{name} {i}": part for i, member in members for name, part in member.items()}

    def megabytes(self) -> float:
        """What a step holds at its peak, state and batch included, according to the compiler."""
        memory = self.step.memory_analysis()
        assert memory is not None
        held: int = memory.argument_size_in_bytes + memory.output_size_in_bytes
        held += memory.temp_size_in_bytes - memory.alias_size_in_bytes
        return held / 1e6

    def train_epoch(self, epoch: int) -> float:
        """Trains one epoch, whose order and dropped words only seed and epoch decide."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.data.train.words))
        title = f"{self.way}, seed {self.seed}, epoch {epoch}/{self.epochs}"
        starts = tqdm(range(0, self.steps * self.batch, self.batch), title, disable=None)
        members, losses = [states(member) for member in self.members], []
        for start in starts:
            rows = order[start : start + self.batch]
            words, positives = (part[rows] for part in self.data.train)
            for i, state in enumerate(members):
                kept = np.where(rng.random(words.shape) < DROPPED, len(self.data.words), words)
                started = time.perf_counter()
                members[i], loss = self.step(state, kept, positives)
                losses.append(float(loss))
                self.seconds.append(time.perf_counter() - started)
        for member, state in zip(self.members, members, strict=True):
            set_states(member, state)
        mean = float(np.mean(losses))
        print(f"{title}: loss {mean:.3f}", flush=True)
        return mean

    def best_labels(self, words: np.ndarray) -> np.ndarray:
        """The max(CUTOFFS) likeliest labels of each row."""
        k = min(max(CUTOFFS), len(self.data.labels))
        models = [member["model"] for member in self.members]
        return in_parts(lambda part: top_labels(models, part, k)[1], words)


def precisions(best: np.ndarray, positives: np.ndarray) -> list[float]:
    """Of the first 1, 3, 5 columns of `best`, the share that is right."""
    hits = (best[:, :, None] == positives[:, None, :]).any(axis=-1)
    return [float(hits[:, :k].mean()) for k in CUTOFFS]


def open_checkpoints(workdir: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    return ocp.CheckpointManager((workdir / "checkpoints").resolve(), options=options)


def saved_epoch(workdir: Path) -> int:
    """The last epoch of which there is a whole checkpoint; 0 without one."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def read_names(workdir: Path) -> Names:
    try:
        return Names(**json.loads((workdir / NAMES).read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(
            f"{workdir / NAMES} is missing or broken ({error}): put that of the run back, or run "
            "without --resume and --predict to start anew."
        ) from None


def restore(checkpoints: ocp.CheckpointManager, target: State) -> State:
    """The parts named in `target`, from the last checkpoint."""
    parts = {name: ocp.args.StandardRestore(part) for name, part in target.items()}
    restored = checkpoints.restore(checkpoints.latest_step(), args=ocp.args.Composite(**parts))
    return {name: restored[name] for name in target}


def train(data: Data, args: argparse.Namespace) -> Trainer:
    """Trains the first seed up to args.epochs; saves names once and the state every epoch."""
    seed, done = args.seeds[0], saved_epoch(args.workdir)
    names = Names(seed, args.epochs, data.words, data.labels)
    if not args.resume:
        if done:
            print(f"replaces the run in {args.workdir}, saved after epoch {done}", flush=True)
            shutil.rmtree(args.workdir / "checkpoints")
            done = 0
        (args.workdir / NAMES).write_text(json.dumps(names._asdict()))
    elif read_names(args.workdir) != names:
        raise SystemExit(
            f"The run in {args.workdir} is not one of these data, seed {seed} and {args.epochs} "
            "epochs: run without --resume to start anew."
        )
    trainer = Trainer(data, seed, "head.update", args.epochs)
    everything = trainer.everything()
    with open_checkpoints(args.workdir) as checkpoints:
        if done:
            set_states(everything, restore(checkpoints, states(everything)))
        for epoch in range(done + 1, args.epochs + 1):
            trainer.train_epoch(epoch)
            parts = {name: ocp.args.StandardSave(part) for name, part in states(everything).items()}
            checkpoints.save(epoch, args=ocp.args.Composite(**parts))
    return trainer


def compare(data: Data, args: argparse.Namespace) -> Results:
    """Trains, prints the table and returns the precisions of every way, one list per seed."""
    sizes = (len(data.train.words), len(data.test.words), len(data.words), len(data.labels))
    print(
        "{:,} packages to train, {:,} to test, {:,} words, {:,} labels".format(*sizes), flush=True
    )
    frequent = np.arange(max(CUTOFFS))[None]  # labels are numbered by their frequency
    results = {"label frequencies": [precisions(frequent, data.test.positives)]}
    costs = {"label frequencies": ""}
    saved = train(data, args)
    for way in WAYS if args.compare else ("head.update",):
        results[way], seconds = [], []
        for seed in args.seeds:
            if (way, seed) == (saved.way, saved.seed):
                trainer = saved
            else:
                trainer = Trainer(data, seed, way, args.epochs)
                for epoch in range(1, args.epochs + 1):
                    trainer.train_epoch(epoch)
            best = trainer.best_labels(data.test.words)
            results[way].append(precisions(best, data.test.positives))
            seconds += trainer.seconds
        milliseconds = f"{1e3 * statistics.median(seconds):.1f}" if seconds else "-"
        costs[way] = f"{milliseconds:>8} ms {trainer.megabytes():>7.0f} MB"
    print_table(results, costs)
    return results


def print_table(results: Results, costs: dict[str, str]) -> None:
    """The median over the seeds and (lowest-highest); the median time of a step and its peak."""
    titles = [f"precision at {k}" for k in CUTOFFS]
    print(f"{'test part':<18}" + "".join(f"{title:>23}" for title in titles) + "     a step")
    for name, runs in results.items():
        cells = [
            f"{statistics.median(column):.4f} ({min(column):.4f}-{max(column):.4f})"
            for column in zip(*runs, strict=True)
        ]
        print(f"{name:<18}" + "".join(f"{cell:>23}" for cell in cells) + costs[name])


def predict(description: str, workdir: Path) -> list[tuple[str, float]]:
    """Prints and returns the ten likeliest dependencies, by the checkpoint in workdir."""
    names = read_names(workdir)
    words, labels = names.words, names.labels
    known = pad([split_words(description)], words, fill=len(words))
    if not known.size:
        raise SystemExit(f"No word of {description!r} is in the vocabulary.")
    models = [Classifier(len(words), len(labels), nnx.Rngs(0)) for _ in range(MEMBERS)]
    everything: Run = {f"model {i}": model for i, model in enumerate(models)}
    with open_checkpoints(workdir) as checkpoints:
        set_states(everything, restore(checkpoints, states(everything)))
    probabilities, ids = top_labels(models, jnp.asarray(known), min(10, len(labels)))
    best = [(labels[i], float(p)) for i, p in zip(ids[0], probabilities[0], strict=True)]
    for name, probability in best:
        print(f"{probability:>8.1%}  {name}")
    return best


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
        description="Learns a Debian package's dependencies from its description.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=EPOCHS, help="epochs in total; they set the schedule")
    seeds = "each decides weights and batches of one run per way; the first one's run is saved"
    add("--seeds", type=int, nargs="+", default=[0], help=seeds)
    add("--workdir", type=Path, default=Path("runs/debian"), help="where the run is written")
    add("--resume", action="store_true", help="continue the run in workdir, bit for bit")
    add("--available", type=Path, help="a file with the output of `apt-cache dumpavail`")
    compare = "also train the same model in two other ways: with gradients, with a dense head"
    add("--compare", action="store_true", help=compare)
    add("--predict", help="print the dependencies of this description; train if there is no run")
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")
    if not all(0 <= seed < 2**32 for seed in args.seeds):
        parser.error(f"--seeds must be from 0 to 2**32 - 1, got {args.seeds}")
    return args


def main(argv: Sequence[str] | None = None) -> Any:
    """Runs the program; returns what it predicts, or the precisions of the table."""
    args = parse_arguments(argv)
    try:
        return train_or_predict(args)
    except KeyboardInterrupt:
        done = saved_epoch(args.workdir)
        hint = f"after epoch {done}; continue with --resume" if done else "before epoch 1 was saved"
        raise SystemExit(f"stopped {hint}") from None


def train_or_predict(args: argparse.Namespace) -> Any:
    started = time.perf_counter()
    if args.resume and not saved_epoch(args.workdir):
        raise SystemExit(f"No run to resume in {args.workdir}: run without --resume to start one.")
    with locked(args.workdir):
        result = None
        if args.predict is None or not saved_epoch(args.workdir):
            result = compare(load(read_available(args.available)), args)
            print(f"{time.perf_counter() - started:.1f} s; see {args.workdir}")
        return result if args.predict is None else predict(args.predict, args.workdir)


if __name__ == "__main__":
    main()
