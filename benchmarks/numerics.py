"""Claim: the gradient is within 2 ULP at every logit, and no other common form is.

Draws docs/numerics.png: the worst relative error among 500 random logits in each of 320 intervals.
"""

import itertools
import pathlib
import sys

import contenders
import jax
import matplotlib.pyplot as plt
import numpy as np

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))

import oracle

PICTURE = pathlib.Path(__file__).parents[1] / "docs" / "numerics.png"
LIMIT = 40
FLOOR = 2.0**-26  # what is drawn for an error of 0
# What is drawn later covers what was drawn before; dashes show what lies below.
LINES = {
    "naive": {"label": "naive: log(sigmoid(x)), differentiated", "color": "C3"},
    "textbook": {"label": "textbook: sigmoid(x) − y", "color": "C2", "linestyle": (0, (4, 4))},
    "optax": {"label": "optax", "color": "C1"},
    "jaxbce": {"label": "jaxbce", "color": "C0", "linewidth": 3.5},
}


def relative_error(loss, x, label):
    labels = np.full_like(x, label)
    gradient = jax.jit(jax.grad(lambda x: loss(x, labels).sum()))(x)
    expected = oracle.bce_with_logits(x.astype(np.float64), np.float64(label))[1]
    error = np.abs(np.asarray(gradient, np.float64) - expected) / np.abs(expected)
    # A gradient that is NaN, or off by more than itself, is 100 % wrong.
    return np.clip(np.nan_to_num(error, nan=1.0), FLOOR, 1)


def main():
    bins = np.linspace(-LIMIT, LIMIT, 321)
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(*edge, 500) for edge in itertools.pairwise(bins)])
    x = x.astype(np.float32)
    centres = (bins[1:] + bins[:-1]) / 2

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, label in zip(axes, (1, 0), strict=True):
        for name, style in LINES.items():
            error = relative_error(contenders.ELEMENTWISE[name], x, label)
            worst = error.reshape(len(centres), -1).max(axis=1)
            print(f"label {label} {name:9} worst relative error {worst.max():.1e}")
            axis.plot(centres, worst, **({"linewidth": 2} | style))
        axis.axhline(2.0**-24, color="grey", linestyle=":")
        axis.set_yscale("log")
        axis.set_ylim(FLOOR, 3)
        axis.set_xlim(-LIMIT, LIMIT)
        axis.set_title(f"label {label}")
        axis.set_xlabel("logit")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("worst relative error of the gradient")
    axes[0].text(-LIMIT + 1, 2.0**-24 * 0.6, "float32 rounding", color="grey", va="top")
    axes[0].set_yticks([1e-6, 1e-4, 1e-2, 1], ["0.0001 %", "0.01 %", "1 %", "100 %"])
    axes[1].legend(loc="upper left")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    main()
