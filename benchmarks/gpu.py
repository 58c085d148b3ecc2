"""Claim: on a GPU the losses keep their accuracy, and take no longer than optax's.

On any CUDA device: the worst error over 1/64 of all float32 logits, the time of value and gradient
beside optax, jitted and interleaved, and the peak memory of the chunked head beside a dense one.

    pip install "jax[cuda12]" && python benchmarks/gpu.py --json gpu.json --picture gpu.png
    python benchmarks/gpu.py --small      # on whatever there is, in seconds: a test of this
"""

import argparse
import json
import pathlib
from typing import Any

import accuracy
import contenders
import head
import jax
import jax.numpy as jnp
import made
import numpy as np
import optax

import jaxbce

CASES = {
    "plain": lambda b, n: {},
    "pos_weight": lambda b, n: {"pos_weight": jnp.full(n, 3.0)},
    "weight": lambda b, n: {"weight": jnp.full((b, 1), 2.0)},
    "where": lambda b, n: {"where": jnp.arange(b * n).reshape(b, n) % 3 > 0},
}
LOSSES = {
    "bce": {"jaxbce": contenders.jaxbce_mean, "optax": contenders.optax_mean},
    "focal": {
        "jaxbce": contenders.mean_of(jaxbce.focal_loss),
        "optax": contenders.optax_focal_mean,
    },
}


def worst_errors(number: int) -> dict[str, float]:
    """Of loss, gradient and second derivative over random bit patterns, in ULP."""
    name, worst = "jaxbce", {}
    implementations = {name: accuracy.jax_derivatives(contenders.ELEMENTWISE[name])}
    for block in range(-(-number // accuracy.BLOCK)):
        x = accuracy.bits(accuracy.ALL, 0.5, block).view(np.float32)[:number]
        accuracy.sweep_block(x, implementations, worst)
    return {quantity: entry[0] for quantity, entry in worst[name].items()}


def losses(batch: int, labels: int) -> list[dict[str, Any]]:
    rng, rows = np.random.default_rng(0), []
    for dtype in ("float32", "bfloat16"):
        x = jnp.asarray(rng.normal(0, 3, (batch, labels)), dtype)
        y = jnp.asarray(rng.random((batch, labels)) < 0.1, dtype)
        for loss, pair in LOSSES.items():
            steps = {name: jax.value_and_grad(fn) for name, fn in pair.items()}
            for case, options_of in CASES.items():
                if loss == "focal" and case == "pos_weight":
                    continue
                times = head.medians(steps, (x, y, options_of(batch, labels)))
                rows.append({"loss": loss, "dtype": dtype, "case": case, **times})
                ratio = times["optax"] / times["jaxbce"]
                print(f"{loss:8}{dtype:10}{case:12}optax / jaxbce {ratio:6.2f}", flush=True)
    return rows


def pairs_and_head(batch: int, width: int, labels: int) -> list[dict[str, Any]]:
    arguments = head.draw(batch, width, labels)
    steps = {"jaxbce": head.chunked(), "optax": head.dense}
    memory = {
        name: jax.jit(step).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
        for name, step in steps.items()
    }
    times = head.medians(steps, arguments, rounds=5)
    ratio = times["optax"] / times["jaxbce"]
    print(f"head, {labels} labels: optax / jaxbce {ratio:.2f}, temporaries {memory}")
    siglip = {"jaxbce": jax.value_and_grad(jaxbce.siglip_loss, argnums=(0, 1))}
    pairs = head.medians(siglip, (arguments[0], arguments[0], 1.0, -5.0), rounds=5)
    return [{"loss": "head", "memory": memory, **times}, {"loss": "siglip", **pairs}]


def draw(rows: list[dict[str, Any]], device: str, path: str) -> None:
    from matplotlib import pyplot

    timed = [row for row in rows if "case" in row]
    names = [f"{row['loss']}, {row['dtype']}, {row['case']}" for row in timed]
    figure, axis = pyplot.subplots(figsize=(7, 0.35 * len(names) + 1))
    axis.barh(names, [row["optax"] / row["jaxbce"] for row in timed])
    axis.axvline(1, color="k", lw=1)
    axis.set_xlabel(f"time of optax / time of jaxbce, {device}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--small", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--picture", help="also draw them")
    args = parser.parse_args()

    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, optax {optax.__version__}")
    if device.platform != "gpu" and not args.small:
        parser.error(f"no GPU here, only {device.platform}; --small tests this script on it")
    errors = worst_errors(2**16 if args.small else 2**26)
    print("worst error, ULP:", {name: round(error, 2) for name, error in errors.items()})
    rows = losses(*((64, 128) if args.small else (16384, 1024)))
    rows += pairs_and_head(*((32, 16, 512) if args.small else (1024, 768, 2**18)))
    if args.json:
        figures = {"made": made.made("optax"), "device": device.device_kind}
        figures |= {"errors": errors, "rows": rows}
        pathlib.Path(args.json).write_text(json.dumps(figures, indent=1))
    if args.picture:
        draw(rows, device.device_kind, args.picture)


if __name__ == "__main__":
    main()
