"""Breaks the package in one place at a time and shows that the tests notice.

    python tests/mutants.py                       # every mutant of the modules in TESTS
    python tests/mutants.py _reduce --sample 20   # a random 20 of one module
    python tests/mutants.py _math --list       # what would be changed, without running it

A mutant is a copy of the package with one operator, comparison, constant or order of arguments
changed, found in the syntax tree: nothing here follows the code. Each runs the tests of its module
that a default run has, in a fresh process, until the first failure. One that survives is a gap in
the tests, or changes nothing that can be seen: EQUIVALENT says which and why.

Two tools were tried. mutmut 3.8 switches mutants inside one process, where JAX keeps what it
compiled of the original ("Unable to force test failures"). cosmic-ray 8.7 makes six times as many,
371 of `_reduce` alone, and imports JAX anew for each: hours for a module.
"""

import argparse
import ast
import contextlib
import copy
import importlib
import multiprocessing
import os
import pathlib
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Module: the files whose tests must notice, the fastest judge first.
TESTS = {
    "_math": ["test_functions", "test_accuracy", "test_backends", "test_focal", "test_losses"],
    "_reduce": ["test_losses", "test_linear_loss", "test_placement", "test_linear"],
    "_loss": ["test_losses", "test_own_losses", "test_checks"],
    "_losses.bce": ["test_accuracy", "test_losses"],
    "_losses.probabilities": ["test_accuracy", "test_losses", "test_float64"],
    "_losses.focal": ["test_focal", "test_losses", "test_float64"],
    "_losses.asymmetric": ["test_focal", "test_losses", "test_float64"],
    "_head.chunks": ["test_linear", "test_linear_loss", "test_update", "test_sharding"],
    "_head.top_k": ["test_linear", "test_sharding"],
    "_head.arguments": ["test_linear", "test_linear_loss"],
    "_head.update": ["test_update"],
    "_head.optimizers": ["test_update"],
    "_labels.ids": ["test_labels", "test_placement"],
    "_labels.balance": ["test_labels", "test_placement"],
    "_checks": ["test_checks", "test_labels", "test_losses"],
}

SWAPS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
NAMES = {"maximum": "minimum", "minimum": "maximum", "any": "all", "all": "any", "ones": "zeros"}
NAMES |= {"ones_like": "zeros_like", "zeros_like": "ones_like", "max": "min", "min": "max"}

# What is changed, as `--list` prints it, and why no test can see it.
EQUIVALENT = {
    "count_true: size <= 2 ** 24 -> size < 2 ** 24": "both ways are exact",
    "along: strict=True -> strict=False": "they are of one length",
    "with_jvp: inline=True -> inline=False": "XLA inlines it too",
    "log1p_unit: jnp.minimum(quotient(t, 2 + t), 1) -> jnp.minimum(quotient(t, 2 + t), 2)": (
        "the quotient is at most 1 / 3"
    ),
    "softplus_mix_value: x > 0 -> x >= 0": "at 0 it is multiplied by 0",
    "softplus_value: x > 0 -> x >= 0": "at 0 both are the same",
    "sigmoid_mix_value: x >= 0 -> x > 0": "at 0 the tail is (a + b) / 2",
    "sigmoid_minus_value: x >= 0 -> x > 0": "at 0 the tail is 1 / 2",
    "tanh_half_value: jnp.abs(x) < 1 -> jnp.abs(x) <= 1": "at 1 both forms hold",
    "tanh_half_value: jnp.clip(x, -1, 1) -> jnp.clip(x, -1, 2)": "beyond 1 it is not taken",
    "tanh_half_value: -1 -> -2": "beyond -1 it is not taken",
    "tanh_half_value: x < 0 -> x <= 0": "at 0 it is not taken",
    "tanh_half_value: x < 0 -> x < 1": "up to 1 it is not taken",
    "value: x > 0 -> x >= 0": "at 0 it is multiplied by 0",
    "recomputed_value: x < 0 -> x <= 0": "the sign of 0 has no part in a derivative",
    "inverse_spread_partials: p * (1 - p) > 1e-12 -> p * (1 - p) >= 1e-12": "at its bound",
    "mark: local < size -> local <= size": "at `size` it is dropped",
    "chunk_pass: jnp.where(jnp.any(keep, axis=0)[None], chunk['kernel'], 0) -> "
    "jnp.where(jnp.any(keep, axis=0)[None], chunk['kernel'], 1)": "any finite number will do",
    "row: self.loss(logits[None], labels[None], *per_label)[0] -> "
    "self.loss(logits[None], labels[None], *per_label)[1]": "of one row JAX takes the last",
    "full_pass: num_labels - 1 -> num_labels - 2": "a last chunk of one label joins the one before",
    "empty_operands: jnp.zeros(0, operand.dtype) -> jnp.zeros(1, operand.dtype)": "of its dtype",
    "total_loss_impl: how.run(operands, False) -> how.run(operands, True)": "XLA removes gradients",
    "row_losses_impl: how.run(operands, False) -> how.run(operands, True)": "XLA removes gradients",
    "default_chunk_size: max(batch, 1) -> max(batch, 2)": "of two rows it is the largest, too",
    "step: strict=True -> strict=False": "the two are of one length",
}


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What `node` may be replaced by."""

    def changed(**fields: object) -> ast.AST:
        other = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(other, name, value)
        return other

    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
        yield changed(op=SWAPS[type(node.op)]())
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield changed(ops=[SWAPS[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield changed(value=not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield changed(value=node.value + 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield changed(value=node.value * 1.001 + 1e-5)
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield changed(attr=NAMES[node.attr])
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "where":
        yield changed(args=[node.args[0], *node.args[:0:-1]])


def places(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Every (parent, field, index, node) of an expression."""
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(node, ast.expr):
                    yield parent, field, index, node


