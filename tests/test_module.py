"""`BCEWithLogitsLoss`: an immutable constant that behaves as the function."""

import copy
import dataclasses
import functools
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbce

LOGITS = np.array([[2.0, -1.0, 0.5]], np.float32)
LABELS = np.array([[1, 0, 1]], np.float32)
OPTIONS = {"weight": np.float32(2), "pos_weight": jnp.array([1.0, 2.0, 3.0]), "reduction": "sum"}


def test_equals_the_function():
    loss = jaxbce.BCEWithLogitsLoss(**OPTIONS, label_smoothing=0.1)
    expected = jaxbce.bce_with_logits(LOGITS, LABELS, **OPTIONS, label_smoothing=0.1)
    assert loss(LOGITS, LABELS) == expected
    masked = loss(LOGITS, LABELS, where=np.array([[True, False, True]]))
    assert masked < expected


def test_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        jaxbce.BCEWithLogitsLoss().reduction = "sum"


def test_its_arrays_are_copies_that_nobody_changes():
    weight = np.ones(3, np.float32)
    loss = jaxbce.BCEWithLogitsLoss(weight)
    weight[:] = 2
    assert (loss.weight == 1).all()
    with pytest.raises(ValueError, match="read-only"):
        loss.weight[0] = 2


# Values that an object may hold, and others of the same shape.
VALUES = {
    "None": (None, 1),
    "number": (2.0, 2.5),
    "kind of number": (1, True),
    "NumPy scalar": (np.float32(2), np.float32(2.5)),
    "host": (np.arange(3.0, dtype=np.float32), np.arange(1.0, 4, dtype=np.float32)),
    "device": (jnp.arange(3.0), jnp.arange(1.0, 4)),
    "bfloat16": (jnp.ones(3, jnp.bfloat16), jnp.zeros(3, jnp.bfloat16)),
    "dtype": (np.ones(3, np.float32), np.ones(3, np.int32)),
    "shape": (np.ones(3, np.float32), np.ones((1, 3), np.float32)),
    "NaN": (np.float32([1, np.nan, 1]), np.ones(3, np.float32)),
}
every_value = pytest.mark.parametrize(("value", "other"), VALUES.values(), ids=list(VALUES))
every_weight = pytest.mark.parametrize("argument", ["weight", "pos_weight"])


@every_weight
@every_value
def test_equal_by_value(value, other, argument):
    loss, equal, unequal = (
        jaxbce.BCEWithLogitsLoss(**{argument: copy.copy(each)}) for each in (value, value, other)
    )
    assert loss == equal
    assert hash(loss) == hash(equal)
    assert loss != unequal
    assert loss not in (jaxbce.BCEWithLogitsLoss(reduction="sum"), None, 2)


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss)), dataclasses.replace],
    ids=["copy", "deepcopy", "pickle", "replace"],
)
@every_value
def test_a_copy_is_equal(value, other, copied):
    loss = jaxbce.BCEWithLogitsLoss(value, other, label_smoothing=0.1)
    hash(loss)
    assert copied(loss) == loss
    assert repr(copied(loss)) == repr(loss)
    assert repr(copied(jaxbce.BCEWithLogitsLoss())) == "BCEWithLogitsLoss()"
    if isinstance(loss.weight, np.ndarray):
        assert not copied(loss).weight.flags.writeable


def test_jit_compiles_once_for_equal_objects():
    traced = []

    @jax.jit
    def call(loss, logits):
        traced.append(loss)
        return loss(logits, LABELS)

    results = [call(jaxbce.BCEWithLogitsLoss(**OPTIONS), LOGITS) for _ in range(2)]
    assert len(traced) == 1
    assert results[0] == results[1] == jaxbce.bce_with_logits(LOGITS, LABELS, **OPTIONS)
    call(jaxbce.BCEWithLogitsLoss(**OPTIONS | {"pos_weight": 3.0}), LOGITS)
    assert len(traced) == 2


def test_crosses_transformations():
    loss = jaxbce.BCEWithLogitsLoss(**OPTIONS)
    expected = loss(LOGITS, LABELS)
    assert not jax.tree.leaves(loss)
    assert jax.grad(lambda loss: loss(LOGITS, LABELS))(loss) == loss
    values = jax.vmap(lambda loss, x: loss(x, LABELS), (None, 0))(loss, np.stack([LOGITS] * 2))
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    _, total = jax.lax.scan(lambda loss, x: (loss, loss(x, LABELS)), loss, LOGITS[None])
    np.testing.assert_allclose(total[0], expected, rtol=1e-6)


@every_weight
def test_a_traced_array_is_a_constant(argument):
    def total(array, logits):
        return jaxbce.BCEWithLogitsLoss(**{argument: array})(logits, LABELS)

    array = jnp.array([1.0, 2.0, 3.0])
    for call in (total, jax.jit(total)):
        np.testing.assert_allclose(call(array, LOGITS), total(np.array(array), LOGITS), rtol=1e-6)
        by_array, by_logits = jax.grad(call, argnums=(0, 1))(array, LOGITS)
        assert not by_array.any()
        assert by_logits.any()


