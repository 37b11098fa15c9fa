"""Recurrent cells under one contract; `CELLS` maps names to classes: "peephole_lstm" is PeepholeLSTM."""
# ruff: noqa: I001 - from the simplest family to those that are made of others: the order of CELLS and of docs/cells.md

import re

from .base import Cell
from .elman import Elman
from .lstm import LSTM, PeepholeLSTM, CoupledLSTM, ProjectedLSTM, LayerNormLSTM
from .gru import GRU, MGU
from .janet import JANET
from .slstm import SLSTM
from .mlstm import MLSTM
from .linear import MinLSTM, MinGRU, RGLRU
from .conv import ConvLSTM, ConvGRU

CELLS: dict[str, type[Cell]] = {
    re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(): cell
    for name, cell in dict(globals()).items()
    if isinstance(cell, type) and cell is not Cell
}

from .wrappers import Bidirectional, Stack  # noqa: E402  cells made of cells, which have no name above
