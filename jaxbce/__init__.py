"""Binary cross-entropy with logits for JAX: right at every logit, fast, for one label or a million.

>>> import jax, jax.numpy as jnp, jaxbce
>>> logits, labels = jnp.array([[2.0, -jnp.inf]]), jnp.array([[1, 0]])
>>> loss, gradient = jax.value_and_grad(jaxbce.bce_with_logits)(logits, labels)
>>> print(gradient)
[[-0.05960146  0.        ]]
"""

from jaxbce._checks import checked
from jaxbce._focal import asymmetric_loss, focal_loss, sigmoid_focal_loss
from jaxbce._functions import log_sigmoid, sigmoid, softplus
from jaxbce._head import linear_bce_with_logits, linear_loss, linear_top_k
from jaxbce._labels import balanced_pos_weight, multi_hot, positives_from_multi_hot, prior_bias
from jaxbce._losses import (
    bce,
    bce_with_logits,
    sigmoid_binary_cross_entropy,
    sparse_bce_with_logits,
)
from jaxbce._module import BCEWithLogitsLoss
from jaxbce._siglip import siglip_loss
from jaxbce._update import linear_update

__all__ = [
    "BCEWithLogitsLoss",
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
    "prior_bias",
    "siglip_loss",
    "sigmoid",
    "sigmoid_binary_cross_entropy",
    "sigmoid_focal_loss",
    "softplus",
    "sparse_bce_with_logits",
]

__version__ = "0.2.0"
