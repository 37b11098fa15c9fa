"""Labelled sequences of tokens from files: any set, such as the Long Range Arena's text, retrieval and pathfinder."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from xlstm_jax.data.documents import DataNotFound, file_hash
from xlstm_jax.data.lookup import data_folder
from xlstm_jax.tasks.byte_lm import register
from xlstm_jax.tasks.finite import LabelledSequences
from xlstm_jax.tasks.task import SPLITS


@dataclass(frozen=True, eq=False)
class Labelled(LabelledSequences):
    """`folder` holds train.npz, valid.npz and test.npz, each with inputs (N, T), lengths (N,) and labels (N,).

    inputs [[7, 2, 0], [3, 3, 9]], lengths [2, 3], labels [1, 0] -> class 1 asked at the 2, class 0 at the 9.

    All are integers, inputs 0 to 65,535, padded on the right; a folder that is no path from here is one of the data
    folder. Pixels are tokens of 0 to 255, a pair of documents (retrieval) one sequence with a token between the two.
    """

    folder: str = "lra/text"
    data_dir: str = ""  # of the look-up; "": its default

    name: ClassVar[str] = "labelled"

    def _read(self):
        folder = next(
            (each for each in (Path(self.folder), data_folder(self.data_dir or None) / self.folder) if each.is_dir()),
            None,
        )
        if folder is None:
            raise DataNotFound(
                f"{self.name}: no folder {self.folder}, nor in the data folder {data_folder(self.data_dir or None)}: it"
                " should hold train.npz, valid.npz and test.npz with inputs (N, T), lengths (N,) and labels (N,)"
            )
        data = {split: read(folder / f"{split}.npz") for split in SPLITS}
        digest = "".join(file_hash(folder / f"{split}.npz") for split in SPLITS)
        vocab_size, num_classes = (1 + max(int(part[at].max()) for part in data.values()) for at in (0, 2))
        return data, digest, vocab_size, max(num_classes, 2)


def read(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """inputs (uint16), lengths and labels (int32) of one file, checked."""
    if not path.is_file():
        raise DataNotFound(f"labelled: {path} is missing: train.npz, valid.npz and test.npz are needed")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in ("inputs", "lengths", "labels")}
    except KeyError as error:
        raise ValueError(f"labelled: {path}: {error.args[0]}; inputs, lengths and labels are needed") from None
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise ValueError(f"labelled: {path} is truncated or no .npz file: {' '.join(str(error).split())}") from None
    inputs, lengths, labels = found.values()
    shapes = f"inputs {inputs.shape}, lengths {lengths.shape}, labels {labels.shape}"
    if inputs.ndim != 2 or 0 in inputs.shape or lengths.shape != inputs.shape[:1] or labels.shape != inputs.shape[:1]:
        raise ValueError(f"labelled: {path} has {shapes}: (N, T), (N,) and (N,) are needed")
    for name, array, least, most in (
        ("inputs", inputs, 0, 2**16 - 1),
        ("lengths", lengths, 1, inputs.shape[1]),
        ("labels", labels, 0, 2**31 - 1),
    ):
        if not np.issubdtype(array.dtype, np.integer) or array.min() < least or array.max() > most:
            raise ValueError(
                f"labelled: {path}: {name} are {array.dtype} of {array.min()} to {array.max()}: integers of {least} to"
                f" {most} are needed"
            )
    return inputs.astype(np.uint16), lengths.astype(np.int32), labels.astype(np.int32)


register(Labelled)
