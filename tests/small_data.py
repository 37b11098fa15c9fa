"""Small files in the formats of the real data sets, for tests."""

import gzip
from pathlib import Path

import numpy as np
import scipy.io

PIECES = {"train": 6, "valid": 2, "test": 3}
KEYS = 88


def music(path: Path, **changes: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Piano rolls of 3 to 9 frames as a .mat file; those of train are all 9 long but the first."""
    rng = np.random.default_rng(0)
    pieces = {}
    for split, count in PIECES.items():
        rolls = [(rng.random((9 if n else 3 + len(split) % 3, KEYS)) < 0.1).astype(float) for n in range(count)]
        pieces[split] = changes.get(split, rolls)
    cells = {}
    for split, rolls in pieces.items():
        cells[f"{split}data"] = np.empty((1, len(rolls)), object)
        for number, roll in enumerate(rolls):
            cells[f"{split}data"][0, number] = roll
    scipy.io.savemat(path, cells)
    return pieces


def images(folder: Path, side: int = 4) -> Path:
    """Idx files of sixteen training and four test images, with consecutive numbers as pixels."""
    folder.mkdir(exist_ok=True)
    for split, count in (("train", 16), ("t10k", 4)):
        pictures = (np.arange(count * side * side) % 256).astype(np.uint8).reshape(count, side, side)
        heads = {"images-idx3": [2051, count, side, side], "labels-idx1": [2049, count]}
        bodies = {"images-idx3": pictures, "labels-idx1": np.arange(count, dtype=np.uint8) % 3}
        for what, head in heads.items():
            content = np.array(head, ">i4").tobytes() + bodies[what].tobytes()
            (folder / f"{split}-{what}-ubyte.gz").write_bytes(gzip.compress(content))
    return folder
