"""NX-AI's mLSTM kernels in JAX, from the folders that --peer_path names; nothing of them is in this repository."""

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import layers, peers
from experiments.benchmarks.cases import Case
from experiments.benchmarks.layers import Data, Layer
from experiments.benchmarks.timing import Program


def module(folder: Path, alias: str, name: str) -> types.ModuleType:
    """A module of a folder without the packages around it: those import Triton, or have the name of ours."""
    if not folder.is_dir():
        raise ImportError(f"{folder} is not there")
    package = sys.modules.setdefault(alias, types.ModuleType(alias))
    package.__path__ = [str(folder)]
    return importlib.import_module(f"{alias}.{name}")


def program(
    apply: Callable[..., jax.Array], given: Data, inputs: tuple[np.ndarray, ...] | None = None
) -> Callable[[str], Program]:
    inputs = tuple(map(jnp.asarray, given.inputs if inputs is None else inputs))
    layer = Layer(lambda params, inputs: apply(*inputs), (), inputs)
    return lambda pass_: layers.program(layer, pass_, given.cotangent)


def kernels(case: Case, given: Data) -> Callable[[str], Program]:
    """mlstm_kernels, native chunkwise form, differentiated by JAX."""
    folder = peers.FOLDERS["mlstm_kernels"] / "mlstm_kernels/jax/chunkwise"
    kernel = module(folder, "mlstm_kernels_jax_chunkwise", "native").mlstm_chunkwise__native_autograd
    L = min(64, case.sizes["T"])
    return program(lambda *inputs: kernel(*inputs, chunk_size=L), given)


def fwbw(case: Case, given: Data) -> Callable[[str], Program]:
    """xlstm-jax, its form with a backward pass of its own, for one head, mapped over the heads."""
    folder = peers.FOLDERS["xlstm-jax"] / "xlstm_jax/models/xlstm_parallel/blocks/mlstm/backend"
    found = module(folder, "xlstm_jax_backend", "fwbw")
    config = found.mLSTMBackendFwbwConfig(chunk_size=min(64, case.sizes["T"]), stabilize_correctly=True)
    kernel = jax.vmap(found.mlstm_fwbw_custom_grad(config), in_axes=1, out_axes=1)
    q, k, v, i, f = given.inputs
    empty = (None,) * 3  # the backward pass answers for a state too
    return program(lambda *inputs: kernel(*inputs, *empty), given, (q, k, v, i[..., None], f[..., None]))


PEERS = {
    "mlstm_kernels": {"mlstm": {"mlstm_kernels jax chunkwise 64": kernels}},
    "xlstm-jax": {"mlstm": {"xlstm-jax fwbw 64": fwbw}},
}
