"""The chunked head on a mesh that spans processes, as on a cluster of several hosts.

    pip install -e ".[examples]"                   # in a clone of the repository
    python examples/distributed_head.py            # about 20 s on a 2-core CPU; --help for options

Without `--process-id` it starts all processes on this machine, two by default, with two virtual CPU
devices each, over JAX's own runtime (`jax.distributed`). They form a mesh, here of 2 x 2: the batch
is split over processes, the 4,096 labels over the devices of each. Every process makes only its
own rows of the data. They train a few steps with `linear_update`, and compare kernel and momentum
after each with gradient and optimizer on one device that sees everything; also compared are loss
and gradient of `linear_bce_with_logits` and, at the end, `linear_top_k`.

On a cluster start one process per host, without virtual devices:

    python examples/distributed_head.py --coordinator HOST:PORT --processes N --process-id I

Data: random, from a seed; no licence. Expected: the loss of a row falls from 2839 to
1215 in ten steps, all positives are among the top labels, and the largest difference from the
single device is 6e-7, relative to the largest entry. It makes no picture.
"""

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import jaxbce

BATCH, WIDTH, LABELS, POSITIVES = 64, 32, 4096, 4
TOLERANCE = 1e-5
OPTIMIZER = optax.sgd(1.0, momentum=0.9)  # linear in the gradient, so rounding stays small


def make_data(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, positives that depend on them, and a first kernel: the same in every process."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(BATCH, WIDTH)).astype(np.float32)
    truth = rng.normal(size=(WIDTH, LABELS))
    positives = np.argsort(-(features @ truth), axis=1)[:, :POSITIVES].astype(np.int32)
    return features, positives, np.zeros((WIDTH, LABELS), np.float32)


def functions_on(mesh: Mesh | None) -> tuple[Callable[..., Any], ...]:
    """Loss and gradient, a step of the optimizer, and the top labels: on the mesh or one device."""
    axes: dict[str, Any] = {}
    if mesh is not None:
        axes = {"mesh": mesh, "batch_axis": "batch", "label_axis": "labels"}

    def loss(kernel: jax.Array, features: jax.Array, positives: jax.Array) -> jax.Array:
        return jaxbce.linear_bce_with_logits(
            features,
            kernel,
            positives=positives,
            reduction="batchmean",
            chunk_size=512,
            **axes,
        )

    def update(
        kernel: jax.Array, state: Any, features: jax.Array, positives: jax.Array
    ) -> tuple[jax.Array, Any]:
        step = jaxbce.linear_update(
            OPTIMIZER,
            features,
            {"kernel": kernel},
            state,
            positives=positives,
            reduction="batchmean",
            chunk_size=512,
            **axes,
        )
        return step.params["kernel"], step.opt_state

    def top(kernel: jax.Array, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jaxbce.linear_top_k(features, kernel, k=POSITIVES, **axes)

    return jax.jit(jax.value_and_grad(loss)), jax.jit(update), jax.jit(top)


@jax.jit
def step_apart(params: dict[str, jax.Array], state: Any, gradient: jax.Array) -> tuple[Any, Any]:
    """What `linear_update` has to be equal to."""
    updates, state = OPTIMIZER.update({"kernel": gradient}, state, params)
    return optax.apply_updates(params, updates)["kernel"], state


def largest_difference(got: Any, expected: Any) -> float:
    """Of all pairs of arrays, relative to the largest entry."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def train(mesh: Mesh, seed: int, steps: int) -> None:
    features, positives, start = make_data(seed)
    by_row = NamedSharding(mesh, PartitionSpec("batch"))
    mine = slice(*(BATCH // jax.process_count() * (jax.process_index() + end) for end in (0, 1)))
    batch = [
        jax.make_array_from_process_local_data(by_row, array[mine])
        for array in (features, positives)
    ]

    def place(array: jax.Array | np.ndarray) -> jax.Array:
        """Each device makes its own labels; the number of steps is everywhere."""
        spec = PartitionSpec(None, "labels") if array.ndim else PartitionSpec()
        where = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

    kernel, state = jax.tree.map(place, (start, OPTIMIZER.init({"kernel": start})))
    value_and_gradient, update, top = functions_on(mesh)
    alone, _, top_alone = functions_on(None)

    def gather(arrays: Any) -> Any:
        return multihost_utils.process_allgather(arrays, tiled=True)

    leader = jax.process_index() == 0
    worst = 0.0
    for step in tqdm(range(steps), "training", disable=None if leader else True):
        before = gather((kernel, state))
        value, gradient = value_and_gradient(kernel, *batch)
        kernel, state = update(kernel, state, *batch)
        expected = alone(before[0], features, positives)
        stepped = step_apart({"kernel": before[0]}, before[1], expected[1])
        got = gather((value, gradient, kernel, state))
        worst = max(worst, largest_difference(got, (*expected, *stepped)))
        if leader:
            print(f"step {step + 1}: loss {float(value):.4f}", flush=True)
    logits, labels = gather(top(kernel, batch[0]))
    expected_logits, expected_labels = top_alone(gather(kernel), features)
    worst = max(worst, largest_difference(logits, expected_logits))
    if worst > TOLERANCE or not np.array_equal(labels, expected_labels):
        raise SystemExit(f"process {jax.process_index()}: differs by {worst:.1e}")
    if leader:
        shape = dict(mesh.shape)
        found = (labels[:, :, None] == positives[:, None, :]).any(axis=1).mean()
        print(f"{found:.0%} of the positives are among the {POSITIVES} top labels")
        print(f"{jax.process_count()} processes, mesh {shape}: largest difference {worst:.1e}")


def launch(args: argparse.Namespace) -> None:
    """Runs this file once for each process, with two virtual devices."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--coordinator", coordinator]
    command += [f"--processes={args.processes}", f"--seed={args.seed}", f"--steps={args.steps}"]
    processes = [
        subprocess.Popen([*command, "--process-id", str(number)], env=environment)
        for number in range(args.processes)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit("A process failed; its message is above.")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains the chunked head over several processes and checks it against one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=10, help="training steps")
    add("--seed", type=int, default=0, help="decides the data")
    add("--coordinator", help="HOST:PORT of process 0")
    add("--processes", type=int, default=2, help="how many processes there are")
    add("--process-id", type=int, help="its number; without it, all are started here")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if args.seed < 0:
        parser.error(f"--seed must be at least 0, got {args.seed}")
    if args.processes < 1 or BATCH % args.processes:
        parser.error(f"--processes must divide the batch of {BATCH}, got {args.processes}")
    if args.process_id is not None and not 0 <= args.process_id < args.processes:
        last = args.processes - 1
        parser.error(f"--process-id must be from 0 to {last}, got {args.process_id}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.process_id is None:
        launch(args)
        return
    jax.distributed.initialize(args.coordinator, args.processes, args.process_id)
    shape = (jax.process_count(), jax.local_device_count())
    mesh = jax.make_mesh(shape, ("batch", "labels"), axis_types=(AxisType.Auto,) * 2)
    train(mesh, args.seed, args.steps)


if __name__ == "__main__":
    main()
