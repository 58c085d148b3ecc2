"""What a compiled program contains, read from its text."""

import re

import numpy as np


def collectives(text):
    """The number of elements of every result of a collective."""
    sizes = []
    for line in text.splitlines():
        op = r" (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
        if match := re.search(rf"= (.*?){op}", line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match.group(1))
            sizes += [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]
    return sizes
