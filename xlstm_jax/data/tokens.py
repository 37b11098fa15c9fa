"""A corpus as token ids: tokenised once into a cache folder, then memory-mapped.

    files = tokenise(corpus, tokenizer)             # train.npy, valid.npy, test.npy and tokens.json
    files["train"].tokens                           # (N,) uint8, uint16 or uint32, not read until it is indexed

Running text is its tokens. Documents stand between end tokens: end d1 end d2 end. An input `end` begins a document: its
target is the document's first token. Every document's end is a target too; nothing is predicted across documents.
The folder is named by the hashes of corpus and tokeniser and appears whole or not at all.
"""

import hashlib
import io
import json
import os
import shutil
import uuid
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from . import tokenizers
from .documents import Corpus, token_array
from .tokenizers import Tokenizer

HEADER = 128  # bytes before the tokens of a .npy file of one axis


class TokenFile:
    """The tokens of one split; pickled as its path, opened where it is used."""

    def __init__(self, path: str | os.PathLike, end: int | None = None, num_bytes: int = 0, num_documents: int = 0):
        self.path, self.end = Path(path), end
        self.num_bytes, self.num_documents = num_bytes, num_documents  # of the text; 0 if it is running text

    @cached_property
    def tokens(self) -> Shaped[np.ndarray, " N"]:
        """Token ids, memory-mapped."""
        return token_array(self.path)

    def __len__(self) -> int:
        return self.tokens.size

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "tokens"}


def cache_root() -> Path:
    """$XLSTM_JAX_CACHE, else ~/.cache/xlstm_jax: `tokens` lie in it, and in `jax` the compiled programs of scripts."""
    return Path(os.environ.get("XLSTM_JAX_CACHE") or "~/.cache/xlstm_jax").expanduser()


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """`cache_dir`, else `tokens` in the `cache_root`."""
    return Path(cache_dir).expanduser() if cache_dir else cache_root() / "tokens"


def tokenizer_for(corpus: Corpus, spec: str, cache_dir: str | os.PathLike | None = None) -> Tokenizer:
    """`tokenizers.make` on the training split; a trained one is kept in the cache folder."""
    if not tokenizers.is_trained(spec):
        return tokenizers.make(spec)
    folder = cache_folder(cache_dir) / _key(corpus, spec)
    if (folder / "about.json").exists():
        return tokenizers.load(folder)
    if not isinstance(corpus.splits["train"][0], bytes):
        raise ValueError(f"corpus {corpus.name} holds no text to train the tokenizer {spec!r} on: write ids:SIZE")
    try:
        tokenizer = tokenizers.make(spec, corpus.splits["train"])
    except ValueError as error:
        raise ValueError(f"{corpus.name}, train: {error}") from None
    tokenizers.save(tokenizer, folder)
    return tokenizer


def tokenise(corpus: Corpus, tokenizer: Tokenizer, cache_dir: str | os.PathLike | None = None) -> dict[str, TokenFile]:
    """The token files of all splits, made if they are not there; a killed call leaves nothing that counts."""
    if not corpus.whole and tokenizer.end is None:
        better = f"{tokenizer.name}+end" if tokenizer.kind in ("bytes", "characters") else "one that has such a token"
        raise ValueError(
            f"corpus {corpus.name} consists of documents, but tokenizer {tokenizer.name!r} has no token to end one:"
            f" take {better}"
        )
    folder = cache_folder(cache_dir) / _key(corpus, tokenizer.hash)
    if not (folder / "tokens.json").exists():
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")  # one folder may serve several machines
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise ValueError(
                f"cannot write the tokens to {folder.parent}: {error.strerror}; set XLSTM_JAX_CACHE"
            ) from None
        try:
            _write_all(temporary, corpus, tokenizer)
            os.rename(temporary, folder)
        except OSError:
            if not (folder / "tokens.json").exists():  # else another process was first, with the same content
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    about = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    files = {
        split: TokenFile(folder / row["file"], about["end"], row["bytes"], row["documents"])
        for split, row in about["splits"].items()
    }
    for split, file in files.items():
        if len(file) != about["splits"][split]["tokens"]:
            raise ValueError(f"token file {file.path} is damaged: remove the folder {folder}")
    return files


def _write_all(folder: Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
    written, rows = {}, {}
    end = None if corpus.whole else tokenizer.end
    for split, documents in corpus.splits.items():
        if id(documents) not in written:
            path = folder / f"{split}.npy"
            with open(path, "wb") as file:
                written[id(documents)] = _write(file, documents, tokenizer, end, f"{corpus.name}, {split}")
            written[id(documents)] |= {"file": path.name, "documents": 0 if corpus.whole else len(documents)}
        rows[split] = written[id(documents)]
    about = {"corpus": corpus.name, "corpus_hash": corpus.hash, "layout": corpus.layout, "end": end}
    about |= {"tokenizer": tokenizer.name, "tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size}
    (folder / "tokens.json").write_text(json.dumps(about | {"splits": rows}, indent=1) + "\n", encoding="utf-8")


def _write(file, documents, tokenizer: Tokenizer, end: int | None, where: str) -> dict[str, int]:
    """A .npy file, document by document; its header comes last, when the number of tokens is known."""
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    count = num_bytes = 0
    file.write(bytes(HEADER))

    def put(ids):
        nonlocal count
        file.write(np.asarray(ids, dtype).tobytes())
        count += len(ids)

    for number, document in enumerate(documents):
        try:
            ids = tokenizer.encode(document) if isinstance(document, bytes) else given_ids(document, tokenizer)
        except ValueError as error:
            raise ValueError(f"{where}{'' if end is None else f', document {number}'}: {error}") from None
        put(ids if end is None else np.concatenate([[end], ids]))
        num_bytes += len(document) if isinstance(document, bytes) else 0
    if not count:
        raise ValueError(f"{where}: there are no tokens")
    if end is not None:
        put([end])
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": (count,)})
    if len(header.getvalue()) != HEADER:
        raise AssertionError(f"NumPy writes a header of {len(header.getvalue())} bytes, not {HEADER}")
    file.seek(0)
    file.write(header.getvalue())
    return {"tokens": count, "bytes": num_bytes}


def given_ids(document: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Ids that a corpus already holds, refused where they cannot be those of the tokeniser."""
    if document.ndim != 1 or not np.issubdtype(document.dtype, np.integer):
        raise ValueError(f"a document is {document.dtype} {document.shape}: text or token ids (T,) are needed")
    least, most = int(document.min()), int(document.max())
    if least < 0 or most >= tokenizer.vocab_size:
        wrong = least if least < 0 else most
        raise ValueError(
            f"token id {wrong} does not match tokenizer {tokenizer.name!r}: its ids are 0 .. {tokenizer.vocab_size - 1}"
        )
    return document


def _key(corpus: Corpus, other: str) -> str:
    return hashlib.sha256(f"{corpus.hash} {corpus.layout} {corpus.whole} {other}".encode()).hexdigest()[:32]
