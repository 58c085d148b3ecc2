"""The table of replacements: each row against the peer, where that is installed, or its formula."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_docs import ROOT

import jaxbce

RNG = np.random.default_rng(0)
BATCH, LABELS = 6, 4
X = RNG.normal(0, 3, (BATCH, LABELS)).astype(np.float32)
Y = RNG.integers(0, 2, X.shape).astype(np.float32)
P = (1 / (1 + np.exp(-X))).astype(np.float32)
MASK = RNG.random(X.shape) < 0.7
WEIGHT = RNG.uniform(0.5, 2, BATCH).astype(np.float32)  # one per example
POS_WEIGHT = RNG.uniform(0.5, 2, LABELS).astype(np.float32)
ROWS = {}


@pytest.fixture(autouse=True)
def _as_peers_compute():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def row(name):
    """A function that returns what the peer gives and what jaxbce does, once or several times."""

    def add(fn):
        ROWS[name] = fn
        return fn

    return add


# --- optax and jax.nn ----------------------------------------------------------------------------


@row("optax sigmoid_binary_cross_entropy")
def _():
    yield optax.sigmoid_binary_cross_entropy(X, Y), jaxbce.sigmoid_binary_cross_entropy(X, Y)
    yield optax.sigmoid_binary_cross_entropy(X, Y).mean(), jaxbce.bce_with_logits(X, Y)


@row("optax masked mean")
def _():
    loss = optax.sigmoid_binary_cross_entropy(X, Y)
    yield jnp.mean(loss, where=MASK), jaxbce.bce_with_logits(X, Y, where=MASK)
    yield (loss * MASK).sum() / MASK.sum(), jaxbce.bce_with_logits(X, Y, where=MASK)


@row("optax sum over labels, mean over the batch")
def _():
    loss = optax.sigmoid_binary_cross_entropy(X, Y).sum(-1).mean()
    yield loss, jaxbce.bce_with_logits(X, Y, reduction="batchmean")


@row("optax mean over one axis")
def _():
    loss = optax.sigmoid_binary_cross_entropy(X, Y).mean(-1)
    yield loss, jaxbce.bce_with_logits(X, Y, axis=-1)


@row("optax smooth_labels")
def _():
    """Toward 1 / K for K labels; here toward 1 / 2, which is the same for K = 2."""
    smoothed = optax.smooth_labels(jnp.asarray(Y), 0.1)
    loss = optax.sigmoid_binary_cross_entropy(X, smoothed).mean()
    yield loss, jaxbce.bce_with_logits(X, smoothed)
    pair = jnp.asarray(Y[:, :2])
    loss = optax.sigmoid_binary_cross_entropy(X[:, :2], optax.smooth_labels(pair, 0.1)).mean()
    yield loss, jaxbce.bce_with_logits(X[:, :2], pair, label_smoothing=0.1)


@row("optax sigmoid_focal_loss")
def _():
    for alpha, gamma in ((None, 2.0), (0.25, 2.0), (0.5, 1.5)):
        theirs = optax.sigmoid_focal_loss(X, Y, alpha=alpha, gamma=gamma)
        yield theirs, jaxbce.sigmoid_focal_loss(X, Y, alpha=alpha, gamma=gamma)
    yield optax.sigmoid_focal_loss(X, Y).mean(), jaxbce.focal_loss(X, Y)


@row("jax.nn softplus, log_sigmoid, sigmoid")
def _():
    for name in ("softplus", "log_sigmoid", "sigmoid"):
        for x in (jnp.asarray(X), jnp.asarray(X, jnp.bfloat16)):
            ours = getattr(jaxbce, name)(x)
            assert ours.dtype == getattr(jax.nn, name)(x).dtype
            # Half precision is computed in float32 and rounded once; theirs is a unit off.
            theirs = getattr(jax.nn, name)(x.astype(np.float32)).astype(ours.dtype)
            yield theirs.astype(np.float32), ours.astype(np.float32)


# --- PyTorch -------------------------------------------------------------------------------------


def torch_of(*arrays):
    torch = pytest.importorskip("torch")
    return torch, *(torch.tensor(array) for array in arrays)


@row("PyTorch BCEWithLogitsLoss")
def _():
    torch, x, y, w, q = torch_of(X, Y, WEIGHT[:, None], POS_WEIGHT)
    for reduction in ("mean", "sum", "none"):
        theirs = torch.nn.BCEWithLogitsLoss(weight=w, pos_weight=q, reduction=reduction)(x, y)
        ours = jaxbce.BCEWithLogitsLoss(WEIGHT[:, None], POS_WEIGHT, reduction=reduction)
        yield theirs, ours(X, Y)


@row("PyTorch binary_cross_entropy_with_logits")
def _():
    torch, x, y = torch_of(X, Y)
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(x, y)
    yield theirs, jaxbce.bce_with_logits(X, Y)


@row("PyTorch BCELoss")
def _():
    torch, p, y = torch_of(P, Y)
    yield torch.nn.BCELoss()(p, y), jaxbce.bce(P, Y)


@row("PyTorch MultiLabelSoftMarginLoss")
def _():
    torch, x, y, q = torch_of(X, Y, POS_WEIGHT)
    yield torch.nn.MultiLabelSoftMarginLoss()(x, y), jaxbce.bce_with_logits(X, Y)
    per_row = torch.nn.MultiLabelSoftMarginLoss(reduction="none")(x, y)
    yield per_row, jaxbce.bce_with_logits(X, Y, axis=-1)
    weighted = torch.nn.MultiLabelSoftMarginLoss(weight=q)(x, y)
    yield weighted, jaxbce.bce_with_logits(X, Y, weight=POS_WEIGHT)


@row("torchvision sigmoid_focal_loss")
def _():
    """By its formula: alpha is 0.25 unless given, and -1 for none."""
    bce = jaxbce.sigmoid_binary_cross_entropy(X, Y)
    p_t = P * Y + (1 - P) * (1 - Y)
    focused = bce * (1 - p_t) ** 2
    yield (0.25 * Y + 0.75 * (1 - Y)) * focused, jaxbce.sigmoid_focal_loss(X, Y, alpha=0.25)
    yield focused, jaxbce.sigmoid_focal_loss(X, Y)


@row("torchvision, as installed")
def _():
    focal = pytest.importorskip("torchvision").ops.sigmoid_focal_loss
    _, x, y = torch_of(X, Y)
    yield focal(x, y), jaxbce.sigmoid_focal_loss(X, Y, alpha=0.25)
    yield focal(x, y, alpha=-1, gamma=1.5), jaxbce.sigmoid_focal_loss(X, Y, gamma=1.5)
    yield focal(x, y, reduction="mean"), jaxbce.focal_loss(X, Y, alpha=0.25)


@row("MONAI, segmentation-models, kornia: focal losses, also of soft labels")
def _():
    """By their formulas, without alpha: the same for labels 0 and 1 only."""
    for x, y in ((X, Y), (np.float32([1]), np.float32([0.3]))):
        p = 1 / (1 + np.exp(-x))
        bce = -y * np.log(p) - (1 - y) * np.log(1 - p)
        losses = {
            "torchvision": bce * (1 - (p * y + (1 - p) * (1 - y))) ** 2,
            "MONAI": bce * np.exp(2 * jax.nn.log_sigmoid(x * (1 - 2 * y))),
            "segmentation-models": bce * (1 - np.exp(-bce)) ** 2,
            "kornia": -y * (1 - p) ** 2 * np.log(p) - (1 - y) * p**2 * np.log(1 - p),
        }
        symmetric = {"gamma_neg": 2, "gamma_pos": 2, "clip": 0}
        yield losses["torchvision"], jaxbce.sigmoid_focal_loss(x, y)
        yield losses["kornia"], jaxbce.asymmetric_loss(x, y, **symmetric, reduction="none")
        if y is Y:
            yield from ((loss, jaxbce.sigmoid_focal_loss(x, y)) for loss in losses.values())
    told = ", ".join(f"{loss.item():.4f} in {library}" for library, loss in losses.items())
    assert told in (ROOT / "docs/how-to/switching.md").read_text()


# --- asymmetric loss -----------------------------------------------------------------------------


def published_asymmetric(x, stop):
    """The original, with its clamp of the logarithm at 1e-8."""
    p = jax.nn.sigmoid(x)
    q = jnp.minimum(1 - p + 0.05, 1)
    loss = Y * jnp.log(jnp.maximum(p, 1e-8)) + (1 - Y) * jnp.log(jnp.maximum(q, 1e-8))
    p_t = p * Y + q * (1 - Y)
    focus = (1 - p_t) ** (1 * Y + 4 * (1 - Y))
    return -(loss * (jax.lax.stop_gradient(focus) if stop else focus)).sum()


@row("original AsymmetricLoss")
def _():
    """Its gradient is that of a constant focus."""

    def ours(x):
        return jaxbce.asymmetric_loss(x, Y, stop_focus_gradient=True, reduction="sum")

    yield published_asymmetric(X, True), ours(X)
    yield jax.grad(published_asymmetric)(X, True), jax.grad(ours)(X)


@row("timm AsymmetricLossMultiLabel")
def _():
    """So is that of the original's optimised form: the gradient goes through the focus."""

    def ours(x):
        return jaxbce.asymmetric_loss(x, Y, reduction="sum")

    yield published_asymmetric(X, False), ours(X)
    yield jax.grad(published_asymmetric)(X, False), jax.grad(ours)(X)


