"""Recurrent cells under one contract; `CELLS` maps names to classes."""

from .elman import Elman
from .gru import GRU
from .lstm import LSTM
from .mlstm import MLSTM
from .slstm import SLSTM

CELLS = {"elman": Elman, "lstm": LSTM, "gru": GRU, "slstm": SLSTM, "mlstm": MLSTM}

__all__ = ["CELLS", "Elman", "GRU", "LSTM", "MLSTM", "SLSTM"]
