"""Breaks jaxbce in many ways and shows that the tests notice each.

    python tests/mutants.py                 # every mutant, six minutes on two cores
    python tests/mutants.py _reduce         # those of one module
    python tests/mutants.py --dry-run       # only whether every text is still there

A mutant is one replacement in one module, listed under the test that must notice it. It is tried in
a copy of the package; first all those tests pass without a mutant. One that its test does not
notice is printed and makes the exit status 1: a test is missing, or the mutant changes nothing.

What only costs time or memory is not here: no test of a value can notice it.
"""

import argparse
import collections
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]

# module: {test file: {test: [(text, its replacement)]}}
MUTANTS = {
    "_kernels": {
        "test_accuracy.py": {
            "test_where_it_matters_in_float32": [
                ("return t - s * (t - z * series)", "return jnp.log1p(t)"),
                ("return t - s * (t - z * series)", "return jnp.log(1 + t)"),
                ("0.27986288", "0.27886288"),
                ("return t - t * (t / (1 + t))", "return 1 - 1 / (1 + t)"),
                ("(1 - y) - tail, tail - y", "1 - (y + tail), tail - y"),
                ("return sigmoid_minus(x, y), -x, None", "return sigmoid(x) - y, -x, None"),
                ("return tail - tail * tail", "return tail * tail"),
            ],
            "test_third_derivative_in_the_tails": [
                ("return jnp.tanh(x / 2)", "return jnp.tanh(x)"),
                ("-sigmoid_slope(x) * sigmoid_excess(x)", "sigmoid_slope(x) * sigmoid_excess(x)"),
            ],
            "test_gradients_of_the_other_arguments": [
                ("return sigmoid_minus(x, y), -x, None", "return sigmoid_minus(x, y), x, None"),
                ("softplus_mix(x, -jnp.ones_like(x), q)", "softplus_mix(x, -q, q)"),
                ("softplus_mix(x, jnp.zeros_like(x), y)", "softplus_mix(x, y, jnp.zeros_like(x))"),
            ],
        },
        "test_losses.py": {
            "test_value_and_gradient_match_the_oracle": [
                ("jnp.where(x > 0, a, b), a + b", "jnp.where(x < 0, a, b), a + b"),
                ("jnp.where(x > 0, a, b), a + b", "jnp.where(x > 0, a, b), a - b"),
                ("jnp.where(x > 0, 1 - y, y), 1)", "jnp.where(x > 0, y, 1 - y), 1)"),
                ("a - tail, tail - b)", "a - tail, tail + b)"),
                ("(p - y) / spread(p), -log_odds(p)", "(p - y) * spread(p), -log_odds(p)"),
            ],
            "test_infinite_logits": [
                (
                    "jnp.where(slope == 0, curved, magnitude * slope + curved)",
                    "magnitude * slope + curved",
                ),
                ("defjvp(jvp, symbolic_zeros=True)", "defjvp(jvp)"),
            ],
            "test_hessian": [
                ("return forward(*inputs), inputs", "return kernel(*inputs), inputs"),
                ("return sigmoid_slope(x), -jnp", "return -sigmoid_slope(x), -jnp"),
                (
                    "(a + b) * sigmoid_slope(x), sigmoid(x)",
                    "(a - b) * sigmoid_slope(x), sigmoid(x)",
                ),
            ],
            "test_second_derivative_by_label_and_score": [
                ("return (1 / spread(p),)", "return (spread(p),)"),
                (" if terms else jnp.zeros_like(like)", ""),
            ],
            "test_second_derivatives_across_arguments": [
                ("-jnp.ones_like(x)\n\n\nsigmoid_minus =", "jnp.ones_like(x)\n\n\nsigmoid_minus ="),
                ("sigmoid(x), -sigmoid(-x)", "sigmoid(x), sigmoid(-x)"),
                (
                    "return sigmoid_mix(x, a, b), softplus(x)",
                    "return sigmoid_mix(x, b, a), softplus(x)",
                ),
                ("softplus(x), softplus(-x)", "softplus(-x), softplus(x)"),
            ],
            "test_hessian_of_the_squared_loss_at_logit_zero": [
                ("kernel = jax.custom_jvp(jax.jit(value, inline=True))\n", "return value\n"),
            ],
            "test_forward_mode_only_where_promised": [
                ("isinstance(tangent, SymbolicZero)", "isinstance(tangent, jax.Array)"),
            ],
            "test_inside_shard_map": [
                (
                    "jax.linear_transpose(tangent, *residuals)(g)",
                    "tuple(s if s is None else g * s for s in partials(*residuals))",
                ),
            ],
            "test_probabilities_of_zero_and_one": [
                ("jnp.maximum(jnp.log(p), -100)", "jnp.log(p)"),
                ("jnp.maximum(jnp.log1p(-p), -100)", "jnp.maximum(jnp.log1p(-p), -50)"),
                ("jnp.maximum(p * (1 - p), 1e-12)", "p * (1 - p)"),
            ],
            "test_gradient_of_labels_and_weight": [
                ("clamped_log(p) - clamped_log1m(p)", "clamped_log(p) + clamped_log1m(p)"),
                ("(p - y) / spread(p), -log_odds(p)", "(p - y) / spread(p), log_odds(p)"),
            ],
        },
    },
    "_reduce": {
        "test_losses.py": {
            "test_divisors": [
                ("loss = loss * weight", "pass"),
                ("per_row = reduction ==", "per_row = reduction !="),
                ("where = jnp.any(where, axis=-1)", "where = jnp.all(where, axis=-1)"),
                ("count_kept(where, units, per_row, loss.dtype), 1)", "loss.size, 1)"),
            ],
            "test_nothing_kept_gives_zero_and_no_gradient": [
                (
                    "jnp.maximum(count_kept(where, units, per_row, loss.dtype), 1)",
                    "count_kept(where, units, per_row, loss.dtype)",
                ),
            ],
            "test_empty_arrays_give_zero": [
                ("max(math.prod(units), 1)", "math.prod(units)"),
            ],
            "test_garbage_behind_a_mask_or_a_zero_weight_leaves_no_trace": [
                ("(weight != 0) | jnp.isfinite(values)", "weight == weight"),
                ("loss = jnp.where(keep, loss, 0)", "pass"),
                ("if where is None else keep & where", "if where is None else keep | where"),
            ],
            "test_gradient_of_labels_and_weight": [
                ("(weight != 0) | jnp.isfinite(values)", "weight != 0"),
            ],
            "test_unreduced_sums_to_the_sum": [
                ('if reduction == "none":', 'if reduction == "sum":'),
            ],
        },
    },
    "_checks": {
        "test_checks.py": {
            "test_checked_names_function_argument_and_value": [
                ("with _value_checks(True):", "with _value_checks(False):"),
                ("ok = (values >= 0) & (values <= 1)", "ok = ~((values < 0) | (values > 1))"),
            ],
            "test_unknown_reduction_lists_the_valid_ones": [("value not in choices:", "False:")],
            "test_label_smoothing_out_of_range": [("and not 0 <= value <= 1:", "and value < 0:")],
            "test_checked_on_an_empty_array": [("or not values.size:", ":")],
            "test_without_checked_nothing_is_traced": [
                ("default_value=False", "default_value=True")
            ],
        },
        "test_losses.py": {
            "test_divisors": [
                ("jnp.expand_dims(where, range(len(target) - where.ndim))", "where"),
            ],
        },
        "test_labels.py": {
            "test_checked_positives": [("inside | (ids == -1)", "inside | (ids < 0)")],
            "test_multi_hot": [("jnp.where(inside, ids, num_labels)", "jnp.abs(ids)")],
            "test_multi_hot_shapes": [("or value < least or", "or value <= least or")],
            "test_count_errors": [("if len(given) != 1:", "if len(given) > 1:")],
        },
        "test_focal.py": {
            "test_hyper_parameters_out_of_range": [
                ("not low <= number < high", "number < low or number >= high"),
            ],
        },
        "test_linear.py": {
            "test_top_k_out_of_range": [
                ("and not isinstance(value, bool)", ""),
                ("(largest is not None and value > largest)", "False"),
            ],
            "test_errors_name_the_argument": [
                ("array.shape != shape:", "array.ndim != len(shape):"),
            ],
        },
    },
    "_losses": {
        "test_checks.py": {
            "test_label_smoothing_goes_toward_one_half": [
                ("y = y * (1 - a) + a / 2", "y = y * (1 - a) + a"),
            ],
        },
        "test_losses.py": {
            "test_garbage_behind_a_mask_or_a_zero_weight_leaves_no_trace": [
                ("weight, keep, where, reduction)", "weight, keep, keep, reduction)"),
            ],
        },
        "test_labels.py": {},
    },
    "_labels": {
        "test_labels.py": {
            "test_multi_hot": [('dtype), mode="drop")', 'dtype), mode="clip")')],
            "test_positives_from_multi_hot": [
                ("int(counts.max(initial=0))", "int(counts.min(initial=9))"),
            ],
            "test_positives_of_nothing": [("counts.max(initial=0)", "counts.max()")],
            "test_checked_labels": [
                ("(labels == 0) | (labels == 1)", "labels >= 0"),
                ("counts <= max_positives, rule", "counts >= 0, rule"),
            ],
            "test_checked_counts": [("(masked >= 0) & (masked <= 1)", "masked >= 0")],
            "test_balanced_pos_weight": [
                ("prepend=-1", "prepend=0"),
                ("counted = jnp.diff(ids, axis=-1, prepend=-1) != 0", "counted = ids >= 0"),
            ],
            "test_prior_bias": [
                ("jnp.log((count + 0.5)", "jnp.log(count"),
            ],
            "test_unknown_labels_are_left_out": [
                ("jnp.where(where, labels, 0)", "labels"),
            ],
            "test_counts_keep_their_dtype_and_transform": [
                ("jnp.float64 if labels.dtype == jnp.float64 else jnp.float32", "jnp.float32"),
            ],
        },
    },
    "_focal": {
        "test_focal.py": {
            "test_hyper_parameters_out_of_range": [
                ('gamma, "finite and at least 0", 0, math.inf', 'gamma, "any", -9, math.inf'),
                ('clip, "in [0, 1)", 0, 1)', 'clip, "in [0, 1)", -1, 2)'),
            ],
            "test_alpha_of_one_and_numpy_numbers_are_fine": [("math.nextafter(1, 2)", "1")],
            "test_focal_in_float32": [
                ("lax.integer_pow(m, int(k)) *", "jnp.exp(k * jnp.log(m)) *"),
                ("jnp.exp(exponent * log_m)", "jnp.exp(exponent * log_m * (1 + 5e-7))"),
                ("m < info.tiny", "m < 0"),
                ("jnp.where(hard, -_kernels", "jnp.where(y == 2, -_kernels"),
                ("k * (1 - 2 * y) * term", "k * (1 - y) * term"),
            ],
            "test_asymmetric_in_float32": [
                ("jnp.where(m < 0.5, near, -jnp.log(rest))", "-jnp.log(rest)"),
                ("growth = growth - (x0 - rounded) * (1 + growth)", "pass"),
                ("jnp.where(beyond < 1, clip * q * growth, p - clip)", "p - clip"),
                ("return lax.integer_pow(m, int(k))", "return jnp.exp(k * jnp.log(m))"),
                (
                    "-k * _kernels.sigmoid_minus(x, 1 - label)",
                    "-k * _kernels.sigmoid_minus(x, label)",
                ),
            ],
            "test_every_derivative_up_to_the_third": [
                ("if exponent < 0 and f in", "if exponent < -9 and f in"),
                ('1 if f == "c" else 1 - 2 * y', "1"),
                ("if exponent > 0 else jnp.clip(value, -largest, largest)", "if True else 0"),
                ("info.max / 1024", "info.max"),
                ('"x": (0, "1")}', '"x": (1, "1")}'),
                ('MINUS_BY_Y = {"c": "x", "s": "1"}', 'MINUS_BY_Y = {"c": "x"}'),
                ("by_x.append(j * product", "by_x.append(2 * j * product"),
                ("by_y.append(k * product", "by_y.append(-k * product"),
            ],
            "test_agrees_with_optax_where_optax_is_right": [
                ("(1 - alpha) * (1 - y) + alpha * y", "alpha * (1 - y) + (1 - alpha) * y"),
                ("+ (2 * alpha - 1) * loss", "+ (1 - alpha) * loss"),
            ],
            "test_without_focus_is_bce_bit_for_bit": [
                ("if focused else focal(0.0, None)", "if True else 0"),
            ],
            "test_a_clip_alone": [
                ("focused = clip or any(gammas)", "focused = any(gammas)"),
                ("jnp.where(m > 0, power, 0)", "power"),
                (
                    "return (_kernels.sigmoid_slope(x) / rest,)",
                    "return (_kernels.sigmoid_slope(x),)",
                ),
            ],
            "test_stop_focus_gradient": [("if stop_focus_gradient:", "if False:")],
            "test_infinite_logits_two_derivatives": [
                ("jnp.where(jnp.isinf(b), 0, b), a", "b, a"),
            ],
        },
        "test_losses.py": {
            "test_value_and_gradient_match_the_oracle": [
                ("asymmetric(*gammas, clip", "asymmetric(*gammas[::-1], clip"),
                ("Elementwise(focal(gamma, alpha)", "Elementwise(focal(gamma, None)"),
            ],
            "test_infinite_logits": [
                ("annihilate_value(power * ratio, factor)", "power * ratio * factor"),
            ],
            "test_hessian": [
                ("clipped_power(k - 1, clip)", "clipped_power(k, clip)"),
            ],
            "test_gradient_of_labels_and_weight": [
                (
                    "(1 - y) * negative_by_x, positive - negative",
                    "(1 - y) * negative_by_x, positive",
                ),
            ],
        },
    },
    "_linear": {
        "test_sharding.py": {},
        "test_linear.py": {
            "test_plain_positives_match_the_oracle": [
                ("(local >= 0) & (local < size), local, size", "local < size, local, size"),
                (".set(-1, mode=", ".add(-2, mode="),
                ("_kernels.softplus, 2)(signs * logits)", "_kernels.softplus, 2)(-signs * logits)"),
                ("return (rows + more, gradients), None", "return (more, gradients), None"),
                ("return gradients[name] + part", "return part"),
                ("positives, offset + start, size", "positives, offset, size"),
            ],
            "test_value_and_gradients_match_the_dense_head": [
                ("+ label_smoothing / 2", "+ label_smoothing"),
                ("labels * (1 - label_smoothing) +", "labels +"),
                ("labels = jnp.maximum(-signs, 0)", "labels = jnp.maximum(signs, 0)"),
                ("logits if bias is None else logits + bias[None]", "logits"),
                ("operands._replace(scale=g)", "operands"),
                ("loss * scale[:, None]", "loss"),
            ],
            "test_empty": [
                ("max(num_labels - 1, 0)", "(num_labels - 1)"),
            ],
            "test_a_row_of_weight_zero_hides_an_infinite_loss": [
                ("jnp.where(scale == 0, 0, rows * scale)", "rows * scale"),
                ("jnp.where(scale[:, None] == 0, 0, slope)", "slope"),
                ("jnp.where((scale == 0) & ~jnp.isfinite(rows), 0, rows)", "rows"),
            ],
            "test_top_k_is_that_of_the_dense_logits": [
                ("return values, ids + start", "return values, ids"),
                ("zip(best, best_of(start, chunk_size)", "zip(best_of(start, chunk_size), best"),
            ],
        },
    },
    "_head": {
        "test_linear.py": {
            "test_a_row_of_weight_zero_hides_an_infinite_loss": [
                ("loss = jnp.where(keep, loss, 0)", "pass"),
            ],
            "test_errors_name_the_argument": [
                ("_checks.check_one_of(name, positives=positives, labels=labels)", "pass"),
                ("if not features.ndim:", "if False:"),
                ("kernel.ndim != 2 or kernel.shape[0] != features.shape[-1]", "kernel.ndim != 2"),
            ],
            "test_a_small_weight_does_not_vanish_in_float16": [
                (
                    "if not features.dtype == kernel.dtype == jnp.bfloat16:",
                    "if features.dtype != kernel.dtype:",
                ),
            ],
            "test_a_row_of_weight_zero_hides_what_is_not_finite": [
                ("features = jnp.where(keep[:, None], features, 0)", "pass"),
                ("weight = jnp.where(keep, weight, 0)", "pass"),
            ],
            "test_a_weight_of_zero_has_a_gradient": [
                ("(weight != 0) | jnp.all(jnp.isfinite(features), axis=1)", "weight != 0"),
            ],
            "test_divisors": [
                ("loss, weight, None, None", "loss, None, None, None"),
            ],
            "test_top_k_is_that_of_the_dense_logits": [
                ("max(how.chunk_size, k)", "how.chunk_size")
            ],
        },
    },
    "_sharding": {
        "test_sharding.py": {
            "test_plain_positives_are_ids_of_the_whole_kernel": [
                ("offset = shard * operands.kernel.shape[1]", "offset = shard"),
                ("- {None, *spec}", "- {None}"),
                ("return total(rows, row_spec), totals", "return rows, totals"),
            ],
            "test_value_and_gradients_are_those_of_one_device": [
                ('"labels": PartitionSpec(batch, label)', '"labels": PartitionSpec(batch, None)'),
                ('"pos_weight": PartitionSpec(label)', '"pos_weight": PartitionSpec()'),
            ],
        },
        "test_linear.py": {
            "test_errors_name_the_argument": [("if chunk_size is not None:", "if chunk_size:")],
        },
    },
    "_siglip": {
        "test_linear.py": {
            "test_siglip_loss_is_that_of_all_pairs": [
                ("jnp.exp(log_scale.astype(dtype))", "log_scale.astype(dtype)"),
                ("jnp.broadcast_to(bias.astype(dtype), batch)", "None"),
            ],
            "test_siglip_loss_errors": [
                ("if images.ndim != 2:", "if False:"),
            ],
        },
        "test_sharding.py": {},
    },
    "_module": {
        "test_module.py": {
            "test_equals_the_function": [
                ("weight=self.weight,", ""),
                ("pos_weight=self.pos_weight,", ""),
                ("label_smoothing=self.label_smoothing,", ""),
                ("reduction=self.reduction,", ""),
                ("where=where,", ""),
            ],
            "test_repr": [("is not field.default", "is field.default")],
            "test_is_immutable": [("frozen=True, ", "")],
            "test_options_are_checked_at_once": [
                (
                    '_checks.check_choice(name, "reduction", self.reduction, _reduce.REDUCTIONS)',
                    "pass",
                ),
            ],
            "test_leaves_are_the_weights": [
                ('data_fields=["weight", "pos_weight"]', 'data_fields=["pos_weight", "weight"]'),
            ],
        },
    },
    "nnx": {
        "test_nnx.py": {
            "test_loss_and_gradient_equal_those_of_the_logits": [
                ("            weight=weight,\n", ""),
                ("            pos_weight=pos_weight,\n", ""),
                ("            label_smoothing=label_smoothing,\n", ""),
                ("            reduction=reduction,\n", ""),
            ],
            "test_logits_are_those_of_a_linear_layer": [
                (
                    "self.kernel = nnx.Param(kernel_init(rngs.params(), shape,",
                    "self.kernel = nnx.Param(kernel_init(rngs.params(), shape[::-1],",
                ),
            ],
            "test_zero_features_predict_the_prior": [
                ("jnp.log(rate) - jnp.log1p(-rate)", "jnp.log(rate)"),
                ("return logits + jnp.expand_dims(", "return logits - jnp.expand_dims("),
            ],
            "test_dtypes": [
                ("jnp.matmul(features, kernel, preferred_element_type=dtype)", "features @ kernel"),
                ("num_labels).astype(dtype)", "num_labels)"),
                ("self.dtype or jnp.promote", "jnp.promote"),
            ],
            "test_errors": [
                ("if prior is not None and not use_bias:", "if False:"),
                ("(rate > 0) & (rate < 1)", "(rate >= 0) & (rate < 1)"),
                ("(rate > 0) & (rate < 1)", "~((rate <= 0) | (rate >= 1))"),
                ("if features.shape[-1:] != (self.in_features,):", "if False:"),
            ],
        },
    },
}


