"""What the TPU compiler makes of the loss. It needs libtpu (`pip install "jax[tpu]"`), no TPU."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "compilers.py"
CASES = ["plain", "pos_weight", "weight", "where", "where per row"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Rows by (dtype, case). The platform is chosen before jax is imported: a fresh process."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('the TPU compiler is not installed: pip install "jax[tpu]"')
    output = tmp_path_factory.mktemp("compilers") / "rows.json"
    options = ["--contenders", "jaxbce", "--shape", "2048", "512", "--json", output, "--cases"]
    subprocess.run([sys.executable, SCRIPT, *options, *CASES], check=True, timeout=600)
    return {(row["dtype"], row["case"]): row for row in json.loads(output.read_text())}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inputs_are_read_once_and_the_gradient_is_written_once(compiled, dtype, case):
    row = compiled[dtype, case]
    assert row["bytes / bound"] <= 1.02
    assert row["temporary / logits"] <= 0.01
    assert row["transcendentals"] <= 2  # one exponential for the loss, one for the gradient
