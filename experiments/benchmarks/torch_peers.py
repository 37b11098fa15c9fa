"""torch's own layers, with our weights."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from experiments.benchmarks import timing
from experiments.benchmarks.cases import BOTH, Case
from experiments.benchmarks.layers import Data, cell
from experiments.benchmarks.timing import Program
from xlstm_jax import convert

torch.set_num_threads(timing.cores())


def device() -> torch.device:
    """Where JAX computes too."""
    import jax

    return torch.device("cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu")


def tensor(a: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(a)).to(device())


def finish() -> None:
    """Wait for what was dispatched."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def program(
    apply: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor],
    params: Sequence[torch.Tensor],
    cotangent: torch.Tensor,
    pass_: str,
) -> Program:
    """apply(*inputs) alone, or with the gradients of inputs and params."""

    def forward():
        with torch.no_grad():
            ys = apply(*inputs)
        finish()
        return ys

    def both():
        ys = apply(*inputs)
        gradients = torch.autograd.grad(ys, [*inputs, *params], cotangent)
        finish()
        return ys.detach(), gradients

    for each in (*inputs, *params):
        each.requires_grad_(True)
    return Program(both if pass_ == BOTH else forward)


def rnn(case: Case, given: Data) -> Callable[[str], Program]:
    """nn.LSTM and nn.GRU (oneDNN on a CPU, cuDNN on a GPU); with lengths as a packed sequence."""
    s = case.sizes
    kind = torch.nn.GRU if case.kind == "gru" else torch.nn.LSTM
    module = kind(s["D"], s["H"], batch_first=True, bidirectional=case.kind == "bilstm").to(device())
    module.load_state_dict({name: tensor(a) for name, a in convert.to_torch_rnn(cell(case, {})).items()})

    def packed(xs):
        lengths = torch.from_numpy(given.lengths)
        rows = torch.nn.utils.rnn.pack_padded_sequence(xs, lengths, batch_first=True, enforce_sorted=False)
        return torch.nn.utils.rnn.pad_packed_sequence(module(rows)[0], batch_first=True, total_length=s["T"])[0]

    apply = packed if given.lengths is not None else lambda xs: module(xs)[0]
    xs, cotangent, params = tensor(given.inputs[0]), tensor(given.cotangent), list(module.parameters())
    return lambda pass_: program(apply, [xs], params, cotangent, pass_)


PEERS = {
    "torch": {
        "lstm": {"torch nn.LSTM": rnn},
        "gru": {"torch nn.GRU": rnn},
        "bilstm": {"torch nn.LSTM, packed": rnn},
    }
}
