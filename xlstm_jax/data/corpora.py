"""Corpora by name, as bytes: `bundled:kjv` ships with the package, `file:PATH` is any file, .xz decompressed."""

import hashlib
import lzma
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8


class Bundled(NamedTuple):
    """A corpus inside the package: where it is and what it must contain."""

    path: Path
    size: int  # bytes, decompressed
    sha256: str  # of the decompressed bytes


BUNDLED = {
    "kjv": Bundled(
        Path(__file__).with_name("kjv.txt.xz"),
        4_137_850,
        "b5c4940bcfeee072c0935b5200d0f9d88a00a0199cb0961d16133458fcdfae5d",
    ),
}
PARTS = {"train": (0, 90), "valid": (90, 95), "test": (95, 100)}  # per cent of the corpus, by position


def load(name: str) -> UInt8[np.ndarray, " N"]:
    """The bytes of a corpus; a bundled one is compared with its recorded length and SHA-256."""
    kind, _, rest = name.partition(":")
    if kind == "file" and rest:
        return read(Path(rest))
    if kind == "bundled" and rest in BUNDLED:
        path, size, sha256 = BUNDLED[rest]
        data = read(path)
        if data.size != size or content_hash(data) != sha256:
            raise ValueError(f"corpus {name}: {path} is damaged: expected {size} bytes with SHA-256 {sha256[:12]}...")
        return data
    known = ", ".join(f"bundled:{key}" for key in BUNDLED)
    raise ValueError(f"unknown corpus {name!r}: choose {known}, or file:PATH")


def read(path: Path) -> UInt8[np.ndarray, " N"]:
    """The bytes of one file, decompressed where it ends in .xz."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read corpus file {path}: {error.strerror}") from None
    if path.suffix == ".xz":
        try:
            content = lzma.decompress(content)
        except lzma.LZMAError as error:
            raise ValueError(f"corpus file {path} is truncated or no xz file: {error}") from None
    if not content:
        raise ValueError(f"corpus file {path} is empty")
    return np.frombuffer(content, np.uint8)


def utf8(content: bytes, what: str) -> str:
    """The text of UTF-8 bytes; ValueError with the offset of the first byte that is none."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is no UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}") from None


def bounds(size: int, split: str) -> tuple[int, int]:
    """First position of a split and the one after its last: contiguous 90/5/5 parts of `size` bytes."""
    if split not in PARTS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(PARTS)}")
    start, stop = PARTS[split]
    return size * start // 100, size * stop // 100


def part(data: UInt8[np.ndarray, " N"], split: str) -> UInt8[np.ndarray, " M"]:
    """The bytes of one split."""
    start, stop = bounds(data.size, split)
    return data[start:stop]


def content_hash(data: UInt8[np.ndarray, " N"]) -> str:
    """SHA-256 of the bytes, in hexadecimal."""
    return hashlib.sha256(data.tobytes()).hexdigest()
