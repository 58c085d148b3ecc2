"""Checkpoints of a head and its optimizer, and a served `top_k`, as docs/how-to/saving.md says."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_docs import ROOT, blocks, run

from jaxbce.nnx import MultiLabelHead

pytestmark = [pytest.mark.newest, pytest.mark.usefixtures("compile_fast")]

WIDTH, LABELS = 8, 64
FEATURES = np.random.default_rng(0).normal(size=(6, WIDTH)).astype(np.float32)
POSITIVES = np.random.default_rng(1).integers(-1, LABELS, (6, 3))
KINDS = pytest.mark.parametrize("kind", list(AxisType)[:2], ids=lambda kind: kind.name)
TABLES = pytest.mark.parametrize("table", [False, True], ids=["kernel", "table"])


@pytest.fixture(scope="module")
def page():
    """What the first block of the page defines: `save` and `restore` are what a reader copies."""
    first, *_ = blocks("python", (ROOT / "docs/how-to/saving.md").read_text())
    return types.SimpleNamespace(**run(first))


def mesh_of(devices, kind=AxisType.Auto):
    chosen = jax.devices()[:devices]
    return jax.make_mesh((devices,), ("labels",), axis_types=(kind,), devices=chosen)


def maker(table=False, labels=LABELS):
    def make(mesh):
        devices = {} if mesh is None else {"mesh": mesh, "label_axis": "labels"}
        options = {"prior": 0.1, "transpose_kernel": table, **devices}
        head = MultiLabelHead(WIDTH, labels, rngs=nnx.Rngs(0), **options)
        return head, nnx.Optimizer(head, optax.adam(1e-2), wrt=nnx.Param)

    return make


@nnx.jit
def train_step(head, optimizer):
    return head.update(optimizer, FEATURES, positives=POSITIVES)


def stepped(modules):
    """The modules after one step, for which virtual devices must be waited for."""
    jax.block_until_ready(train_step(*modules))
    return modules


def values(modules):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(modules))]


def assert_equal(got, expected):
    for ours, theirs in zip(values(got), values(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@KINDS
@TABLES
def test_training_goes_on_with_another_number_of_devices(page, tmp_path, kind, table):
    """From 1 device to 8, the same 8, 2 and 1: beside a head on one device that is never saved."""
    never_saved = stepped(maker(table)(None))
    modules = stepped(maker(table)(mesh_of(1, kind)))
    for number, (before, devices) in enumerate(itertools.pairwise((1, 8, 8, 2, 1))):
        page.save(tmp_path / str(number), modules)
        mesh = mesh_of(devices, kind)
        restored = page.restore(tmp_path / str(number), maker(table), mesh)
        assert_equal(restored, modules)
        for ours, new in zip(
            *(jax.tree.leaves(nnx.state(each)) for each in (restored, maker(table)(mesh))),
            strict=True,
        ):
            spec = new.sharding.spec if new.ndim else PartitionSpec()  # a counter is everywhere
            assert ours.sharding.is_equivalent_to(NamedSharding(mesh, spec), ours.ndim)
        stepped(restored)
        stepped(never_saved)
        if before == devices:
            assert_equal(restored, stepped(modules))
        for ours, exact in zip(values(restored), values(never_saved), strict=True):
            np.testing.assert_allclose(ours, exact, rtol=1e-6, atol=1e-7)
        modules = restored


@KINDS
@TABLES
def test_a_number_of_labels_that_no_number_of_devices_divides(page, tmp_path, kind, table):
    """61 labels from 1 device to 8, 2 and 1: what is padded for one mesh is cut for another."""
    make = maker(table, labels=61)
    never_saved, modules = stepped(make(None)), stepped(make(mesh_of(1, kind)))
    for devices in (8, 2, 1):
        page.save(tmp_path / str(devices), modules)
        saved = page.restore(tmp_path / str(devices), make, mesh_of(devices, kind), strict=False)
        modules, never_saved = stepped(saved), stepped(never_saved)
    for ours, exact in zip(values(modules), values(never_saved), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("call", [nnx.jit, lambda fn: fn], ids=["compiled", "eager"])
def test_why_a_target_has_shardings(page, tmp_path, call):
    """Else the counters come back on one device. When this fails, the page can say less."""
    modules = stepped(maker()(mesh_of(8)))
    page.save(tmp_path / "saved", modules)
    new = maker()(mesh_of(8))
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.update(new, checkpointer.restore(tmp_path / "saved", nnx.state(new)))
    step = call(lambda head, optimizer: head.update(optimizer, FEATURES, positives=POSITIVES))
    with pytest.raises(ValueError, match="incompatible devices"):
        step(*new)
    restored = page.restore(tmp_path / "saved", maker(), mesh_of(8))
    jax.block_until_ready(step(*restored))


def test_why_a_pretrained_encoder_is_copied_to_the_mesh():
    mesh = mesh_of(8)
    head, _ = maker()(mesh)
    encoder = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=nnx.Rngs(1))
    nnx.update(encoder, jax.device_put(nnx.state(encoder), jax.devices()[0]))
    expected = head.top_k(np.asarray(encoder(FEATURES)), 5)
    with pytest.raises(ValueError, match="incompatible devices"):
        head.top_k(encoder(FEATURES), 5)
    everywhere = NamedSharding(mesh, PartitionSpec())
    nnx.update(encoder, jax.device_put(nnx.state(encoder), everywhere))
    got = jax.block_until_ready(head.top_k(encoder(FEATURES), 5))
    np.testing.assert_array_equal(got[1], expected[1])
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)


@TABLES
@pytest.mark.parametrize("devices", [None, 1, 8], ids="{}_devices".format)
def test_a_served_top_k_is_the_live_one(devices, table):
    """After serialisation; on several devices with a batch of fixed size."""
    mesh = None if devices is None else mesh_of(devices)
    head, _ = stepped(maker(table)(mesh))
    graph, state = nnx.split(head)
    params, features = nnx.to_pure_dict(state), jnp.asarray(FEATURES)
    batch = len(FEATURES) if devices == 8 else jax.export.symbolic_shape("batch")[0]
    if devices == 8:
        features = jax.device_put(features, NamedSharding(mesh, PartitionSpec()))

    @jax.jit
    def top_5(params, features):
        return nnx.merge(graph, params).top_k(features, 5)

    shape = jax.ShapeDtypeStruct((batch, WIDTH), jnp.float32)
    exported = jax.export.export(top_5, platforms=["cpu", "cuda", "tpu"])(params, shape)
    served = jax.jit(jax.export.deserialize(exported.serialize()).call)
    got, live = jax.block_until_ready((served(params, features), head.top_k(features, 5)))
    np.testing.assert_array_equal(got[1], live[1])
    np.testing.assert_allclose(got[0], live[0], rtol=1e-6)
