"""The documentation runs: every Python block of the README and of `docs/`."""

import pathlib
import re
import runpy

import jax
import pytest
from test_package import IMPORTS, public_objects

import jaxbce

pytestmark = pytest.mark.usefixtures("compile_fast")

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language, text):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def programs(language, page):
    """The blocks of a page; those of the tutorial continue each other, those of the FAQ raise."""
    found = blocks(language, page.read_text())
    return {"tutorial": ["\n".join(found)] if found else [], "faq": []}.get(page.stem, found)


def cases(language):
    return [
        pytest.param(block, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, block in enumerate(programs(language, page))
    ]


def errors():
    """Of the FAQ: what each heading quotes, and the blocks below it."""
    for section in re.split("^## ", (ROOT / "docs/faq.md").read_text(), flags=re.MULTILINE)[1:]:
        quoted = section.splitlines()[0].strip("`")
        yield pytest.param(quoted, blocks("python", section), id=quoted)


def run(block):
    """The names that it defines."""
    names = {"__name__": "block"}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        exec(compile(block, "block", "exec"), names)
    return names


@pytest.mark.newest
@pytest.mark.parametrize("block", cases("python"))
def test_python_block_runs(block):
    run(block)


@pytest.mark.newest
@pytest.mark.parametrize(("quoted", "found"), list(errors()))
def test_an_error_message_of_the_faq_is_a_real_one(quoted, found):
    """The first block raises what the heading quotes, the others do not."""
    wrong, *right = found
    with pytest.raises(Exception, match=re.escape(quoted)):
        run(wrong)
    for block in right:
        run(block)


@pytest.mark.parametrize("block", cases("py"))
def test_block_of_a_library_that_may_be_absent_runs(block):
    """Those of docs/upstream.md notice when a peer is mended."""
    for library in re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE):
        pytest.importorskip(library, reason=f"{library} is not installed")
    run(block)


def test_the_readme_opens_with_what_goes_wrong(capsys):
    """Its first block prints the block below it."""
    run(blocks("python", README)[0])
    assert capsys.readouterr().out == blocks("text", README)[0]


def test_quick_start_is_one_block_of_two_commands():
    section = README.split("## Quick start")[1].split("\n## ")[0]
    (block,) = blocks("bash", section)
    assert len(block.strip().splitlines()) == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for path in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / path).exists(), path


FOLDERS = ("jaxbce", "tests", "benchmarks", "examples", "docs")


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_files_that_are_named_exist(page):
    files = [str(path) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    named = set(re.findall(r"`([\w/]+\.py)`", page.read_text())) - {"_losses/poly1.py"}  # to add
    assert not [name for name in named if not any(file.endswith(f"/{name}") for file in files)]


def test_every_python_block_is_found():
    """None is indented, in a list or an admonition, where the pattern above would miss it."""
    for page in PAGES:
        assert page.read_text().count("```python") == len(blocks("python", page.read_text()))


def reference():
    """The pages of every name, as mkdocs reads them."""
    hook = runpy.run_path(str(ROOT / "docs/pages.py"))["on_page_markdown"]
    return {page.stem: hook(page.read_text()) for page in (ROOT / "docs/reference").glob("*.md")}


def test_the_reference_has_every_public_name():
    listed = re.findall(r"^::: jaxbce\.(\S+)$", "\n".join(reference().values()), re.MULTILINE)
    assert sorted(listed) == sorted(name for name, _ in public_objects())


def test_a_new_name_comes_into_the_reference_by_itself(monkeypatch):
    monkeypatch.setattr(jaxbce, "__all__", ["a_loss", *jaxbce.__all__, "z_loss"])
    page = reference()["own-loss"]
    assert {"::: jaxbce.a_loss", "::: jaxbce.z_loss"} <= set(page.splitlines())


def test_the_picture_of_the_modules_is_true():
    """It and its text have every room, each above all that it imports."""
    names = r'class="name" x="\d+" y="(\d+)">(\w+)<'
    picture = re.findall(names, (ROOT / "docs/architecture.svg").read_text())
    heights = {name: int(y) for y, name in picture}
    page = (ROOT / "docs/architecture.md").read_text()
    table = re.findall(r"^\| \d \| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(heights) == sorted(table) == sorted(IMPORTS)
    for room, used in IMPORTS.items():
        assert all(heights[room] < heights[each] for each in used)


def test_the_readme_is_short():
    """At most 140 lines with today's 13 rows of names; a new loss adds a row."""
    assert sum(not line.startswith("| `jaxbce.") for line in README.splitlines()) <= 127
