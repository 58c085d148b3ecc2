"""Flax NNX modules; `jaxbce` itself never imports Flax."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

import jaxbce
from jaxbce import _checks, _flax, _math, _placement
from jaxbce._head import arguments as _arguments
from jaxbce._head import mesh as _mesh
from jaxbce._reduce import Reduction, ScalarReduction

R = TypeVar("R")

KERNEL_INIT = nnx.initializers.lecun_normal()


class MultiLabelHead(nnx.Module):
    """The last layer of a classifier with very many labels, with its loss and its top labels.

    Use it in place of `flax.nnx.Linear` as the output layer of a multi-label model. Train with
    `head.loss`, or with `head.update` where the gradient of the kernel has no room, and predict
    with `head.top_k`: none holds the [batch, labels] logits.

    Formula: logits = features @ kernel + bias; the loss, the step and the top labels are those of
    `linear_bce_with_logits`, `linear_update` and `linear_top_k`.

    Args:
      in_features: the width D of the features.
      num_labels: the number of labels L.
      use_bias: whether the layer has a bias.
      prior: the base rate of the labels, a number or an array [L], in (0, 1); the bias starts at
        log(prior / (1 − prior)), with which zero features predict it. From counts, without 0 and 1:
        `jax.nn.sigmoid(jaxbce.prior_bias(labels))`. None starts at 0.
      kernel_init: initialiser of the kernel [D, L], also where that is transposed afterwards.
      dtype: in which features and kernel are multiplied; None promotes theirs.
      param_dtype: of kernel and bias. With a kernel in float8 the bias is in float32, because a
        log-odds below −8 would be off by up to a half.
      transpose_kernel: True keeps the kernel as a table [L, D], the shape of an `nnx.Embed` of the
        labels, whose table the head can then share.
      chunk_size: number of labels at a time, as in `linear_bce_with_logits`; None chooses.
      mesh: devices to share the work of the methods; None uses one.
      batch_axis: axis of the mesh over which the rows are sharded; None replicates them.
      label_axis: axis of the mesh over which kernel and bias are sharded, from their creation on;
        None replicates them. `nnx.get_partition_spec` knows it. Where its devices do not divide L,
        the kernel and the bias hold a few more labels, zeros that no method counts or returns.
      rngs: source of the key of the kernel.

    Returns:
      A module: `head(features)` with features [..., D] is the logits [..., L] in float32 (float64
      for float64).

    Raises:
      ValueError: prior is outside (0, 1), of another shape, or given without a bias; features are
        not [..., D]. The methods raise what the functions they call do.

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
        transpose_kernel: bool = False,
        chunk_size: int | None = None,
        mesh: Mesh | None = None,
        batch_axis: str | tuple[str, ...] | None = None,
        label_axis: str | tuple[str, ...] | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        if prior is not None and not use_bias:
            raise ValueError("MultiLabelHead: prior sets the bias, got use_bias=False")
        _checks.check_size("MultiLabelHead", "in_features", in_features)
        _checks.check_size("MultiLabelHead", "num_labels", num_labels)
        _mesh.PlanOptions.checked(
            "MultiLabelHead",
            transpose_kernel,
            chunk_size,
            mesh,
            batch_axis=batch_axis,
            label_axis=label_axis,
        )
        self.in_features = in_features
        self.num_labels = num_labels
        self.dtype = dtype
        self.transpose_kernel = transpose_kernel
        self.chunk_size = chunk_size
        self.mesh = mesh
        self.batch_axis = batch_axis
        self.label_axis = label_axis

        axes, shape = _placement.names_of(label_axis), {} if mesh is None else mesh.shape
        padding = -num_labels % math.prod(shape[axis] for axis in axes)

        product = _math.multiplied_in(param_dtype)
        bias_dtype = param_dtype if product == param_dtype else jnp.float32

        def new_kernel(key: jax.Array) -> jax.Array:
            # JAX draws NaN, or few different numbers, in float8.
            kernel: jax.Array = kernel_init(key, (in_features, num_labels), product)
            kernel = _arguments.padded(kernel.astype(param_dtype), padding)
            return kernel.T if transpose_kernel else kernel

        names = (label_axis, None) if transpose_kernel else (None, label_axis)
        self.kernel: nnx.Param[jax.Array] = _flax.created(new_kernel, names, mesh, rngs.params())
        rate = _rate(prior, num_labels, bias_dtype)

        def new_bias() -> jax.Array:
            return _arguments.padded(_bias(rate, num_labels, bias_dtype), padding)

        self.bias: nnx.Param[jax.Array] | None = (
            _flax.created(new_bias, (label_axis,), mesh) if use_bias else None
        )

    def __call__(self, features: ArrayLike) -> jax.Array:
        """The logits features @ kernel + bias, [..., L]: where there is room for them."""
        features, kernel, bias = self._operands(features)
        dtype = _math.accumulator(features)
        kernel = (kernel.T if self.transpose_kernel else kernel).astype(features.dtype)
        logits = jnp.matmul(features, kernel, preferred_element_type=dtype)
        if bias is not None:
            logits += jnp.expand_dims(bias.astype(dtype), range(logits.ndim - 1))
        if not self._padding():
            return logits
        *by_row, by_label = jax.typeof(logits).sharding.spec
        if self.mesh is not None and by_label is not None:  # explicit axes must divide what is left
            place = NamedSharding(self.mesh, PartitionSpec(*by_row, None))
            logits = jax.sharding.reshard(logits, place)
        return logits[..., : self.num_labels]

    def loss(
        self,
        features: ArrayLike,
        *,
        positives: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        weight: ArrayLike | None = None,
        pos_weight: ArrayLike | None = None,
        label_smoothing: ArrayLike = 0.0,
        where: ArrayLike | None = None,
        ignored: ArrayLike | None = None,
        reduction: Reduction = "mean",
    ) -> jax.Array:
        """The loss of the logits, which are not held.

        Arguments and result are those of `linear_bce_with_logits`: features [..., D], and exactly
        one of positives [..., P] and labels [..., L].
        """
        return self._call(
            jaxbce.linear_bce_with_logits,
            *self._operands(features),
            positives=positives,
            labels=labels,
            weight=weight,
            pos_weight=pos_weight,
            label_smoothing=label_smoothing,
            where=where,
            ignored=ignored,
            reduction=reduction,
        )

    def update(
        self,
        optimizer: nnx.Optimizer[Any],
        features: ArrayLike,
        *,
        loss: Callable[..., jax.Array] | None = None,
        positives: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        per_label: Sequence[ArrayLike] = (),
        weight: ArrayLike | None = None,
        pos_weight: ArrayLike | None = None,
        label_smoothing: ArrayLike = 0.0,
        where: ArrayLike | None = None,
        ignored: ArrayLike | None = None,
        reduction: ScalarReduction = "mean",
        rounding_key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """One step of the optimizer on the parameters, whose gradients are not held.

        The optimizer is an `nnx.Optimizer` of this head, `nnx.Optimizer(head, optax.adam(1e-3),
        wrt=nnx.Param)`; what its `wrt` leaves out stays as it is. The other arguments are those of
        `linear_update`. Parameters and optimizer change in place. Returns the loss and its gradient
        with respect to the features. Loss and gradient are those before the step. It multiplies in
        the wider dtype of parameters and features. A `dtype` narrower than the parameters is an
        error.
        """
        own = {"kernel": self.kernel} | ({} if self.bias is None else {"bias": self.bias})
        tx, opt_state = _flax.taken(optimizer, self, own)
        given, param_dtype = self._checked(features), self.kernel[...].dtype
        dtype = jnp.dtype(self.dtype or given.dtype)
        if self.dtype is not None and self._promoted(dtype, param_dtype) != dtype:
            raise ValueError(
                f"MultiLabelHead: update multiplies in {param_dtype}, the dtype of the parameters, "
                f"got dtype={dtype}; make the head with param_dtype={dtype}, for which there is "
                "rounding_key, or without dtype"
            )
        step = self._call(
            jaxbce.linear_update,
            tx,
            given.astype(dtype),
            {name: variable[...] for name, variable in own.items()},
            opt_state,
            loss=loss,
            positives=positives,
            labels=labels,
            per_label=per_label,
            weight=weight,
            pos_weight=pos_weight,
            label_smoothing=label_smoothing,
            where=where,
            ignored=ignored,
            reduction=reduction,
            rounding_key=rounding_key,
        )
        gradient = step.features_gradient.astype(given.dtype)
        count = jnp.asarray(optimizer.step[...]) + 1
        # All is computed; only now is anything written.
        for name, variable in own.items():
            _flax.put(variable, step.params[name])
        _flax.write(optimizer, jax.tree.leaves(step.opt_state))
        _flax.put(optimizer.step, count)
        return step.loss, gradient

    def update_with_encoder(
        self,
        optimizer: nnx.Optimizer[Any],
        encoder: nnx.Module,
        *inputs: Any,
        wrt: Any = nnx.Param,
        **arguments: Any,
    ) -> tuple[jax.Array, Any]:
        """`update` with the features `encoder(*inputs)`, and the gradients of the encoder.

        Returns the loss and the gradients of what the filter `wrt` selects of the encoder, both
        before the step. Give them to the optimizer of the encoder, as those of
        `nnx.value_and_grad`: `encoder_optimizer.update(encoder, gradients)`. Variables that the
        encoder writes, as its batch statistics, the keys of its dropout or those of an `nnx.Rngs`
        among the inputs, change in place. Plain Python attributes do not. `arguments` are the other
        ones of `update`.
        """
        if not isinstance(encoder, nnx.Module) or not callable(encoder):
            raise TypeError(
                "MultiLabelHead: encoder must be a flax.nnx.Module that makes the features, "
                f"encoder(*inputs), got {type(encoder).__name__}; call another method in the "
                "__call__ of a module that holds it"
            )
        if any(node is self.kernel or node is self.bias for _, node in nnx.iter_graph(encoder)):
            raise ValueError(
                "MultiLabelHead: encoder must have parameters of its own, got one that holds the "
                "kernel or bias of the head; train a shared table with MultiLabelHead.loss and one "
                "optimizer, or pass the part of the model that makes the features"
            )
        if unknown := arguments.keys() - inspect.signature(self.update).parameters.keys():
            raise TypeError(
                f"MultiLabelHead: update has no argument {min(unknown)}, got one of that name; the "
                "encoder takes its inputs by position, encoder(*inputs)"
            )
        targets = {name: arguments.get(name) for name in ("positives", "labels")}
        _checks.check_one_of("MultiLabelHead", **targets)
        # An input may be a module too, as an nnx.Rngs.
        nodes = (encoder, *(each for each in inputs if isinstance(each, nnx.Pytree)))
        selected = nnx.All(wrt, lambda path, _: path[0] == 0)
        structure, weights = nnx.graphdef(nodes), nnx.state(nodes, selected)
        rest = nnx.state(nodes, nnx.Not(selected))
        if not weights:
            raise ValueError(
                "MultiLabelHead: wrt selects nothing of the encoder, got "
                f"{wrt}; use MultiLabelHead.update with the features of a fixed encoder"
            )
        kinds = [leaf.dtype for leaf in jax.tree.leaves(weights)]
        if whole := [kind for kind in kinds if not jnp.issubdtype(kind, jnp.inexact)]:
            raise TypeError(
                f"MultiLabelHead: encoder must have floats in what wrt selects, got {whole[0]}; "
                "hold it in another kind of nnx.Variable, or leave it out of wrt"
            )

        def encode(weights: Any) -> tuple[jax.Array, Any]:
            merged: Any = nnx.merge(structure, weights, rest, copy=True)
            model, *others = merged
            left = iter(others)
            given = [next(left) if isinstance(each, nnx.Pytree) else each for each in inputs]
            return model(*given), nnx.state(merged)

        features, backward, changed = jax.vjp(encode, weights, has_aux=True)
        if not isinstance(features, jax.Array):
            raise TypeError(
                "MultiLabelHead: encoder must return the features alone, got "
                f"{type(features).__name__}; call it in a module that returns them"
            )
        # Traced before the step writes anything: a rule of the encoder may raise.
        jax.eval_shape(backward, self._checked(features))
        loss, slope = self.update(optimizer, features, **arguments)
        nnx.update(nodes, changed)
        (gradients,) = backward(slope)
        return loss, gradients[0]

    def top_k(self, features: ArrayLike, k: int) -> tuple[jax.Array, jax.Array]:
        """The k highest logits and their labels, both [..., k], highest first.

        Arguments and result are those of `linear_top_k`: features [..., D], and k in [1, L].
        """
        return self._call(jaxbce.linear_top_k, *self._operands(features), k=k)

    def _padding(self) -> int:
        """How many labels the kernel holds beside its own, so that the devices divide them."""
        return self.kernel.shape[0 if self.transpose_kernel else 1] - self.num_labels

    def _call(self, function: Callable[..., R], *operands: Any, **arguments: Any) -> R:
        """A function of the head, told of chunks, devices and padding, which it leaves out."""
        names = ("transpose_kernel", "chunk_size", "mesh", "batch_axis", "label_axis")
        options = {name: getattr(self, name) for name in names}
        with _arguments.padding(self._padding()):
            return function(*operands, **arguments, **options)

    def _operands(self, features: ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Features in the dtype of the product, a kernel that is no wider, and the bias."""
        features, kernel = self._checked(features), self.kernel[...]
        dtype = self.dtype or self._promoted(features.dtype, kernel.dtype)
        bias = None if self.bias is None else self.bias[...]
        if self._promoted(dtype, kernel.dtype) != dtype:
            kernel = kernel.astype(dtype)
        return features.astype(dtype), kernel, bias

    @staticmethod
    def _promoted(*dtypes: DTypeLike) -> Any:
        with jax.numpy_dtype_promotion("standard"):  # a user's own setting may refuse it
            return jnp.promote_types(*map(_math.multiplied_in, dtypes))

    def _checked(self, features: ArrayLike) -> jax.Array:
        (features,) = _checks.jit_arguments("MultiLabelHead", features=features)
        features = _checks.floating("MultiLabelHead", "features", features)
        if features.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"MultiLabelHead: features must have shape (..., {self.in_features}), got "
                f"{features.shape}"
            )
        held = self.num_labels + self._padding()
        expected = self.num_labels if self.bias is None else self.bias.shape[0]
        if held < expected or (self.bias is not None and held != expected):
            raise ValueError(
                f"MultiLabelHead: kernel must be of {expected} labels, as the bias is, got {held}; "
                f"a table that the head shares needs as many rows: {self.num_labels} labels, and "
                "what fills up the devices of the mesh"
            )
        return features


def _rate(prior: ArrayLike | None, num_labels: int, dtype: DTypeLike) -> jax.Array | None:
    """The base rate of the labels, in the dtype in which its logit is computed."""
    if prior is None:
        return None
    number = _math.accumulator(jax.ShapeDtypeStruct((), dtype))
    if isinstance(prior, nnx.Variable):
        prior = prior[...]
    if np.shape(prior) not in ((), (num_labels,)):
        raise ValueError(
            f"MultiLabelHead: prior must be one number or have shape ({num_labels},), got "
            f"{np.shape(prior)}"
        )
    if not isinstance(prior, jax.core.Tracer):
        # NumPy, because under `jax.jit` JAX would not compute but trace.
        prior = np.asarray(prior, number)
        if not np.all((prior > 0) & (prior < 1)):
            raise ValueError(
                f"MultiLabelHead: prior must be in (0, 1), got {prior.min()} to {prior.max()}; "
                "base rates without 0 and 1 are jax.nn.sigmoid(jaxbce.prior_bias(labels))"
            )
    return jnp.asarray(prior, number)


def _bias(rate: jax.Array | None, num_labels: int, dtype: DTypeLike) -> jax.Array:
    if rate is None:
        return jnp.zeros(num_labels, dtype)
    return jnp.broadcast_to(jnp.log(rate) - jnp.log1p(-rate), num_labels).astype(dtype)
