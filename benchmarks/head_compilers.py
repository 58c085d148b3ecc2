"""Claim: as the compiler of a TPU v5e counts it, the last layer with its loss and all its gradients
moves little more than its three matrix products alone; on an H100 about twice as much. This holds
for label ids and for every loss. `siglip_loss` moves less than the formula by hand, and
`sparse_bce_with_logits` little more than the loss of dense labels.

Both compilers run without the hardware. What they say is exact and has no noise; it is not a time.

One chunk: batch 1024, width 768, 32,768 labels, bfloat16, 16 ids a row. Each row of the result
names the case that it is compared with.

    pip install "jax[tpu]" optax && python benchmarks/head_compilers.py --target tpu
    pip install "jax[cuda12]" optax && python benchmarks/head_compilers.py --target h100  # 5.5 GB

The compiler of the TPU also counts what moves between main and on-chip memory. It stages the new
kernel on the chip where parameters are donated, so that such a step counts more bytes.
"""

import argparse
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import compilers  # which also tells JAX and libtpu that no device is here
import head
import jax
import jax.numpy as jnp
import made
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxbce

BATCH, WIDTH, LABELS = 1024, 768, 32_768
PAIRS, EMBEDDING = 4096, 1152
CHIPS = 4
SGD = optax.sgd(0.1)


class Argument(NamedTuple):
    shape: tuple[int, ...]
    dtype: Any = jnp.bfloat16
    spec: tuple[str | None, ...] = ()


class Case(NamedTuple):
    beside: str  # the case whose bytes are 1
    program: Callable[..., Any]
    arguments: tuple[Argument, ...]
    donated: int = 0  # so many of the first arguments
    mesh: Mesh | None = None  # one device where there is none


FEATURES, BIAS = Argument((BATCH, WIDTH)), Argument((LABELS,))
KERNEL, TABLE = Argument((WIDTH, LABELS)), Argument((LABELS, WIDTH))
LOGITS = Argument((BATCH, LABELS), jnp.float32)
DENSE_LABELS = Argument((BATCH, LABELS), jnp.uint8)
ONE_NUMBER = Argument((), jnp.float32)


def ids(count: int) -> Argument:
    return Argument((BATCH, count), jnp.int32)


def own(logit: jax.Array, label: jax.Array) -> jax.Array:
    """A loss as a user would write it, in which positives count twice."""
    return (1 + label) * (jaxbce.softplus(logit) - label * logit)


LOSSES = {
    "focal": head.FOCAL,
    "asymmetric": functools.partial(jaxbce.asymmetric_loss, reduction="none"),
    "own": jaxbce.Loss(own),
}


def layer(*operands: Argument, loss: Any = None, mesh: Mesh | None = None, **rest: Any) -> Case:
    """Value and gradients of the operands. The rest are arrays without a gradient, and options."""
    call = (
        jaxbce.linear_bce_with_logits
        if loss is None
        else functools.partial(jaxbce.linear_loss, loss)
    )
    arrays = {name: each for name, each in rest.items() if isinstance(each, Argument)}
    options = {name: each for name, each in rest.items() if name not in arrays}
    if mesh is not None:
        options |= {"mesh": mesh, "label_axis": "devices"}

    def total(*given: Any) -> jax.Array:
        named = dict(zip(arrays, given[len(operands) :], strict=True))
        return call(*given[: len(operands)], **named, **options, chunk_size=LABELS)

    program = jax.value_and_grad(total, argnums=range(len(operands)))
    return Case("three products", program, (*operands, *arrays.values()), mesh=mesh)


def update(kernel: Argument, donated: int = 0, **options: bool) -> Case:
    """A step of SGD."""

    def step(kernel: Any, bias: Any, features: Any, positives: Any) -> Any:
        params = {"kernel": kernel, "bias": bias}
        given = {"positives": positives, "chunk_size": LABELS} | options
        return jaxbce.linear_update(SGD, features, params, SGD.init(params), **given)

    return Case("three products", step, (kernel, BIAS, FEATURES, ids(16)), donated)


def products(features: Any, kernel: Any) -> Any:
    """The three of the layer, with the logits in place of their gradient."""
    logits = features @ kernel
    return logits @ kernel.T, features.T @ logits


def of_logits(loss: Callable[..., jax.Array], truth: Argument) -> Case:
    return Case("dense labels, loss", jax.value_and_grad(loss), (LOGITS, truth))


def siglip(
    loss: Callable[..., jax.Array], mesh: Mesh | None = None, beside: str = "siglip by hand"
) -> Case:
    pairs = PAIRS if mesh is None else PAIRS * mesh.size
    embeddings = Argument((pairs, EMBEDDING), spec=("devices",))
    program = jax.value_and_grad(loss, argnums=range(4))
    arguments = embeddings, embeddings, ONE_NUMBER, ONE_NUMBER
    return Case(beside, program, arguments, mesh=mesh)


def pairs_by_hand(images: Any, texts: Any, log_scale: Any, bias: Any) -> jax.Array:
    scaled = images * jnp.exp(log_scale).astype(images.dtype)
    logits = jnp.dot(scaled, texts.T, preferred_element_type=jnp.float32) + bias
    signs = 2 * jnp.eye(PAIRS) - 1
    return -jnp.sum(jax.nn.log_sigmoid(signs * logits)) / PAIRS


