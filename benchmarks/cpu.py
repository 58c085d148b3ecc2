"""Claim: on a CPU, value and gradient of the mean loss cost about as much as reading the inputs.

Every contender takes one step in turn, round after round; the figures are ratios of medians.

    python benchmarks/cpu.py                                # jaxbce, optax, Keras, textbook, x + y
    python benchmarks/cpu.py --torch path/to/python         # an interpreter that has torch

What decides the time is how many arrays of the size of the logits XLA writes: a fresh one costs
page faults too. A sum that ends in plain arithmetic XLA hands to a library (YNNPACK), which goes
over a tile once per operation; what it lacks (selects, comparisons, masks) and what the gradient
computes too (a conversion from bfloat16, a pos_weight that is broadcast) is written to memory
first. A loss that ends in a select is one loop instead, from the inputs to an array of losses,
which is then summed; an exponential that the gradient shares is kept in a second array. Forms
tried, time of value and gradient over that of the chosen form, and in brackets the temporaries in
arrays of the logits; jax 0.10.2, one run:

                          float32, [256, 1024]    float32, [8192, 1024]   bfloat16, [8192, 1024]
                          plain       where       plain       where       plain       where
  arithmetic to the end   1.59 (0)    1.01 (1.2)  1.03 (0)    1.30 (1.2)  2.91 (4)    1.44 (4)
  select, |x| unshared    1.32 (1)    0.97 (1)    0.81 (1)    0.97 (1)    1.28 (2)    0.88 (2)
  select, exp(-|x|)
    shared: chosen        1.00 (1)    1.00 (1)    1.00 (1)    1.00 (1)    1.00 (2)    1.00 (4)
    its t / (2 + t)
      used three times    1.07 (2)    0.88 (1.2)  1.33 (2)    1.06 (1.2)  1.53 (4)    1.20 (4)
    XLA's log1p, 2.9 ULP  1.41 (1)    1.23 (1)    1.25 (1)    1.11 (1)    1.76 (4)    1.20 (4)
  textbook                1.01 (0)    1.90 (1)    0.70 (0)    1.04 (1)    2.22 (4)    1.87 (4)
  optax                   3.82 (3)    3.97 (3)    2.11 (3)    2.02 (3)    7.09 (13)   3.88 (7)

An array of [8192, 1024] float32 has 32 MiB, the size from which glibc gives memory back to the
system after each call, so that the next one faults in every page: that is most of `x + y` there.
`MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592` in the environment keeps the
pages; the textbook, which writes no array of losses, is then still the faster.
"""

import argparse
import functools
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

os.environ["KERAS_BACKEND"] = "jax"

import contenders
import jax
import jax.numpy as jnp
import made
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

RESULTS = pathlib.Path(__file__).parent / "results"
CASES = ["plain", "pos_weight", "weight", "where"]
DTYPES = ["float32", "bfloat16"]
SHAPES = [(256, 1024), (8192, 1024)]
COLORS = {
    "jaxbce": "C0",
    "x + y": "black",
    "textbook": "C2",
    "optax": "C1",
    "Keras (JAX)": "C3",
    "PyTorch": "C4",
}


def steps():
    """One jitted step per contender; `x + y` is the floor."""
    losses = {
        "jaxbce": contenders.jaxbce_mean,
        "textbook": contenders.textbook_mean,
        "optax": contenders.optax_mean,
    }
    if importlib.util.find_spec("keras"):
        losses["Keras (JAX)"] = contenders.keras_mean
    found = {name: jax.jit(jax.value_and_grad(loss)) for name, loss in losses.items()}
    return found | {"x + y": jax.jit(lambda x, y, options: x + y)}


def inputs(case, dtype, shape):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(3 * rng.standard_normal(shape, np.float32), dtype)
    labels = jnp.asarray(rng.integers(0, 2, shape), dtype)
    batch, count = shape
    options = {
        "plain": {},
        "pos_weight": {"pos_weight": jnp.linspace(1, 5, count)},
        "weight": {"weight": jnp.linspace(0.5, 2, batch)[:, None]},
        "where": {"where": jnp.asarray(rng.random(shape) < 0.7)},
    }
    return logits, labels, options[case]