def all_mutants(modules):
    """(module, test, text, replacement)"""
    for module in modules:
        for file, tests in MUTANTS[module].items():
            for test, replacements in tests.items():
                for before, after in replacements:
                    yield module, f"{file}::{test}", before, after


def mutated(module, before, after):
    source = (ROOT / "jaxbce" / f"{module}.py").read_text()
    if before not in source:
        raise SystemExit(
            f"{module}: the mutant's text is not there any more, so update or remove its "
            f"entry in MUTANTS: {before!r}"
        )
    return source.replace(before, after, 1)


def run_tests(package, *arguments):
    """`package` is the folder that holds jaxbce."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True
    )


def outcome(module, test, before, after):
    """The first test that notices the mutant, or None."""
    with tempfile.TemporaryDirectory() as directory:
        package = pathlib.Path(directory) / "jaxbce"
        shutil.copytree(ROOT / "jaxbce", package, ignore=shutil.ignore_patterns("__pycache__"))
        (package / f"{module}.py").write_text(mutated(module, before, after))
        result = run_tests(directory, "-n", "0", test)
    if result.returncode == 0:
        return None
    failed = re.search(r"^FAILED \S+?::(.*?)(?: - .*)?$", result.stdout, re.MULTILINE)
    if not failed:  # not a failed test: the mutant is no valid program
        raise SystemExit(f"{module}: {before!r} -> {after!r}\n{result.stdout[-2000:]}")
    return failed[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="module", help=f"of {', '.join(MUTANTS)}")
    parser.add_argument("--dry-run", action="store_true", help="run no test")
    options = parser.parse_args()
    mutants = list(all_mutants(options.modules or MUTANTS))
    for module, _, before, after in mutants:
        compile(mutated(module, before, after), f"{module}.py", "exec")
    counts = collections.Counter(module for module, *_ in mutants)
    print(f"{len(mutants)} mutants: {dict(counts)}", flush=True)
    if options.dry_run:
        return
    baseline = run_tests(ROOT, "-n", "2", *dict.fromkeys(test for _, test, *_ in mutants))
    if baseline.returncode:
        raise SystemExit(f"a test fails without a mutant:\n{baseline.stdout[-2000:]}")
    survivors = 0
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        outcomes = pool.map(outcome, *zip(*mutants, strict=True))
        for number, (mutant, noticed) in enumerate(zip(mutants, outcomes, strict=True), 1):
            module, test, before, after = mutant
            survivors += noticed is None
            what = "SURVIVED " + test if noticed is None else "caught by " + noticed
            print(f"{number} {module}: {before!r} -> {after!r}\n    {what}", flush=True)
    print(f"{len(mutants) - survivors} of {len(mutants)} mutants caught")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