IDS = Y.argmax(axis=-1)
SMOOTHED_IDS = jax.nn.one_hot(IDS, LABELS) * 0.9 + 0.1 / LABELS


def timm_bce(x, target, smoothing, smooth_dense=False):
    """As timm 1.0.31 has it, in jnp: class ids are smoothed toward 1 / K, dense labels not."""
    if target.shape != x.shape:
        low = smoothing / x.shape[-1]
        at = np.arange(x.shape[-1]) == target[:, None]
        target = np.where(at, 1.0 - smoothing + low, low).astype(np.float32)
    elif smooth_dense:
        target = target * np.float32(1.0 - smoothing) + np.float32(0.5 * smoothing)
    return optax.sigmoid_binary_cross_entropy(x, target).mean()


@row("timm BinaryCrossEntropy")
def _():
    yield timm_bce(X, IDS, 0.1), jaxbce.bce_with_logits(X, SMOOTHED_IDS)
    yield timm_bce(X, Y, 0.1), jaxbce.bce_with_logits(X, Y)
    theirs = timm_bce(X, Y, 0.1, smooth_dense=True)
    yield theirs, jaxbce.bce_with_logits(X, Y, label_smoothing=0.1)


@row("timm, as installed")
def _():
    losses = pytest.importorskip("timm.loss")
    torch, x, y = torch_of(X, Y)
    theirs = losses.AsymmetricLossMultiLabel(disable_torch_grad_focal_loss=False)
    yield theirs(x, y), jaxbce.asymmetric_loss(X, Y, reduction="batchmean")
    for target, options in ((IDS, {}), (Y, {}), (Y, {"smooth_dense": True})):
        theirs = losses.BinaryCrossEntropy(smoothing=0.1, **options)(x, torch.tensor(target))
        yield theirs, timm_bce(X, target, 0.1, **options)
    theirs = losses.BinaryCrossEntropy(smoothing=0.0, sum_classes=True)(x, y)
    yield theirs, jaxbce.bce_with_logits(X, Y, reduction="batchmean")


