"""Documents of one file, each read when it is asked for, and how they are shared out among train, valid and test."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import corpora

ALIASES = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}


class DataNotFound(ValueError):
    """Data that is not on this machine; the message says where it was looked for and how to get it."""


class Corpus(NamedTuple):
    """Documents by split, and where they came from."""

    name: str  # as asked for
    source: str  # file or folder
    splits: dict[str, Sequence]  # "train", "valid", "test" -> bytes of text, token ids (T,) or feature rows (T, D)
    whole: bool  # each split is one stretch of a running text, not documents
    hash: str  # SHA-256 of the content (a prepared set: `prepared.folder_hash`)
    layout: str  # what else decides the documents: field and shares


class Documents(Sequence):
    """Documents `start` to `stop` of a source, by `read` from its items."""

    def __init__(self, source: Sequence, read: Callable[[Any], Any], start: int, stop: int):
        self._source, self._read, self._start, self._stop = source, read, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int):
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._read(self._source[self._start + index])


class JSONLines(Sequence):
    """A document a line: the UTF-8 bytes of one field of its JSON object. Blank lines are none."""

    def __init__(self, path: Path, field: str):
        self._path, self._field, self._places, place = path, field, [], 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._places.append((number, place))
                place += len(line)
        if not self._places:
            raise ValueError(f"corpus file {path} is empty")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> bytes:
        number, place = self._places[index]
        with open(self._path, "rb") as file:
            file.seek(place)
            line = file.readline()
        where = f"corpus file {self._path}, line {number}"
        try:
            row = json.loads(corpora.utf8(line, where))
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is no JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get(self._field), str):
            given = f"the fields {', '.join(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise ValueError(f"{where} has no text {self._field!r} but {given}: name the field by file:PATH#FIELD")
        return row[self._field].encode()


def read(path: Path, field: str = "") -> tuple[Sequence, bool, str]:
    """Documents of one file, whether they are one running text, and the SHA-256 of its content."""
    if path.suffix == ".jsonl":
        return JSONLines(path, field or "text"), False, file_hash(path)
    if field:
        raise ValueError(f"#{field} names a field: only .jsonl files and tensorflow-datasets have fields, not {path}")
    if path.suffix == ".npy":
        return [token_array(path)], True, file_hash(path)
    data = corpora.read(path)
    if path.name.removesuffix(".xz").endswith(".txt"):  # promises text; other names may hold any bytes
        corpora.utf8(data.tobytes(), f"corpus file {path}")
    return [data.tobytes()], True, corpora.content_hash(data)


def token_array(path: Path) -> np.ndarray:
    """Token ids (N,) of a .npy file, memory-mapped."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"token file {path} is truncated or no .npy file: {' '.join(str(error).split())}") from None
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"token file {path} holds {tokens.dtype} {tokens.shape}: integers (N,) are needed")
    if not tokens.size:
        raise ValueError(f"token file {path} is empty")
    return tokens


def rolls(name: str, path: Path) -> Corpus:
    """Piano rolls (T, D) of 0 and 1: the fields traindata, validdata and testdata of a MATLAB file."""
    import scipy.io

    try:
        content = scipy.io.loadmat(path)
    except Exception as error:  # scipy raises many kinds for a damaged file
        raise ValueError(f"{path} is truncated or no MATLAB file: {' '.join(str(error).split())}") from None
    absent = [f"{split}data" for split in ALIASES if f"{split}data" not in content]
    if absent:
        raise ValueError(f"{path} has no {', '.join(absent)}: traindata, validdata and testdata are needed")
    splits = {split: [np.asarray(roll, np.uint8) for roll in content[f"{split}data"].ravel()] for split in ALIASES}
    return Corpus(name, str(path), splits, False, file_hash(path), "rolls")


def stretches(name: str, path: Path, whole, parts: dict[str, tuple[int, int]], digest: str) -> Corpus:
    """One running text (bytes) or array of ids, cut at per cents of its length; text is cut between characters."""
    is_text = isinstance(whole, bytes)
    data = np.frombuffer(whole, np.uint8) if is_text else whole

    def cut(per_cent: int) -> int:
        position = data.size * per_cent // 100
        while is_text and position < data.size and data[position] & 0xC0 == 0x80:  # inside a UTF-8 sequence
            position += 1
        return position

    found = {}  # by place, so that two names of one part are one object
    for split, (start, stop) in parts.items():
        stretch = data[cut(start) : cut(stop)]
        if not stretch.size:
            size = f"{data.size} {'bytes' if is_text else 'tokens'}"
            raise ValueError(f"corpus {name} has {size}: too few for a {split} part ({start}-{stop} %)")
        found.setdefault((start, stop), [stretch.tobytes() if is_text else stretch])
    splits = {split: found[place] for split, place in parts.items()}
    return Corpus(name, str(path), splits, True, digest, f"per cent {list(parts.values())}")


def shares(splits: dict[str, Sequence], name: str) -> dict[str, Sequence]:
    """All three splits, by the rule of `lookup`: what is not there is held out of train, and test may be valid."""
    if "train" not in splits:
        raise ValueError(f"{name} has no split called train, but {', '.join(splits) or 'none'}")
    train = splits["train"]
    if "valid" in splits:
        return {"train": train, "valid": splits["valid"], "test": splits.get("test", splits["valid"])}
    count, held = len(train), max(len(train) // 20, 1)
    bounds = [count - held, count] if "test" in splits else [count - 2 * held, count - held, count]
    if bounds[0] < 1:
        raise ValueError(f"{name} has {count} documents: too few to hold out {len(bounds) - 1} of them")
    parts = [Documents(train, lambda document: document, *span) for span in zip([0, *bounds], bounds)]
    return dict(zip(ALIASES, [*parts, splits["test"]] if "test" in splits else parts))


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
