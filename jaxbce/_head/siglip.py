"""The pairwise sigmoid loss of two sets of embeddings: a head whose kernel is one of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jaxbce import _checks, _math, _placement, _reduce
from jaxbce._head import chunks
from jaxbce._head.loss import ChunkLoss
from jaxbce._head.mesh import Devices
from jaxbce._head.ring import OnRing
from jaxbce._losses.bce import BCE


def siglip_loss(
    image_embeddings: ArrayLike,
    text_embeddings: ArrayLike,
    log_scale: ArrayLike,
    bias: ArrayLike,
    *,
    positives: ArrayLike | None = None,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
    axis: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """The pairwise sigmoid loss of images and their texts, without the matrix of all pairs.

    Use it to train two encoders so that image i matches text i and no other, or the texts that
    `positives` names, with batches whose [batch, batch] logits would not fit.

    Formula, with z = exp(log_scale) · image[i] · text[j] + bias:

      loss = 1 / batch · Σᵢ Σⱼ softplus(−z where j belongs to i, z elsewhere)

    The divisor is the number of rows, not of pairs.

    Args:
      image_embeddings: float array [batch, D], usually of unit length.
      text_embeddings: float array [batch, D]; row i belongs to image i, unless positives are given.
      log_scale: one number, of shape (), (1,) or (1, 1): the logarithm of the inverse temperature;
        the paper starts at log 10. Code that passes the temperature itself passes its logarithm.
      bias: one number, of shape (), (1,) or (1, 1); the paper starts at −10. With p = 1 / batch the
        share of pairs that match, log(p / (1 − p)) starts at a loss that already knows p.
      positives: integer array [batch, P], the rows of the texts that belong to each image, padded
        with -1; None is the row of the image itself.
      chunk_size: number of texts at a time; None chooses.
      mesh: devices to share the work; None uses one.
      axis: axis of the mesh, or a tuple of axes, over which images and texts are sharded. Texts
        and their gradients travel from device to device, so that each holds its own rows and those
        of one other, however many devices there are.

    Returns:
      The loss, a scalar in float32 (float64 where an embedding is).

    Raises:
      TypeError: an embedding is not floating-point, positives not integer, or an argument is not an
        array or a number.
      ValueError: a shape does not fit, the axis of the mesh does not exist or does not divide the
        batch, or chunk_size is not valid.

    Edge values: an empty batch gives 0. A positive outside [0, batch) is padding, duplicates count
    once.

    Differentiable: with respect to both embeddings, log_scale and bias, each in its own dtype and
    shape, in reverse mode; forward over reverse and reverse over reverse too.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> loss = jaxbce.siglip_loss(jnp.eye(2), jnp.eye(2), jnp.log(10.0), -10.0)
      >>> print(round(float(loss), 4))
      0.6932

    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training".
    """
    name = "siglip_loss"
    devices = Devices.named(name, True, chunk_size, mesh, axis=axis)
    arrays = _checks.jit_arguments(
        name,
        image_embeddings=image_embeddings,
        text_embeddings=text_embeddings,
        log_scale=log_scale,
        bias=bias,
        positives=positives,
    )
    return _siglip(*arrays, name=name, devices=devices)


@_placement.compiled("name", "devices", result=_placement.replicated)
def _siglip(
    image_embeddings: Any,
    text_embeddings: Any,
    log_scale: Any,
    bias: Any,
    positives: Any,
    *,
    name: str,
    devices: Devices,
) -> jax.Array:
    images = _checks.floating(name, "image_embeddings", image_embeddings)
    if images.ndim != 2:
        raise ValueError(
            f"{name}: image_embeddings must have shape (batch, width), got {images.shape}"
        )
    texts = _checks.floating(name, "text_embeddings", text_embeddings)
    texts = _checks.shaped(name, "text_embeddings", texts, images.shape, "(batch, width)")
    log_scale = _checks.number(name, "log_scale", log_scale, most_axes=2)
    bias = _checks.number(name, "bias", bias, most_axes=2)
    dtype = _math.accumulator(images, texts)
    batch = images.shape[0]
    if positives is None:
        positives = jnp.arange(batch, dtype=jnp.int32)[:, None]
    positives = _checks.positives(
        name, positives, batch, rows_of=("image_embeddings", images.shape)
    )
    operands = chunks.Operands(
        features=images.astype(dtype) * _math.exp(log_scale.astype(dtype)),
        kernel=texts,
        bias=jnp.broadcast_to(bias.astype(dtype), batch),
        positives=positives,
        row_factor=jnp.full(batch, _reduce.one_over(batch, dtype)),
    )
    plan = devices.over(name, batch, batch, loss=ChunkLoss(BCE), kind=OnRing)
    return chunks.total_loss(plan, _placement.vary_together(operands))