# --- TensorFlow and Keras ------------------------------------------------------------------------


@row("TensorFlow sigmoid_cross_entropy_with_logits")
def _():
    tf = pytest.importorskip("tensorflow")
    theirs = tf.nn.sigmoid_cross_entropy_with_logits(labels=Y, logits=X).numpy()
    yield theirs, jaxbce.sigmoid_binary_cross_entropy(X, Y)


@row("TensorFlow weighted_cross_entropy_with_logits")
def _():
    tf = pytest.importorskip("tensorflow")
    theirs = tf.nn.weighted_cross_entropy_with_logits(labels=Y, logits=X, pos_weight=POS_WEIGHT)
    ours = jaxbce.sigmoid_binary_cross_entropy(X, Y, pos_weight=POS_WEIGHT)
    yield theirs.numpy(), ours


def keras_losses():
    os.environ["KERAS_BACKEND"] = "jax"
    return pytest.importorskip("keras").losses


@row("Keras BinaryCrossentropy from logits")
def _():
    """Its sum and None average the last axis first."""
    loss = keras_losses().BinaryCrossentropy
    weight = WEIGHT[:, None]
    yield loss(from_logits=True)(Y, X), jaxbce.bce_with_logits(X, Y)
    theirs = loss(from_logits=True)(Y, X, sample_weight=WEIGHT)
    yield theirs, jaxbce.bce_with_logits(X, Y, weight=weight)
    theirs = loss(from_logits=True, reduction="mean_with_sample_weight")
    ours = jaxbce.bce_with_logits(X, Y, weight=weight, reduction="weighted_mean")
    yield theirs(Y, X, sample_weight=WEIGHT), ours
    per_row = jaxbce.bce_with_logits(X, Y, axis=-1)
    yield loss(from_logits=True, reduction=None)(Y, X), per_row
    yield loss(from_logits=True, reduction="sum")(Y, X), per_row.sum()
    theirs = loss(from_logits=True, label_smoothing=0.1)(Y, X)
    yield theirs, jaxbce.bce_with_logits(X, Y, label_smoothing=0.1)


@row("Keras BinaryCrossentropy from probabilities")
def _():
    loss = keras_losses().BinaryCrossentropy
    yield loss()(Y, P), jaxbce.bce(P, Y)
    yield loss(label_smoothing=0.1)(Y, P), jaxbce.bce(P, Y, label_smoothing=0.1)


