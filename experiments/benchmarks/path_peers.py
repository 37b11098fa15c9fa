"""NX-AI's reference code, taken from the folders that --peer_path names; nothing of it is in this repository."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import torch

from experiments.benchmarks import layers
from experiments.benchmarks.cases import Case
from experiments.benchmarks.layers import Data, Layer
from experiments.benchmarks.timing import Program
from experiments.benchmarks.torch_peers import device, program, tensor

Build = Callable[[str], Program]


def flashrnn_slstm(case: Case, given: Data) -> Build:
    """FlashRNN's torch recurrence with its own backward pass."""
    from flashrnn.flashrnn.vanilla_fwbw.fwbw import slstm_pt_fwbw

    B, T, H, N = case.sizes.values()
    ours = layers.cell(case, {})
    R = tensor(np.asarray(ours.R[...]).transpose(2, 0, 3, 1))  # (G, N, out, in)
    b = tensor(np.asarray(ours.b[...]).reshape(4, N, H // N))
    empty = torch.zeros(4, B, N, H // N, device=device())

    def apply(xs):
        states, _ = slstm_pt_fwbw(empty, xs.reshape(B, T, 4, N, H // N), R, b)
        return states[:, 0].transpose(0, 1).reshape(B, T, H)

    return lambda pass_: program(apply, [tensor(given.inputs[0])], [R, b], tensor(given.cotangent), pass_)


def xlstm_slstm(case: Case, given: Data) -> Build:
    """The xlstm package's sLSTM cell, vanilla backend, in float32."""
    from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

    B, T, H, N = case.sizes.values()
    config = sLSTMCellConfig(
        hidden_size=H,
        num_heads=N,
        backend="vanilla",
        dtype="float32",
        batch_size=B,
        enable_automatic_mixed_precision=False,
    )
    module = sLSTMCell(config).to(device())

    def apply(xs):
        return module(xs.reshape(B, T, 4 * H))[0].transpose(1, 2).reshape(B, T, H)

    params = list(module.parameters())
    return lambda pass_: program(apply, [tensor(given.inputs[0])], params, tensor(given.cotangent), pass_)


def time_last(given: Data) -> list[np.ndarray]:
    """(B, T, N, ...) to (B, N, T, ...)."""
    return [np.ascontiguousarray(np.moveaxis(a, 2, 1)) for a in given.inputs]


def torch_memory(backend: str) -> Callable[[Case, Data], Build]:
    def build(case: Case, given: Data) -> Build:
        from mlstm_kernels.torch import get_mlstm_kernel

        kernel, L = get_mlstm_kernel(backend), min(64, case.sizes["T"])
        inputs, cotangent = [tensor(a) for a in time_last(given)], tensor(np.moveaxis(given.cotangent, 2, 1))
        return lambda pass_: program(lambda *qkvif: kernel(*qkvif, chunk_size=L), inputs, [], cotangent, pass_)

    return build


def jax_memory(case: Case, given: Data) -> Build:
    from mlstm_kernels.jax.chunkwise.native import mlstm_chunkwise__native_autograd as kernel

    L = min(64, case.sizes["T"])
    inputs = tuple(map(jnp.asarray, time_last(given)))
    layer = Layer(lambda params, inputs: kernel(*inputs, chunk_size=L), (), inputs)
    return lambda pass_: layers.program(layer, pass_, np.moveaxis(given.cotangent, 2, 1))


PEERS = {
    "flashrnn": {"slstm": {"flashrnn vanilla_fwbw": flashrnn_slstm}},
    "xlstm": {"slstm": {"xlstm vanilla": xlstm_slstm}},
    "mlstm_kernels": {
        "mlstm": {
            "mlstm_kernels torch chunkwise 64": torch_memory("chunkwise--native_custbw"),
            "mlstm_kernels torch chunkwise 64, autograd": torch_memory("chunkwise--native_autograd"),
            "mlstm_kernels jax chunkwise 64": jax_memory,
        }
    },
}
