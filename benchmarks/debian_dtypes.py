"""Claim: a kernel in bfloat16 or float8 finds as many labels as one in float32, on real text.

Trains one model of examples/debian_dependencies.py by `update_with_encoder`, with its data, its
settings and three seeds. Kernel and features are in the dtype named; the bias, the state of Adam
and the encoder are in float32. A narrow kernel is rounded at random.
"""

import pathlib
import statistics
import sys

import jax
import jax.numpy as jnp
import made
import numpy as np
import optax
from flax import nnx

import jaxbce.nnx

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

import debian_dependencies as example

RESULT = pathlib.Path(__file__).parent / "results/debian_dtypes.json"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float8_e4m3fn": jnp.float8_e4m3fn}
SEEDS = range(3)


def state_in_float32(tx):
    def init(params):
        return tx.init(jax.tree.map(lambda array: array.astype(jnp.float32), params))

    return optax.GradientTransformation(init, tx.update)


def narrowed(wide, dtype, rngs):
    """A head with the parameters of another one, and its kernel in `dtype`."""
    head = jaxbce.nnx.MultiLabelHead(
        wide.in_features, wide.num_labels, transpose_kernel=True, param_dtype=dtype, rngs=rngs
    )
    head.kernel[...] = wide.kernel[...].astype(dtype)
    head.bias[...] = wide.bias[...].astype(head.bias.dtype)
    return head


class Encoder(nnx.Module):
    """The features in half precision where the kernel is narrow."""

    def __init__(self, encoder, dtype):
        self.encoder, self.dtype = encoder, jnp.float32 if dtype == jnp.float32 else jnp.bfloat16

    def __call__(self, words):
        return self.encoder(words).astype(self.dtype)


def train(data, dtype, seed):
    """Precision at 1, 3 and 5 on the test part."""
    rngs = nnx.Rngs(seed)
    model = example.Classifier(len(data.words), len(data.labels), rngs)
    example.start_from_counts(model, data)
    head, encoder = narrowed(model.head, dtype, rngs), Encoder(model.encoder, dtype)
    rows = len(data.train.words)
    steps = rows // example.BATCH
    schedule = optax.cosine_decay_schedule(example.LEARNING_RATE, steps * example.EPOCHS)
    adam = state_in_float32(optax.adam(schedule))
    of_head, of_encoder = (nnx.Optimizer(part, adam, wrt=nnx.Param) for part in (head, encoder))

    @nnx.jit(donate_argnums=(0, 1, 2, 3))
    def step(head, of_head, encoder, of_encoder, words, positives, key):
        _, gradients = head.update_with_encoder(
            of_head,
            encoder,
            words,
            positives=positives,
            reduction="batchmean",
            rounding_key=None if dtype == jnp.float32 else key,
        )
        of_encoder.update(encoder, gradients)

    rng = np.random.default_rng(seed)
    for i in range(example.EPOCHS * steps):
        if i % steps == 0:
            order = rng.permutation(rows)
        batch = order[i % steps * example.BATCH :][: example.BATCH]
        words, positives = (part[batch] for part in data.train)
        words = np.where(rng.random(words.shape) < example.DROPPED, len(data.words), words)
        key = jax.random.fold_in(jax.random.key(seed), i)
        step(head, of_head, encoder, of_encoder, words, positives, key)

    @nnx.jit
    def best(head, encoder, words):
        return head.top_k(encoder(words), max(example.CUTOFFS))[1]

    found = example.in_parts(lambda words: best(head, encoder, words), data.test.words)
    return example.precisions(found, data.test.positives)


def main():
    data = example.load(example.read_available(None))
    rows = []
    for name, dtype in DTYPES.items():
        columns = list(zip(*(train(data, dtype, seed) for seed in SEEDS), strict=True))
        figures = {
            f"precision at {k}": [min(column), statistics.median(column), max(column)]
            for k, column in zip(example.CUTOFFS, columns, strict=True)
        }
        rows.append({"kernel": name, **figures})
        print(rows[-1], flush=True)
    made.write(RESULT, rows, "flax", "optax")


if __name__ == "__main__":
    main()
