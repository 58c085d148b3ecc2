"""PyTorch's CPU build for `cpu.py`, which times it between the other contenders.

It reads lines of JSON: a configuration is set up, `null` is one timed step. It needs torch alone.
"""

import json
import sys
import time

import torch
from torch.nn.functional import binary_cross_entropy_with_logits


def prepare(case, dtype, shape):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(shape, generator=generator)
    labels = torch.randint(0, 2, shape, generator=generator)
    logits = logits.to(getattr(torch, dtype)).requires_grad_()
    labels = labels.to(logits.dtype)
    batch, count = shape
    options = {}
    if case == "pos_weight":
        options["pos_weight"] = torch.linspace(1, 5, count, dtype=logits.dtype)
    if case == "weight":
        options["weight"] = torch.linspace(0.5, 2, batch, dtype=logits.dtype)[:, None]
    mask = torch.rand(shape, generator=generator) < 0.7 if case == "where" else None

    def step():
        logits.grad = None
        if mask is None:
            loss = binary_cross_entropy_with_logits(logits, labels, **options)
        else:
            loss = binary_cross_entropy_with_logits(logits, labels, reduction="none")
            loss = torch.where(mask, loss, 0).sum() / mask.sum()
        loss.backward()

    return step


def main():
    print(json.dumps(torch.__version__), flush=True)
    step = None
    for line in sys.stdin:
        configuration = json.loads(line)
        start = time.perf_counter()
        if configuration is None:
            step()
        else:
            step = prepare(**configuration)
        print(json.dumps(time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