def ring_by_hand(mesh: Mesh) -> Callable[..., jax.Array]:
    """The texts travel, and each turn is computed again for its gradient: the logits of all turns
    would take more memory and more traffic."""
    steps = [(chip, (chip + 1) % mesh.size) for chip in range(mesh.size)]

    def local(images: Any, texts: Any, log_scale: Any, bias: Any) -> jax.Array:
        scaled = images * jnp.exp(log_scale).astype(images.dtype)

        @jax.checkpoint
        def turn(carry: Any, number: jax.Array) -> Any:
            texts, total = carry
            logits = jnp.dot(scaled, texts.T, preferred_element_type=jnp.float32) + bias
            signs = jnp.where((number == 0) & jnp.eye(PAIRS, dtype=bool), 1, -1)
            total -= jnp.sum(jax.nn.log_sigmoid(signs * logits))
            return (jax.lax.ppermute(texts, "devices", steps), total), None

        start = texts, jax.lax.pcast(jnp.float32(0), "devices", to="varying")
        (_, total), _ = jax.lax.scan(turn, start, jnp.arange(mesh.size))
        return jax.lax.psum(total, "devices") / (PAIRS * mesh.size)

    of_all, of_each = PartitionSpec(), PartitionSpec("devices")
    specs = of_each, of_each, of_all, of_all
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=of_all)


def cases(target: str) -> dict[str, Case]:
    operands, positives = (FEATURES, KERNEL, BIAS), ids(16)
    siglip_loss = functools.partial(jaxbce.siglip_loss, chunk_size=PAIRS)
    found = {
        "three products": Case("three products", products, (FEATURES, KERNEL)),
        "dense optax": Case("three products", head.dense, (*operands, positives)),
        "16 ids": layer(*operands, positives=positives),
        "128 ids": layer(*operands, positives=ids(128)),
        "16 ids, no bias": layer(FEATURES, KERNEL, positives=positives),
        "16 ids, weight": layer(
            *operands, positives=positives, weight=Argument((BATCH,), jnp.float32)
        ),
        "16 ids, 16 ignored": layer(*operands, positives=positives, ignored=ids(16)),
        "16 ids, table": layer(FEATURES, TABLE, BIAS, positives=positives, transpose_kernel=True),
        "dense labels": layer(*operands, labels=DENSE_LABELS),
        **{
            f"16 ids, {name} loss": layer(*operands, positives=positives, loss=loss)
            for name, loss in LOSSES.items()
        },
        "update": update(KERNEL),
        "update, donated": update(KERNEL, donated=2),
        "update, table": update(TABLE, transpose_kernel=True),
        "dense labels, loss": of_logits(jaxbce.bce_with_logits, DENSE_LABELS),
        "16 ids, loss": of_logits(jaxbce.sparse_bce_with_logits, positives),
        "siglip by hand": siglip(pairs_by_hand),
        "siglip": siglip(siglip_loss),
    }
    if target == "tpu":
        mesh = compilers.mesh_of(target, CHIPS)
        kernel = Argument((WIDTH, CHIPS * LABELS), spec=(None, "devices"))
        bias = Argument((CHIPS * LABELS,), spec=("devices",))
        found["16 ids, 4 chips"] = layer(FEATURES, kernel, bias, positives=positives, mesh=mesh)
        # A loop is counted once: a turn, of which there is one for each chip.
        on_ring = functools.partial(siglip_loss, mesh=mesh, axis="devices")
        found["a turn on 4 chips by hand"] = siglip(ring_by_hand(mesh), mesh)
        found["siglip, a turn on 4 chips"] = siglip(on_ring, mesh, "a turn on 4 chips by hand")
    return found


def moved(target: str, case: Case) -> float:
    """Bytes, of each device."""
    mesh = case.mesh or compilers.mesh_of(target)
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        for shape, dtype, spec in case.arguments
    ]
    step = jax.jit(case.program, donate_argnums=range(case.donated))
    return compilers.bytes_moved(target, step.lower(*arguments).compile())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--target", choices=compilers.TARGETS, default="tpu")
    parser.add_argument("--cases", nargs="+", help="of these alone, by name; all without it")
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()

    found = cases(args.target)
    if args.cases:
        wanted = {*args.cases, *(found[name].beside for name in args.cases)}
        found = {name: case for name, case in found.items() if name in wanted}
    sizes, rows = {}, []
    with ThreadPoolExecutor(2) as pool:
        measured = pool.map(functools.partial(moved, args.target), found.values())
        for (name, case), size in zip(found.items(), measured, strict=True):
            sizes[name] = size
            row = {"case": name, "beside": case.beside}  # which comes before it
            row |= {"megabytes": size / 1e6, "ratio": size / sizes[case.beside]}
            rows.append({"target": args.target} | row)
            print(
                f"{name:26}{row['megabytes']:9.1f} MB {row['ratio']:6.2f} of {case.beside}",
                flush=True,
            )
    if args.json:
        made.write(args.json, rows, "optax")


if __name__ == "__main__":
    main()
