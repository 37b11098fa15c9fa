"""What needs no network: bits a byte of a test split by counting and by a compressor."""

import lzma

import numpy as np
from jaxtyping import UInt8


def order0_bits(train: UInt8[np.ndarray, " N"], test: UInt8[np.ndarray, " M"]) -> float:
    """Bits a byte of `test` under the byte frequencies of `train`, one added to every count (Laplace)."""
    counts = np.bincount(train, minlength=256) + 1.0
    bits = -np.log2(counts / counts.sum())
    return float(np.bincount(test, minlength=256) @ bits / test.size)


def xz_bits(train: UInt8[np.ndarray, " N"], test: UInt8[np.ndarray, " M"]) -> float:
    """Bits a byte that `xz -9e` adds for `test` after `train`: (|xz(train + test)| - |xz(train)|) * 8 / |test|."""

    def compressed_size(content: bytes) -> int:
        return len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))

    before = train.tobytes()
    return (compressed_size(before + test.tobytes()) - compressed_size(before)) * 8 / test.size
