"""How mkdocstrings reads our docstrings: used by `mkdocs.yml`, not part of the site."""

import re
from typing import Any

import griffe

FORMULA = re.compile(r"^(Formula\b[^\n]*(?:\n[^\n]+)*:\n\n)((?:  [^\n]+\n)+)", re.MULTILINE)
RETURNS = re.compile(r"^Returns:\n((?:  [^\n]+\n)+)", re.MULTILINE)
HEADINGS = re.compile(r"^(Formula|Edge values|Differentiable|Source)\b", re.MULTILINE)


def as_markdown(docstring: str) -> str:
    """Our own sections in bold, formulas as they are set, and the example as one of Google's."""
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
