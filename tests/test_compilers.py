"""What the compilers of a TPU and an H100 make of losses and head: none needs its chip.

Each needs its package: `pip install "jax[tpu]"`, which CI has, and `pip install "jax[cuda12]"`.
"""

import importlib.util
import itertools
import json
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import contenders
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
CASES = ["plain", "pos_weight", "weight", "where", "where per row"]
LOSSES = ["jaxbce", *contenders.LOSSES]
VARIANTS = ["jaxbce, weighted_mean", "jaxbce, axis"]
SMALL, LARGE, WIDE = (8192, 1024), (16384, 1024), (256, 131072)
# target, contenders, dtypes of logits and labels, cases, shape: each is a run of the benchmark.
# What XLA fuses for an H100 depends on the sizes and on the dtype of the labels.
RUNS = {
    "libtpu": [
        ("tpu", LOSSES, "float32", "float32", ["plain", "weight", "where per row"], SMALL),
        ("tpu", LOSSES, "bfloat16", "bfloat16", ["plain", "pos_weight", "where"], SMALL),
        ("tpu", VARIANTS, "float32", "float32", ["weight", "where"], SMALL),
    ],
    "jax_cuda12_plugin": [
        ("h100", LOSSES, "float32", "float32", CASES, LARGE),
        ("h100", LOSSES, "bfloat16", "bfloat16", CASES, LARGE),
        ("h100", VARIANTS, "bfloat16", "bfloat16", ["weight", "where"], LARGE),
        ("h100", LOSSES, "bfloat16", "bool", ["where", "where per row"], WIDE),
    ],
}
INSTALLED = [
    run for package, runs in RUNS.items() if importlib.util.find_spec(package) for run in runs
]
ROWS = [
    (target, contender, logits, labels, case)
    for target, names, logits, labels, cases, _ in INSTALLED
    for contender in names
    for case in cases
    if case != "pos_weight" or contender not in contenders.WITHOUT_POS_WEIGHT
]

# The most that a case of `head_compilers.py` may move, over the case it is compared with: the three
# matrix products of the layer, the loss of dense labels, or the formula of SigLIP by hand.
LAYERS = [
    *("16 ids", "128 ids", "16 ids, table", "dense labels"),
    *(f"16 ids, {name} loss" for name in ("focal", "asymmetric", "own")),
]
BOUNDS = {
    "tpu": {
        **dict.fromkeys(LAYERS, 1.15),
        "16 ids, 4 chips": 1.15,
        "16 ids, no bias": 1.15,
        "16 ids, weight": 1.25,
        "16 ids, 16 ignored": 1.3,
        "update": 1.25,
        "update, donated": 1.5,
        "update, table": 1.25,
        "16 ids, loss": 1.15,
        "siglip": 1.0,
        "siglip, a turn on 4 chips": 1.0,
    },
    "h100": {
        **dict.fromkeys(LAYERS, 2.2),
        "16 ids, no bias": 1.9,
        "16 ids, weight": 2.5,
        "16 ids, 16 ignored": 3.0,
        "update": 3.0,
        "update, donated": 3.0,
        "update, table": 3.0,
        "16 ids, loss": 1.15,
        "siglip": 1.0,
    },
}
# One of each kind is compiled here. `test_results.py` holds the kept results of all to the bounds.
COMPILED = [
    *("16 ids", "16 ids, weight", "16 ids, 16 ignored", "16 ids, table", "16 ids, own loss"),
    *("dense labels", "update, donated", "16 ids, loss", "siglip", "siglip, a turn on 4 chips"),
]
TARGETS = sorted({run[0] for run in INSTALLED})
HEADS = [(target, case) for target in TARGETS for case in COMPILED if case in BOUNDS[target]]

# The platform is chosen before jax is imported: each compiles in a fresh process.
needs_a_compiler = pytest.mark.skipif(
    not INSTALLED, reason='no compiler is installed: pip install "jax[tpu]"'
)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='the TPU compiler is not installed: pip install "jax[tpu]"',
)


