"""JAX as strict as it can be, on eight virtual CPU devices."""

import atexit
import gc
import os
import tempfile

import jax
import numpy as np
import pytest
from hypothesis import settings

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# What one process of the tests compiled, the others need not compile, nor itself once more after
# `jax.clear_caches`. The first one makes the folder and removes it. jax 0.8.0 aborted once in a
# program that it had read there.
CACHE = "JAX_COMPILATION_CACHE_DIR"
if CACHE not in os.environ and jax.__version_info__ >= (0, 10):
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    os.environ[CACHE] = folder.name
jax.config.update("jax_compilation_cache_dir", os.environ.get(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("repeatable")

# What JAX traces and compiles lives long: collecting less often saves a tenth of the time.
gc.set_threshold(200_000, 50, 1000)


def pytest_collection_finish():
    gc.freeze()


@pytest.fixture(scope="module")
def compile_fast():
    """For a module of programs, not of roundings: memory and collectives are decided before."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("batch", "labels"), (jax.sharding.AxisType.Auto,) * 2)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