def skipped(tree: ast.Module) -> set[ast.AST]:
    """What computes nothing: imports, annotations, decorators, messages, definitions of types."""
    nodes: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Raise | ast.JoinedStr):
            nodes.append(node)
        elif isinstance(node, ast.AnnAssign):
            nodes.append(node.annotation)
        elif isinstance(node, ast.FunctionDef):
            arguments = [*node.args.args, *node.args.kwonlyargs, node.args.vararg]
            nodes += [each.annotation for each in arguments if each and each.annotation]
            nodes += [*node.decorator_list, *([node.returns] if node.returns else [])]
        elif isinstance(node, ast.Assign) and node in tree.body and "Callable" in ast.dump(node):
            nodes.append(node)
    return {child for node in nodes for child in ast.walk(node)}


def path_of(module: str) -> pathlib.Path:
    return pathlib.Path("jaxbce", *module.split(".")).with_suffix(".py")


def mutants(module: str) -> Iterator[tuple[str, str, str]]:
    """(where, what is changed, the whole source)."""
    tree = ast.parse((ROOT / path_of(module)).read_text())
    left_out = skipped(tree)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    owner = {node: function.name for function in functions for node in ast.walk(function)}
    for parent, field, index, node in places(tree):
        if node in left_out:
            continue
        in_expression = isinstance(parent, ast.expr | ast.keyword)
        shown = parent if isinstance(node, ast.Constant) and in_expression else node
        before = ast.unparse(shown)
        for other in changes(node):
            put(parent, field, index, other)
            after = ast.unparse(shown if shown is parent else other)
            yield (
                f"{module}:{node.lineno}",
                f"{owner.get(node, module)}: {before} -> {after}",
                ast.unparse(ast.fix_missing_locations(tree)),
            )
            put(parent, field, index, node)


def put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def run_tests(module: str, source: str, *options: str) -> int:
    """The exit code of the tests of the module, with this source in its place."""
    with tempfile.TemporaryDirectory() as folder:
        package = pathlib.Path(folder) / "jaxbce"
        shutil.copytree(ROOT / "jaxbce", package)
        (pathlib.Path(folder) / path_of(module)).write_text(source)
        sys.path[:0] = [folder, str(ROOT / "tests")]
        os.chdir(ROOT)
        files = [f"tests/{name}.py" for name in TESTS[module]]
        options = ("-x", "-n0", "-p", "no:cacheprovider", *options)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            return int(pytest.main([*options, *files]))


def collects(module: str) -> bool:
    """Whether the tests can be run at all, so that an error of pytest is no killed mutant."""
    source = (ROOT / path_of(module)).read_text()
    return run_tests(module, source, "--collect-only") == pytest.ExitCode.OK


def survives(job: tuple[str, str, str]) -> tuple[str, str, bool, float]:
    place, change, source = job
    started = time.perf_counter()
    code = run_tests(place.partition(":")[0], source)
    # A failed test, or an import that the mutant breaks; all else would be a fault of this script.
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        raise RuntimeError(f"pytest ended with {code} at {place}: {change}")
    return place, change, code == pytest.ExitCode.OK, time.perf_counter() - started


def share(cache: str) -> None:
    """Of a mutant only what it changes is compiled: the rest is in the folder `cache`."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("modules", nargs="*", metavar="module", help=f"of {', '.join(TESTS)}")
    parser.add_argument("--sample", type=int, help="a random part of so many mutants")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="what would be changed")
    args = parser.parse_args()
    if unknown := set(args.modules) - set(TESTS):
        parser.error(f"no tests are named here for {', '.join(unknown)}")

    jobs = [mutant for module in args.modules or TESTS for mutant in mutants(module)]
    stale = EQUIVALENT.keys() - {change for _, change, _ in jobs}
    if stale and not args.modules:
        parser.error(f"no mutant is {stale.pop()}")
    if args.sample:
        jobs = random.Random(0).sample(jobs, min(args.sample, len(jobs)))
    if args.list:
        print(*(f"{place}: {change}" for place, change, _ in jobs), sep="\n")
        return
    # Imported once, before each mutant's process is made of this one.
    for name in ("jax", "numpy", "chex", "optax", "flax.nnx", "mpmath"):
        importlib.import_module(name)
    warnings.simplefilter("ignore")
    survivors = []
    context = multiprocessing.get_context("fork")
    with (
        tempfile.TemporaryDirectory() as cache,
        context.Pool(args.processes, share, (cache,), maxtasksperchild=1) as pool,
    ):
        modules = args.modules or list(TESTS)
        for module, fine in zip(modules, pool.map(collects, modules, chunksize=1), strict=True):
            if not fine:
                parser.error(f"without a mutant, the tests of {module} cannot be collected")
        for count, result in enumerate(pool.imap_unordered(survives, jobs), 1):
            place, change, alive, seconds = result
            state = "killed" if not alive else "equivalent" if change in EQUIVALENT else "SURVIVED"
            survivors += [f"{place}: {change}"] if state == "SURVIVED" else []
            print(f"{count}/{len(jobs)} {state} in {seconds:.0f} s  {place}: {change}", flush=True)
    print(f"{len(jobs)} mutants, {len(survivors)} survived", *survivors, sep="\n")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
