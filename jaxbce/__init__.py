"""Binary cross-entropy with logits for JAX: right at every logit, fast, for one label or a million.

>>> import jax, jax.numpy as jnp, jaxbce
>>> logits, labels = jnp.array([[2.0, -jnp.inf]]), jnp.array([[1, 0]])
>>> loss, gradient = jax.value_and_grad(jaxbce.bce_with_logits)(logits, labels)
>>> print(gradient)
[[-0.05960146  0.        ]]
"""

import importlib

from jaxbce._debug import checked
from jaxbce._functions import log_sigmoid, sigmoid, softplus
from jaxbce._head.api import linear_bce_with_logits, linear_loss
from jaxbce._head.siglip import siglip_loss
from jaxbce._head.top_k import linear_top_k
from jaxbce._head.update import linear_update
from jaxbce._labels.balance import balanced_pos_weight, prior_bias
from jaxbce._labels.ids import multi_hot, positives_from_multi_hot, positives_from_rows
from jaxbce._loss import Loss
from jaxbce._losses.asymmetric import asymmetric_loss
from jaxbce._losses.bce import (
    bce_with_logits,
    sigmoid_binary_cross_entropy,
    sparse_bce_with_logits,
)
from jaxbce._losses.focal import focal_loss, sigmoid_focal_loss
from jaxbce._losses.module import BCEWithLogitsLoss
from jaxbce._losses.probabilities import bce

__all__ = [
    "BCEWithLogitsLoss",
    "Loss",
    "asymmetric_loss",
    "balanced_pos_weight",
    "bce",
    "bce_with_logits",
    "checked",
    "focal_loss",
    "linear_bce_with_logits",
    "linear_loss",
    "linear_top_k",
    "linear_update",
    "log_sigmoid",
    "multi_hot",
    "positives_from_multi_hot",
    "positives_from_rows",
    "prior_bias",
    "siglip_loss",
    "sigmoid",
    "sigmoid_binary_cross_entropy",
    "sigmoid_focal_loss",
    "softplus",
    "sparse_bce_with_logits",
]

__version__ = "0.3.0"


def __getattr__(name: str) -> object:
    """Imports `jaxbce.nnx`, and with it Flax, when it is first used."""
    if name == "nnx":
        return importlib.import_module("jaxbce.nnx")
    raise AttributeError(f"module 'jaxbce' has no attribute {name!r}")
