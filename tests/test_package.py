"""The package as a whole: names, documentation, imports."""

import ast
import importlib
import inspect
import pathlib
import re
import subprocess
import sys
import typing

import pytest
from losses import FIRST, FUNCTIONS

import jaxbce
import jaxbce.nnx

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "jaxbce"
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")
)

# What a room may import from jaxbce: each folder or module stands on those above it.
IMPORTS = {
    "_math": set(),
    "_program": set(),
    "_placement": set(),
    "_checks": set(),
    "_debug": {"_checks"},
    "_reduce": {"_math"},
    "_functions": {"_checks", "_math", "_placement"},
    "_labels": {"_checks", "_math", "_placement", "_reduce"},
    "_loss": {"_checks", "_labels", "_math", "_placement", "_program", "_reduce"},
    "_losses": {"_checks", "_loss", "_math", "_reduce"},
    "_head": {
        *("_checks", "_labels", "_loss", "_losses", "_math", "_placement", "_program", "_reduce"),
    },
    "__init__": {"_debug", "_functions", "_head", "_labels", "_loss", "_losses"},
    "_flax": set(),
    "nnx": {"_checks", "_flax", "_head", "_math", "_placement", "_reduce"},
}

SECTIONS = ["Use it", "Returns:", "Example:", ">>>", "Source:"]
# The others may be left out by what opens with the name of the function that has them.
ALL_SECTIONS = [*SECTIONS, "Formula", "Args:", "Raises:", "Edge values:", "Differentiable:"]


def public_objects():
    names = [(name, getattr(jaxbce, name)) for name in jaxbce.__all__]
    return [*names, ("nnx.MultiLabelHead", jaxbce.nnx.MultiLabelHead)]


every_public_name = pytest.mark.parametrize(
    ("name", "value"), public_objects(), ids=[name for name, _ in public_objects()]
)


def test_everything_public_is_exported():
    public = {name for name in vars(jaxbce) if not name.startswith("_")}
    public -= {name for name in public if inspect.ismodule(getattr(jaxbce, name))}
    assert public == set(jaxbce.__all__)
    assert jaxbce.__all__ == sorted(jaxbce.__all__)


def test_the_version_is_the_same_everywhere():
    assert f"version: {jaxbce.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {jaxbce.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@every_public_name
def test_every_public_name_is_documented(name, value):
    doc = inspect.getdoc(value)
    original = re.match(r"`(\w+)`", doc)
    shared = inspect.signature(getattr(jaxbce, original[1])).parameters if original else {}
    own = inspect.signature(value.__init__ if inspect.isclass(value) else value).parameters
    for parameter in own.keys() - {"self"}:
        described = f"  {parameter}: " in doc
        assert described or own[parameter].default == shared[parameter].default
    silent = {"checked": ["Formula"], "nnx.MultiLabelHead": ["Edge values:"]}.get(name, [])
    sections = SECTIONS if original else ALL_SECTIONS
    assert [section for section in sections if section not in doc] == silent
    only_refers = r"^ *(Formula|Edge values|Differentiable|\w*Errors?): (as|that of) \S+$"
    assert not re.search(only_refers, doc, re.MULTILINE)


@every_public_name
def test_every_public_name_is_in_the_readme(name, value):
    assert (
        f"`{name}" in (ROOT / "README.md").read_text()
        or f"jaxbce.{name}" in (ROOT / "README.md").read_text()
    )


def test_public_functions_share_their_arguments():
    """Two positional arguments, the rest keyword-only and in one order."""
    assert len(FUNCTIONS) >= 6
    order = list(inspect.signature(jaxbce.bce_with_logits).parameters)[2:]
    for name in FUNCTIONS:
        parameters = inspect.signature(getattr(jaxbce, name)).parameters.values()
        kinds = [parameter.kind for parameter in parameters]
        assert all(kind is inspect.Parameter.KEYWORD_ONLY for kind in kinds[2:])
        names = [parameter.name for parameter in parameters][2:]
        own = [name for name in names if name not in order]
        assert names == own + [name for name in order if name in names]


def test_every_loss_is_in_the_matrix():
    assert set(FUNCTIONS) <= set(FIRST)


def source(module):
    return (PACKAGE / module.replace(".", "/")).with_suffix(".py").read_text()


def imported_from_jaxbce(module):
    """The modules, dotted, that one imports."""
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jaxbce":
            within = node.module.removeprefix("jaxbce").removeprefix(".")
            for alias in node.names:
                name = f"{within}.{alias.name}".removeprefix(".")
                yield name if name in MODULES else within or name


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    """Between the rooms as IMPORTS says, and within a room without a circle."""
    room = module.split(".")[0]
    imported = {name.split(".")[0] for name in imported_from_jaxbce(module)}
    assert imported - {room} <= IMPORTS[room]
    seen, ahead = set(), {module}
    while ahead:
        seen |= ahead
        ahead = {own for each in ahead for own in imported_from_jaxbce(each) if own in MODULES}
        assert module not in ahead
        ahead -= seen


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is(module):
    name = f"jaxbce.{module}".removesuffix(".__init__").removesuffix("__init__").rstrip(".")
    assert importlib.import_module(name).__doc__


def test_only_public_jax():
    for module in MODULES:
        text = source(module)
        assert "jax._src" not in text
        assert "type: ignore" not in text
        assert "noqa" not in text


def test_a_fresh_import_pulls_in_neither_flax_nor_optax():
    code = "import sys, jaxbce; print([m for m in ('flax', 'optax', 'chex') if m in sys.modules])"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


def test_flax_is_imported_when_its_module_is_used():
    code = "import sys, jaxbce; jaxbce.nnx.MultiLabelHead; print('flax' in sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "True"
    with pytest.raises(AttributeError, match="module 'jaxbce' has no attribute 'linen'"):
        getattr(jaxbce, "lin" + "en")


def test_a_reduction_is_typed_by_its_choices():
    """A type checker finds a wrong one, and `help` shows short names."""
    found = [fn for _, fn in public_objects() if "reduction" in inspect.signature(fn).parameters]
    found += [jaxbce.Loss.__call__, jaxbce.nnx.MultiLabelHead.loss]
    for fn in found:
        hints = typing.get_type_hints(fn.__init__ if inspect.isclass(fn) else fn)
        choices = typing.get_args(hints["reduction"])
        assert choices[:4] == ("mean", "weighted_mean", "sum", "batchmean")
        assert "reduction: 'Literal" not in str(inspect.signature(fn))


def test_importing_costs_little_beyond_jax():
    """Less than 0.15 s of a processor; the smallest of three runs, since machines are shared."""
    code = (
        "import time, jax; t = time.process_time(); import jaxbce; print(time.process_time() - t)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    assert min(float(run.stdout) for run in runs) < 0.15


def test_actions_of_github_are_pinned():
    """To a commit, with its version beside it: a tag can be moved to other code."""
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        for action in re.findall(r"uses: (.*)", path.read_text()):
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), path.name
