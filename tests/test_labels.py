"""Label ids to multi-hot and back, the loss from ids, class balance."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from programs import collectives

import jaxbce

pytestmark = pytest.mark.usefixtures("compile_fast")

POSITIVES = np.array([[0, 2, -1], [1, 4, 1], [-1, -1, -1], [3, 9, -7]])
DENSE = np.array([[1, 0, 1, 0, 0], [0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 1, 0]])

every_jit = pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])


def temporaries(fn, *args):
    """Bytes that `fn`, compiled, holds beside its arguments and results."""
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


def of_any_batch(fn, *args):
    """`fn` lowered with a symbolic first axis of its arguments, then called with these."""
    (batch,) = jax.export.symbolic_shape("batch")
    specs = [jax.ShapeDtypeStruct((batch, *arg.shape[1:]), arg.dtype) for arg in args]
    return jax.export.export(jax.jit(fn))(*specs).call(*args)


# --- positives and multi-hot -------------------------------------------------------------------


@every_jit
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool", "int8"])
def test_multi_hot(transform, dtype):
    """Unsorted, duplicate, padded, negative and too large ids."""
    got = transform(functools.partial(jaxbce.multi_hot, num_labels=5, dtype=dtype))(POSITIVES)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, DENSE.astype(got.dtype))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32"])
def test_multi_hot_of_any_integer_dtype(dtype):
    """300 labels do not fit into 8 bits, and an unsigned -1 is a large id."""
    got = jaxbce.multi_hot(np.array([3, -1]).astype(dtype), 300)
    expected = [3, 255] if dtype == "uint8" else [3]
    np.testing.assert_array_equal(np.flatnonzero(got), expected)


def test_multi_hot_does_not_wrap_a_wide_id():
    with jax.enable_x64(True):
        assert not jaxbce.multi_hot(np.array([2**32 + 1]), 3).any()


@pytest.mark.parametrize(
    ("positives", "num_labels", "shape"),
    [((3, 0), 4, (3, 4)), ((0, 2), 4, (0, 4)), ((2,), 0, (0,)), ((2, 3, 1), 4, (2, 3, 4))],
    ids=["no positives", "no rows", "no labels", "three axes"],
)
def test_multi_hot_shapes(positives, num_labels, shape):
    assert jaxbce.multi_hot(np.zeros(positives, int), num_labels).shape == shape


def test_multi_hot_maps_over_any_axis():
    mapped = jax.vmap(lambda p: jaxbce.multi_hot(p, 5), in_axes=1)(POSITIVES.T)
    np.testing.assert_array_equal(mapped, DENSE)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "float32", "bfloat16"])
@pytest.mark.parametrize(
    ("max_positives", "expected"),
    [
        (None, [[0, 2], [1, 4], [-1, -1], [3, -1]]),
        (3, [[0, 2, -1], [1, 4, -1], [-1, -1, -1], [3, -1, -1]]),
        (1, [[0], [1], [-1], [3]]),
        (0, np.zeros((4, 0))),
    ],
    ids=["largest row", "padded", "cut off", "none"],
)
def test_positives_from_multi_hot(max_positives, expected, dtype):
    labels = jnp.asarray(DENSE).astype(dtype)
    got = jaxbce.positives_from_multi_hot(labels, max_positives)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, expected)


def test_round_trip(rng):
    labels = (rng.random((2, 7, 31)) < 0.2).astype(np.float32)
    positives = jax.jit(lambda labels: jaxbce.positives_from_multi_hot(labels, 31))(labels)
    np.testing.assert_array_equal(jaxbce.multi_hot(positives, 31), labels)
    fewest = jaxbce.positives_from_multi_hot(labels)
    assert fewest.shape[-1] == labels.sum(-1).max()
    np.testing.assert_array_equal(jaxbce.multi_hot(fewest, 31), labels)


@pytest.mark.parametrize("num_labels", [1, 7, 8, 9, 300])
@pytest.mark.parametrize("max_positives", [3, 400], ids=["cut off", "padded"])
def test_positives_of_any_number_of_labels(num_labels, max_positives, rng):
    """Empty, sparse, dense and full rows, whose last byte is a part of one."""
    labels = rng.random((40, num_labels)) < np.linspace(0, 1, 40)[:, None]
    expected = np.full((40, max_positives), -1)
    for row, ids in zip(expected, map(np.flatnonzero, labels), strict=True):
        row[: len(ids)] = ids[:max_positives]
    got = jaxbce.positives_from_multi_hot(labels, max_positives)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)], ids=str)
def test_positives_of_nothing(shape):
    assert jaxbce.positives_from_multi_hot(np.zeros(shape)).shape == (*shape[:-1], 0)
    padded = jaxbce.positives_from_multi_hot(np.zeros(shape), 2)
    np.testing.assert_array_equal(padded, np.full((*shape[:-1], 2), -1))


@pytest.mark.parametrize("dtype", ["bool", "float32"])
@pytest.mark.parametrize(
    ("shape", "max_positives"), [((64, 16384), 8), ((64, 16384), 512), ((512, 1000), 40)], ids=str
)
def test_positives_of_large_labels_need_little_memory(shape, max_positives, dtype):
    labels = jnp.zeros(shape, dtype)
    held = temporaries(
        lambda labels: jaxbce.positives_from_multi_hot(labels, max_positives), labels
    )
    assert held < 2.5 * labels.size


class Csr:
    """What `scipy.sparse` calls so, by its attributes: ids at the end that no row has, too."""

    def __init__(self, rows, data=None):
        flat = [each for row in rows for each in row]
        self.indptr = np.cumsum([0, *map(len, rows)], dtype=np.int32)
        self.indices = np.array([*flat, -5], np.int32)
        self.data = np.ones(len(flat) + 1) if data is None else np.array([*data, 1])


def objects(rows):
    """An array of objects, of one axis even if the rows are of one length."""
    array = np.empty(len(rows), object)
    array[:] = rows
    return array


ROWS_OF_IDS = [[17], [4, 99, 3], [], [42, 4, 4]]
KINDS_OF_ROWS = {
    "lists": lambda rows: rows,
    "tuples": lambda rows: tuple(map(tuple, rows)),
    "arrays": lambda rows: [np.array(row, np.uint16) for row in rows],
    "arrays of several dtypes": lambda rows: [
        np.array(row, dtype) for row, dtype in zip(rows, ["u8", "i8", "f4", "i1"], strict=False)
    ],
    "JAX arrays": lambda rows: [jnp.array(row, jnp.int32) for row in rows],
    "ragged": lambda rows: objects([np.array(row, int) for row in rows]),
    "ragged objects": lambda rows: objects([np.array(row, object) for row in rows]),
    "iterator": iter,
    "CSR": Csr,
}


@pytest.mark.parametrize("max_positives", [None, 3, 5], ids=["longest row", "fits", "padded"])
@pytest.mark.parametrize("kind", KINDS_OF_ROWS)
def test_positives_from_rows(kind, max_positives):
    got = jaxbce.positives_from_rows(KINDS_OF_ROWS[kind](ROWS_OF_IDS), max_positives)
    assert isinstance(got, jax.Array)
    assert got.dtype == jnp.int32
    width = max_positives or 3
    expected = [row + [-1] * (width - len(row)) for row in ROWS_OF_IDS]
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", ["int64", "uint8", object], ids=str)
@pytest.mark.parametrize("rows", [[[0, 1], [1, 0]], [[4, 3, 2], [0, 0, 1]], [[7]]], ids=str)
def test_rows_that_happen_to_have_one_length(rows, dtype):
    """NumPy then makes an array of two axes of what was ragged in other batches."""
    np.testing.assert_array_equal(jaxbce.positives_from_rows(np.array(rows, dtype)), rows)


@pytest.mark.parametrize(
    "rows",
    [[], [[]], [[], []], np.zeros((2, 0)), Csr([[]])],
    ids=["none", "one", "two", "array", "sparse"],
)
def test_rows_of_nothing(rows):
    number = len(rows) if hasattr(rows, "__len__") else 1
    assert jaxbce.positives_from_rows(rows).shape == (number, 0)
    np.testing.assert_array_equal(jaxbce.positives_from_rows(rows, 2), np.full((number, 2), -1))


@pytest.mark.parametrize("data", [[1, 0, 2.5, -1, 0], [True, False, True, True, False]], ids=str)
def test_zeros_kept_in_a_sparse_matrix_are_no_positives(data):
    """Also where they would make a row too long."""
    got = jaxbce.positives_from_rows(Csr([[3, 8], [0, 5, 2], []], data), 2)
    np.testing.assert_array_equal(got, [[3, -1], [0, 5], [-1, -1]])


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "lil", "dok"])
@pytest.mark.parametrize("container", ["array", "matrix"])
def test_positives_from_a_matrix_of_scipy(container, kind, rng):
    labels = (rng.random((9, 31)) < 0.2).astype(np.float32)
    sparse = getattr(scipy.sparse, f"csr_{container}")(labels).asformat(kind)
    got = jaxbce.positives_from_rows(sparse, 12)
    np.testing.assert_array_equal(got, jaxbce.positives_from_multi_hot(labels, 12))


def test_a_sparse_matrix_may_hold_an_entry_twice():
    """Its entries add up, here to 3 and to 0, and the matrix stays as it is."""
    parts = np.array([1.0, 1, 1, 1, -1]), [0, 0, 0, 1, 1], [0, 3, 5]
    rows = scipy.sparse.csr_matrix(parts, shape=(2, 2))
    np.testing.assert_array_equal(jaxbce.positives_from_rows(rows), [[0], [-1]])
    assert rows.indices.tolist() == parts[1]


def test_the_ids_of_a_sparse_matrix_ascend():
    rows = scipy.sparse.csr_matrix((np.ones(2), [2, 0], [0, 2]), shape=(1, 3))
    np.testing.assert_array_equal(jaxbce.positives_from_rows(rows), [[0, 2]])


def test_what_the_mask_of_a_row_hides_is_left_out():
    rows = np.ma.array([[1, 2], [3, 4]], mask=[[False, True], [False, False]])
    np.testing.assert_array_equal(jaxbce.positives_from_rows(rows), [[1, -1], [3, 4]])


def test_scipy_is_not_imported_for_rows():
    text = inspect.getsource(inspect.getmodule(jaxbce.positives_from_rows))
    assert "import scipy" not in text
    assert "from scipy" not in text


@pytest.mark.parametrize("kind", ["lists", "ragged", "CSR"])
@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([[1], [], [2, 3, 4, 5]], ValueError, r"at most 3 ids .*got 4 in row 2; pass .*=4,"),
        ([[1] * 4, [], [2] * 6], ValueError, "got 4 in row 0; pass max_positives=6, the longest"),
        ([[], [], [2, 3], [4, -1]], ValueError, r"\[0, 2147483647\], got -1 in row 3; .* padded"),
    ],
    ids=["too long", "two too long", "negative"],
)
def test_a_row_that_is_wrong_is_named(kind, rows, error, message):
    with pytest.raises(error, match=f"positives_from_rows: rows must .*{message}"):
        jaxbce.positives_from_rows(KINDS_OF_ROWS[kind](rows), 3)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([[1], [2**31]], ValueError, "got 2147483648 in row 1"),
        ([[1], [2**63 + 1], [-3]], ValueError, "in row 1"),
        ([[1], [2**64]], TypeError, r"row 1 of rows .* ids below 2\*\*31, got object"),
        ([[1], [2.0]], TypeError, "row 1 of rows .* got float64; convert them to int"),
        ([[1], ["a"]], TypeError, "row 1 of rows .* got <U1"),
        ([[1], [None]], TypeError, "row 1 of rows .* got object"),
        (DENSE == 1, TypeError, "row 0 of rows .* got bool; .*positives_from_multi_hot"),
        (DENSE, ValueError, r"\(4, 5\) of zeros and ones; .*positives_from_multi_hot"),
        ([1, 2], TypeError, r"row 0 of rows must be a flat list of ids, got int; .*\[id\]"),
        ([[1], {2}], TypeError, r"row 1 of rows must be a flat list .* got set; .*list\(row\)"),
        ([[[1], [2, 3]]], TypeError, "row 0 of rows must be a flat list of ids, got list"),
        (None, TypeError, "rows must be lists of ids, got NoneType; pass one list per row"),
    ],
    ids=[
        "too large",
        "too large for int64",
        "too large for all integers",
        "float",
        "text",
        "None in a row",
        "bool",
        "multi-hot",
        "numbers",
        "set",
        "nested",
        "None",
    ],
)
def test_rows_that_are_none(rows, error, message):
    with pytest.raises(error, match=f"positives_from_rows: .*{message}"):
        jaxbce.positives_from_rows(rows)


@pytest.mark.parametrize("wrap", [lambda ids: ids, lambda ids: [ids[0]]], ids=["array", "list"])
def test_rows_that_are_traced(wrap):
    with pytest.raises(TypeError, match="positives_from_rows: rows must be known, got a traced"):
        jax.jit(lambda ids: jaxbce.positives_from_rows(wrap(ids)))(POSITIVES)


@pytest.mark.parametrize("max_positives", [-1, 1.0, "3"], ids=repr)
def test_max_positives_of_rows_is_a_size(max_positives):
    with pytest.raises(ValueError, match="positives_from_rows: max_positives must be an int of"):
        jaxbce.positives_from_rows([[1]], max_positives)


def test_positives_of_sharded_rows_move_nothing(mesh):
    labels = jax.device_put(np.eye(16, 32), jax.NamedSharding(mesh, jax.P("batch")))
    fn = jax.jit(lambda labels: jaxbce.positives_from_multi_hot(labels, 2))
    assert not collectives(fn.lower(labels).compile().as_text())
    np.testing.assert_array_equal(fn(labels), [[row, -1] for row in range(16)])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jaxbce.multi_hot([1], 3), TypeError, "positives must be an array.*got list"),
        (lambda: jaxbce.multi_hot(DENSE * 1.0, 3), TypeError, "float.*positives_from_multi_hot"),
        (lambda: jaxbce.multi_hot(DENSE == 1, 3), TypeError, "integer label ids, got bool"),
        (lambda: jaxbce.multi_hot(np.array(1), 3), ValueError, "positives must have an axis"),
        (
            lambda: jaxbce.multi_hot(DENSE, -3),
            ValueError,
            "num_labels must be an int of at least 0, got -3",
        ),
        (lambda: jaxbce.multi_hot(DENSE, 3.0), ValueError, "num_labels must be an int.*got 3.0"),
        (lambda: jax.jit(jaxbce.multi_hot)(DENSE, 3), ValueError, "num_labels must be an int"),
        (
            lambda: jaxbce.positives_from_multi_hot(np.array(1)),
            ValueError,
            "labels must have an axis",
        ),
        (
            lambda: jaxbce.positives_from_multi_hot(DENSE, 1.5),
            ValueError,
            "max_positives must be an int.*1.5",
        ),
        (
            lambda: jax.jit(jaxbce.positives_from_multi_hot)(DENSE),
            ValueError,
            "max_positives must be given.*pass the largest",
        ),
        (
            lambda: jaxbce.positives_from_multi_hot(DENSE * 1j, 2),
            TypeError,
            "labels must be float, integer or bool, got complex",
        ),
    ],
    ids=[
        "list",
        "float positives",
        "bool positives",
        "one number",
        "negative num_labels",
        "float num_labels",
        "traced num_labels",
        "one label",
        "float max_positives",
        "traced labels",
        "complex labels",
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- sparse_bce_with_logits --------------------------------------------------------------------


OPTIONS = {
    "plain": {},
    "weight": {"weight": np.array([[0.5], [2.0], [0.0], [1.0]], np.float32)},
    "pos_weight": {"pos_weight": np.array([1, 2, 3, 0, 5], np.float32)},
    "label_smoothing": {"label_smoothing": 0.2},
    "where": {"where": DENSE.T.repeat(4, axis=1)[1:, :5] == 0},
    "none": {"reduction": "none"},
    "batchmean": {"reduction": "batchmean"},
}


@pytest.mark.thorough
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sparse_loss_equals_the_dense_one_exactly(options, dtype, rng):
    logits = jnp.asarray(rng.normal(0, 5, DENSE.shape)).astype(dtype)

    def value_and_gradient(loss, labels):
        @jax.jit
        def total(logits):
            value = loss(logits, labels, **options)
            return value.sum(), value

        (_, value), gradient = jax.value_and_grad(total, has_aux=True)(logits)
        return value, gradient

    sparse = value_and_gradient(jaxbce.sparse_bce_with_logits, POSITIVES)
    dense = value_and_gradient(jaxbce.bce_with_logits, DENSE)
    chex.assert_trees_all_equal(sparse, dense)


def test_sparse_loss_keeps_infinite_logits_right():
    logits = np.where(DENSE == 1, np.inf, -np.inf).astype(np.float32)
    assert jaxbce.sparse_bce_with_logits(logits, POSITIVES) == 0
    assert jaxbce.sparse_bce_with_logits(-logits, POSITIVES) == np.inf


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("transform", "dtype"),
    [
        (lambda f: f, "float32"),
        (lambda f: f, "bfloat16"),
        (jax.grad, "float32"),
        (jax.grad, "bfloat16"),
        (jax.value_and_grad, "float32"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sparse_loss_holds_one_byte_a_label_more_than_the_dense_one(transform, dtype, reduction):
    logits = jnp.zeros((64, 16384), dtype)
    positives, labels = jnp.zeros((64, 8), jnp.int32), jnp.zeros((64, 16384), jnp.uint8)
    sparse = transform(functools.partial(jaxbce.sparse_bce_with_logits, reduction=reduction))
    dense = transform(functools.partial(jaxbce.bce_with_logits, reduction=reduction))
    more = temporaries(sparse, logits, positives) - temporaries(dense, logits, labels)
    assert more < 1.1 * labels.size


def test_sparse_loss_of_sharded_logits_moves_only_scalars(mesh, rng):
    logits = rng.normal(size=(16, 32)).astype(np.float32)
    positives = rng.integers(-1, 32, (16, 3))
    both = jax.jit(jax.value_and_grad(jaxbce.sparse_bce_with_logits))
    expected = both(logits, positives)
    for axes in (("batch", None), ("batch", "labels")):
        args = (
            jax.device_put(logits, jax.NamedSharding(mesh, jax.P(*axes))),
            jax.device_put(positives, jax.NamedSharding(mesh, jax.P("batch"))),
        )
        chex.assert_trees_all_close(both(*args), expected, rtol=1e-5)
        program = both.lower(*args).compile().as_text()
        assert set(collectives(program)) == {1}


@pytest.mark.parametrize(
    ("logits", "positives", "error", "message"),
    [
        (DENSE, POSITIVES, TypeError, "logits must be floating-point"),
        (DENSE * 1.0, POSITIVES * 1.0, TypeError, "positives must be integer label ids"),
        (
            DENSE * 1.0,
            POSITIVES[0],
            ValueError,
            r"\(3,\) and logits \(4, 5\).*each row of logits has a row of ids",
        ),
        (DENSE * 1.0, POSITIVES[:1], ValueError, r"positives \(1, 3\) and logits \(4, 5\)"),
        (np.float32(1), POSITIVES[0], ValueError, r"logits must have an axis of labels, got \(\)"),
    ],
    ids=["integer logits", "float positives", "one row", "broadcast", "one logit"],
)
def test_sparse_loss_errors(logits, positives, error, message):
    with pytest.raises(error, match=f"sparse_bce_with_logits: .*{message}"):
        jaxbce.sparse_bce_with_logits(logits, positives)


# --- checked -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [5, -2], ids=["too large", "negative"])
@pytest.mark.parametrize(
    "call",
    [
        lambda positives: jaxbce.multi_hot(positives, 5),
        lambda positives: jaxbce.sparse_bce_with_logits(DENSE * 1.0, positives),
        lambda positives: jaxbce.prior_bias(positives=positives, num_labels=5),
    ],
    ids=["multi_hot", "sparse_bce_with_logits", "prior_bias"],
)
def test_checked_positives(call, bad):
    positives = np.where(POSITIVES == -7, bad, np.minimum(POSITIVES, 4))
    call(positives)
    with pytest.raises(ValueError, match=rf"positives must be in \[0, 5\), or -1 .*, got {bad}"):
        jaxbce.checked(call)(positives)
    jaxbce.checked(call)(np.clip(positives, -1, 4))


@pytest.mark.parametrize(
    ("labels", "message"),
    [(DENSE, r"at most 1 \(max_positives\) in a row, got 2"), (DENSE * 0.5, "be 0 or 1, got 0.5")],
    ids=["too many", "soft"],
)
def test_checked_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        jaxbce.checked(lambda labels: jaxbce.positives_from_multi_hot(labels, 1))(labels)


def test_checked_counts():
    with pytest.raises(ValueError, match=r"prior_bias: labels must be in \[0, 1\], got 2.0"):
        jaxbce.checked(jaxbce.prior_bias)(DENSE * 2.0)


@pytest.mark.parametrize("fn", [jaxbce.balanced_pos_weight, jaxbce.prior_bias])
@pytest.mark.parametrize(
    ("labels", "got"),
    [
        (np.array([[3, 7, 1], [2, -1, -1]]), "-1"),
        (np.array([[3, 7, 1], [2, 0, 0]], np.uint8), "7"),
        (np.array([[0.0, 1.0, np.nan]]), "nan"),
    ],
    ids=["ids", "unsigned", "NaN"],
)
def test_known_labels_outside_of_0_and_1_are_refused(fn, labels, got):
    """Such as ids, which are `positives`. A mask leaves them out, and traced ones are not known."""
    with pytest.raises(ValueError, match=rf"in \[0, 1\], got {got}; label ids are positives=..."):
        fn(labels)
    inside = (labels >= 0) & (labels <= 1)
    kept = np.where(inside, labels, 0)
    np.testing.assert_array_equal(fn(labels, where=inside), fn(kept, where=inside))
    jax.jit(fn)(labels)
    jax.jit(lambda where: fn(labels, where=where))(inside)
    np.testing.assert_array_equal(
        fn(inside, where=inside[:1]), fn(inside.astype(int), where=inside[:1])
    )


# --- class balance -----------------------------------------------------------------------------


MASKS = {
    "no mask": None,
    "rows": np.array([[True], [False], [True], [True]]),
    "labels": np.array([True, False, True, True, True]),
    "elements": np.random.default_rng(0).random((4, 5)) < 0.6,
    "scalar": np.array(True),
    "nothing kept": np.zeros((4, 5), bool),
}
every_mask = pytest.mark.parametrize("where", MASKS.values(), ids=MASKS)
every_form = pytest.mark.parametrize(
    "arguments",
    [{"labels": DENSE}, {"labels": DENSE * 1.0}, {"positives": POSITIVES, "num_labels": 5}],
    ids=["integer", "float", "positives"],
)


def counts(where):
    """Positives and negatives of each label."""
    where = np.broadcast_to(True if where is None else where, DENSE.shape)
    return (DENSE * where).sum(0), ((1 - DENSE) * where).sum(0)


@every_form
@every_mask
@pytest.mark.parametrize("max_weight", [None, 1.5], ids="max_weight={}".format)
def test_balanced_pos_weight(arguments, where, max_weight):
    positives, negatives = counts(where)
    got = jaxbce.balanced_pos_weight(**arguments, where=where, max_weight=max_weight)
    expected = np.minimum(negatives / np.maximum(positives, 1), max_weight or np.inf)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@every_form
@every_mask
def test_prior_bias(arguments, where):
    positives, negatives = counts(where)
    got = jaxbce.prior_bias(**arguments, where=where)
    np.testing.assert_allclose(got, np.log((positives + 0.5) / (negatives + 0.5)), rtol=1e-6)


@every_mask
@pytest.mark.parametrize("fn", [jaxbce.balanced_pos_weight, jaxbce.prior_bias])
def test_ignored_labels_are_not_counted(fn, where):
    """Duplicates, padding, and positives among them."""
    ignored = np.array([[2, 1, 2], [-1, 7, -1], [0, 3, 4], [3, 3, -1]])
    kept = np.asarray(jaxbce.multi_hot(ignored, 5)) == 0
    kept = kept if where is None else kept & where
    got = fn(positives=POSITIVES, num_labels=5, where=where, ignored=ignored)
    np.testing.assert_allclose(got, fn(DENSE, where=kept), rtol=1e-6)


def test_an_untrained_head_predicts_the_base_rate(rng):
    labels = (rng.random((1000, 4)) < [0.5, 0.1, 0.01, 0.9]).astype(np.float32)
    probabilities = jax.nn.sigmoid(jaxbce.prior_bias(labels))
    np.testing.assert_allclose(probabilities, labels.mean(0), atol=1e-3)


def test_the_balanced_weight_balances(rng):
    """At logit 0 both classes then have the same loss."""
    labels = (rng.random((1000, 4)) < [0.5, 0.1, 0.01, 0.9]).astype(np.float32)
    pos_weight = jaxbce.balanced_pos_weight(labels)
    gradient = jax.grad(jaxbce.bce_with_logits)(
        np.zeros_like(labels), labels, pos_weight=pos_weight
    )
    np.testing.assert_allclose(gradient.sum(0), 0, atol=1e-6)


def test_soft_labels_count_in_parts():
    labels = np.array([[0.25], [0.75], [1.0], [1.0]], np.float32)
    np.testing.assert_allclose(jaxbce.balanced_pos_weight(labels), [1 / 3], rtol=1e-6)


def test_unknown_labels_are_left_out():
    labels = np.array([[1, np.nan], [np.nan, 0], [0, 1]], np.float32)
    got = jaxbce.balanced_pos_weight(labels, where=~np.isnan(labels))
    np.testing.assert_array_equal(got, [1, 1])


def test_counts_keep_their_dtype_and_transform():
    with jax.enable_x64(True):
        assert jaxbce.prior_bias(DENSE.astype(np.float64)).dtype == jnp.float64
    assert jaxbce.prior_bias(jnp.asarray(DENSE, jnp.bfloat16)).dtype == jnp.float32
    stacked = np.stack([DENSE, DENSE[::-1]])
    expected = np.stack([jaxbce.prior_bias(DENSE)] * 2)
    np.testing.assert_array_equal(jax.jit(jax.vmap(jaxbce.prior_bias))(stacked), expected)
    np.testing.assert_array_equal(
        jaxbce.prior_bias(stacked), jaxbce.prior_bias(np.concatenate(stacked))
    )


def test_counting_ids_needs_no_dense_labels():
    def call(positives, where):
        return jaxbce.balanced_pos_weight(positives=positives, num_labels=2**20, where=where)

    positives = jnp.zeros((256, 4), jnp.int32)
    for where in (jnp.ones((256, 1), bool), jnp.ones(2**20, bool)):
        assert temporaries(call, positives, where) < 4 * 4 * 2**20


@pytest.mark.parametrize("fn", [jaxbce.balanced_pos_weight, jaxbce.prior_bias])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "exactly one of labels and positives must be given, got neither"),
        ({"labels": DENSE, "positives": POSITIVES}, ValueError, "got labels and positives"),
        ({"positives": POSITIVES}, ValueError, "num_labels must be given with positives"),
        ({"labels": DENSE, "num_labels": 5}, ValueError, "num_labels goes with positives"),
        ({"labels": np.float32(1)}, ValueError, "labels must have an axis"),
        ({"labels": DENSE, "where": DENSE}, TypeError, "where must be bool"),
        ({"labels": DENSE, "where": DENSE[:, 0] == 0}, ValueError, r"where\[:, None\]"),
        ({"labels": DENSE, "ignored": POSITIVES}, ValueError, "ignored goes with positives"),
        (
            {"positives": POSITIVES, "num_labels": 5, "ignored": POSITIVES[:2]},
            ValueError,
            "ignored must have shape .* leading axes of positives",
        ),
    ],
    ids=[
        "neither",
        "both",
        "no num_labels",
        "labels and num_labels",
        "one label",
        "integer where",
        "where per row",
        "dense and ignored",
        "rows of ignored",
    ],
)
def test_count_errors(fn, arguments, error, message):
    with pytest.raises(error, match=f"{fn.__name__}: .*{message}"):
        fn(**arguments)


@pytest.mark.parametrize(
    "kind", [float, np.float32, np.float64, jnp.bfloat16, np.asarray, jnp.array]
)
@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")], ids=str)
def test_max_weight_must_be_positive(limit, kind):
    limit = kind(limit)
    for transform in (lambda f: f, jax.jit):
        call = transform(lambda labels: jaxbce.balanced_pos_weight(labels, max_weight=limit))
        with pytest.raises(ValueError, match="balanced_pos_weight: max_weight must be positive, g"):
            call(DENSE)


@pytest.mark.parametrize(
    "limit", [2, 2.0, np.int32(2), np.float32(2), np.float64(2), np.array(2.0), jnp.float32(2)]
)
def test_max_weight_of_any_real_dtype(limit):
    for fn in (jaxbce.balanced_pos_weight, jax.jit(jaxbce.balanced_pos_weight)):
        got = fn(DENSE, max_weight=limit)
        np.testing.assert_array_equal(got, [2, 2, 2, 2, 2])
        assert got.dtype == jnp.float32


@pytest.mark.parametrize("limit", ["2", 2j, [2.0]], ids=str)
def test_max_weight_must_be_a_number(limit):
    with pytest.raises(TypeError, match="balanced_pos_weight: max_weight must be"):
        jaxbce.balanced_pos_weight(DENSE, max_weight=limit)


# --- sizes: none, many, unknown ----------------------------------------------------------------


@pytest.mark.parametrize("form", ["labels", "no positives", "positives"])
@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize("num_labels", [0, 3])
def test_counts_of_nothing(form, rows, num_labels):
    """No rows, no ids in a row or no labels, with no mask and with one of every shape."""
    if form == "labels":
        arguments = {"labels": np.zeros((rows, num_labels), bool)}
    else:
        ids = np.full((rows, 0 if form == "no positives" else 2), -1)
        arguments = {"positives": ids, "num_labels": num_labels}
    shapes = [(), (num_labels,), (1, num_labels), (rows, 1), (rows, num_labels), (1, 1)]

    @jax.jit
    def counts():
        masks = [None, *(np.ones(shape, bool) for shape in shapes)]
        return [
            (
                jaxbce.balanced_pos_weight(**arguments, where=where),
                jaxbce.prior_bias(**arguments, where=where),
            )
            for where in masks
        ]

    expected = np.float32([[rows], [np.log(0.5 / (rows + 0.5))]]).repeat(num_labels, axis=1)
    for got in counts():
        chex.assert_trees_all_close(got, tuple(expected), rtol=1e-6)


def test_counts_of_no_rows_eagerly():
    mask = np.ones((0, 1), bool)
    assert not jaxbce.prior_bias(np.zeros((0, 3)), where=mask).any()
    ids = np.zeros((0, 2), int)
    assert not jaxbce.balanced_pos_weight(positives=ids, num_labels=3, where=mask).any()


@every_jit
def test_more_rows_than_an_int32_counts(transform):
    """2^32 rows, which take no memory because they have no positives."""
    positives = np.zeros((2**16, 2**16, 0), np.int32)
    call = transform(
        lambda where: jaxbce.balanced_pos_weight(positives=positives, num_labels=3, where=where)
    )
    np.testing.assert_array_equal(call(None), [2.0**32] * 3)
    np.testing.assert_array_equal(call(np.array([True, False, True])), [2.0**32, 0, 2.0**32])
    rows = np.arange(2**16)[:, None, None] < 2**15
    np.testing.assert_array_equal(call(rows), [2.0**31] * 3)


@pytest.mark.parametrize("where", [None, (4,), (1, 4), (2**33, 1), (2**33, 4)], ids=str)
@pytest.mark.parametrize("fn", [jaxbce.balanced_pos_weight, jaxbce.prior_bias])
def test_counts_of_any_size(fn, where):
    where = where and jax.ShapeDtypeStruct(where, bool)
    for dtype in ("bool", "int8", "float32"):
        labels = jax.ShapeDtypeStruct((2**33, 4), dtype)
        assert jax.eval_shape(lambda y, where: fn(y, where=where), labels, where).shape == (4,)
    ids = jax.ShapeDtypeStruct((2**33, 3), jnp.int8)
    sparse = jax.eval_shape(lambda p, w: fn(positives=p, num_labels=4, where=w), ids, where)
    assert sparse.shape == (4,)


def test_a_label_that_is_always_positive_has_no_negatives():
    """Though a sum of many labels may be rounded up, here by a label with one bit too many."""
    labels = np.array([[1 + 2**-23]], np.float32)
    np.testing.assert_array_equal(jax.jit(jaxbce.balanced_pos_weight)(labels), [0])


def test_a_symbolic_batch():
    labels, positives = DENSE.astype(np.float32), POSITIVES.astype(np.int32)
    for fn in (jaxbce.balanced_pos_weight, jaxbce.prior_bias):
        expected = fn(labels)
        np.testing.assert_array_equal(of_any_batch(fn, labels), expected)
        sparse = functools.partial(fn, num_labels=5)
        got = of_any_batch(lambda p, sparse=sparse: sparse(positives=p), positives)
        np.testing.assert_array_equal(got, expected)
    multi_hot = functools.partial(jaxbce.multi_hot, num_labels=5)
    np.testing.assert_array_equal(of_any_batch(multi_hot, positives), DENSE)
    ids = functools.partial(jaxbce.positives_from_multi_hot, max_positives=2)
    np.testing.assert_array_equal(of_any_batch(ids, labels), ids(labels))
    loss = of_any_batch(jaxbce.sparse_bce_with_logits, labels, positives)
    np.testing.assert_allclose(loss, jaxbce.bce_with_logits(labels, DENSE), rtol=1e-6)


@pytest.mark.thorough
def test_64_bits():
    """Ids stay int32, and counts float32 but for float64 labels."""
    labels, positives = DENSE.astype(np.float64), POSITIVES.astype(np.int64)

    @jax.jit
    def counts(labels, positives, where):
        def both(**arguments):
            weight = jaxbce.balanced_pos_weight(**arguments, where=where, max_weight=np.float64(2))
            return weight, jaxbce.prior_bias(**arguments, where=where)

        return both(labels=labels), both(positives=positives, num_labels=5)

    with jax.enable_x64(True):
        for fewest in (None, 2):
            ids = jaxbce.positives_from_multi_hot(labels, fewest)
            assert ids.dtype == jnp.int32
            np.testing.assert_array_equal(ids, [[0, 2], [1, 4], [-1, -1], [3, -1]])
        np.testing.assert_array_equal(jaxbce.multi_hot(positives, 5, dtype=np.float64), DENSE)
        loss = jaxbce.sparse_bce_with_logits(labels, positives)
        assert loss.dtype == jnp.float64
        np.testing.assert_allclose(loss, jaxbce.bce_with_logits(labels, DENSE))
        for where in (None, np.ones((4, 1), bool)):
            wide, narrow = counts(labels, positives, where)
            chex.assert_trees_all_equal_dtypes(wide, (jnp.zeros(5, jnp.float64),) * 2)
            chex.assert_trees_all_equal_dtypes(narrow, (jnp.zeros(5, jnp.float32),) * 2)
            chex.assert_trees_all_close(jax.tree.map(np.float64, narrow), wide, rtol=1e-6)
            chex.assert_trees_all_equal(counts(DENSE, positives, where)[0], narrow)
