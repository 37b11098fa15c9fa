"""NX-AI's reference code in torch, from the folders that --peer_path names; nothing of it is in this repository."""

from collections.abc import Callable

import numpy as np
import torch

from experiments.benchmarks import layers, whole
from experiments.benchmarks.cases import Case
from experiments.benchmarks.layers import Data
from experiments.benchmarks.timing import Program
from experiments.benchmarks.torch_peers import adamw, device, finish, parameters, program, tensor, update
from experiments.benchmarks.whole import HEADS, VOCABULARY

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
    module, ours = sLSTMCell(config), layers.cell(case, {})
    R, b = (torch.from_numpy(np.array(a[...])) for a in (ours.R, ours.b))
    with torch.no_grad():
        module._recurrent_kernel_.copy_(module._recurrent_kernel_ext2int(R))
        module._bias_.copy_(module._bias_ext2int(b.reshape(4, N, H // N).permute(1, 0, 2)))
    module = module.to(device())

    def apply(xs):
        return module(xs.reshape(B, T, 4 * H))[0].transpose(1, 2).reshape(B, T, H)

    params = list(module.parameters())
    return lambda pass_: program(apply, [tensor(given.inputs[0])], params, tensor(given.cotangent), pass_)


def torch_memory(backend: str) -> Callable[[Case, Data], Build]:
    def build(case: Case, given: Data) -> Build:
        from mlstm_kernels.torch import get_mlstm_kernel

        kernel, L = get_mlstm_kernel(backend), min(64, case.sizes["T"])
        inputs, cotangent = [tensor(a) for a in given.inputs], tensor(given.cotangent)
        return lambda pass_: program(lambda *qkvif: kernel(*qkvif, chunk_size=L), inputs, [], cotangent, pass_)

    return build


def chunkwise_simple(case: Case, given: Data) -> Build:
    """The xlstm package's chunkwise recurrence in torch."""
    from xlstm.blocks.mlstm.backends import chunkwise_simple as kernel

    L = min(64, case.sizes["T"])
    inputs, cotangent = [tensor(a) for a in given.inputs], tensor(given.cotangent)

    def apply(*inputs):
        hs = kernel(*inputs, chunk_size=L)
        return hs[0] if isinstance(hs, tuple) else hs

    return lambda pass_: program(apply, inputs, [], cotangent, pass_)


def xlstm_step(case: Case, given: None) -> Build:
    """A training step of the xlstm package's language model, vanilla backends."""
    from xlstm import FeedForwardConfig, mLSTMBlockConfig, mLSTMLayerConfig, sLSTMBlockConfig, sLSTMLayerConfig
    from xlstm.xlstm_lm_model import xLSTMLMModel, xLSTMLMModelConfig

    s = case.sizes
    a, b = (int(n) for n in case.kind.removeprefix("train[").removesuffix("]").split(":"))
    mlstm = mLSTMBlockConfig(mlstm=mLSTMLayerConfig(conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=HEADS))
    layer = sLSTMLayerConfig(backend="vanilla", num_heads=HEADS, conv1d_kernel_size=4, dtype="float32")
    slstm = sLSTMBlockConfig(slstm=layer, feedforward=FeedForwardConfig(proj_factor=1.3, act_fn="gelu"))
    config = xLSTMLMModelConfig(
        mlstm_block=mlstm if a else None,
        slstm_block=slstm if b else None,
        slstm_at=[n for n in range(s["layers"]) if n % (a + b) >= a],
        context_length=s["T"],
        num_blocks=s["layers"],
        embedding_dim=s["D"],
        vocab_size=VOCABULARY,
    )
    module = xLSTMLMModel(config).to(device())
    module.reset_parameters()
    optimizer, tokens = adamw(module), torch.randint(0, VOCABULARY, (s["B"], s["T"] + 1), device=device())

    def run():
        logits = module(tokens[:, :-1])
        update(module, optimizer, torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
        finish()

    return lambda pass_: Program(run, parameters=parameters(module))


def xlstm_large(case: Case, given: None) -> Build:
    """The 7B model's code at this width, torch kernels, in float32: a prompt, or generation after one token."""
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

    s = case.sizes
    config = xLSTMLargeConfig(
        embedding_dim=s["D"],
        num_heads=HEADS,
        num_blocks=s["layers"],
        vocab_size=VOCABULARY,
        mode="inference",
        return_last_states=True,
        chunkwise_kernel="chunkwise--native_autograd",
        sequence_kernel="native_sequence__native",
        step_kernel="native",
        autocast_kernel_dtype="float32",
    )
    module, tokens = xLSTMLarge(config).to(device()), torch.from_numpy(whole.prompt(case)).long().to(device())

    @torch.no_grad()
    def run():
        result = module(tokens) if case.kind == "prefill" else module.generate(tokens, s["length"])
        finish()
        return result

    return lambda pass_: Program(run, parameters=parameters(module))


PEERS = {
    "flashrnn": {"slstm": {"flashrnn vanilla_fwbw": flashrnn_slstm}},
    "xlstm": {
        "slstm": {"xlstm vanilla": xlstm_slstm},
        "mlstm": {"xlstm chunkwise 64": chunkwise_simple},
        **{kind: {"xlstm vanilla": xlstm_step} for kind in ("train[1:0]", "train[3:1]", "train[0:1]")},
        **{kind: {"xlstm_large": xlstm_large} for kind in ("prefill", "decode")},
    },
    "mlstm_kernels": {
        "mlstm": {
            "mlstm_kernels torch chunkwise 64": torch_memory("chunkwise--native_custbw"),
            "mlstm_kernels torch chunkwise 64, autograd": torch_memory("chunkwise--native_autograd"),
        }
    },
}
