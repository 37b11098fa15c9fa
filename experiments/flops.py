"""Model FLOPs by formula: what a step must compute, whatever chunks, forms and recomputation make of it.

Forward, a token: 2 for every weight that multiplies it (matrices, convolutions, R; an embedding only where it is the
head too), for each mLSTM head 4 K V + 4 K, the write and the read of its memory step by step (arXiv:2503.14376's
recurrent view), and for attention 4 D for every key that a token sees. Training is three times that. Gates, norms and
softmax are left out. A compiler's count is of no use here: it counts the body of a loop once.
"""

import math
from typing import Any

import jax
from flax import nnx

from experiments.topology import peak
from xlstm_jax.attention import Attention
from xlstm_jax.cells import Stack
from xlstm_jax.cells.base import RecurrentCell
from xlstm_jax.cells.conv import ConvCell
from xlstm_jax.kernels.mlstm import MLSTMState
from xlstm_jax.metrics import Work
from xlstm_jax.optim import parameter_name


def forward_flops(model: nnx.Module, seq_len: int = 1) -> float:
    """Of one token through a model (abstract or not), on average over the first `seq_len` of a sequence."""
    named = jax.tree_util.tree_leaves_with_path(nnx.split(model)[1])
    tied = getattr(model, "tie_weights", False)
    weights = sum(
        math.prod(leaf.shape)
        for path, leaf in named
        if multiplies(parameter_name(path)) or (tied and parameter_name(path).startswith("embedding"))
    )
    state = nnx.eval_shape(lambda: model.initial_state(1))
    memories = jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, MLSTMState))
    memories = [s for s in memories if isinstance(s, MLSTMState)]
    memory = sum(4 * math.prod(s.C.shape) + 4 * math.prod(s.n.shape) for s in memories)
    attention = sum(
        4 * m.features * copies * sum(min(t, m.context) for t in range(1, seq_len + 1)) / seq_len
        for m, copies in modules(model, Attention)
    )
    return 2 * weights + memory + attention


def modules(model: nnx.Module, kind: type) -> list[tuple[Any, int]]:
    """(module, how many layers it stands for) of every module of this kind; one of a stack stands for its repeats."""
    found = list(nnx.iter_modules(model))
    repeats = {path: module.repeats for path, module in found if isinstance(module, Stack)}
    return [
        (module, math.prod(n for stack, n in repeats.items() if path[: len(stack)] == stack))
        for path, module in found
        if isinstance(module, kind)
    ]


def work(model: nnx.Module, seq_len: int, devices: list) -> Work:
    """What a run's speed is told by: training FLOPs of a token, the devices' peak, layers that are serial in time.

    A convolution's weights multiply a token more often than once: no FLOPs are claimed then.
    """
    flops = None if modules(model, ConvCell) else 3 * forward_flops(model, seq_len)
    peaks = [peak(device.device_kind) for device in devices]
    serial = sum(copies for _, copies in modules(model, RecurrentCell))
    return Work(flops, None if None in peaks else sum(peaks), serial)


def multiplies(name: str) -> bool:
    """Whether a parameter of this name multiplies every token: kernels, and a cell's W, R and S."""
    return name.rpartition(".")[2] in ("kernel", "W", "R", "S")
