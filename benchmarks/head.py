"""Claim: at 131,072 labels, batch 256, width 128, float32, on a CPU, the chunked head is 2.1 to 3.4
times as fast as a dense optax head and takes 0.9 to 1.3 times its three bare matrix products, 1.1
on a quiet machine; `chunk_size=None` is within 10 % of the best fixed chunk. A whole step of
training with Adam, by `linear_update`, takes 0.8 to 1.02 times as long as the chunked head's
gradient and the optimizer apart.

    python benchmarks/head.py [head] [chunks] [steps]

Every variant runs once a round, in an order drawn anew, since what ran before decides which pages
and caches are warm; the ratio is that of the medians. `head` measures the first claim, `chunks` the
second, `steps` the last.
"""

import functools
import random
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbce
from jaxbce._head import chunks

ROUNDS = 15
ADAM = optax.adam(1e-3)
FOCAL = functools.partial(jaxbce.focal_loss, gamma=2.0, reduction="none")
SHAPES = [
    (256, 128, 131_072),
    (32, 256, 65_536),
    (1024, 64, 32_768),
    (64, 64, 4_096),
    (256, 64, 512),
]
CHUNKS = [512, 1024, 2048, 4096, 8192, 16_384, 32_768]


def draw(batch, width, labels, positives=8):
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.normal(size=(batch, width)), jnp.float32),
        jnp.asarray(rng.normal(size=(width, labels)) / np.sqrt(width), jnp.float32),
        jnp.zeros(labels),
        jnp.asarray(rng.integers(0, labels, (batch, positives)), jnp.int32),
    )


def chunked(loss=None, **options):
    """BCE, or a loss of its own."""
    head = jaxbce.linear_bce_with_logits
    if loss is not None:
        head = functools.partial(jaxbce.linear_loss, loss)

    def total(features, kernel, bias, positives):
        return head(features, kernel, bias, positives=positives, **options)

    return jax.value_and_grad(total, argnums=(0, 1, 2))


def dense(features, kernel, bias, positives):
    def loss(features, kernel, bias):
        logits = (features @ kernel + bias).astype(jnp.float32)  # as in the chunked head
        rows = jnp.arange(len(positives))[:, None]
        labels = jnp.zeros_like(logits).at[rows, positives].set(1)
        return optax.sigmoid_binary_cross_entropy(logits, labels).mean()

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(features, kernel, bias)


def steps(optimizer, **options):
    """Three ways of a step of training; donate the first two arguments, which it replaces."""

    def apart(value_and_gradients):
        def step(params, state, features, positives):
            operands = features, params["kernel"], params["bias"], positives
            value, (slope, kernel, bias) = value_and_gradients(*operands)
            gradients = {"kernel": kernel, "bias": bias}
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, value, slope

        return step

    def update(params, state, features, positives):
        value, slope, params, state = jaxbce.linear_update(
            optimizer, features, params, state, positives=positives, **options
        )
        return params, state, value, slope

    return {"dense": apart(dense), "chunked": apart(chunked(**options)), "update": update}


def draw_step(optimizer, *shape):
    features, kernel, bias, positives = draw(*shape)
    params = {"kernel": kernel, "bias": bias}
    return params, optimizer.init(params), features, positives


def three_products(chunk_size):
    """The products alone, over whole chunks."""

    def run(features, kernel, bias, positives):
        def step(carry, start):
            d_features, d_kernel = carry
            chunk = jax.lax.dynamic_slice_in_dim(kernel, start, chunk_size, 1)
            logits = features @ chunk
            d_chunk = features.T @ logits
            d_kernel = jax.lax.dynamic_update_slice_in_dim(d_kernel, d_chunk, start, 1)
            return (d_features + logits @ chunk.T, d_kernel), None

        carry = jnp.zeros_like(features), jnp.zeros_like(kernel)
        starts = jnp.arange(kernel.shape[1] // chunk_size) * chunk_size
        return jax.lax.scan(step, carry, starts)[0]

    return run


def medians(variants, arguments, rounds=ROUNDS, donated=0):
    """Seconds of each variant; so many of its first results replace its first arguments."""
    compiled = {
        name: jax.jit(fn, donate_argnums=range(donated)).lower(*arguments).compile()
        for name, fn in variants.items()
    }
    carried, rest = arguments[:donated], arguments[donated:]
    seconds = {name: [] for name in variants}
    order, rng = list(compiled.items()), random.Random(0)
    for round_ in range(rounds + 1):
        rng.shuffle(order)
        for name, run in order:
            start = time.perf_counter()
            results = jax.block_until_ready(run(*carried, *rest))
            if round_:
                seconds[name].append(time.perf_counter() - start)
            carried = results[:donated]
    return {name: statistics.median(times) for name, times in seconds.items()}


def compare():
    """Against each in a run of its own: the dense head leaves the next variant cold memory."""
    shape = batch, _, labels = SHAPES[0]
    products = three_products(chunks.default_chunk_size(batch, labels))
    for name, other in {"three products": products, "dense optax": dense}.items():
        times = medians({"chunked": chunked(), name: other}, draw(*shape))
        ours, theirs = times.values()
        print(f"chunked {1e3 * ours:.1f} ms, {name} {1e3 * theirs:.1f} ms")
        print(f"  chunked / {name} = {ours / theirs:.2f}, {name} / chunked = {theirs / ours:.2f}")


def compare_chunks():
    for shape in SHAPES:
        batch, _, labels = shape
        chosen = min(chunks.default_chunk_size(batch, labels), labels)  # what None stands for
        sizes = sorted({chosen, labels, *(chunk for chunk in CHUNKS if chunk < labels)})
        variants = {chunk: chunked(chunk_size=chunk) for chunk in sizes if batch * chunk <= 2**24}
        times = medians(variants, draw(*shape))
        best = min(times, key=times.get)
        row = ", ".join(f"{chunk}: {1e3 * seconds:.1f}" for chunk, seconds in times.items())
        print(f"{shape}: None is {chosen}, {times[chosen] / times[best]:.2f} x best (ms: {row})")


def compare_steps():
    for shape in SHAPES:
        times = medians(steps(ADAM), draw_step(ADAM, *shape), donated=2)
        row = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in times.items())
        print(f"{shape}: {row}, update / chunked {times['update'] / times['chunked']:.2f}")


if __name__ == "__main__":
    parts = {"head": compare, "chunks": compare_chunks, "steps": compare_steps}
    for part in sys.argv[1:] or ["head"]:
        parts[part]()
