"""What the TPU compiler makes of the loss. It needs libtpu (`pip install "jax[tpu]"`), no TPU."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "compilers.py"
CASES = ["plain", "pos_weight", "weight", "where", "where per row"]
CONTENDERS = ["jaxbce", "focal", "asymmetric"]
ROWS = [
    (contender, dtype, case)
    for contender in CONTENDERS
    for dtype in ("float32", "bfloat16")
    for case in CASES
    if contender == "jaxbce" or case != "pos_weight"
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Rows by (contender, dtype, case). The platform is chosen before jax is imported: a fresh
    process."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('the TPU compiler is not installed: pip install "jax[tpu]"')
    output = tmp_path_factory.mktemp("compilers") / "rows.json"
    options = ["--contenders", *CONTENDERS, "--shape", "2048", "512", "--json", output]
    command = [sys.executable, SCRIPT, *options, "--cases", *CASES]
    subprocess.run(command, check=True, timeout=600)
    rows = json.loads(output.read_text())
    return {(row["contender"], row["dtype"], row["case"]): row for row in rows}


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_inputs_are_read_once_and_the_gradient_is_written_once(compiled, row):
    assert compiled[row]["bytes / bound"] <= 1.02
    assert compiled[row]["temporary / logits"] <= 0.01


@pytest.mark.parametrize("row", [row for row in ROWS if row[0] == "jaxbce"], ids="-".join)
def test_one_exponential_serves_the_loss_and_the_gradient(compiled, row):
    assert compiled[row]["transcendentals"] == 1
