"""Kernels of the focal and the asymmetric loss: sums of products, differentiated as such.

Both losses are sums of products of powers of a few functions of x and y whose derivatives are again
such sums. So a loss is one `Sum`, and its derivative of any order is another, found by the rules of
its symbols before anything is computed. A product is evaluated in log space as a whole: its factors
may over- and underflow (for gamma = 1/2 and label 0, p^-1/2 p at x = -200), the product does not,
so every derivative is finite where the true one is.

A zero coefficient annihilates: 0 · ∞ = 0.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbce import _kernels

Product = tuple[tuple[str, float], ...]  # (symbol, exponent), sorted
Sum = dict[Product, float]  # product: coefficient
Rules = dict[str, Sum]  # symbol: its derivative; 0 for a symbol that is not there
Evaluate = Callable[[Sum, "SigmoidPowers", jax.Array], jax.Array]
Decorator = Callable[[_kernels.Kernel, _kernels.Partials], _kernels.Kernel]


def term(coefficient: float = 1.0, **exponents: float) -> Sum:
    product = sorted((symbol, power) for symbol, power in exponents.items() if power)
    return {tuple(product): coefficient}


def add(left: Sum, right: Sum) -> Sum:
    total = left | {product: left.get(product, 0.0) + c for product, c in right.items()}
    return {product: coefficient for product, coefficient in total.items() if coefficient}


def multiply(left: Sum, right: Sum) -> Sum:
    total: Sum = {}
    for product, coefficient in left.items():
        for other, factor in right.items():
            exponents = dict(product)
            for symbol, power in other:
                exponents[symbol] = exponents.get(symbol, 0) + power
            total = add(total, term(coefficient * factor, **exponents))
    return total


def derivative(total: Sum, rules: Rules) -> Sum:
    result: Sum = {}
    for product, coefficient in total.items():
        for symbol, power in product:
            if symbol in rules:
                rest = term(coefficient * power, **{**dict(product), symbol: power - 1})
                result = add(result, multiply(rest, rules[symbol]))
    return result


def unshared_abs(x: jax.Array) -> jax.Array:
    """|x|, in the derivatives. XLA on a GPU would write to memory what they and the loss share."""
    return jnp.maximum(x, -x)


def sum_kernel(
    total: Sum,
    by_x: Rules,
    by_y: Rules,
    evaluate: Evaluate,
    decorate: Decorator = _kernels.with_jvp,
    magnitude: _kernels.Kernel = unshared_abs,
) -> _kernels.Kernel:
    """The function of (x, y) that `total` stands for, right at every order of differentiation."""

    def value(x: jax.Array, y: jax.Array) -> jax.Array:
        return evaluate(total, SigmoidPowers(x, magnitude(x)), y)

    @functools.cache
    def derivatives() -> list[_kernels.Kernel | None]:
        sums = [derivative(total, rules) for rules in (by_x, by_y)]
        return [sum_kernel(each, by_x, by_y, evaluate) if each else None for each in sums]

    def partials(x: jax.Array, y: jax.Array) -> tuple[jax.Array | None, ...]:
        return tuple(kernel and kernel(x, y) for kernel in derivatives())

    return decorate(value, partials)


def loss_kernel(loss: Sum, by_x: Rules, by_y: Rules, evaluate: Evaluate) -> _kernels.Kernel:
    return sum_kernel(loss, by_x, by_y, evaluate, _kernels.with_vjp, jnp.abs)


def without_focus(x: jax.Array, y: jax.Array) -> jax.Array:
    """Both losses when nothing focuses: binary cross-entropy, bit for bit."""
    return _kernels.bce_with_logits(x, y, None)


def annihilate(coefficient: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.where(coefficient == 0, 0, coefficient * value)


def power(base: jax.Array, exponent: float) -> jax.Array:
    """base^exponent for base > 0; a whole power to a few ULP."""
    whole = math.floor(exponent)
    result = lax.integer_pow(base, whole)
    rest = exponent - whole
    return result * jnp.exp(rest * jnp.log(base)) if rest else result


# p = sigmoid(x) and q = sigmoid(-x). With t = exp(-|x|), the smaller is t / (1 + t), the larger
# 1 / (1 + t). Small whole exponents are multiplied out. Any other product of powers is evaluated
# in log space: p^i q^j = exp(-n |x|) (1 + t)^-(i + j), n being the exponent of the smaller.
#
# Rounding n |x|, up to 87, before the exponential would cost 60 ULP. n and |x| are split into a
# part of few bits, whose product is exact, and a rest that is small: two exponentials instead.

P_BY_X, Q_BY_X = term(p=1, q=1), term(-1, p=1, q=1)


def split(number: float) -> tuple[float, float]:
    high = round(number * 256) / 256
    return high, number - high


def multiplied_out(*exponents: float) -> bool:
    return sum(exponents) <= 4 and all(k >= 0 and float(k).is_integer() for k in exponents)


class SigmoidPowers:
    """x, functions of it, and powers of p and q; `magnitude` is |x|."""

    def __init__(self, x: jax.Array, magnitude: jax.Array) -> None:
        self.negative = x < 0
        self.magnitude = magnitude
        self.x = jnp.where(self.negative, -magnitude, magnitude)
        self.t = jnp.exp(-magnitude)
        self.log1p_t = _kernels.log1p_unit(self.t)
        self.smaller = _kernels.sigmoid_of_exp(self.t)
        self.larger = 1 - self.smaller
        self.p = jnp.where(self.negative, self.smaller, self.larger)
        self.q = jnp.where(self.negative, self.larger, self.smaller)

    def power(self, i: float, j: float) -> jax.Array:
        """p^i q^j"""
        if multiplied_out(i, j):
            return lax.integer_pow(self.p, int(i)) * lax.integer_pow(self.q, int(j))
        return self.power_in_log_space(i, j, 0, False)

    def power_in_log_space(self, i: float, j: float, e: float, near: jax.Array | bool) -> jax.Array:
        """p^i q^j r^e, where r is the smaller of p and q if near, else the larger."""
        # Capped, so that an infinite |x| gives exp(-0 |x|) = 1.
        magnitude = jnp.minimum(self.magnitude, 2.0**100)
        info = jnp.finfo(magnitude.dtype)
        high = lax.reduce_precision(magnitude, info.nexp, info.nmant // 2)
        low = magnitude - high
        (i_high, i_low), (j_high, j_low), (e_high, e_low) = split(i), split(j), split(e)
        n_high = jnp.where(self.negative, i_high, j_high) + jnp.where(near, e_high, 0.0)
        n_low = jnp.where(self.negative, i_low, j_low) + jnp.where(near, e_low, 0.0)
        n_high, n_low = n_high.astype(self.t.dtype), n_low.astype(self.t.dtype)
        rest = n_high * low + n_low * magnitude + (i + j + e) * self.log1p_t
        large = -n_high * high
        # The select keeps XLA from rewriting exp(a) exp(b) as exp(a + b). Capped, so that two terms
        # that overflow do not make NaN.
        scale = jnp.where(large < -1000, 0, jnp.exp(large))
        return jnp.minimum(scale * jnp.exp(-rest), info.max)


# Focal loss with a = 1 - y, b = y, m = 1 - p_t = a p + b q, d = ∂m/∂p = a - b = 1 - 2 y and
# r = ∂m/∂y = q - p = -tanh(x / 2):
#
# loss = alpha_t m^gamma c,  c = a softplus(x) + b softplus(-x),  alpha_t = alpha b + (1 - alpha) a
#
# Where the label is hard and the logit on its side (`near`), m is the smaller of p and q; c is then
# as small, so in log space it is evaluated as m (c / m). Elsewhere m = u / (1 + t), and u is not
# small.

FOCAL_BY_X: Rules = {
    "p": P_BY_X,
    "q": Q_BY_X,
    "m": term(d=1, p=1, q=1),
    "c": add(term(a=1, p=1), term(-1, b=1, q=1)),
    "r": term(-2, p=1, q=1),
    "x": term(),
}
FOCAL_BY_Y: Rules = {
    "a": term(-1),
    "b": term(),
    "d": term(-2),
    "m": term(r=1),
    "c": term(-1, x=1),
}


def evaluate_focal(total: Sum, at: SigmoidPowers, y: jax.Array) -> jax.Array:
    a, b = 1 - y, y
    larger, smaller = jnp.where(at.negative, b, a), jnp.where(at.negative, a, b)
    near = larger == 0
    u = jnp.where(near, 1, larger + smaller * at.t)
    m = a * at.p + b * at.q
    c = jnp.where(near, at.log1p_t, at.magnitude * larger + at.log1p_t)

    def powers(i: float, j: float, e: float, c_power: float) -> jax.Array:
        """p^i q^j m^e c^c_power, of which c_power is 0 or 1."""
        if multiplied_out(i, j, e):
            value = at.power(i, j) * lax.integer_pow(m, int(e))
            return annihilate(value, c) if c_power else value
        value = at.power_in_log_space(i, j, e + c_power, near) * power(u, e + c_power)
        if not c_power:
            return value
        vanished = near & (at.t == 0)
        c_over_m = jnp.where(vanished, 1, c / jnp.where(near, at.t, u) * (1 + at.t))
        return annihilate(value, c_over_m)

    bases = {"a": a, "b": b, "d": a - b, "r": -jnp.tanh(at.x / 2)}
    result = jnp.zeros_like(m)
    for product, coefficient in total.items():
        k = dict(product)
        value = powers(*(k.pop(symbol, 0) for symbol in "pqmc"))
        if "x" in k:
            value = annihilate(value, at.x)
        for symbol, base in bases.items():
            if symbol in k:
                value = annihilate(lax.integer_pow(base, int(k[symbol])), value)
        result = result + coefficient * value
    return result


@functools.cache
def sigmoid_focal(gamma: float, alpha: float | None) -> _kernels.Kernel:
    if gamma == 0 and alpha is None:
        return without_focus
    alpha_t = term() if alpha is None else add(term(alpha, b=1), term(1 - alpha, a=1))
    loss = multiply(alpha_t, term(m=gamma, c=1))
    return loss_kernel(loss, FOCAL_BY_X, FOCAL_BY_Y, evaluate_focal)


# Asymmetric loss with a = 1 - y, b = y, m = max(p - clip, 0), v = 1 - m, l = -log(v), h = [m > 0]
# and s = softplus(-x):
#
# loss = b q^gamma_pos s + a h m^gamma_neg l,  ∂m/∂x = h p q,  ∂l/∂x = h p q / v
#
# Everything is 0 at the kink p = clip and below. With clip = 0, m is p, v is q and l is n =
# softplus(x). Capital letters are p, q and m in a focusing weight that gives no gradient.

ASYMMETRIC_BY_X: Rules = {
    "p": P_BY_X,
    "q": Q_BY_X,
    "s": term(-1, q=1),
    "n": term(p=1),
    "m": P_BY_X,
    "v": Q_BY_X,
    "l": term(p=1, q=1, v=-1),
}
ASYMMETRIC_BY_Y: Rules = {"a": term(-1), "b": term()}


def shifted_probability(x: jax.Array, p: jax.Array, q: jax.Array, clip: float) -> jax.Array:
    """max(p - clip, 0), to a few ULP also near the kink, at x0 = log(clip / (1 - clip))."""
    x0 = math.log(clip / (1 - clip))
    rounded = float(np.asarray(x0, x.dtype))
    # p - clip = clip q (exp(x - x0) - 1), where x - rounded is exact and the rest of x0 follows.
    beyond = x - rounded
    growth = jnp.expm1(jnp.minimum(beyond, 1))
    growth = growth - (x0 - rounded) * (1 + growth)
    return jnp.maximum(jnp.where(beyond < 1, clip * q * growth, p - clip), 0)


def evaluate_asymmetric(clip: float, total: Sum, at: SigmoidPowers, y: jax.Array) -> jax.Array:
    bases = {"a": 1 - y, "b": y}
    bounded = {}
    linear = at.magnitude + at.log1p_t
    unbounded = {
        "s": jnp.where(at.negative, linear, at.log1p_t),
        "n": jnp.where(at.negative, at.log1p_t, linear),
    }
    if clip:
        m = shifted_probability(at.x, at.p, at.q, clip)
        v = at.q + clip
        bases["h"] = jnp.sign(m)
        bounded = {"m": m, "v": v, "l": jnp.where(m < 0.5, -jnp.log1p(-m), -jnp.log(v))}

    result = jnp.zeros_like(at.x)
    for product, coefficient in total.items():
        k = dict(product)
        i, j = (k.pop(symbol, 0) + k.pop(symbol.upper(), 0) for symbol in "pq")
        value = at.power(i, j)
        k["m"] = k.get("m", 0) + k.pop("M", 0)
        for symbol, base in bounded.items():
            value = value * power(base, k.get(symbol, 0))
        for symbol, factor in unbounded.items():
            if symbol in k:
                value = annihilate(value, factor)
        for symbol, base in bases.items():
            if symbol in k:
                value = annihilate(base, value)
        result = result + coefficient * value
    return result


@functools.cache
def asymmetric(
    gamma_neg: float, gamma_pos: float, clip: float, stop_focus_gradient: bool
) -> _kernels.Kernel:
    if gamma_neg == gamma_pos == clip == 0:
        return without_focus
    weight = str.upper if stop_focus_gradient else str
    positive = term(b=1, s=1, **{weight("q"): gamma_pos})
    if clip:
        negative = term(a=1, h=1, l=1, **{weight("m"): gamma_neg})
    else:
        negative = term(a=1, n=1, **{weight("p"): gamma_neg})
    evaluate = functools.partial(evaluate_asymmetric, clip)
    loss = add(positive, negative)
    return loss_kernel(loss, ASYMMETRIC_BY_X, ASYMMETRIC_BY_Y, evaluate)