@pytest.mark.parametrize(
    "cross",
    [
        lambda loss: jax.jit(lambda loss: loss(LOGITS, LABELS))(loss),
        lambda loss: jax.grad(lambda loss: loss(LOGITS, LABELS))(loss),
        lambda loss: loss,
        lambda loss: loss == jaxbce.BCEWithLogitsLoss(),
    ],
    ids=["into jit", "into grad", "out of jit", "compared"],
)
@every_weight
def test_a_traced_array_crosses_nothing(cross, argument):
    message = (
        rf"{argument} must be known .* got a traced float32\[3\]; pass {argument} to jaxbce.bce"
    )
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda array: cross(jaxbce.BCEWithLogitsLoss(**{argument: array})))(np.ones(3))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "BCEWithLogitsLoss()"),
        ({"weight": 2.0}, "BCEWithLogitsLoss(weight=2.0)"),
        ({"reduction": "".join(["me", "an"]), "label_smoothing": 0}, "BCEWithLogitsLoss()"),
        (
            {"pos_weight": np.ones(14, np.float32), "label_smoothing": 0.1},
            "BCEWithLogitsLoss(pos_weight=float32[14], label_smoothing=0.1)",
        ),
    ],
    ids=["defaults", "number", "equal to the defaults", "array"],
)
def test_repr(options, text):
    assert repr(jaxbce.BCEWithLogitsLoss(**options)) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "average"}, "BCEWithLogitsLoss: reduction must be one of mean"),
        ({"label_smoothing": 2.0}, r"BCEWithLogitsLoss: label_smoothing must be in \[0, 1\]"),
        ({"weight": "1"}, "BCEWithLogitsLoss: weight must be an array or a number, got str"),
        ({"pos_weight": [1.0]}, "BCEWithLogitsLoss: pos_weight must be .* got list; wrap it"),
    ],
    ids=["reduction", "label_smoothing", "weight", "pos_weight"],
)
def test_options_are_checked_at_once(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        jaxbce.BCEWithLogitsLoss(**options)


# --- in what an optimizer trains -----------------------------------------------------------------


class EquinoxModel(eqx.Module):
    layer: eqx.nn.Linear
    loss: jaxbce.BCEWithLogitsLoss

    def __init__(self, loss):
        self.layer, self.loss = eqx.nn.Linear(3, 3, key=jax.random.key(0)), loss

    def total(self):
        return self.loss(jax.vmap(self.layer)(LOGITS), LABELS)


def train_equinox(loss, optimizer, steps):
    model = EquinoxModel(loss)
    state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model, state):
        value, grads = eqx.filter_value_and_grad(EquinoxModel.total)(model)
        updates, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state, value

    values = []
    for _ in range(steps):
        model, state, value = step(model, state)
        values.append(value)
    return model.loss, values


def train_dict(loss, optimizer, steps):
    tree = {"kernel": jnp.zeros((3, 3)), "loss": loss}
    state = optimizer.init(tree)

    @jax.jit
    def step(tree, state):
        value, grads = jax.value_and_grad(
            lambda tree: tree["loss"](LOGITS @ tree["kernel"], LABELS)
        )(tree)
        updates, state = optimizer.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state, value

    values = []
    for _ in range(steps):
        tree, state, value = step(tree, state)
        values.append(value)
    return tree["loss"], values


def train_flax(loss, optimizer, steps, kept=lambda loss: loss):
    class Model(nnx.Module):
        def __init__(self):
            self.layer, self.loss = nnx.Linear(3, 3, rngs=nnx.Rngs(0)), kept(loss)

    model = Model()
    optimizer = nnx.Optimizer(model, optimizer, wrt=...)  # of everything that it has

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(
            lambda model: model.loss(model.layer(LOGITS), LABELS), argnums=nnx.DiffState(0, ...)
        )(model)
        optimizer.update(model, grads)
        return value

    values = [step(model, optimizer) for _ in range(steps)]
    return model.loss, values


TRAIN = {
    "equinox": train_equinox,
    "dict": train_dict,
    "nnx": train_flax,
    "nnx.data": functools.partial(train_flax, kept=nnx.data),
}
OPTIMIZERS = {
    "sgd": optax.sgd(0.3),
    "adam": optax.adam(0.3),
    "adamw": optax.adamw(0.3, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
@pytest.mark.parametrize("train", TRAIN.values(), ids=list(TRAIN))
def test_an_optimizer_leaves_its_arrays_alone(train, optimizer):
    loss = jaxbce.BCEWithLogitsLoss(weight=jnp.full(3, 2.0), pos_weight=jnp.array([1.0, 2.0, 3.0]))
    before = [np.array(array) for array in (loss.weight, loss.pos_weight)]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        trained, values = train(loss, optimizer, 5)
    np.testing.assert_array_equal([trained.weight, trained.pos_weight], before)
    assert 0 < values[-1] < values[0]
