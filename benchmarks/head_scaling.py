"""Claims, of a step of training with Adam by the number of labels, parameters and state donated:
beside these `linear_update` needs megabytes for any number of labels, gradient and optimizer apart
also the gradient of the kernel, a dense optax head that and logits, of which a TPU v5e does not
hold 2^21. On a CPU a step of `linear_update` takes 0.8 to 1.05 times as long as the chunked head's
gradient and the optimizer apart. With SGD a v5e holds twice the labels by `linear_update`
that it holds with a gradient. Of value and gradients alone, 2^26 labels fit 64 chips.

    pip install "jax[tpu]" optax matplotlib
    python benchmarks/head_scaling.py [cpu] [tpu] [limits] [plot] [h100] [amazon]

`cpu`: batch 256, width 128, float32; memory by the compiler, the time measured. `tpu`: batch 1024,
width 768, bfloat16; no TPU is needed, its compiler runs on any machine and reports what the program
will hold. `limits` searches what a v5e holds. Without arguments: these and the plot. `h100`: as
`tpu`, for `update`, by the compiler of `pip install "jax[cuda12]"`, with no GPU either. `amazon`:
a step of SGD with a kernel of the size of Amazon-3M in bfloat16 and in float8, rounded at random.
It measures the peak memory and the time of a process on the CPU (5 GB), and asks the compiler of a
v5e. Writes benchmarks/results/head_scaling.json and docs/head.png.
"""

import bisect
import functools
import json
import pathlib
import resource
import subprocess
import sys
import time

import compilers  # which also tells JAX and libtpu that no device is here
import head
import jax
import jax.numpy as jnp
import made
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxbce

ROOT = pathlib.Path(__file__).parents[1]
RESULTS, PICTURE = ROOT / "benchmarks" / "results" / "head_scaling.json", ROOT / "docs" / "head.png"
README_LABELS = 98_505  # of the README's table
CPU_LABELS = [2**12, 2**14, 2**16, README_LABELS, 2**18, 2**20, 2**21]
TPU_LABELS = [2**16, README_LABELS, 2**18, 2**20, 2**21, 2**22]
RINGS = [("v5e:2x2", 4), ("v5e:4x4", 16), ("v5e:8x8", 64)]
CPU_LIMIT = 8e9  # bytes of temporaries beyond which a step is not run
CELLS = 2**23  # logits of a chunk for which `chunk_size=None` aims on a TPU
HBM = 63 * 2**28  # bytes of a v5e
FLOOR = 1e6  # what is drawn for less: on the TPU a chunk may stay in on-chip memory
AMAZON_3M = 128, 768, 2_812_281  # batch, width, labels, as the papers train
SGD = optax.sgd(1e-3)
COLORS = {"dense": "C1", "chunked": "C0", "update": "C2"}
STYLES = {"tpu": {"marker": "o"}, "cpu": {"marker": "s", "linestyle": (0, (2, 1))}}


def abstract_operands(batch, width, labels, dtype, mesh, axes=(None, None)):
    """Features, kernel, bias and positives."""

    def array(shape, dtype, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    by_batch, by_label = axes
    return (
        array((batch, width), dtype, by_batch, None),
        array((width, labels), dtype, None, by_label),
        array((labels,), dtype, by_label),
        array((batch, 8), jnp.int32, by_batch, None),
    )


def abstract_step(optimizer, *shape, mesh):
    """Parameters, state, features and positives, on a mesh of one device."""
    features, kernel, bias, positives = abstract_operands(*shape, mesh)
    params = {"kernel": kernel, "bias": bias}
    here = NamedSharding(mesh, PartitionSpec())
    state = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=here),
        jax.eval_shape(optimizer.init, params),
    )
    return params, state, features, positives


def temporaries(variant, arguments, donated=0):
    """Bytes beyond arguments and results; None where the compiler says that it does not fit."""
    try:
        compiled = jax.jit(variant, donate_argnums=range(donated)).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        print(str(error).splitlines()[0][:160])
        return None
    return compiled.memory_analysis().temp_size_in_bytes


def report(labels, sizes, seconds):
    """One row of the results."""
    for name, size in sizes.items():
        memory = "does not fit" if size is None else f"{size / 1e6:10.1f} MB of temporaries"
        time = f", {1e3 * seconds[name]:9.2f} ms" if name in seconds else ""
        print(f"{labels:>9,} labels, {name:8} {memory}{time}", flush=True)
    return {"labels": labels, "temporaries": sizes, "seconds": seconds}


