"""Random arguments of the chunked head, for its tests on one device and on a mesh."""

import jax.numpy as jnp
import numpy as np


def draw_arguments(rng, rows, width, num_labels, dtype, dense):
    """Arguments by name; the labels only if `dense`."""
    drawn = {
        "features": rng.normal(size=(rows, width)),
        "kernel": rng.normal(size=(width, num_labels)),
        "bias": rng.normal(size=num_labels),
        "weight": rng.uniform(0.5, 2, rows),
        "pos_weight": rng.uniform(0.5, 2, num_labels),
        "label_smoothing": np.float64(0.1),
    }
    if dense:
        drawn["labels"] = rng.random((rows, num_labels))
    return {name: jnp.asarray(value, dtype) for name, value in drawn.items()}
