"""Claim: with every exponential and every division off by as much as JAX publishes for a backend,
in the direction that hurts most, loss and gradient are within 5 ULP and the second derivative
within 7, on every backend of that table; optax, the textbook and jax.nn are not.

JAX documents the worst error of its functions on each backend ("Numerical accuracy"). Here the
jaxprs that JAX itself makes of a loss and its derivatives are evaluated operation by operation in
float32. Additions, products and comparisons are rounded correctly; each inexact operation is
computed exactly and then moved by its published error, up or down: at random, and greedily, where
each sign is flipped wherever that makes the result worse. No accelerator is needed.

    python benchmarks/backends.py                         # a random 2^16 float32 logits, 1 minute
    python benchmarks/backends.py --fraction 0.00390625   # 1/256 of all
    python benchmarks/backends.py --picture docs/backends.png
"""

import argparse
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import contenders
import jax
import made
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import oracle

from jaxbce import _math

# Worst error in ULP of float32, from the table; of a division, that of a reciprocal and a product.
PLAIN = ("exp", "log1p", "logistic", "tanh", "log", "expm1", "div")
TABLE = {
    "CPU": (1.5, 3, 2.5, 5, 1.5, 6.5, 0.5),
    "H100, B200": (2, 1, 4, 5.5, 1, 1.5, 0.5),
    "TPU v2 to v5e": (116, 4034, 243, 1366, 4031, 1772, 199),
    "TPU v5p": (110, 2083, 124, 92, 62, 1358, 41),
    "TPU v6e": (65, 2049, 66, 1.5, 2.5, 64, 2.5),
    "TPU 7x": (65, 2049, 64, 1.5, 2.5, 64, 2.5),
}
HIGHEST = {"CPU": 1.5, "H100, B200": 2.0}  # of exp with AccuracyMode.HIGHEST; 1.5 on every TPU
EXACT = {
    "exp": np.exp,
    "exp2": np.exp2,
    "log1p": np.log1p,
    "logistic": oracle.sigmoid,
    "tanh": np.tanh,
    "log": np.log,
    "expm1": np.expm1,
    "div": np.divide,
}
ROUNDED: dict[str, Callable] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "neg": np.negative,
    "abs": np.abs,
    "sign": np.sign,
    "max": np.maximum,
    "min": np.minimum,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "not": np.logical_not,
    "is_finite": np.isfinite,
    "add_any": np.add,
    "copy": np.array,
    "square": np.square,
    "stop_gradient": np.array,
}
CALLS = ("jit", "pjit", "custom_jvp_call", "custom_vjp_call", "closed_call", "remat", "checkpoint")


