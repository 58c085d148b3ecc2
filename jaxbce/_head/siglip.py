"""The pairwise sigmoid loss of two sets of embeddings: a head whose kernel is one of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jaxbce import _checks, _math, _placement, _reduce
from jaxbce._head import arguments, chunks
from jaxbce._head.loss import ChunkLoss
from jaxbce._head.mesh import PlanOptions
from jaxbce._head.ring import RingPlan
from jaxbce._labels.ids import checked_ids
from jaxbce._losses.bce import BCE


def siglip_loss(
    image_embeddings: ArrayLike,
    text_embeddings: ArrayLike,
    log_scale: ArrayLike,
    bias: ArrayLike,
    *,
    positives: ArrayLike | None = None,
    ignored: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    text_bias: ArrayLike | None = None,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
    axis: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """The pairwise sigmoid loss of images and their texts, without the matrix of all pairs.

    Use it to train two encoders so that image i matches text i and no other, or the texts that
    `positives` names, with batches whose [batch, texts] logits would not fit. The towers need not
    be of images and texts: users and items, or questions and answers, are trained in the same way.

    Formula, with z = exp(log_scale) · image[i] · text[j] + bias + text_bias[j]:

      loss = 1 / batch · Σᵢ weight[i] · Σⱼ softplus(−z where j belongs to i, z elsewhere)

    The inner sum leaves out the texts that image i ignores. The divisor is the number of images,
    not of pairs.

    Args:
      image_embeddings: float array [batch, D], usually of unit length.
      text_embeddings: float array [texts, D]; row i belongs to image i, unless positives are given.
        There may be more texts than images. The rest are negatives of every image.
      log_scale: one number, of shape (), (1,) or (1, 1): the logarithm of the inverse temperature;
        the paper starts at log 10. If your code has the scale, 1 / temperature, pass its logarithm.
      bias: one number, of shape (), (1,) or (1, 1); the paper starts at −10. With p = 1 / batch the
        share of pairs that match, a bias of log(p / (1 − p)) starts at the right share of matches.
      positives: integer array [batch, P], the rows of the texts that belong to each image, padded
        with -1; None is the row of the image itself.
      ignored: integer array [batch, I], the rows of the texts that each image leaves out, padded
        with -1: duplicates of its own text, or items that only happen to be in the batch. A
        positive that is ignored is left out too.
      weight: real array [batch], which multiplies the loss of each image; None is 1. The divisor
        stays the number of images.
      text_bias: float array [texts], added to every logit of a text; None is 0. For items that are
        sampled with probability q it is −log q.
      chunk_size: number of texts at a time; None chooses.
      mesh: devices to share the work; None uses one.
      axis: axis of the mesh, or a tuple of axes, over which images and texts are sharded. Texts
        and their gradients travel from device to device, so that each holds its own rows and those
        of one other, however many devices there are.

    Returns:
      The loss, a scalar in float32 (float64 where an embedding is).

    Raises:
      TypeError: an embedding or text_bias is not floating-point, positives or ignored are not
        integer, or an argument is not an array or a number.
      ValueError: a shape does not fit, there are fewer texts than images, the axis of the mesh does
        not exist or does not divide images and texts, or chunk_size is not valid.

    Edge values: an empty batch gives 0. An id outside [0, texts) is padding, duplicates count once.
    What is ignored, or not finite with a weight of 0, reaches neither the loss nor a gradient.

    Differentiable: with respect to both embeddings, log_scale, bias, weight and text_bias, each in
    its own dtype and shape, in reverse mode; forward over reverse and reverse over reverse too.

    Example:
      >>> import jax.numpy as jnp, jaxbce
      >>> loss = jaxbce.siglip_loss(jnp.eye(2), jnp.eye(2), jnp.log(10.0), -10.0)
      >>> print(round(float(loss), 4))
      0.6932

    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training"; for text_bias, Yi et
    al. 2019, "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations".
    """
    name = "siglip_loss"
    options = PlanOptions.checked(name, True, chunk_size, mesh, axis=axis)
    arrays = _checks.jit_arguments(
        name,
        image_embeddings=image_embeddings,
        text_embeddings=text_embeddings,
        log_scale=log_scale,
        bias=bias,
        positives=positives,
        ignored=ignored,
        weight=weight,
        text_bias=text_bias,
    )
    return _siglip(*arrays, name=name, options=options)


@_placement.compiled(result=_placement.replicated)
def _siglip(
    image_embeddings: Any,
    text_embeddings: Any,
    log_scale: Any,
    bias: Any,
    positives: Any,
    ignored: Any,
    weight: Any,
    text_bias: Any,
    *,
    name: str,
    options: PlanOptions,
) -> jax.Array:
    images = _checks.floating(name, "image_embeddings", image_embeddings)
    if images.ndim != 2:
        raise ValueError(
            f"{name}: image_embeddings must have shape (batch, width), got {images.shape}"
        )
    texts = _checks.floating(name, "text_embeddings", text_embeddings)
    if texts.ndim != 2 or texts.shape[1] != images.shape[1]:
        raise ValueError(
            f"{name}: text_embeddings must have shape (texts, width) with the width of "
            f"image_embeddings {images.shape}, got {texts.shape}; project both to one width"
        )
    batch, num_texts = images.shape[0], texts.shape[0]
    if num_texts < batch:
        raise ValueError(
            f"{name}: text_embeddings must have at least as many rows as image_embeddings, got "
            f"{num_texts} texts and {batch} images; append texts of another batch, or repeat a "
            "text that images share, with its other copies in ignored"
        )
    log_scale = _checks.number(name, "log_scale", log_scale, most_axes=2)
    bias = _checks.number(name, "bias", bias, most_axes=2)
    dtype = _math.accumulator(images, texts)
    bias_of_text = jnp.broadcast_to(bias.astype(dtype), num_texts)
    if text_bias is not None:
        text_bias = _checks.floating(name, "text_bias", text_bias)
        text_bias = _checks.shaped(name, "text_bias", text_bias, (num_texts,), "(texts,)")
        bias_of_text += text_bias.astype(dtype)
    if weight is not None:
        weight = _checks.shaped(name, "weight", weight, (batch,), "(batch,)").astype(dtype)
    rows_of = ("image_embeddings", images.shape)
    if ignored is not None:
        ignored = checked_ids(name, ignored, num_texts, argument="ignored", rows_of=rows_of)
    num_kept = _reduce.num_kept(None, ignored, batch, num_texts, dtype)
    row_kept = None if num_kept is None else num_kept != 0
    if positives is None:
        positives = jnp.arange(batch, dtype=jnp.int32)[:, None]
    row_counted = _reduce.counted(weight, row_kept)
    positives = checked_ids(name, positives, num_texts, rows_of=rows_of, keep=row_counted)
    # Before and after the scale, which could make an infinite number of a finite one.
    images, weight = arguments.without_unused_rows(images, weight, row_kept)
    scaled = images.astype(dtype) * _math.exp(log_scale.astype(dtype))
    scaled, weight = arguments.without_unused_rows(scaled, weight, row_kept)
    operands = chunks.Operands(
        features=scaled,
        kernel=texts,
        bias=bias_of_text,
        positives=positives,
        ignored=ignored,
        row_factor=_reduce.row_factor(weight, None, (batch,), num_texts, dtype, "batchmean"),
        weightless=None if weight is None else weight == 0,
    )
    plan = options.plan(name, batch, num_texts, loss=ChunkLoss(BCE), kind=RingPlan)
    return chunks.total_loss(plan, _placement.vary_together(operands))
