"""Claim: at 131,072 labels, batch 256, width 128, float32, on a CPU, the chunked head is 2.4 to 3.4
times as fast as a dense optax head and takes 0.9 to 1.3 times its three bare matrix products, 1.1
on a quiet machine; `chunk_size=None` is within 10 % of the best fixed chunk.

    python benchmarks/head.py [chunks]

Every variant runs once a round, in an order drawn anew, since what ran before decides which pages
and caches are warm; the ratio is that of the medians. `chunks` measures the last claim.
"""

import random
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbce
from jaxbce import _linear

ROUNDS = 15
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


def chunked(**options):
    def loss(features, kernel, bias, positives):
        return jaxbce.linear_bce_with_logits(features, kernel, bias, positives=positives, **options)

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


def dense(features, kernel, bias, positives):
    def loss(features, kernel, bias):
        logits = (features @ kernel + bias).astype(jnp.float32)  # as in the chunked head
        rows = jnp.arange(len(positives))[:, None]
        labels = jnp.zeros_like(logits).at[rows, positives].set(1)
        return optax.sigmoid_binary_cross_entropy(logits, labels).mean()

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(features, kernel, bias)


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


def medians(variants, arguments, rounds=ROUNDS):
    """Seconds of each variant."""
    compiled = {name: jax.jit(fn).lower(*arguments).compile() for name, fn in variants.items()}
    seconds = {name: [] for name in variants}
    order, rng = list(compiled.items()), random.Random(0)
    for round_ in range(rounds + 1):
        rng.shuffle(order)
        for name, run in order:
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def compare():
    """Against each in a run of its own: the dense head leaves the next variant cold memory."""
    shape = batch, _, labels = SHAPES[0]
    products = three_products(_linear.default_chunk_size(batch, labels))
    for name, other in {"three products": products, "dense optax": dense}.items():
        times = medians({"chunked": chunked(), name: other}, draw(*shape))
        ours, theirs = times.values()
        print(f"chunked {1e3 * ours:.1f} ms, {name} {1e3 * theirs:.1f} ms")
        print(f"  chunked / {name} = {ours / theirs:.2f}, {name} / chunked = {theirs / ours:.2f}")


def compare_chunks():
    for shape in SHAPES:
        batch, _, labels = shape
        chosen = min(_linear.default_chunk_size(batch, labels), labels)  # what None stands for
        chunks = sorted({chosen, labels, *(chunk for chunk in CHUNKS if chunk < labels)})
        variants = {chunk: chunked(chunk_size=chunk) for chunk in chunks if batch * chunk <= 2**24}
        times = medians(variants, draw(*shape))
        best = min(times, key=times.get)
        row = ", ".join(f"{chunk}: {1e3 * seconds:.1f}" for chunk, seconds in times.items())
        print(f"{shape}: None is {chosen}, {times[chosen] / times[best]:.2f} x best (ms: {row})")


if __name__ == "__main__":
    compare_chunks() if "chunks" in sys.argv[1:] else compare()
