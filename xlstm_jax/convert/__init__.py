"""Weights from and to torch's, keras's and flax's cells (`rnn`), and those of published xLSTM models (`pretrained`)."""

from .pretrained import load_pretrained, save_pretrained
from .rnn import Fused, build, from_flax, from_keras, from_torch_rnn, fuse, to_flax, to_keras, to_torch_rnn

__all__ = [
    "Fused",
    "build",
    "from_flax",
    "from_keras",
    "from_torch_rnn",
    "fuse",
    "load_pretrained",
    "save_pretrained",
    "to_flax",
    "to_keras",
    "to_torch_rnn",
]
