"""Claim: compiled for a TPU v5e and for an H100, the mean loss with its gradient moves every input
and the gradient once, holds no temporary of the size of the logits and evaluates one exponential
per element; float32 and bfloat16, with pos_weight, weight and where. The other losses move as
little.

Both compilers run without the hardware. What they say is exact and has no noise; it is not a time.

A mask of the shape of the logits is read twice under "mean": the gradient is divided by the number
of kept elements, which is known only after all of the mask has been read. The bound counts that
second reading, and reduction="sum", which needs no count, is shown beside it.

    pip install "jax[tpu]" && python benchmarks/compilers.py --target tpu
    pip install "jax[cuda12]" && python benchmarks/compilers.py --target h100       # 5.5 GB
"""

import argparse
import math
import os
import re

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no lock file: nothing runs on a TPU
os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"

import contenders
import jax
import jax.numpy as jnp
import made
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

CONTENDERS = {
    "jaxbce": contenders.jaxbce_mean,
    "jaxbce, sum": contenders.jaxbce_sum,
    "jaxbce, weighted_mean": contenders.jaxbce_weighted_mean,
    "jaxbce, batchmean": contenders.jaxbce_batchmean,
    "jaxbce, axis": contenders.jaxbce_axis,
    "optax": contenders.optax_mean,
    "textbook": contenders.textbook_mean,
    "optax focal": contenders.optax_focal_mean,
    **{name: contenders.mean_of(loss) for name, loss in contenders.LOSSES.items()},
}

# name: shape of each option, given the batch and the number of labels
CASES = {
    "plain": lambda b, n: {},
    "pos_weight": lambda b, n: {"pos_weight": (n,)},
    "weight": lambda b, n: {"weight": (b, 1)},
    "where": lambda b, n: {"where": (b, n)},
    "where per row": lambda b, n: {"where": (b, 1)},
    "all": lambda b, n: {"pos_weight": (n,), "weight": (b, 1), "where": (b, n)},
}

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

TARGETS = {
    "tpu": {"platform": "tpu", "topology_name": "v5e:2x2"},
    "h100": {
        "platform": "cuda",
        "topology_name": "",
        "topology": "1x1x1",
        "target_config": H100,
    },
}

SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)$")
FREE = {"parameter", "tuple", "get-tuple-element", "constant", "bitcast"}
TRANSCENDENTAL = {"exponential", "exponential-minus-one", "log", "log-plus-one", "logistic", "tanh"}


def elements(shape: str) -> int:
    """How many numbers the (tuple of) arrays in an HLO type hold."""
    return sum(
        math.prod(map(int, dims.split(","))) if dims else 1 for _, dims in SHAPE.findall(shape)
    )


def size(shape: str) -> int:
    """How many bytes the (tuple of) arrays in an HLO type take."""
    total = 0
    for dtype, dims in SHAPE.findall(shape):
        bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype) or 0)
        total += bits // 8 * elements(f"{dtype}[{dims}]")
    return total


def traffic(hlo: str) -> int:
    """Bytes of every operand and result of the instructions of the entry computation."""
    entry = hlo[hlo.index("\nENTRY ") :].splitlines()
    sizes, total = {}, 0
    for name, shape, operation, rest in (m.groups() for m in map(INSTRUCTION.match, entry) if m):
        sizes[name] = size(shape)
        if operation not in FREE:
            operands = re.findall(r"%([\w.-]+)", rest.split(")")[0])
            total += sizes[name] + sum(sizes[operand] for operand in operands)
    return total


def transcendentals(hlo: str) -> int:
    matches = filter(None, map(INSTRUCTION.match, hlo.splitlines()))
    return sum(elements(m[2]) for m in matches if m[3] in TRANSCENDENTAL)


def mesh_of(target: str, devices: int = 1) -> Mesh:
    topology = topologies.get_topology_desc(**TARGETS[target])
    return Mesh(np.array(topology.devices[:devices]), ("devices",))


def bytes_moved(target: str, compiled: jax.stages.Compiled) -> float:
    if target == "h100":
        return traffic(compiled.as_text())
    return compiled.cost_analysis()["bytes accessed"]


def compile_one(
    target: str, contender: str, case: str, dtypes: tuple[str, str], batch: int, labels: int
):
    """One row of the table; the dtypes are those of logits and labels."""
    one_device = NamedSharding(mesh_of(target), PartitionSpec())

    def argument(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=one_device)

    logits, truth = (argument((batch, labels), jnp.dtype(dtype)) for dtype in dtypes)
    options = {
        name: argument(shape, jnp.bool_ if name == "where" else jnp.float32)
        for name, shape in CASES[case](batch, labels).items()
    } | {name: argument((labels,), jnp.float32) for name in contenders.REQUIRED.get(contender, [])}
    step = jax.jit(jax.value_and_grad(CONTENDERS[contender]))
    compiled = step.lower(logits, truth, options).compile()

    moved = bytes_moved(target, compiled)
    arrays = [logits, truth, *options.values()]
    once = (
        sum(array.size * array.dtype.itemsize for array in arrays)
        + logits.size * logits.dtype.itemsize
    )
    counts_mask = "where" in options and contender != "jaxbce, sum"
    again = options["where"].size if counts_mask else 0
    return {
        "target": target,
        "contender": contender,
        "case": case,
        "dtype": dtypes[0],
        "bytes / once": moved / once,
        "bytes / bound": moved / (once + again),
        "temporary / logits": compiled.memory_analysis().temp_size_in_bytes
        / (logits.size * logits.dtype.itemsize),
        "transcendentals": transcendentals(compiled.as_text()) / logits.size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--target", choices=TARGETS, default="tpu")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--labels", help="their dtype; by default that of the logits")
    parser.add_argument("--shape", nargs=2, type=int, default=[16384, 1024])
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()

    rows = []
    print(f"value and gradient of the mean loss, {args.shape}, compiled for {args.target}")
    print(f"{'':38}{'bytes/once':>11}{'bytes/bound':>12}{'temporary':>10}{'transcendentals':>16}")
    for dtype in args.dtypes:
        for case in args.cases:
            for contender in args.contenders:
                if contender in contenders.WITHOUT_POS_WEIGHT and "pos_weight" in CASES[case](
                    *args.shape
                ):
                    continue
                dtypes = (dtype, args.labels or dtype)
                row = compile_one(args.target, contender, case, dtypes, *args.shape)
                rows.append(row)
                print(
                    f"{dtype:9} {case:14}{contender:14}{row['bytes / once']:11.3f}"
                    f"{row['bytes / bound']:12.3f}{row['temporary / logits']:10.3f}"
                    f"{row['transcendentals']:16.2f}",
                    flush=True,
                )
    if args.json:
        made.write(args.json, rows, "optax")


if __name__ == "__main__":
    main()
