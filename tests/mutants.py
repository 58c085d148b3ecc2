"""Breaks jaxbce in many ways and shows that the tests notice each.

    python tests/mutants.py                 # every mutant, some minutes each ten
    python tests/mutants.py _reduce         # those of one module

A mutant is one replacement in one module. Each is tried in a copy of the package against the test
files named for its module; a mutant that no test notices is printed and makes the exit status 1.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]

TESTS = {
    "_kernels": ["test_losses.py", "test_accuracy.py"],
    "_reduce": ["test_losses.py"],
    "_checks": ["test_checks.py"],
    "_losses": ["test_losses.py", "test_checks.py"],
    "_module": ["test_module.py"],
}

MUTANTS = {
    "_kernels": [
        ("return t - s * (t - z * series)", "return jnp.log1p(t)"),
        ("return t - s * (t - z * series)", "return jnp.log(1 + t)"),
        ("0.27986288", "0.27886288"),
        ("return t - t * (t / (1 + t))", "return t / (1 + t)"),
        ("return t - t * (t / (1 + t))", "return 1 - 1 / (1 + t)"),
        ("slope = jnp.where(x > 0, a, b)", "slope = jnp.where(x < 0, a, b)"),
        ("linear = jnp.where(slope == 0, 0, magnitude * slope)", "linear = magnitude * slope"),
        ("return linear + (a + b) * log1p_unit", "return linear + (a - b) * log1p_unit"),
        ("return sigmoid_mix(x, a, b), softplus(x)", "return sigmoid_mix(x, b, a), softplus(x)"),
        ("softplus(x), softplus(-x)", "softplus(-x), softplus(x)"),
        ("jnp.where(x >= 0, a - tail, tail - b)", "jnp.where(x > 0, a - tail, tail + b)"),
        ("(a + b) * sigmoid_slope(x), sigmoid(x)", "(a - b) * sigmoid_slope(x), sigmoid(x)"),
        ("sigmoid(x), -sigmoid(-x)", "sigmoid(x), sigmoid(-x)"),
        ("return tail - tail * tail", "return tail * tail"),
        (
            "return (-sigmoid_slope(x) * jnp.tanh(x / 2),)",
            "return (sigmoid_slope(x) * jnp.tanh(x),)",
        ),
        ("slope = (positive - y) * sign", "slope = positive - y"),
        ("slope = slope * (positive + (0.5 - sign * 0.5) * q)", "slope = slope * q"),
        ("curvature = curvature * ((1 - y) + q * y)", "curvature = curvature * q"),
        (
            "slope * jnp.minimum(magnitude * (1 / scale), jnp.finfo(x.dtype).max) * scale",
            "slope * magnitude",
        ),
        ("return sigmoid_mix(x, 1 - y, y), -x, None", "return sigmoid_mix(x, 1 - y, y), x, None"),
        (
            "return sigmoid_mix(x, 1 - y, y), -x, None",
            "return (sigmoid(x) - y) * 1, -x, None",
        ),
        ("d_labels = softplus_mix(x, -one, q)", "d_labels = softplus_mix(x, -one, one)"),
        ("softplus_mix(x, jnp.zeros_like(x), y)", "softplus_mix(x, y, jnp.zeros_like(x))"),
        ("return forward(*inputs), inputs", "return kernel(*inputs), inputs"),
        ("isinstance(tangent, SymbolicZero)", "not isinstance(tangent, SymbolicZero)"),
        ("jnp.maximum(jnp.log(p), -100)", "jnp.log(p)"),
        ("jnp.maximum(jnp.log1p(-p), -100)", "jnp.maximum(jnp.log(1 - p), -50)"),
        ("jnp.maximum(p * (1 - p), 1e-12)", "p * (1 - p)"),
        ("(p - y) / spread(p), -log_odds(p)", "(p - y) / spread(p), log_odds(p)"),
        ("return (1 / spread(p),)", "return (spread(p),)"),
    ],
    "_reduce": [
        ("(weight != 0) | jnp.isfinite(values)", "(weight != 0) & jnp.isfinite(values)"),
        ("return keep if where is None else keep & where", "return keep"),
        ("loss = loss * weight", "pass"),
        ("loss = jnp.where(keep, loss, 0)", "loss = loss * keep.astype(loss.dtype)"),
        ('if reduction == "sum":', 'if reduction == "mean":'),
        ('per_row = reduction == "batchmean"', "per_row = False"),
        ("max(math.prod(units), 1)", "math.prod(units)"),
        ("jnp.maximum(count_kept(where, units, per_row, loss.dtype), 1)", "loss.size"),
        (
            "jnp.maximum(count_kept(where, units, per_row, loss.dtype), 1)",
            "count_kept(where, units, per_row, loss.dtype)",
        ),
        ("where = jnp.any(where, axis=-1)", "where = jnp.all(where, axis=-1)"),
        ("* (math.prod(units) // max(where.size, 1))", ""),
    ],
    "_checks": [
        ("with _value_checks(True):", "with _value_checks(False):"),
        ("ok = (values >= 0) & (values <= 1)", "ok = ~((values < 0) | (values > 1))"),
        ("ok |= ~keep", "pass"),
        ("jnp.ravel(values)[jnp.argmin(ok)]", "jnp.ravel(values)[0]"),
        ("if labels.shape != self.shape:", "if labels.size != self.scores.size:"),
        ("== target\n    except", "!= ()\n    except"),
        ("if dtype != jnp.bool_:", "if False:"),
        ("if number.ndim:", "if False:"),
        ("if value not in choices:", "if False:"),
        ("and not 0 <= value <= 1:", "and value < 0:"),
    ],
    "_losses": [
        ("y = y * (1 - a) + a / 2", "y = y * (1 - a) + a"),
        ("x = jnp.where(keep, x, 0)", "pass"),
        ("y = jnp.where(keep, y, 0)", "pass"),
        (
            "_kernels.bce_with_logits_forward if forward_mode",
            "_kernels.bce_with_logits if forward_mode",
        ),
        (
            '        weight,\n        label_smoothing,\n        where,\n        "none",',
            '        None,\n        label_smoothing,\n        where,\n        "none",',
        ),
    ],
    "_module": [
        ("weight=self.weight,", ""),
        ("label_smoothing=self.label_smoothing,", ""),
        ("where=where,", ""),
        ("is not field.default", "is field.default"),
        ("frozen=True, ", ""),
    ],
}


def survives(module: str, before: str, after: str) -> bool:
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(ROOT / "jaxbce", pathlib.Path(directory) / "jaxbce")
        path = pathlib.Path(directory) / "jaxbce" / f"{module}.py"
        source = path.read_text()
        if before not in source:
            raise SystemExit(f"{module}: the mutant's text is not there any more: {before!r}")
        path.write_text(source.replace(before, after, 1))
        tests = [str(ROOT / "tests" / name) for name in TESTS[module]]
        command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider"]
        return not subprocess.run(
            [*command, *tests],
            cwd=ROOT / "tests",
            env=os.environ | {"PYTHONPATH": directory},
            capture_output=True,
        ).returncode


def main() -> None:
    modules = sys.argv[1:] or list(MUTANTS)
    tried = [(module, *mutant) for module in modules for mutant in MUTANTS[module]]
    survivors = []
    for number, mutant in enumerate(tried, 1):
        alive = survives(*mutant)
        survivors += [mutant] * alive
        print(f"{number}/{len(tried)} {'SURVIVED' if alive else 'caught'} {mutant}", flush=True)
    print(f"{len(tried) - len(survivors)} of {len(tried)} mutants caught")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