def inner(equation: Any) -> Any:
    """The jaxpr that a call runs."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in equation.params:
            return equation.params[name]
    raise NotImplementedError(equation.primitive.name)


def inexact_error(backend: str, equation: Any) -> float:
    """In ULP."""
    name = equation.primitive.name
    if equation.params.get("accuracy") is jax.lax.AccuracyMode.HIGHEST and name == "exp":
        return HIGHEST.get(backend, 1.5)
    return dict(zip(PLAIN, TABLE[backend], strict=True))["exp" if name == "exp2" else name]


def live(jaxpr: Any) -> list[Any]:
    """The equations whose results are used: with a gradient JAX keeps the loss, unused."""
    used, equations = set(jaxpr.outvars), []
    for equation in reversed(jaxpr.eqns):
        if used & set(equation.outvars):
            equations.append(equation)
            used |= {atom for atom in equation.invars if not hasattr(atom, "val")}
    return equations[::-1]


class Backend:
    """Evaluates a jaxpr; `signs` says of each inexact operation, in order, where it is off."""

    def __init__(self, name: str, signs: Callable[[int, tuple[int, ...]], np.ndarray]) -> None:
        self.name, self.signs, self.count = name, signs, 0

    def run(self, closed: Any, *arguments: Any) -> list[Any]:
        jaxpr = closed.jaxpr if hasattr(closed, "jaxpr") else closed
        values = dict(zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=False))
        values |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Any:
            return np.asarray(atom.val) if hasattr(atom, "val") else values[atom]

        with np.errstate(all="ignore"):
            for equation in live(jaxpr):
                results = self.operate(equation, [read(atom) for atom in equation.invars])
                values |= dict(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def operate(self, equation: Any, inputs: list[Any]) -> list[Any]:
        name, out = equation.primitive.name, equation.outvars[0].aval
        if name in CALLS:
            return self.run(inner(equation), *inputs)
        if name == "platform_index":
            # The branches of `platform_dependent` are those for a CPU and for all others.
            return [np.int32(0 if self.name == "CPU" else 1)]
        if name == "cond":
            branches = equation.params["branches"]
            return self.run(branches[int(inputs[0])], *inputs[1:])
        if name in EXACT:
            return [self.inexact(equation, inputs)]
        if name in ROUNDED:
            return [np.asarray(ROUNDED[name](*inputs)).astype(out.dtype)]
        if name == "integer_pow":
            return [self.power(inputs[0], equation.params["y"])]
        if name == "select_n":
            which, *cases = inputs
            return [np.where(which, cases[1], cases[0])]
        if name == "convert_element_type":
            return [np.asarray(inputs[0]).astype(out.dtype)]
        if name in ("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "pvary"):
            return [np.broadcast_to(np.asarray(inputs[0]).reshape(-1), out.shape)]
        if name == "clamp":
            return [np.minimum(np.maximum(inputs[1], inputs[0]), inputs[2])]
        raise NotImplementedError(name)

    def power(self, base: np.ndarray, exponent: int) -> np.ndarray:
        result = np.ones_like(base)
        for _ in range(exponent):
            result = result * base
        return result

    def inexact(self, equation: Any, inputs: list[Any]) -> np.ndarray:
        exact = EXACT[equation.primitive.name](*(np.float64(value) for value in inputs))
        error = inexact_error(self.name, equation)
        sign = self.signs(self.count, np.shape(exact))
        self.count += 1
        unit = np.spacing(np.abs(np.float32(exact))).astype(np.float64)
        moves = np.isfinite(exact) & (exact != 0)
        moved = np.float32(exact + np.where(moves, sign * error * unit, 0))
        # A float32 that is no further away than that.
        beyond = moves & (np.abs(moved - exact) > error * unit)
        return np.where(beyond, np.nextafter(moved, np.float32(exact)), moved)


def derivative(fn: Callable, order: int) -> Callable:
    """Of a function of (logit, label), by the logit."""
    for _ in range(order):
        fn = jax.grad(fn)
    return jax.vmap(fn)


def flushed(order: int) -> float:
    """Below so many times the smallest normal number a result, or a correction, is 0 on some."""
    return 2.0**24 if order == 3 else 2.0


def worst(
    backend: str,
    fn: Callable,
    order: int,
    expected: np.ndarray,
    x: np.ndarray,
    label: float,
    rounds: int = 4,
) -> np.ndarray:
    """The worst error found for each logit, in ULP."""
    y = np.full_like(x, label)
    jaxpr = jax.make_jaxpr(derivative(fn, order))(x, y)
    rng = np.random.default_rng(0)

    def error(chosen: dict[int, np.ndarray]) -> np.ndarray:
        def signs(count: int, shape: tuple[int, ...]) -> np.ndarray:
            if count not in chosen:
                chosen[count] = rng.choice([-1.0, 1.0], x.shape)
            sign = chosen[count]
            return sign if shape == x.shape else sign.reshape(-1)[0].reshape(shape)

        (got,) = Backend(backend, signs).run(jaxpr, x, y)
        return oracle.ulp_error(np.float32(got), expected, flushed(order))

    best = np.zeros(x.shape)
    for _ in range(rounds):
        chosen: dict[int, np.ndarray] = {}
        current = error(chosen)
        for operation in list(chosen):
            flipped = chosen | {operation: -chosen[operation]}
            other = error(flipped)
            better = other > current
            chosen[operation] = np.where(better, flipped[operation], chosen[operation])
            current = np.where(better, other, current)
        best = np.maximum(best, np.nan_to_num(current, nan=0.0))
    return best


# --- the bound, derived --------------------------------------------------------------------------
#
# docs/numerics.md derives it. t = exp(-|x|) is off by E units; what follows is a function of that
# t, so its error enters once, through the derivative by t, and beside it stand the roundings.


def unit(value: np.ndarray) -> np.ndarray:
    return oracle.ulp(value, np.float32)


def half(value: np.ndarray) -> np.ndarray:
    """The error of a rounding."""
    return unit(value) / 2


def of_quotient(n: np.ndarray, d: np.ndarray, units: float) -> np.ndarray:
    """The error of `quotient`, whose division is off by so many units."""
    if units <= 0.5:
        return half(n / d)
    # The product q d is rounded at n; the correction is off by `units` of itself; the sum rounded.
    correction = units * unit(n / d) + half(n) / d
    return half(n) / d + correction * units * 2.0**-23 + half(n / d)


def of_tail(t: np.ndarray, exp_units: float, division_units: float) -> np.ndarray:
    """s = t - t (t / (1 + t))"""
    q = t / (1 + t)
    roundings = q * half(1 + t) / (1 + t) + of_quotient(t, 1 + t, division_units)
    return exp_units * unit(t) / (1 + t) ** 2 + t * roundings + half(t * q) + half(q)


def of_log1p(t: np.ndarray, exp_units: float, division_units: float) -> np.ndarray:
    """log1p_unit: t - s (t - z S) with s = t / (2 + t), z = s², S a polynomial of z."""
    s = t / (2 + t)
    z, log1p = s * s, np.log1p(t)
    by_s = s * half(2 + t) / (2 + t) + of_quotient(t, 2 + t, division_units)
    series = _math.log1p_series(z)
    by_z = 2 * s * by_s + half(z)
    by_series = half(series) * (1 + 2 * z) + 0.5 * by_z  # |S'| < 1 / 2; two more roundings, times z
    product = z * by_series + series * by_z + half(z * series)
    inner = t - z * series
    by_product = s * (product + half(inner)) + inner * by_s + half(s * inner)
    approximation = 1e-8 * t
    return exp_units * unit(t) / (1 + t) + by_product + approximation + half(log1p)


def of_tanh(
    x: np.ndarray, t: np.ndarray, exp_units: float, division_units: float
) -> tuple[np.ndarray, np.ndarray]:
    """tanh(|x| / 2) and its error: near 0 a quotient n / d, elsewhere 1 - 2 s."""
    n, d = _math.short_fraction(np.minimum(np.abs(np.float64(x)), 1))
    # The last rounding of each sum and of n counts fully, the others a tenth at most.
    near = (1 + 1 + 1 + 0.6) * 2.0**-24 * n / d + of_quotient(n, d, division_units)
    excess = (1 - t) / (1 + t)
    far = 2 * of_tail(t, exp_units, division_units) + half(excess)
    is_near = np.abs(x) < 1
    return np.where(is_near, n / d, excess), np.where(is_near, near, far)


def derived(backend: str, order: int, x: np.ndarray, label: float) -> np.ndarray:
    """The bound of the loss or its derivative of that order for a hard label, in ULP."""
    errors = dict(zip(PLAIN, TABLE[backend], strict=True))
    units = HIGHEST.get(backend, 1.5), errors["div"]
    t = np.maximum(np.exp(-np.abs(np.float64(x))), 1e-99)
    value = oracle.derivative(order, np.float64(x), label)
    far = (x > 0) if label == 0 else (x < 0)
    if order == 0:
        error = of_log1p(t, *units) + np.where(far, half(value), 0)
    elif order == 1:
        error = of_tail(t, *units) + np.where(far, half(value), 0)
    else:
        s = t / (1 + t)
        second = s - s * s
        error = of_tail(t, *units) * (1 - 2 * s) + half(s * s) + half(second)
        if order == 3:
            excess, of_excess = of_tanh(x, t, *units)
            error = error * excess + second * of_excess + half(value)
    above = np.abs(value) > flushed(order) * float(np.finfo(np.float32).tiny)
    return np.where(above, error / unit(value), 0)


CONTENDERS = {name: contenders.ELEMENTWISE[name] for name in ("jaxbce", "optax", "textbook")}


def logits(fraction: float) -> Iterator[np.ndarray]:
    """All of 16 bits; blocks of random bit patterns of float32, and as many normal ones.

    Of those where exp(-|x|) rounds to 1 or is far below the loss, one in 16: they are all alike.
    """
    for dtype in ("float16", "bfloat16"):
        yield np.asarray(oracle.all_finite(dtype), np.float32)
    rng, number = np.random.default_rng(0), int(fraction * 2**32)
    for start in range(0, number, 2**20):
        size = min(number - start, 2**20)
        bits = rng.integers(0, 2**32, size, dtype=np.uint32).view(np.float32)
        alike = (np.abs(bits) < 2.0**-26) | (np.abs(bits) >= 2.0**7)
        bits = bits[~alike | (np.arange(size) % 16 == 0)]
        x = np.concatenate([bits, rng.normal(0, 5, bits.size).astype(np.float32)])
        yield x[np.isfinite(x) & (np.abs(x) >= np.finfo(np.float32).tiny)]


def measure(backend: str, fn: Callable, order: int, x: np.ndarray, label: float) -> float:
    expected = oracle.derivative(order, np.float64(x), label)
    return float(worst(backend, fn, order, expected, x, label).max())


def draw(rows: list[dict[str, Any]], path: str) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.6), sharey=True)
    titles = ("loss", "gradient", "second derivative")
    for order, axis in enumerate(axes):
        for contender, marker in zip(CONTENDERS, "os^", strict=True):
            errors = [
                row["ulp"] for row in rows if (row["contender"], row["order"]) == (contender, order)
            ]
            axis.plot(errors, list(TABLE), marker, label=contender, ms=7)
        axis.set_xscale("log")
        axis.axvline(5 if order < 2 else 7, color="0.6", lw=1)
        axis.set_title(titles[order])
        axis.set_xlabel("worst error, ULP")
        axis.grid(alpha=0.3)
    axes[0].invert_yaxis()
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--fraction", type=float, default=2**-16, help="of all 2^32 logits")
    parser.add_argument("--backends", nargs="+", choices=TABLE, default=list(TABLE))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--picture", help="also draw them")
    args = parser.parse_args()

    rows = []
    print(f"{'':16}{'':12}{'loss':>12}{'gradient':>12}{'second':>12}{'third':>12}  derivative, ULP")
    for backend in args.backends:
        for contender in args.contenders:
            errors = []
            # The third of the others takes long, and has no digit right, as their second.
            for order in range(4 if contender == "jaxbce" else 3):
                errors.append(
                    max(
                        measure(backend, CONTENDERS[contender], order, x, label)
                        for x in logits(args.fraction)
                        for label in (0.0, 1.0)
                    )
                )
                rows.append(
                    {"backend": backend, "contender": contender, "order": order, "ulp": errors[-1]}
                )
            if contender == "jaxbce":
                bounds = [
                    max(
                        derived(backend, order, x, label).max()
                        for x in logits(args.fraction)
                        for label in (0.0, 1.0)
                    )
                    for order in range(4)
                ]
                print(f"{backend:16}{'derived':12}" + "".join(f"{e:12.3g}" for e in bounds))
            print(f"{backend:16}{contender:12}" + "".join(f"{e:12.3g}" for e in errors), flush=True)
    if args.json:
        made.write(args.json, rows, "optax")
    if args.picture:
        draw(rows, args.picture)


if __name__ == "__main__":
    main()
