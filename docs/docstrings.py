"""How mkdocstrings reads our docstrings: used by `mkdocs.yml`, not part of the site."""

import ast
import pathlib
import re
from typing import Any

import griffe

PACKAGE = pathlib.Path(__file__).parents[1] / "jaxbce"

FORMULA = re.compile(r"^(Formula\b[^\n]*(?:\n[^\n]+)*:\n\n)((?:  [^\n]+\n)+)", re.MULTILINE)
RETURNS = re.compile(r"^Returns:\n((?:  [^\n]+\n)+)", re.MULTILINE)
HEADINGS = re.compile(r"^(Formula|Edge values|Differentiable|Source)\b", re.MULTILINE)


def public_names() -> list[str]:
    for node in ast.parse((PACKAGE / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError("jaxbce has no __all__")


LINKS = re.compile(f"`({'|'.join(public_names())})`")


def as_markdown(docstring: str) -> str:
    """Our own sections in bold, formulas as they are set, the example as one of Google's, links."""
    # What `Source:` names is another library's.
    ours, source, theirs = docstring.partition("\nSource:")
    docstring = LINKS.sub(r"[`\1`][jaxbce.\1]", ours) + source + theirs
    docstring = FORMULA.sub(
        lambda match: f"{match[1]}```text\n" + re.sub("^  ", "", match[2], flags=re.M) + "```\n",
        docstring,
    )
    docstring = HEADINGS.sub(r"**\1**", docstring)
    return docstring.replace("\nExample:\n", "\nExamples:\n")


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
            if obj.is_class:  # it has no annotation of what it returns
                obj.docstring.value = RETURNS.sub(
                    lambda match: f"**Returns**: {' '.join(match[1].split())}\n",
                    obj.docstring.value,
                )
