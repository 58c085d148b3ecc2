"""Breaks the package in one place at a time and shows that the tests notice.

    python tests/mutants.py                       # every mutant of every module, on every core
    python tests/mutants.py _reduce --sample 20   # a random 20 of one module; --list only says them

A mutant is a copy of the package with one operator, comparison, constant or order of arguments
changed in the syntax tree. Each runs the tests of its module, also the thorough ones, in a fresh
process, until the first failure. The rules of `left_out` say what cannot change a result. Any other
mutant that survives is a gap in the tests, or changes nothing that can be seen: a person judges.
"""

import argparse
import ast
import importlib
import multiprocessing
import os
import pathlib
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from tempfile import TemporaryDirectory

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT / "jaxbce").with_suffix("").parts): path.relative_to(ROOT)
    for path in sorted(ROOT.glob("jaxbce/**/*[!_].py"))  # all but __init__
}
# Module or folder: the files whose tests must notice, the fastest judge first.
TESTS = {
    "_math": "functions accuracy backends focal losses float64",
    "_checks": "checks labels losses",
    "_placement": "placement",
    "_program": "own_losses linear_loss update",
    "_reduce": "linear_loss losses linear",
    "_debug": "checks",
    "_functions": "functions accuracy",
    "_labels": "labels placement",
    "_loss": "own_losses losses checks",
    "_losses": "accuracy focal losses module float64",
    "_head": "linear linear_loss own_losses second_order update sharding",
    "_head.mesh": "sharding",
    "_head.update": "update",
    "_head.optimizers": "update",
    "_head.rounding": "update float8",
    "_flax": "nnx",
    "nnx": "nnx",
}
# Operators by their names in `ast`, and functions. Those of PAIRS are swapped both ways.
SWAPS = {"FloorDiv": "Mult", "Mod": "Mult", "Pow": "Mult", "ones": "zeros"}
PAIRS = "Add Sub, Mult Div, BitAnd BitOr, Lt LtE, Gt GtE, Eq NotEq, Is IsNot, In NotIn, And Or"
for pair in (PAIRS + ", maximum minimum, max min, any all, ones_like zeros_like").split(", "):
    first, second = pair.split()
    SWAPS |= {first: second, second: first}


def changes(node: ast.AST) -> Iterator[tuple[str, object]]:
    """The field of `node` that is changed, and to what."""
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if name := SWAPS.get(type(op).__name__):
            yield "op", getattr(ast, name)()
        case ast.Compare(ops=[op, *others]):
            yield "ops", [getattr(ast, SWAPS[type(op).__name__])(), *others]
        case ast.UnaryOp(op=op, operand=operand):
            yield "operand", ast.UnaryOp(op, operand)  # twice is not at all
        case ast.Constant(value=bool(value)):
            yield "value", not value
        case ast.Constant(value=int(value)):
            yield "value", value + 1
        case ast.Constant(value=float(value)):
            yield "value", value * 1.001 + 1e-5
        case ast.Attribute(attr=name) if name in SWAPS:
            yield "attr", SWAPS[name]
        case ast.Call(func=ast.Attribute(attr="where"), args=[condition, yes, no]):
            yield "args", [condition, no, yes]


def left_out(tree: ast.Module) -> Iterator[ast.AST]:
    """What changes no result: messages, types, bounds of caches, checks of what always holds."""
    for node in ast.walk(tree):
        if annotation := getattr(node, "annotation", None) or getattr(node, "returns", None):
            yield from ast.walk(annotation)
        match node:
            case ast.Raise() | ast.JoinedStr():
                yield from ast.walk(node)
            case ast.keyword(arg="strict" | "inline" | "maxsize", value=ast.Constant(value=v)) if v:
                yield node.value
            # Swapped choices negate the condition, and at its bound both are right.
            case ast.Call(func=ast.Attribute(attr="where"), args=[ast.Compare() as condition, *_]):
                yield condition


def mutants(module: str) -> Iterator[tuple[str, str]]:
    """(module and line: what is changed, the whole source)."""
    tree = ast.parse((ROOT / FILES[module]).read_text())
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    ignored = set(left_out(tree))
    for node in (each for each in parents if each not in ignored):
        for field, value in changes(node):
            shown = parents[node] if isinstance(node, ast.Constant) else node
            before, old = ast.unparse(shown), getattr(node, field)
            setattr(node, field, value)
            yield f"{module}:{node.lineno}: {before} -> {ast.unparse(shown)}", ast.unparse(tree)
            setattr(node, field, old)


def survives(mutant: tuple[str, str], *options: str) -> tuple[str, bool]:
    title, source = mutant
    module = title.partition(":")[0]
    names = (TESTS.get(module) or TESTS[module.partition(".")[0]]).split()
    with TemporaryDirectory() as folder, open(os.devnull, "w") as out, redirect_stdout(out):
        shutil.copytree(ROOT / "jaxbce", pathlib.Path(folder, "jaxbce"))
        pathlib.Path(folder, FILES[module]).write_text(source)
        sys.path.insert(0, folder)
        tests = [str(ROOT / f"tests/test_{name}.py") for name in names]
        code = pytest.main(["-x", "-n0", "-m", "", "-p", "no:cacheprovider", *options, *tests])
    # A failed test, or an import that the mutant breaks; all else would be a fault of this script.
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        raise RuntimeError(f"pytest ended with {code} at {title}")
    return title, code == pytest.ExitCode.OK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("modules", nargs="*", default=list(FILES), help="such as _head.chunks")
    parser.add_argument("--sample", type=int, help="a random part of so many mutants")
    parser.add_argument("--list", action="store_true", help="what would be changed")
    args = parser.parse_args()
    if unknown := set(args.modules) - set(FILES):
        parser.error(f"there is no {unknown.pop()}; modules are {', '.join(FILES)}")
    jobs = [mutant for module in args.modules for mutant in mutants(module)]
    if args.sample:
        jobs = random.Random(0).sample(jobs, min(args.sample, len(jobs)))
    if args.list:
        print(*(title for title, _ in jobs), sep="\n")
        return
    # Imported once, before each mutant's process is made of this one.
    for name in ("jax", "numpy", "chex", "optax", "flax.nnx", "mpmath"):
        importlib.import_module(name)
    originals = [((module, (ROOT / FILES[module]).read_text()), "--co") for module in args.modules]
    survivors = []
    with (
        # Of a mutant only what it changes is compiled: the rest is in the cache.
        TemporaryDirectory() as os.environ["JAX_COMPILATION_CACHE_DIR"],
        multiprocessing.get_context("fork").Pool(maxtasksperchild=1) as pool,
    ):
        if dead := [title for title, alive in pool.starmap(survives, originals, 1) if not alive]:
            parser.error(f"without a mutant, the tests of {', '.join(dead)} cannot be collected")
        for count, (title, alive) in enumerate(pool.imap_unordered(survives, jobs), 1):
            survivors += [title] * alive
            print(f"{count}/{len(jobs)} {'SURVIVED' if alive else 'killed'} {title}", flush=True)
    print(f"{len(jobs)} mutants, {len(survivors)} survived", *survivors, sep="\n")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
