"""Claim: the constants of `log1p_unit` are the best cubic there is, in the relative error of
log(1 + t) for t in [0, 1]: 4.5e-9.

    pip install mpmath && python benchmarks/minimax.py

With s = t / (2 + t) and z = s² in (0, 1/9], log(1 + t) = t - s (t - z S(z)); S is approximated by a
cubic P, whose error counts s z / log(1 + t) times. Remez' algorithm: of a cubic that is best, the
error has five extrema of one size and alternate signs, which are four coefficients and that size.
"""

import mpmath

mpmath.mp.dps = 40
DEGREE, INTERVAL, CELLS, ROUNDS = 3, (mpmath.mpf(10) ** -12, mpmath.mpf(1) / 9), 2000, 12


def parts(z):
    """S(z), and how much an error of it counts in log(1 + t)."""
    s = mpmath.sqrt(z)
    t = 2 * s / (1 - s)
    log = mpmath.log1p(t)
    return (t - (t - log) / s) / z, s * z / log


def best_on(points):
    """The coefficients, lowest first, of which the error at the points alternates."""
    rows = []
    for i, z in enumerate(points):
        rows.append([z**power for power in range(DEGREE + 1)] + [(-1) ** i / parts(z)[1]])
    solution = mpmath.lu_solve(mpmath.matrix(rows), mpmath.matrix([parts(z)[0] for z in points]))
    return list(solution)[:-1]


def errors(coefficients, grid):
    for z in grid:
        exact, counts = parts(z)
        yield z, (mpmath.polyval(coefficients[::-1], z) - exact) * counts


def extrema(pairs):
    """The largest of each run of errors of one sign."""
    found = []
    for z, error in pairs:
        if not found or mpmath.sign(error) != mpmath.sign(found[-1][1]):
            found.append((z, error))
        elif abs(error) > abs(found[-1][1]):
            found[-1] = z, error
    return found


def main():
    low, high = INTERVAL
    grid = [low + (high - low) * cell / CELLS for cell in range(CELLS + 1)]
    last = DEGREE + 1
    points = [
        low + (high - low) * (1 - mpmath.cos(mpmath.pi * i / last)) / 2 for i in range(last + 1)
    ]
    for _ in range(ROUNDS):
        coefficients = best_on(points)
        found = extrema(errors(coefficients, grid))
        points = [z for z, _ in found]
    for power, coefficient in enumerate(coefficients):
        print(f"z^{power}: {mpmath.nstr(coefficient, 9)}")
    print("relative errors at the extrema:", *(mpmath.nstr(error, 3) for _, error in found))


if __name__ == "__main__":
    main()