@row("Keras BinaryFocalCrossentropy")
def _():
    loss = keras_losses().BinaryFocalCrossentropy
    yield loss(from_logits=True)(Y, X), jaxbce.focal_loss(X, Y)
    theirs = loss(from_logits=True, apply_class_balancing=True)(Y, X)
    yield theirs, jaxbce.focal_loss(X, Y, alpha=0.25)


@row("Keras model.compile")
def _():
    """The loss is one number per example there, which Keras multiplies by its sample_weight."""
    per_example = jaxbce.sigmoid_binary_cross_entropy(X, Y).mean(-1)
    theirs = keras_losses().BinaryCrossentropy(from_logits=True)(Y, X, sample_weight=WEIGHT)
    yield theirs, (per_example * WEIGHT).mean()


# --- JAX code ------------------------------------------------------------------------------------


@row("rax pointwise_sigmoid_loss")
def _():
    rax = pytest.importorskip("rax")
    loss = rax.pointwise_sigmoid_loss(jnp.asarray(X), jnp.asarray(Y), reduce_fn=None)
    yield loss, jaxbce.sigmoid_binary_cross_entropy(X, Y)
    theirs = rax.pointwise_sigmoid_loss(jnp.asarray(X), jnp.asarray(Y), where=jnp.asarray(MASK))
    yield theirs, jaxbce.bce_with_logits(X, Y, where=MASK)


@row("jaxopt binary_logistic_loss")
def _():
    loss = pytest.importorskip("jaxopt").loss.binary_logistic_loss
    yield jax.vmap(jax.vmap(loss))(Y, X), jaxbce.sigmoid_binary_cross_entropy(X, Y)


@row("scenic and init2winit, weighted")
def _():
    """The sum over examples and labels, divided by the weights of the examples alone."""
    loss = optax.sigmoid_binary_cross_entropy(X, Y)
    weight = WEIGHT[:, None]
    theirs = (loss * weight).sum() / WEIGHT.sum()
    yield theirs, jaxbce.bce_with_logits(X, Y, weight=weight, reduction="sum") / WEIGHT.sum()
    ours = jaxbce.bce_with_logits(X, Y, weight=weight, reduction="weighted_mean")
    yield theirs, ours * LABELS


@row("big_vision sigmoid_xent")
def _():
    loss = -jnp.sum(Y * jax.nn.log_sigmoid(X) + (1 - Y) * jax.nn.log_sigmoid(-X), axis=-1)
    yield loss, jaxbce.bce_with_logits(X, Y, axis=-1, reduction="sum")
    yield loss.mean(), jaxbce.bce_with_logits(X, Y, reduction="batchmean")


@row("SigLIP of big_vision and open_clip")
def _():
    """They pass the scale itself; big_vision keeps scale and bias in arrays of shape (1,)."""
    images, texts = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (X, X + Y))
    scale, bias = np.float32([10.0]), np.float32([-10.0])
    logits = images @ texts.T * scale + bias
    signs = 2 * np.eye(BATCH, dtype=np.float32) - 1
    theirs = -jax.nn.log_sigmoid(signs * logits).sum() / BATCH
    yield theirs, jaxbce.siglip_loss(images, texts, jnp.log(scale), bias)


@row("Flax's VAE example")
def _():
    log_p = jax.nn.log_sigmoid(X)
    theirs = -jnp.sum(Y * log_p + (1 - Y) * jnp.log(-jnp.expm1(log_p)), axis=-1)
    yield theirs, jaxbce.bce_with_logits(X, Y, axis=-1, reduction="sum")


@row("hand-written, of (y_true, y_pred)")
def _():
    def binary_cross_entropy(y_true, y_pred, eps=1e-7):
        y_pred = jnp.clip(y_pred, eps, 1 - eps)
        return -jnp.mean(y_true * jnp.log(y_pred) + (1 - y_true) * jnp.log(1 - y_pred))

    yield binary_cross_entropy(Y, P), jaxbce.bce(P, Y)


@row("Bradley-Terry, DPO: log_sigmoid of a difference")
def _():
    chosen, rejected = X[:, 0], X[:, 1]
    theirs = -jax.nn.log_sigmoid(chosen - rejected).mean()
    yield theirs, jaxbce.bce_with_logits(chosen - rejected, jnp.ones(BATCH))


@pytest.mark.parametrize("name", ROWS)
def test_replacement(name):
    for theirs, ours in ROWS[name]():
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=2e-5, atol=1e-6)