def interleaved(calls, rounds):
    """Seconds of each call, of which every round makes one, in median; two rounds warm up."""
    times = {name: [] for name in calls}
    for round_ in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            # A call that times itself, in another process, returns its seconds.
            result = jax.block_until_ready(call())
            seconds = result if isinstance(result, float) else time.perf_counter() - start
            del result
            if round_ >= 2:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


class Torch:
    """The worker process that steps PyTorch on request."""

    def __init__(self, interpreter):
        script = pathlib.Path(__file__).with_name("torch_worker.py")
        self.process = subprocess.Popen(
            [interpreter, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.version = json.loads(self.process.stdout.readline())

    def ask(self, message=None):
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def measure_steps(torch, scale):
    rows = []
    all_steps = steps()
    print(f"\n{'':34}" + "".join(f"{name:>13}" for name in COLORS) + "     (ms)")
    for shape in SHAPES:
        for dtype in DTYPES:
            for case in CASES:
                x, y, options = inputs(case, dtype, shape)
                calls = {
                    name: functools.partial(step, x, y, options) for name, step in all_steps.items()
                }
                if torch:
                    torch.ask({"case": case, "dtype": dtype, "shape": shape})
                    calls["PyTorch"] = torch.ask
                rounds = scale * (200 if shape[0] < 1000 else 11)
                row = {"shape": shape, "dtype": dtype, "case": case}
                row["seconds"] = interleaved(calls, rounds)
                row["temporaries"] = {
                    name: step.lower(x, y, options).compile().memory_analysis().temp_size_in_bytes
                    / x.nbytes
                    for name, step in all_steps.items()
                }
                rows.append(row)
                figures = [row["seconds"].get(name, float("nan")) for name in COLORS]
                print(
                    f"{shape!s:13} {dtype:9} {case:11}"
                    + "".join(f"{1e3 * figure:13.3f}" for figure in figures),
                    flush=True,
                )
    return rows


def print_ratios(rows):
    pairs = [(name, "jaxbce") for name in ("optax", "Keras (JAX)", "PyTorch")]
    pairs += [("jaxbce", "textbook"), ("jaxbce", "x + y")]
    print(f"\n{'':34}" + "".join(f"{a + ' / ' + b:>22}" for a, b in pairs))
    for row in rows:
        seconds = row["seconds"]
        cells = [
            f"{seconds[a] / seconds[b]:22.2f}" if a in seconds else f"{'not installed':>22}"
            for a, b in pairs
        ]
        print(f"{row['shape']!s:13} {row['dtype']:9} {row['case']:11}" + "".join(cells))


def print_temporaries(rows):
    names = list(rows[0]["temporaries"])
    print(f"\ntemporaries / logits{'':14}" + "".join(f"{name:>13}" for name in names))
    for row in rows:
        cells = "".join(f"{row['temporaries'][name]:13.2f}" for name in names)
        print(f"{row['shape']!s:13} {row['dtype']:9} {row['case']:11}" + cells)


def measure_dispatch(scale):
    """Eager over jitted, on (32, 80); the floor is `jnp.sum`, whose eager call is compiled too."""
    x, y, _ = inputs("plain", "float32", (32, 80))
    functions = {
        "jaxbce": (lambda x: contenders.jaxbce_mean(x, y, {})),
        "optax": (lambda x: contenders.optax_mean(x, y, {})),
        "floor": jax.jit(jnp.sum),
    }
    calls = {}
    for name, function in functions.items():
        for kind, variant in {"call": function, "gradient": jax.grad(function)}.items():
            jitted = jax.jit(variant)
            calls[name, kind, "eager"] = lambda variant=variant: variant(x)
            calls[name, kind, "jitted"] = lambda jitted=jitted: jitted(x)
    seconds = interleaved(calls, scale * 300)
    print("\neager / jitted on (32, 80), and the eager time")
    rows = []
    for name in functions:
        for kind in ("call", "gradient"):
            eager, jitted = seconds[name, kind, "eager"], seconds[name, kind, "jitted"]
            rows.append({"contender": name, "kind": kind, "eager": eager, "jitted": jitted})
            print(f"{name:8} {kind:9} {eager / jitted:6.2f} {1e6 * eager:9.1f} us")
    return rows


def measure_compilation(scale):
    """Seconds to trace and to compile value and gradient, from empty caches."""
    losses = {"jaxbce": contenders.jaxbce_mean, "optax": contenders.optax_mean}
    times = {(name, case): [] for name in losses for case in CASES}
    for _ in range(scale * 5):
        for case in CASES:
            arguments = inputs(case, "float32", (256, 1024))
            for name, loss in losses.items():
                jax.clear_caches()
                start = time.perf_counter()
                lowered = jax.jit(jax.value_and_grad(loss)).lower(*arguments)
                traced = time.perf_counter()
                lowered.compile()
                times[name, case].append((traced - start, time.perf_counter() - traced))
    print("\ntrace, compile and both, ms")
    rows = []
    for (name, case), pairs in times.items():
        trace, compilation = (statistics.median(column) for column in zip(*pairs, strict=True))
        rows.append({"contender": name, "case": case, "trace": trace, "compile": compilation})
        times_ms = (1e3 * seconds for seconds in (trace, compilation, trace + compilation))
        print(f"{name:8} {case:11}" + "".join(f"{milliseconds:8.1f}" for milliseconds in times_ms))
    return rows


def plot(rows, path):
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    for axis, shape in zip(axes, SHAPES, strict=True):
        chosen = [row for row in rows if tuple(row["shape"]) == shape][::-1]
        for name, color in COLORS.items():
            points = [
                (row["seconds"][name] / row["seconds"]["jaxbce"], height)
                for height, row in enumerate(chosen)
                if name in row["seconds"]
            ]
            if points:
                marker = "|" if name == "x + y" else "o"
                axis.scatter(*zip(*points, strict=True), color=color, label=name, marker=marker)
        axis.axvline(1, color=COLORS["jaxbce"], linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
        axis.set_yticks(range(len(chosen)), [f"{row['dtype']}, {row['case']}" for row in chosen])
        axis.grid(axis="y", alpha=0.3)
        axis.set_title(f"{shape[0]} x {shape[1]}")
        axis.set_xlabel("time / time of jaxbce")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(COLORS)
    )
    figure.suptitle("Value and gradient of the mean loss on a CPU")
    figure.savefig(path, dpi=150)


def machine(torch):
    """What a reader needs to compare figures."""
    names = [name for name in ("optax", "keras") if importlib.util.find_spec(name)]
    versions = made.made(*names) | ({"torch": torch.version} if torch else {})
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor()
    return {"cpu": model, "cores": os.cpu_count()} | versions


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--torch", default=sys.executable, help="a Python interpreter with torch")
    parser.add_argument("--scale", type=int, default=1, help="times as many rounds")
    parser.add_argument("--name", help="keep the results under this name in benchmarks/results")
    args = parser.parse_args()

    has_torch = subprocess.run([args.torch, "-c", "import torch"], capture_output=True)
    torch = Torch(args.torch) if has_torch.returncode == 0 else None
    if not torch:
        print("PyTorch: not installed; name an interpreter that has it with --torch")
    results = {"made": machine(torch)}
    print(results["made"])
    results["steps"] = measure_steps(torch, args.scale)
    print_ratios(results["steps"])
    print_temporaries(results["steps"])
    results["dispatch"] = measure_dispatch(args.scale)
    results["compilation"] = measure_compilation(args.scale)

    if args.name:
        (RESULTS / f"{args.name}.json").write_text(json.dumps(results, indent=1) + "\n")
        plot(results["steps"], RESULTS / f"{args.name}.png")


if __name__ == "__main__":
    main()
