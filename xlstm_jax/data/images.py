"""Images with a label: the idx files of MNIST and its kin, or what tensorflow-datasets prepared."""

import gzip
import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from ..names import unknown
from . import prepared
from .documents import DataNotFound
from .lookup import data_folder

FILES = {"train": "train-{}-idx{}-ubyte", "test": "t10k-{}-idx{}-ubyte"}
FOLDERS = {"fashion_mnist": "/usr/share/datasets/fashion-mnist", "mnist": ""}  # where Debian's package has them
HELD_OUT = 12  # one twelfth of train is the valid split: 5,000 of 60,000


def load(
    name: str, data_dir: str | Path | None = None
) -> tuple[dict[str, tuple[UInt8[np.ndarray, "N H W"], Int[np.ndarray, " N"]]], str]:
    """Images and labels of train, valid and test, and a SHA-256: "fashion_mnist", "mnist", "file:FOLDER", "tfds:NAME".

    A name alone is looked for as idx files in the data folder, then where Debian's dataset-fashion-mnist has them.
    """
    kind, colon, rest = name.partition(":")
    if colon and kind == "tfds":
        found, digest = from_prepared(rest, data_folder(data_dir))
    elif (colon and kind == "file") or name in FOLDERS:
        tried = [Path(rest)] if colon else [data_folder(data_dir) / name, Path(FOLDERS[name] or data_folder(data_dir))]
        folder = next((each for each in tried if path_of(each, "train", "images", 3).is_file()), None)
        if folder is None:
            raise DataNotFound(
                f"images {name}: no {FILES['train'].format('images', 3)}.gz in {' or '.join(map(str, tried))}; put the"
                " four idx files there, or apt-get install dataset-fashion-mnist, or tfds:mnist if it is prepared"
            )
        found, digest = from_idx(folder)
    else:
        raise ValueError(unknown("images", name, [*FOLDERS, "file:FOLDER", "tfds:NAME"]))
    images, labels = found["train"]
    held = max(len(labels) // HELD_OUT, 1)
    return {
        "train": (images[:-held], labels[:-held]),
        "valid": (images[-held:], labels[-held:]),
        "test": found["test"],
    }, digest


def path_of(folder: Path, split: str, what: str, axes: int) -> Path:
    """The idx file of a split, compressed or not."""
    path = folder / FILES[split].format(what, axes)
    return path if path.is_file() else path.with_name(path.name + ".gz")


def from_idx(folder: Path) -> tuple[dict, str]:
    """Train and test of a folder of four idx files."""
    found, digest = {}, hashlib.sha256()
    for split in FILES:
        images, labels = (
            idx(path_of(folder, split, what, axes), axes) for what, axes in (("images", 3), ("labels", 1))
        )
        if len(images) != len(labels):
            raise ValueError(f"{folder}: {len(images)} images but {len(labels)} labels in {split}")
        found[split] = images, labels.astype(np.int32)
        digest.update(images.tobytes() + labels.tobytes())
    return found, digest.hexdigest()


def idx(path: Path, axes: int) -> UInt8[np.ndarray, "..."]:
    """Bytes of an idx file: a magic number 8 * 256 + axes, the sizes, then the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"idx file {path} is missing or truncated: {error}") from None
    head = np.frombuffer(content[: 4 + 4 * axes], ">i4")
    if head.size != axes + 1 or head[0] != 8 * 256 + axes or len(content) != 4 + 4 * axes + np.prod(head[1:]):
        raise ValueError(f"idx file {path} is truncated or holds no array of {axes} axes")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(head[1:])


def from_prepared(name: str, folder: Path) -> tuple[dict, str]:
    """Train and test of a prepared set with the features image and label."""
    found = prepared.folders(folder, name)
    if not found:
        raise DataNotFound(prepared.not_prepared(name, folder))
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(found[-1])
    splits = {}
    for split in FILES:
        rows = builder.as_data_source(split)
        images = np.stack([np.asarray(row["image"], np.uint8) for row in rows])
        splits[split] = (
            images[..., 0] if images.ndim == 4 else images,
            np.array([row["label"] for row in rows], np.int32),
        )
    return splits, prepared.folder_hash(found[-1])
