"""Recurrent cells under one contract; `CELLS` maps names to classes: "peephole_lstm" is PeepholeLSTM."""

import re

from .base import Cell
from .conv import ConvGRU, ConvLSTM
from .elman import Elman
from .gru import GRU, MGU
from .linear import RGLRU, MinGRU, MinLSTM
from .lstm import LSTM, CoupledLSTM, LayerNormLSTM, PeepholeLSTM, ProjectedLSTM
from .mlstm import MLSTM
from .slstm import SLSTM

CELLS: dict[str, type[Cell]] = {
    re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(): cell
    for name, cell in dict(globals()).items()
    if isinstance(cell, type) and cell is not Cell
}
CELLS["rg_lru"] = CELLS.pop("rglru")  # the hyphen of its name, RG-LRU, is not in the class's

from .wrappers import Bidirectional, Stack  # noqa: E402  cells made of cells, which have no name above
