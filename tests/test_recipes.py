"""The recipes of the manual, each against the formula of its source: NumPy in float64."""

import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads import assert_close
from test_docs import ROOT, blocks, run

import jaxbce

RNG = np.random.default_rng(0)
ROWS, LABELS, EXAMPLES = 6, 4, 1000
HOW_TO = ROOT / "docs/how-to"
CASES = {}


def drawn(*shape, scale=2.0):
    """Numbers that float32 holds exactly, in float64."""
    return RNG.normal(0, scale, shape).astype(np.float32).astype(float)


def sections(page: pathlib.Path) -> dict[str, str]:
    parts = re.split(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def recipe(heading, page="recipes"):
    """The names that the last block of this section defines."""
    return run(blocks("python", sections(HOW_TO / f"{page}.md")[heading])[-1])


def case(heading, name, *arguments, moving=(0,), **options):
    """Adds a formula for the function `name`, which is differentiated by the arguments `moving`."""

    def add(formula):
        CASES[heading] = name, formula, arguments, moving, options
        return formula

    return add


def sigma(x):
    return 1 / (1 + np.exp(-x))


def cross_entropy(x, y):
    return -(y * np.log(sigma(x)) + (1 - y) * np.log(sigma(-x)))


X, Y = drawn(ROWS, LABELS), RNG.integers(0, 2, (ROWS, LABELS)).astype(float)
RANKS = np.array([0, 1, 2, 3, 4, 4])
CLASSES = np.array([0, 3, 1, 1, 2, 0])
COUNTS = np.array([700.0, 90.0, 10.0, 2.0])
GAPS = np.where(drawn(ROWS, LABELS) > 1, 255, Y).astype(np.uint8)
QUALITY = np.where(Y == 1, RNG.uniform(0.1, 1, Y.shape).astype(np.float32).astype(float), 0)
PAIRS = tuple(drawn(4, ROWS))
TOKENS = np.array([3, 5, 9, 2, 7, 4])


@case("Reward model", "reward_loss", *PAIRS[:2], 0.5, moving=(0, 1))
def _(chosen, rejected, margin):
    return -np.log(sigma(chosen - rejected - margin)).mean()


@case("DPO and cDPO", "dpo_loss", *PAIRS, moving=(0, 1, 2, 3), beta=0.5, epsilon=0.1)
def _(chosen, rejected, reference_chosen, reference_rejected, beta, epsilon):
    h = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return (-(1 - epsilon) * np.log(sigma(h)) - epsilon * np.log(sigma(-h))).mean()


MOVED = PAIRS[2] + 3  # a mean above 0; it is detached: no gradient goes to it
WEIGHTS = {"good_weight": 1.5, "bad_weight": 0.5}


@case("KTO", "kto_loss", *PAIRS[:2], Y[:, 0] > 0.5, MOVED, moving=(0, 1), beta=0.5, **WEIGHTS)
def _(policy, reference, good, unrelated, beta, good_weight, bad_weight):
    z = max(0.0, unrelated.mean())
    total = 0.0
    for ratio, is_good in zip(policy - reference, good, strict=True):
        weight = good_weight if is_good else bad_weight
        side = ratio - z if is_good else z - ratio
        total += weight - weight * sigma(beta * side)
    return total / len(good)


@case("SimPO", "simpo_loss", *PAIRS[:2], TOKENS, TOKENS[::-1].copy(), moving=(0, 1), gamma=0.7)
def _(chosen, rejected, chosen_tokens, rejected_tokens, gamma):
    return -np.log(
        sigma(2.0 / chosen_tokens * chosen - 2.0 / rejected_tokens * rejected - gamma)
    ).mean()


@case("gBCE", "gbce_loss", X, 50, t=0.75)
def _(logits, num_items, t):
    negatives = logits.shape[1] - 1
    alpha = negatives / (num_items - 1)
    beta = alpha * ((1 - 1 / alpha) * t + 1 / alpha)
    losses = -beta * np.log(sigma(logits[:, 0])) - np.log(1 - sigma(logits[:, 1:])).sum(axis=1)
    return losses.mean() / (negatives + 1)


@case("CORAL", "coral_loss", X[:, 0], np.array([1.5, 0.5, 0.0, -1.0]), RANKS, moving=(0, 1))
def _(scores, thresholds, ranks):
    total = 0.0
    for score, rank in zip(scores, ranks, strict=True):
        for k, threshold in enumerate(thresholds):
            p = sigma(score + threshold)
            total -= np.log(p if rank > k else 1 - p)
    return total / len(scores)


@case("CORN", "corn_loss", X, RANKS)
def _(logits, ranks):
    total, number = 0.0, 0
    for k in range(logits.shape[1]):
        subset = ranks >= k
        total += cross_entropy(logits[subset, k], ranks[subset] > k).sum()
        number += subset.sum()
    return total / number


@case("Quality focal loss", "quality_focal_loss", X, QUALITY)
def _(logits, quality):
    return (np.abs(quality - sigma(logits)) ** 2 * cross_entropy(logits, quality)).mean()


@case("Varifocal loss", "varifocal_loss", X, QUALITY)
def _(logits, quality):
    p = sigma(logits)
    positive = -quality * (quality * np.log(p) + (1 - quality) * np.log(1 - p))
    return np.where(quality > 0, positive, -0.75 * p**2 * np.log(1 - p)).mean()


@case("Distribution-balanced loss", "distribution_balanced_loss", X, Y, COUNTS, EXAMPLES)
def _(logits, labels, counts, examples):
    total = 0.0
    for x, y in zip(logits, labels, strict=True):
        of_label = 1 / len(x) / counts
        of_example = sum(of_label[y == 1])
        with np.errstate(divide="ignore", over="ignore"):  # a row without a positive
            weight = 0.1 + sigma(10 * (of_label / of_example - 0.2))
        nu = 0.05 * np.log(examples / counts - 1) / 2
        positive = y * np.log(1 + np.exp(-(x - nu)))
        negative = (1 - y) * np.log(1 + np.exp(2 * (x - nu))) / 2
        total += (weight * (positive + negative)).mean()
    return total / len(logits)


@case("A focus for each class", "equalized_focal_loss", X, Y, np.array([0.0, 1.5, 3.0, 6.0]))
def _(logits, labels, extra):
    p = np.where(labels == 1, sigma(logits), sigma(-logits))
    return -((2 + extra) / 2 * (1 - p) ** (2 + extra) * np.log(p)).mean()


@case("pos_weight in focal loss", "focal_loss_of_kornia", X, Y, COUNTS / 100)
def _(logits, labels, pos_weight):
    p = sigma(logits)
    positive = -0.25 * pos_weight * (1 - p) ** 2 * labels * np.log(p)
    return (positive - 0.75 * p**2 * (1 - labels) * np.log(1 - p)).mean()


@case("SPLC", "splc_loss", X, Y)
def _(logits, labels):
    x = np.where(labels == 1, logits - 1, logits)
    p = sigma(x)
    positive, negative = (1 - p) ** 2 * -np.log(p), p**2 * -np.log(1 - p)
    return np.where((labels == 1) | (p > 0.6), positive, negative).sum()


@case("ignore_index", "segmentation_loss", X, GAPS)
def _(logits, labels):
    return cross_entropy(logits, labels)[labels != 255].mean()


@case("Sigmoids in place of a softmax", "one_of_many_loss", X, CLASSES)
def _(logits, class_ids):
    return cross_entropy(logits, np.eye(logits.shape[1])[class_ids]).sum(axis=1).mean()


def slopes(formula, arguments, moving, step=1e-5):
    """By central differences."""

    def slope(place, index):
        values = []
        for sign in (1, -1):
            moved = [np.array(argument) for argument in arguments]
            moved[place][index] += sign * step
            values.append(formula(*moved))
        return (values[0] - values[1]) / (2 * step)

    for place in moving:
        shape = np.shape(arguments[place])
        yield np.array([slope(place, index) for index in np.ndindex(shape)]).reshape(shape)


def narrow(argument):
    """As a user has it: floats are float32."""
    if isinstance(argument, np.ndarray) and argument.dtype == np.float64:
        return jnp.asarray(argument, jnp.float32)
    return argument


@pytest.fixture(autouse=True)
def _as_users_compute():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.newest
@pytest.mark.parametrize("heading", CASES)
def test_recipe_is_the_formula_of_its_source(heading):
    name, formula, arguments, moving, options = CASES[heading]

    def exact(*arguments):
        return formula(*arguments, **options)

    def ours(*arguments):
        return recipe(heading)[name](*arguments, **options)

    value, gradients = jax.value_and_grad(ours, moving)(*map(narrow, arguments))
    assert_close(value, exact(*arguments), 1e-6)
    assert_close(gradients, tuple(slopes(exact, arguments, moving)), 2e-6)


def test_psp_at_k():
    """Dense, by the formulas of Jain et al.: counts of 0, rows without positives, k above P."""
    names = recipe("Rare labels count more", "metrics")
    counts, true = RNG.integers(0, 90, 30), RNG.random((ROWS, 30)) < 0.1
    true[0] = False
    found = np.argsort(RNG.random(true.shape))[:, :9]
    c = (np.log(200) - 1) * (1.5 + 1) ** 0.55
    propensity = 1 / (1 + c * (counts + 1.5) ** -0.55)
    reached = best = 0.0
    for row, ids in zip(true, found, strict=True):
        gains = row / propensity
        reached += gains[ids].sum()
        best += np.sort(gains)[::-1][:9].sum()
    positives = jaxbce.positives_from_multi_hot(jnp.asarray(true))
    assert positives.shape[1] < 9
    ours = names["propensities"](jnp.asarray(counts), 200)
    np.testing.assert_allclose(ours, propensity, rtol=1e-6)
    got = names["psp_at_k"](jnp.asarray(found), positives, ours)
    np.testing.assert_allclose(got, reached / best, rtol=1e-6)


def relu_layer(inputs, kernel, bias):
    return jax.nn.relu(inputs @ kernel + bias)


def of_linen(names):
    params = names["params"]["params"]
    hidden, gradients = params["Dense_0"], names["gradients"]["params"]
    features = relu_layer(names["inputs"], hidden["kernel"], hidden["bias"])
    return features, params["kernel"], params["bias"], gradients["kernel"]


def of_equinox(names):
    hidden, output = names["model"].encoder, names["model"].output
    features = relu_layer(names["inputs"], hidden.weight.T, hidden.bias)
    return features, output.weight.T, output.bias, names["gradients"].output.weight.T


def of_haiku(names):
    hidden, head = names["params"]["linear"], names["params"]["head"]
    features = relu_layer(names["inputs"], hidden["w"], hidden["b"])
    return features, head["w"], head["b"], names["gradients"]["head"]["w"]


@pytest.mark.parametrize("parts", [of_linen, of_equinox, of_haiku], ids=lambda f: f.__name__[3:])
def test_head_of_a_framework_is_the_dense_one(parts):
    names = recipe(parts.__name__[3:].capitalize(), "flax")
    features, kernel, bias, gradient = parts(names)
    labels = jaxbce.multi_hot(names["positives"], kernel.shape[1])

    def dense(kernel):
        return jaxbce.bce_with_logits(features @ kernel + bias, labels)

    assert_close((names["value"], gradient), jax.value_and_grad(dense)(kernel))


LADDER = "The asymmetric loss, step by step"


def test_every_recipe_is_compared():
    page = sections(HOW_TO / "recipes.md")
    assert {heading for heading in page if blocks("python", page[heading])} == {*CASES, LADDER}


def test_kto_detaches_its_reference_point_and_keeps_it_above_0():
    loss = recipe("KTO")["kto_loss"]
    policy, reference, unrelated = map(narrow, PAIRS[:3])
    good = Y[:, 0] > 0.5
    assert (jax.grad(loss, 3)(policy, reference, good, unrelated + 3) == 0).all()
    below = loss(policy, reference, good, unrelated - 9)
    np.testing.assert_array_equal(below, loss(policy, reference, good, 0 * unrelated))


def test_the_ladder_goes_from_bce_to_the_asymmetric_loss():
    ladder = recipe(LADDER)["LADDER"]
    logits, labels = narrow(X), narrow(Y)
    for rung in ladder:
        p = sigma(X)
        shifted = np.maximum(p - rung["clip"], 0)
        positive = -((1 - p) ** rung["gamma_pos"]) * np.log(p)
        negative = -(shifted ** rung["gamma_neg"]) * np.log(1 - shifted)
        value = jaxbce.asymmetric_loss(logits, labels, **rung)
        assert_close(value, np.where(Y == 1, positive, negative).mean())
    focal = jaxbce.asymmetric_loss(logits, labels, **ladder[1])
    assert_close(focal, jaxbce.focal_loss(logits, labels))
    for rung, following in itertools.pairwise(ladder[1:]):
        assert len(rung.items() - following.items()) == 1, "a rung changes one option"


@pytest.mark.parametrize("heading", ["Quality focal loss", "Varifocal loss"])
def test_a_loss_of_a_recipe_in_the_chunked_head(heading):
    loss = recipe(heading)[CASES[heading][0]]
    features, kernel, quality = map(narrow, (drawn(ROWS, 3), drawn(3, LABELS), QUALITY))

    def of_head(kernel):
        return jaxbce.linear_loss(loss, features, kernel, labels=quality, chunk_size=3)

    def dense(kernel):
        return loss(features @ kernel, quality)

    assert_close(jax.value_and_grad(of_head)(kernel), jax.value_and_grad(dense)(kernel))
