"""The whole suite runs on 8 fake CPU devices, with implicit rank promotion forbidden."""

import gc
import os
from importlib import metadata

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"  # nearly all of the time is compilation
if metadata.version("jax").startswith("0.10."):  # an unknown flag ends the process, and these are not for ever
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"  # compiles three times as fast
    os.environ["XLA_FLAGS"] += " --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_traceback_in_locations_limit", 0)  # nobody reads where in Python an operation was written


def pytest_collection_finish():
    """Traces are many short-lived objects: what is loaded by now is not searched for garbage again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def x64():
    """64-bit floats for one test."""
    with jax.enable_x64(True):
        yield