def rows_of(script, options, folder):
    output = folder.mktemp("compilers") / "rows.json"
    command = [sys.executable, BENCHMARKS / script, *options, "--json", output]
    subprocess.run(command, check=True, timeout=1500)
    return json.loads(output.read_text())["rows"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Rows by (target, contender, dtypes of logits and labels, case)."""

    def rows(run):
        target, names, logits, labels, cases, shape = run
        options = ["--target", target, "--contenders", *names, "--cases", *cases]
        options += ["--dtypes", logits, "--labels", labels, "--shape", *map(str, shape)]
        found = rows_of("compilers.py", options, tmp_path_factory)
        return {(target, row["contender"], logits, labels, row["case"]): row for row in found}

    with ThreadPoolExecutor(2) as pool:
        return dict(itertools.chain.from_iterable(map(dict.items, pool.map(rows, INSTALLED))))


@needs_a_compiler
@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_inputs_are_read_once_and_the_gradient_is_written_once(compiled, row):
    assert compiled[row]["bytes / bound"] <= 1.02
    assert compiled[row]["temporary / logits"] <= 0.01


@needs_a_compiler
@pytest.mark.parametrize("row", [row for row in ROWS if row[1] == "jaxbce"], ids="-".join)
def test_one_exponential_serves_the_loss_and_the_gradient(compiled, row):
    assert compiled[row]["transcendentals"] == 1


@pytest.fixture(scope="module")
def ratios(tmp_path_factory):
    """By (target, case)."""
    found = {}
    for target in TARGETS:
        named = [case for each, case in HEADS if each == target]
        options = ["--target", target, "--cases", *named]
        for row in rows_of("head_compilers.py", options, tmp_path_factory):
            found[target, row["case"]] = row["ratio"]
    return found


@needs_a_compiler
@pytest.mark.parametrize("row", HEADS, ids="-".join)
def test_the_head_moves_little_more_than_its_products(ratios, row):
    target, case = row
    assert 0 < ratios[row] <= BOUNDS[target][case]


FITS = {
    "2^20 labels on one chip": "one_chip(head.chunked(), 2**20)",
    "a step of Adam on 2^20 labels on one chip": "step_on_one_chip('update', 2**20)",
    "on 98,505 labels, which fill no tiles": "step_on_one_chip('update', 98_505)",
    "2^26 labels on 64 chips": "each_of_64_chips(2**26)",
    "a step on 2,812,281 labels in float8 on one chip, beside its kernel": (
        "amazon_on_one_chip('float8_e4m3fn') - 2_812_281 * 768"
    ),
}
RING = "*(head_scaling.each_of_a_ring(*ring) for ring in head_scaling.RINGS)"
DENSE = "head_scaling.one_chip(head.dense, 2**21)"


@pytest.fixture(scope="module")
def printed():
    """What each of these prints; they compile two at a time."""

    def run(code):
        command = [sys.executable, "-c", f"import head, head_scaling; print({code})"]
        return subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=True)

    codes = [*(f"head_scaling.{size}" for size in FITS.values()), RING, DENSE]
    with ThreadPoolExecutor(2) as pool:
        outputs = [process.stdout for process in pool.map(run, codes)]
    return dict(zip(codes, outputs, strict=True))


@needs_libtpu
@pytest.mark.parametrize("size", FITS.values(), ids=FITS)
def test_the_chunked_head_fits(size, printed):
    assert 0 < int(printed[f"head_scaling.{size}"]) < 0.3e9


@needs_libtpu
def test_a_chip_holds_no_more_on_a_larger_ring(printed):
    """Nor gathers it anything, which the benchmark asserts."""
    first, *larger = map(int, printed[RING].split())
    assert all(0 < size <= first for size in larger)
    assert first < 0.15e9


@needs_libtpu
def test_the_dense_head_does_not(printed):
    assert "RESOURCE_EXHAUSTED" in printed[DENSE]