def measure_cpu():
    mesh = Mesh(np.array(jax.devices()[:1]), ("all",))
    variants, rows = head.steps(head.ADAM), []
    for labels in CPU_LABELS:
        arguments = abstract_step(head.ADAM, 256, 128, labels, jnp.float32, mesh=mesh)
        sizes = {
            name: temporaries(variant, arguments, donated=2) for name, variant in variants.items()
        }
        fitting = {name: variants[name] for name, size in sizes.items() if size <= CPU_LIMIT}
        rounds = 15 if labels < 2**17 else 5
        drawn = head.draw_step(head.ADAM, 256, 128, labels)
        seconds = head.medians(fitting, drawn, rounds, donated=2)
        rows.append(report(labels, sizes, seconds))
        print(f"  update / chunked = {seconds['update'] / seconds['chunked']:.2f}", flush=True)
    return rows


def mesh_of(topology, *shape):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(devices[: np.prod(shape)]).reshape(shape), ("data", "model"))


def one_chip(variant, labels):
    """Of the value and the gradients of the head."""
    chip = mesh_of("v5e:2x2", 1, 1)
    return temporaries(variant, abstract_operands(1024, 768, labels, jnp.bfloat16, chip))


def step_on_one_chip(way, labels, optimizer=head.ADAM, chip=None):
    chip = chip or mesh_of("v5e:2x2", 1, 1)
    arguments = abstract_step(optimizer, 1024, 768, labels, jnp.bfloat16, mesh=chip)
    variant = head.steps(optimizer, chunk_size=CELLS // 1024)[way]
    return temporaries(variant, arguments, donated=2)


def most_labels(way, copies, block=2**18):
    """Of which one chip holds a step of SGD, in blocks, where so many kernels have to fit."""
    sgd = optax.sgd(1e-3)
    blocks = range(1, HBM // (copies * 768 * 2 * block) + 2)

    def too_many(count):
        return step_on_one_chip(way, count * block, sgd) is None

    start = len(blocks) // 2
    return bisect.bisect_left(blocks, True, lo=start, key=too_many) * block


def each_of_64_chips(labels):
    chips, axes = mesh_of("v5e:8x8", 4, 16), ("data", "model")
    options = {"mesh": chips, "batch_axis": "data", "label_axis": "model"}
    sharded = head.chunked(chunk_size=CELLS // 256, **options)
    return temporaries(sharded, abstract_operands(1024, 768, labels, jnp.bfloat16, chips, axes))


def each_of_a_ring(topology, chips):
    """Temporaries of `siglip_loss` with all gradients, 8192 pairs on each chip."""
    ring = mesh_of(topology, chips, 1)

    def array(*shape, dtype=jnp.bfloat16):
        by_row = NamedSharding(ring, PartitionSpec("data") if shape else PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=by_row)

    loss = functools.partial(jaxbce.siglip_loss, mesh=ring, axis="data")
    pairs = array(8192 * chips, 768), array(8192 * chips, 768)
    gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
    compiled = gradients.lower(*pairs, *[array(dtype=jnp.float32)] * 2).compile()
    assert "all-gather" not in compiled.as_text()
    return compiled.memory_analysis().temp_size_in_bytes


def steps_on(chip, ways):
    rows = []
    for labels in TPU_LABELS:
        sizes = {way: step_on_one_chip(way, labels, chip=chip) for way in ways}
        rows.append(report(labels, sizes, {}))
    return rows


def compile_tpu():
    return steps_on(mesh_of("v5e:2x2", 1, 1), COLORS)


def compile_h100():
    devices = topologies.get_topology_desc(**compilers.TARGETS["h100"]).devices
    chip = Mesh(np.array(devices[:1]).reshape(1, 1), ("data", "model"))
    return steps_on(chip, ["update"])


def find_limits():
    limits = {
        name: most_labels(name, copies) for name, copies in {"chunked": 2, "update": 1}.items()
    }
    for name, labels in limits.items():
        print(f"SGD, {name}: {labels:,} labels fit one chip", flush=True)
    print("value and gradients on each of 64 chips:")
    report(2**26, {"chunked": each_of_64_chips(2**26)}, {})
    for topology, chips in RINGS:
        size = each_of_a_ring(topology, chips)
        print(f"a ring of {chips} chips, 8192 pairs on each: {size / 1e6:.1f} MB of temporaries")
    return limits


def amazon_step(dtype, mesh, **options):
    """A step of SGD for Amazon-3M that donates its parameters, and its arguments."""
    features, _, _, positives = abstract_operands(*AMAZON_3M, jnp.bfloat16, mesh)
    _, kernel, _, _ = abstract_operands(*AMAZON_3M, dtype, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct((), key.dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def step(params, features, positives, key):
        given = {"positives": positives, "rounding_key": key} | options
        return jaxbce.linear_update(SGD, features, params, SGD.init(params), **given)[:3]

    return jax.jit(step, donate_argnums=0), ({"kernel": kernel}, features, positives, key)


def total_bytes(step, arguments):
    """What a device holds during a step, by its compiler: arguments, results and temporaries."""
    memory = step.lower(*arguments).compile().memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def amazon_on_one_chip(dtype):
    return total_bytes(*amazon_step(dtype, mesh_of("v5e:2x2", 1, 1), chunk_size=2**15))


def amazon_on_this_cpu(dtype):
    """The peak memory of this process, and the time of its third step."""
    step, arguments = amazon_step(dtype, Mesh(np.array(jax.devices()[:1]), ("all",)))
    ones = functools.partial(jax.tree.map, lambda array: jnp.ones(array.shape, array.dtype))
    params, features, positives = ones(arguments[:3])
    for i in range(3):
        start = time.perf_counter()
        _, _, params = jax.block_until_ready(step(params, features, positives, jax.random.key(i)))
    seconds = time.perf_counter() - start
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"process": peak, "seconds": seconds}


def measure_amazon():
    rows = []
    for dtype in ("bfloat16", "float8_e4m3fn"):
        # In a process of its own, because a peak is never forgotten.
        measured = f"head_scaling.amazon_on_this_cpu({dtype!r})"
        code = f"import json, head_scaling; print(json.dumps({measured}))"
        command = [sys.executable, "-c", code]
        here = pathlib.Path(__file__).parent
        run = subprocess.run(command, cwd=here, stdout=subprocess.PIPE, text=True, check=True)
        row = {"dtype": dtype, "v5e": amazon_on_one_chip(dtype)} | json.loads(run.stdout)
        print(
            f"Amazon-3M, {dtype}: a process on the CPU {row['process'] / 2**30:.2f} GiB, "
            f"{row['seconds']:.1f} s a step; a v5e, by its compiler {row['v5e'] / 2**30:.2f} GiB",
            flush=True,
        )
        rows.append(row)
    return rows


def draw_line(axis, points, limit, name, **style):
    """A cross marks the first point beyond the limit, in proportion to the last within it."""
    fits = [point for point in points if point[1] is not None and point[1] <= limit]
    style = {"color": COLORS[name], "linewidth": 3} | style
    axis.plot(*zip(*fits, strict=True), **style)
    if len(fits) < len(points):
        labels = points[len(fits)][0]
        end = labels, fits[-1][1] * labels / fits[-1][0]
        axis.plot(*zip(fits[-1], end, strict=True), color=COLORS[name], linestyle=":", linewidth=3)
        axis.plot(*end, "X", color="C3", markersize=14)


def draw(results):
    import matplotlib.pyplot as plt  # only here: the other parts do without

    plt.rcParams["font.size"] = 13
    figure, (memory, time) = plt.subplots(1, 2, figsize=(12, 5), sharex=True, layout="constrained")
    for axis in (memory, time):
        axis.set(xscale="log", yscale="log", xlabel="labels")
        axis.grid(alpha=0.3)
    memory.set_title("memory of a step beside parameters and state of Adam")
    memory.set_yticks([1e6, 1e7, 1e8, 1e9, 1e10], ["≤ 1 MB", "10 MB", "100 MB", "1 GB", "10 GB"])
    time.set_title("time of a step with Adam on two CPU cores")
    time.set_yticks([1e-3, 1e-2, 1e-1, 1, 10], ["1 ms", "10 ms", "0.1 s", "1 s", "10 s"])
    ticks = {12: "4k", 14: "16k", 16: "65k", 18: "262k", 20: "1M", 22: "4M"}
    time.set_xticks([2**power for power in ticks], ticks.values())
    time.minorticks_off()
    memory.minorticks_off()

    for name in COLORS:
        for platform, style in STYLES.items():
            sizes = [(row["labels"], row["temporaries"][name]) for row in results[platform]]
            drawn = [(labels, None if size is None else max(size, FLOOR)) for labels, size in sizes]
            draw_line(memory, drawn, CPU_LIMIT if platform == "cpu" else np.inf, name, **style)
        seconds = [(row["labels"], row["seconds"].get(name)) for row in results["cpu"]]
        draw_line(time, seconds, np.inf, name, **STYLES["cpu"])

    keys = {
        "dense optax head": {"color": COLORS["dense"]},
        "chunked head": {"color": COLORS["chunked"]},
        "linear_update": {"color": COLORS["update"]},
        "TPU v5e, by its compiler": {"color": "grey", **STYLES["tpu"]},
        "CPU": {"color": "grey", **STYLES["cpu"]},
        "does not fit (CPU: over 8 GB)": {"color": "C3", "marker": "X", "linestyle": ""},
    }
    lines = [
        plt.Line2D([], [], linewidth=3, markersize=9, label=label, **key)
        for label, key in keys.items()
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=3, fontsize=12)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=130)


def main():
    parts = sys.argv[1:] or ["cpu", "tpu", "limits", "plot"]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"made": {}}
    measures = {
        "cpu": measure_cpu,
        "tpu": compile_tpu,
        "limits": find_limits,
        "h100": compile_h100,
        "amazon": measure_amazon,
    }
    for name, measure in measures.items():
        if name in parts:
            results[name] = measure()
            results["made"][name] = made.made("optax")
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if "plot" in parts:
        draw(results)


if __name__ == "__main__":
    main()
