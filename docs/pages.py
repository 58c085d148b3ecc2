"""What mkdocs does to our pages: used by `mkdocs.yml`, not part of the site."""

import pathlib
import re
from typing import Any

import jaxbce

REFERENCE = pathlib.Path(__file__).parent / "reference"
LISTED = re.compile(r"^::: jaxbce\.(\S+)$", re.MULTILINE)
OTHERS = "::: others"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`::: others` becomes every public name that no page of the reference lists."""
    listed = [name for page in REFERENCE.glob("*.md") for name in LISTED.findall(page.read_text())]
    others = [f"::: jaxbce.{name}" for name in jaxbce.__all__ if name not in listed]
    return re.sub(f"^{OTHERS}$", "\n".join(others), markdown, flags=re.MULTILINE)
