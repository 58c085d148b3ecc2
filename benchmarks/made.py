"""What made a result: every script that keeps one writes this beside the figures."""

import importlib.metadata
import json
import pathlib
import platform
import subprocess


def made(*packages: str) -> dict[str, str]:
    """The commit of the checkout, if it is one, and the versions of Python, JAX and `packages`."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    here = pathlib.Path(__file__).parent
    commit = subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", *packages)}
    return {"commit": commit or "unknown", "python": platform.python_version()} | versions


def write(path: str, rows: list[dict], *packages: str) -> None:
    """Keeps the rows of a table in a file, with what made them."""
    results = {"made": made(*packages), "rows": rows}
    pathlib.Path(path).write_text(json.dumps(results, indent=1))
