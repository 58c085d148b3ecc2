"""Flax NNX modules; `jaxbce` itself never imports Flax."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

import jaxbce

KERNEL_INIT = nnx.initializers.lecun_normal()


class MultiLabelHead(nnx.Module):
    """The last layer of a classifier with very many labels, with its loss and its top labels.

    Use it in place of `flax.nnx.Linear` as the output layer of a multi-label model. Train with
    `head.loss` and predict with `head.top_k`: neither holds the [batch, labels] logits.

    Formula: logits = features @ kernel + bias; the loss and the top labels are those of
    `linear_bce_with_logits` and `linear_top_k`.

    Args:
      in_features: the width D of the features.
      num_labels: the number of labels L.
      use_bias: whether the layer has a bias.
      prior: the base rate of the labels, a number or an array [L], in (0, 1); the bias starts at
        log(prior / (1 − prior)), with which zero features predict it. From counts, without 0 and 1:
        `jax.nn.sigmoid(jaxbce.prior_bias(labels))`. None starts at 0.
      kernel_init: initialiser of the kernel [D, L].
      dtype: in which features and kernel are multiplied; None promotes theirs.
      param_dtype: of kernel and bias.
      chunk_size: number of labels at a time, as in `linear_bce_with_logits`; None chooses.
      rngs: source of the key of the kernel.

    Returns:
      A module: `head(features)` with features [..., D] is the logits [..., L] in float32 (float64
      for float64).

    Raises:
      ValueError: prior is outside (0, 1), of another shape, or given without a bias; features are
        not [..., D]. The methods raise what the functions they call do.

    Edge values: as `linear_bce_with_logits`.

    Differentiable: with respect to the features and the parameters.

    Example:
      >>> import jax.numpy as jnp, jaxbce.nnx
      >>> from flax import nnx
      >>> head = jaxbce.nnx.MultiLabelHead(3, 1000, prior=0.01, rngs=nnx.Rngs(0))
      >>> print(round(float(head.loss(jnp.zeros((2, 3)), positives=jnp.array([[7], [8]]))), 4))
      0.0146
      >>> logits, labels = head.top_k(jnp.zeros((2, 3)), 2)
      >>> print(labels)
      [[0 1]
       [0 1]]

    Source: `flax.nnx.Linear`, whose arguments it shares.
    """

    def __init__(
        self,
        in_features: int,
        num_labels: int,
        *,
        use_bias: bool = True,
        prior: ArrayLike | None = None,
        kernel_init: Callable[..., Any] = KERNEL_INIT,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        chunk_size: int | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        if prior is not None and not use_bias:
            raise ValueError("MultiLabelHead: prior sets the bias, got use_bias=False")
        self.in_features = in_features
        self.num_labels = num_labels
        self.dtype = dtype
        self.chunk_size = chunk_size
        shape = (in_features, num_labels)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(_bias(prior, num_labels, param_dtype)) if use_bias else None

    def __call__(self, features: ArrayLike) -> jax.Array:
        """The logits features @ kernel + bias, [..., L]: where there is room for them."""
        features, kernel, bias = self._operands(features)
        dtype = jnp.float64 if features.dtype == jnp.float64 else jnp.float32
        logits = jnp.matmul(features, kernel, preferred_element_type=dtype)
        if bias is None:
            return logits
        return logits + jnp.expand_dims(bias.astype(dtype), range(logits.ndim - 1))

    def loss(
        self,
        features: ArrayLike,
        *,
        positives: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        weight: ArrayLike | None = None,
        pos_weight: ArrayLike | None = None,
        label_smoothing: ArrayLike = 0.0,
        reduction: str = "mean",
    ) -> jax.Array:
        """The loss of the logits, which are not held.

        Arguments and result are those of `linear_bce_with_logits`: features [..., D], and exactly
        one of positives [..., P] and labels [..., L].
        """
        return jaxbce.linear_bce_with_logits(
            *self._operands(features),
            positives=positives,
            labels=labels,
            weight=weight,
            pos_weight=pos_weight,
            label_smoothing=label_smoothing,
            reduction=reduction,
            chunk_size=self.chunk_size,
        )

    def top_k(self, features: ArrayLike, k: int) -> tuple[jax.Array, jax.Array]:
        """The k highest logits and their labels, both [..., k], highest first.

        Arguments and result are those of `linear_top_k`: features [..., D], and k in [1, L].
        """
        return jaxbce.linear_top_k(*self._operands(features), k=k, chunk_size=self.chunk_size)

    def _operands(self, features: ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Features and kernel in the dtype of their product, and the bias."""
        features, kernel = jnp.asarray(features), self.kernel[...]
        if features.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"MultiLabelHead: features must have shape (..., {self.in_features}), got "
                f"{features.shape}"
            )
        with jax.numpy_dtype_promotion("standard"):  # a user's own setting may refuse it
            dtype = self.dtype or jnp.promote_types(features.dtype, kernel.dtype)
        bias = None if self.bias is None else self.bias[...]
        return features.astype(dtype), kernel.astype(dtype), bias


def _bias(prior: ArrayLike | None, num_labels: int, dtype: DTypeLike) -> jax.Array:
    if prior is None:
        return jnp.zeros(num_labels, dtype)
    rate = jnp.asarray(prior, jnp.float64 if dtype == jnp.float64 else jnp.float32)
    if rate.shape not in ((), (num_labels,)):
        raise ValueError(
            f"MultiLabelHead: prior must be one number or have shape ({num_labels},), got "
            f"{rate.shape}"
        )
    if not isinstance(rate, jax.core.Tracer) and not bool(jnp.all((rate > 0) & (rate < 1))):
        raise ValueError(
            f"MultiLabelHead: prior must be in (0, 1), got {jnp.min(rate)} to {jnp.max(rate)}; "
            "base rates without 0 and 1 are jax.nn.sigmoid(jaxbce.prior_bias(labels))"
        )
    return jnp.broadcast_to(jnp.log(rate) - jnp.log1p(-rate), num_labels).astype(dtype)
