"""`checked`: a function with the values it gives to jaxbce checked."""

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
from jax.experimental import checkify

from jaxbce import _checks

P = ParamSpec("P")
R = TypeVar("R")


def checked(fn: Callable[P, R]) -> Callable[P, R]:
    """Returns `fn` with the values that jaxbce functions receive inside it checked.

    Use it while debugging, around any function that calls jaxbce: a training step, its gradient,
    under `jax.jit` or `jax.vmap`. Without it no check is traced and none costs anything.

    What is checked: kept labels and probabilities lie in [0, 1] and are not NaN; `label_smoothing`
    lies in [0, 1]; `pos_weight` is not negative; positives and ignored are label ids, or -1 for
    padding, and fit into `max_positives`.

    Args:
      fn: a function of arrays, or pytrees of arrays, that returns the same. Flax NNX modules among
        its arguments change as they do without `checked`, and stay as they were where a check
        fails. A module that fn holds and does not get cannot change.

    Returns:
      A function of the same arguments and result. It is traced at every call, so keep it out of the
      final training loop. It goes outside `jax.jit`: `checked(jax.jit(fn))`.

    Raises:
      ValueError: when the returned function is called: the first failed check, with the name of the
        jaxbce function, the argument and the offending value; also for an integer that JAX would
        cut to 32 bits, and inside a transformation.

    Edge values: what `where` masks, or a weight of 0 drops, may hold anything and is not checked.

    Differentiable: yes, `checked(jax.grad(loss))`. In a loop that is differentiated JAX drops the
    checks: of a loss with a `jax.lax.scan` in it, check the loss.

    Example:
      >>> import jax, jaxbce
      >>> loss = jaxbce.checked(jax.jit(jaxbce.bce_with_logits))
      >>> loss(jax.numpy.zeros(2), jax.numpy.array([0.0, 2.0]))
      Traceback (most recent call last):
        ...
      ValueError: bce_with_logits: labels must be in [0, 1], got 2.0...

    Source: `jax.experimental.checkify`.
    """

    @functools.wraps(fn)
    def with_checks(*args: P.args, **kwargs: P.kwargs) -> R:
        if _checks.values_are_checked():
            return fn(*args, **kwargs)
        for values in jax.tree.leaves((args, kwargs)):
            _refuse_traced(values)
            _checks.check_narrowing("checked", "an argument", values)
        if hasattr(sys.modules.get("flax.nnx"), "Pytree"):  # else there are no modules
            flax = importlib.import_module("jaxbce._flax")
            result: R = flax.on_copies(_run, fn, args, kwargs)
            return result
        return _run(fn, *args, **kwargs)

    return with_checks


def _run(fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    with _checks.value_checks(True):
        error, result = checkify.checkify(fn)(*args, **kwargs)
    for outcome in jax.tree.leaves(error):
        _refuse_traced(outcome)
    try:
        error.throw()
    except checkify.JaxRuntimeError as failure:
        raise ValueError(str(failure).removesuffix(" (`check` failed)")) from None
    return result


def _refuse_traced(value: Any) -> None:
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            "checked: it goes outside of jax.jit, jax.grad and every other transformation, got a "
            "traced call; write checked(jax.jit(fn)) or checked(jax.grad(fn))"
        )
