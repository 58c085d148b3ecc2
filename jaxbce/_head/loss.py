"""The loss of a chunk of labels: a built-in one, a `jaxbce.Loss`, or a user's function of arrays.

A function of arrays is proven to compute each element of the loss from its own logit and label:
its program is read for several numbers of rows and labels, and in each chunk that is run.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax

from jaxbce import _checks, _math, _program
from jaxbce._loss import Loss
from jaxbce._losses.bce import BCE


@dataclasses.dataclass(frozen=True)
class ChunkLoss:
    """The loss of a chunk: of its logits, its labels and the numbers of its labels."""

    loss: Loss | Callable[..., jax.Array]  # a function takes [rows, chunk] and numbers [chunk]
    per_label: tuple[str, ...] = ()  # what errors call the numbers of its labels
    # What a user's loss does, for one logit or for arrays [2, 3]. It is in the key of a compiled
    # pass: a function whose numbers have changed is compiled anew.
    program: tuple[_program.Equation, ...] = ()
    name: str = ""  # of the public function

    def __call__(self, logits: jax.Array, labels: jax.Array, *per_label: jax.Array) -> jax.Array:
        """All of them are [rows, chunk]."""
        if isinstance(self.loss, Loss):
            given = self.loss.parameters[: len(self.per_label)]
            losses = self.loss.mapped(2, given)(logits, labels, *per_label)
        else:
            rows, size = logits.shape
            _check_sizes(self, rows, size, logits.dtype)
            losses = jax.vmap(self.row)(logits, labels, *per_label)
        return losses.astype(logits.dtype)

    def row(self, logits: jax.Array, labels: jax.Array, *per_label: jax.Array) -> jax.Array:
        """The losses of one row, to be mapped over all.

        Each row has its own gradient of `per_label`, which all rows share. So that gradient can be
        masked before the rows are summed. A sum would let a masked NaN in.
        """
        return self.loss(logits[None], labels[None], *per_label)[0]


def built_in_loss(pos_weight: Any) -> tuple[ChunkLoss, tuple[Any, ...]]:
    """The loss of the logits, and its numbers per label."""
    if pos_weight is None:
        return ChunkLoss(BCE), ()
    return ChunkLoss(BCE, BCE.parameters), (pos_weight,)


def own_loss(name: str, loss: Any, per_label: Any, *arrays: Any) -> ChunkLoss:
    """A user's loss of logits that `arrays` make: one number per logit, of its arguments alone."""
    if not isinstance(per_label, (tuple, list)):
        raise TypeError(
            f"{name}: per_label must be a tuple of arrays, got {type(per_label).__name__}; one "
            "array is (per_label,)"
        )
    if not callable(loss):
        raise TypeError(
            f"{name}: loss must be a function of (logits, labels, *per_label), or a jaxbce.Loss, "
            f"got {type(loss).__name__}; linear_loss takes it first, linear_update as loss=..."
        )
    _checks.check_hashable(name, "loss", loss, "per_label")
    names = tuple(f"per_label[{i}]" for i in range(len(per_label)))
    if isinstance(loss, Loss):
        if len(per_label) > len(loss.parameters):
            raise ValueError(
                f"{name}: per_label must be the parameters of the loss, of which it has "
                f"{len(loss.parameters)}, got {len(per_label)} arrays; name them in jaxbce.Loss"
            )
        given, rest = loss.parameters[: len(per_label)], loss.parameters[len(per_label) :]
        arguments = loss.arguments(name)
        if missing := [own for own in rest if arguments[own].default is inspect.Parameter.empty]:
            raise TypeError(
                f"{name}: per_label must hold the parameter {missing[0]} of this loss, got "
                f"{len(per_label)} arrays; pass per_label=({', '.join(loss.parameters)},)"
            )
        program = loss.program(name, given, *arrays)
        return ChunkLoss(loss, names, program, name)
    dtype = _math.accumulator(*arrays)
    program = _read(name, loss, 2, 3, len(names), dtype)
    _check_elements(name, loss, len(names), dtype, program)
    return ChunkLoss(loss, names, program, name)


def _read(
    name: str, loss: Any, rows: int, labels: int, numbers: int, dtype: Any
) -> tuple[_program.Equation, ...]:
    """The program of a function of arrays, for so many of them."""
    shapes = [(rows, labels)] * 2 + [(labels,)] * numbers
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    remedy = "pass the value as one of per_label, jax.numpy.full(labels, value)"
    with _checks.value_checks(False):  # a check of values looks at all of them
        chunk = (
            f"a function of a chunk of any size, as {labels} labels, with its arrays by per_label"
        )
        return _program.of_loss(f"{name}: loss", loss, arrays, remedy, chunk)


@functools.lru_cache(maxsize=256)  # a pass is traced several times
def _check_sizes(loss: ChunkLoss, rows: int, labels: int, dtype: Any) -> None:
    """Refuses a function that does something else for these sizes than for those of the proof.

    It runs row by row, so it must also do the same for one row as for all.
    """
    read = functools.partial(_read, loss.name, loss.loss)
    one_row, all_ = (read(each, labels, len(loss.per_label), dtype) for each in (1, rows))
    if not _program.is_same(loss.program, all_, exact=rows != 1 and labels != 1):
        raise _mixes(loss.name, "labels or rows", "what depends on their number")
    if not _program.is_same(one_row, all_, exact=False):
        raise _mixes(loss.name, "rows", "what depends on their number")


@functools.lru_cache(maxsize=256)
def _check_elements(
    name: str, loss: Callable[..., jax.Array], numbers: int, dtype: Any, program: Any
) -> None:
    """Proves that a function of arrays treats each element apart; `program` is what it does now."""

    def by_row(logits: jax.Array, labels: jax.Array, *per_label: jax.Array) -> jax.Array:
        # Of the numbers that all rows share there is no derivative: it would add up the rows.
        return loss(logits, labels, *jax.lax.stop_gradient(per_label))

    for axis, fn, few, more in (("rows", by_row, (2, 3), (5, 3)), ("labels", loss, (1, 3), (1, 7))):
        try:
            mixing = _program.what_mixes(
                *(_read(name, fn, *size, numbers, dtype) for size in (few, more))
            )
        except (TypeError, ValueError) as error:
            mixing = f"an array of another size ({error.__cause__ or error})"
        if mixing is not None:
            raise _mixes(name, axis, mixing or "what depends on their number")


def _mixes(name: str, axis: str, mixing: str) -> ValueError:
    return ValueError(
        f"{name}: loss is not known to treat each logit apart, got a function that does across "
        f"{axis}: {mixing}; write it for one logit and one label, as jaxbce.Loss(function), which "
        "treats each apart"
    )
