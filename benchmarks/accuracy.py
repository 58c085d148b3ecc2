"""Claim: over every float32 logit the loss is within 2 ULP, its gradient within 2 and its second
derivative within 4, and nothing is NaN. Labels 0 and 1; the judge is float64.

The sweep resumes from its state file, so it can be stopped at any time. What it has found counts
only for the source of jaxbce and the versions that it was found with.

    python benchmarks/accuracy.py                        # all 2^32, an hour
    python benchmarks/accuracy.py --core                 # 2^-7 <= |x| < 2^7, where errors are large
    python benchmarks/accuracy.py --fraction 0.015625    # a random 1/64 of them
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import pathlib
import sys

import contenders
import jax
import made
import numpy as np

import jaxbce

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))

import oracle

BLOCK = 2**22
QUANTITIES = ("loss", "gradient", "second derivative")
ALL = [(0, 2**32)]
# The float32 numbers of either sign with 2^-7 <= |x| < 2^7, as ranges of their bits.
CORE = [(sign + (120 << 23), sign + (134 << 23)) for sign in (0, 2**31)]


def jax_derivatives(loss):
    def gradient(x, y):
        return jax.grad(lambda x: loss(x, y).sum())(x)

    def second(x, y):
        return jax.grad(lambda x: gradient(x, y).sum())(x)

    return jax.jit(lambda x, y: (loss(x, y), gradient(x, y), second(x, y)))


def torch_derivatives(x, y):
    import torch  # only with --torch

    logits, labels = torch.from_numpy(x).requires_grad_(), torch.from_numpy(y)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), logits)
    return [result.detach().numpy() for result in (loss, gradient, second)]


def expected(x, label):
    loss, gradient = oracle.bce_with_logits(x, np.float64(label))
    return loss, gradient, oracle.sigmoid(x) * oracle.sigmoid(-x)


def bits(ranges, fraction, block):
    """The bit patterns of a block: the next ones, or as many random ones."""
    if fraction < 1:
        rng = np.random.default_rng(block)
        start, stop = ranges[block % len(ranges)]
        return rng.integers(start, stop, BLOCK, dtype=np.uint32)
    for start, stop in ranges:
        if block < (stop - start) // BLOCK:
            return np.arange(BLOCK, dtype=np.uint32) + np.uint32(start + block * BLOCK)
        block -= (stop - start) // BLOCK
    raise ValueError(f"block {block} lies beyond {ranges}")


def sweep_block(x, implementations, worst):
    """Raises the entries of `worst`: contender -> quantity -> [ULP, logit, label, NaNs]."""
    finite = np.isfinite(x)
    for label in (0, 1):
        y = np.full_like(x, label)
        with np.errstate(all="ignore"):
            truth = expected(x.astype(np.float64), label)
        for name, derivatives in implementations.items():
            for quantity, got, right in zip(QUANTITIES, derivatives(x, y), truth, strict=True):
                got = np.asarray(got)
                error = np.where(finite, oracle.ulp_error(got, right), 0)
                at = int(np.argmax(error))
                entry = worst.setdefault(name, {}).setdefault(quantity, [0.0, 0.0, 0, 0])
                if error[at] > entry[0]:
                    entry[:3] = float(error[at]), float(x[at]), label
                entry[3] += int(np.isnan(got).sum() - np.isnan(x).sum())


def print_table(worst, count):
    print(f"\nworst error in ULP over {count:,} float32 logits, labels 0 and 1 (at logit, label)")
    for name, quantities in worst.items():
        cells = [
            f"{quantity} {ulp:.3g} ({logit:.6g}, {label})" + (f" and {nans} NaN" if nans else "")
            for quantity, (ulp, logit, label, nans) in quantities.items()
        ]
        print(f"{name:9} " + "; ".join(cells))


def measured_with():
    """What a state must not outlive: the source of jaxbce and the versions beside it."""
    sources = sorted(pathlib.Path(jaxbce.__file__).parent.rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    return [digest, *(importlib.metadata.version(name) for name in ("jax", "optax"))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--core", action="store_true", help="only 2^-7 <= |x| < 2^7")
    parser.add_argument("--fraction", type=float, default=1.0, help="a random part of the logits")
    parser.add_argument("--contenders", nargs="+", default=["jaxbce", "optax", "textbook"])
    parser.add_argument("--torch", action="store_true", help="PyTorch too, from this interpreter")
    parser.add_argument("--state", type=pathlib.Path, default=pathlib.Path("runs/accuracy.json"))
    args = parser.parse_args()

    ranges = CORE if args.core else ALL
    total = sum(stop - start for start, stop in ranges)
    blocks = math.ceil(total * args.fraction / BLOCK)
    implementations = {
        name: jax_derivatives(contenders.ELEMENTWISE[name]) for name in args.contenders
    }
    if args.torch:
        implementations["PyTorch"] = torch_derivatives

    states = json.loads(args.state.read_text()) if args.state.exists() else {}
    part = ["core" if args.core else "all", str(args.fraction)]
    key = " ".join([*part, *implementations, *measured_with()])
    state = states.setdefault(key, {"blocks": 0, "worst": {}})
    args.state.parent.mkdir(parents=True, exist_ok=True)
    while state["blocks"] < blocks:
        x = bits(ranges, args.fraction, state["blocks"]).view(np.float32)
        sweep_block(x, implementations, state["worst"])
        state["blocks"] += 1
        args.state.write_text(json.dumps(states, indent=1))
        print(f"\rblock {state['blocks']} of {blocks}", end="", file=sys.stderr, flush=True)
    print("made at", made.made("optax"))
    print_table(state["worst"], blocks * BLOCK)


if __name__ == "__main__":
    main()
