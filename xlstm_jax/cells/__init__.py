"""Recurrent cells under one contract; `CELLS` maps names to classes."""

from .conv import ConvGRU, ConvLSTM
from .elman import Elman
from .gru import GRU, MGU
from .lstm import LSTM, CoupledLSTM, LayerNormLSTM, PeepholeLSTM, ProjectedLSTM
from .mlstm import MLSTM
from .slstm import SLSTM
from .wrappers import Bidirectional, Stack

CELLS = {
    "elman": Elman,
    "lstm": LSTM,
    "peephole_lstm": PeepholeLSTM,
    "coupled_lstm": CoupledLSTM,
    "projected_lstm": ProjectedLSTM,
    "layer_norm_lstm": LayerNormLSTM,
    "gru": GRU,
    "mgu": MGU,
    "slstm": SLSTM,
    "mlstm": MLSTM,
    "conv_lstm": ConvLSTM,
    "conv_gru": ConvGRU,
}

__all__ = [
    "CELLS",
    "Bidirectional",
    "ConvGRU",
    "ConvLSTM",
    "CoupledLSTM",
    "Elman",
    "GRU",
    "LSTM",
    "LayerNormLSTM",
    "MGU",
    "MLSTM",
    "PeepholeLSTM",
    "ProjectedLSTM",
    "SLSTM",
    "Stack",
]
