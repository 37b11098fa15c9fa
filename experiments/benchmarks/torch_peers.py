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


def parity(case: Case, given: None) -> Callable[[str], Program]:
    """The same model and optimiser, trained eagerly on symbols drawn in the step, one seed after another."""
    s = case.sizes

    class Tagger(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.rnn = torch.nn.Embedding(3, s["H"]), torch.nn.LSTM(s["H"], s["H"], batch_first=True)
            self.norm, self.head = torch.nn.LayerNorm(s["H"], bias=False), torch.nn.Linear(s["H"], 3, bias=False)

        def forward(self, tokens):
            return self.head(self.norm(self.rnn(self.embedding(tokens))[0]))

    def trained(seed):
        torch.manual_seed(seed)
        module = Tagger().to(device())
        return module, adamw(module)

    each = [trained(seed) for seed in range(s["seeds"])]

    def run():
        for module, optimizer in each:
            for _ in range(s["steps"]):
                tokens = torch.randint(1, 3, (s["B"], s["T"]), device=device())
                answers = (tokens == 2).sum(dim=1) % 2 + 1
                update(module, optimizer, torch.nn.functional.cross_entropy(module(tokens)[:, -1], answers))
        finish()

    return lambda pass_: Program(run, parameters=parameters(each[0][0]))


def adamw(module: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


def update(module: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One step of the optimiser, the gradient clipped to norm 1."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


PEERS = {
    "torch": {
        "parity": {"torch nn.LSTM, eager": parity},
        "lstm": {"torch nn.LSTM": rnn},
        "gru": {"torch nn.GRU": rnn},
        "bilstm": {"torch nn.LSTM, packed": rnn},
    }
}
