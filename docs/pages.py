"""What mkdocs does to our pages: used by `mkdocs.yml`, not part of the site."""

import re
from typing import Any

import jaxbce

LISTED = re.compile(r"^::: jaxbce\.(\S+)$", re.MULTILINE)
OTHERS = "::: others"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`::: others` becomes every public name that the page does not list."""
    listed = LISTED.findall(markdown)
    others = [f"::: jaxbce.{name}" for name in jaxbce.__all__ if name not in listed]
    return re.sub(f"^{OTHERS}$", "\n".join(others), markdown, flags=re.MULTILINE)
