"""Tokenisers by name, one small protocol: encode, decode, vocab_size, end, name, hash; saved into a folder and loaded.

    tokenizer = make("bpe:4096", corpus.splits["train"])        # trained on what it is given, and on nothing else
    ids = tokenizer.encode("In the beginning")                  # int32 (T,)
    save(tokenizer, workdir / "tokenizer"); load(workdir / "tokenizer") == tokenizer

    bytes, bytes+end                ids are the UTF-8 bytes
    characters, characters+end      the characters of the training text, in code point order
    words, words:SIZE               the words of the training text, all or the commonest, line ends, and <unk>
    bpe:SIZE                        byte-level byte pair encoding with SIZE ids, trained; needs the package tokenizers
    file:PATH/tokenizer.json        a tokenizer.json of the package tokenizers, GPT-2's say
    file:PATH.model                 a sentencepiece model; needs the package sentencepiece
    ids:SIZE                        no text: token ids 0 .. SIZE - 1 that a .npy corpus already holds

`end` is the id that stands between documents, None if there is none; no text is ever encoded as that id.
"""

import hashlib
import importlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import ArrayLike, Int32

from ..names import unknown
from .corpora import utf8

CHUNK = 1 << 20  # characters that are encoded at once, where that changes nothing
CUT = re.compile(r"(?<=\S)\n(?=\S)")  # byte-level tokenisers never join across such a line end
WORD = re.compile(r"\S+|\n")
UNKNOWN = "<unk>"
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # names of the end token in published vocabularies


class Tokenizer:
    """What all have in common; equal if kind, content and end are."""

    kind: str
    name: str
    vocab_size: int
    end: int | None = None

    def encode(self, text: str | bytes) -> Int32[np.ndarray, " T"]:
        """Token ids of a text, given as such or as its UTF-8 bytes."""
        raise NotImplementedError

    def decode(self, ids: Sequence | ArrayLike) -> str:
        """The text of token ids; ends are left out, bytes that are no UTF-8 become the replacement sign."""
        raise NotImplementedError

    def content(self) -> bytes:
        """What a saved tokeniser is made of again, by `cls.restore(content, has_end)`."""
        raise NotImplementedError

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all that decides the ids."""
        return hashlib.sha256(f"{self.kind} {self.end} ".encode() + self.content()).hexdigest()

    def __eq__(self, other):
        return isinstance(other, Tokenizer) and self.hash == other.hash

    def __hash__(self):
        return hash(self.hash)


class Bytes(Tokenizer):
    """Byte b is id b; 256 is the end, if there is one. Any bytes will do, UTF-8 or not."""

    kind = "bytes"

    def __init__(self, has_end: bool = False):
        self.vocab_size, self.end = 256 + has_end, 256 if has_end else None
        self.name = "bytes+end" if has_end else "bytes"

    def encode(self, text):
        return np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8).astype(np.int32)

    def decode(self, ids):
        ids = _inside(ids, self.vocab_size)
        return ids[ids < 256].astype(np.uint8).tobytes().decode(errors="replace")

    def content(self):
        return b""

    @classmethod
    def restore(cls, content: bytes, has_end: bool):
        return cls(has_end)


class Characters(Tokenizer):
    """One id a character of an alphabet, in code point order; the end, if there is one, is the last id."""

    kind = "characters"

    def __init__(self, alphabet: str, has_end: bool = False):
        self.alphabet = "".join(sorted(set(alphabet)))
        if not self.alphabet:
            raise ValueError("tokenizer 'characters': the training text is empty")
        self._points = np.frombuffer(self.alphabet.encode("utf-32-le"), np.uint32)
        self.vocab_size = self._points.size + has_end
        self.end = self._points.size if has_end else None
        self.name = "characters+end" if has_end else "characters"

    def encode(self, text):
        text = _text(text)
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        ids = np.minimum(np.searchsorted(self._points, points), self._points.size - 1)
        (strange,) = np.nonzero(self._points[ids] != points)
        if strange.size:
            where = f"character {text[strange[0]]!r} at position {strange[0]}"
            raise ValueError(f"tokenizer {self.name!r}: {where} is not in the training text; take bytes or bpe:SIZE")
        return ids.astype(np.int32)

    def decode(self, ids):
        ids = _inside(ids, self.vocab_size)
        return self._points[ids[ids < self._points.size]].tobytes().decode("utf-32-le")

    def content(self):
        return self.alphabet.encode()

    @classmethod
    def restore(cls, content: bytes, has_end: bool):
        return cls(content.decode(), has_end)


class Words(Tokenizer):
    """One id a line end or word, which is what stands between white space; id 0 is <unk>, all other words.

    "the cat\\n" -> the cat \\n; decoded words stand between single spaces, whatever did before.
    """

    kind = "words"

    def __init__(self, words: Sequence[str], name: str = "words"):
        self._words = [UNKNOWN, *(word for word in words if word != UNKNOWN)]
        self._ids = {word: id for id, word in enumerate(self._words)}
        self.vocab_size, self.name = len(self._words), name

    def encode(self, text):
        return np.array([self._ids.get(word, 0) for word in WORD.findall(_text(text))], np.int32)

    def decode(self, ids):
        return re.sub(r" ?\n ?", "\n", " ".join(self._words[id] for id in _inside(ids, self.vocab_size)))

    def content(self):
        return json.dumps(self._words).encode()

    @classmethod
    def restore(cls, content: bytes, has_end: bool):
        return cls(json.loads(content))


class TokenizerJSON(Tokenizer):
    """A tokenizer.json of the package tokenizers; special tokens written in a text are text."""

    kind = "json"

    def __init__(self, content: str, name: str = "tokenizer.json"):
        library = _package("tokenizers")
        try:
            self._inner = library.Tokenizer.from_str(content)
        except Exception as error:  # that is the class it raises
            raise ValueError(f"{name} is truncated or no tokenizer.json: {error}") from None
        self._inner.encode_special_tokens = True
        self._inner.no_truncation()
        self._inner.no_padding()
        self.name, self.vocab_size = name, max(self._inner.get_vocab().values(), default=-1) + 1
        self.end = next((id for id in map(self._inner.token_to_id, ENDS) if id is not None), None)
        spec = json.loads(self._inner.to_str())
        before = spec["pre_tokenizer"] or {}
        plain = before.get("type") == "ByteLevel" and before.get("use_regex", True) and not before["add_prefix_space"]
        self._in_chunks = plain and spec["normalizer"] is None

    def encode(self, text):
        pieces = _chunks(_text(text)) if self._in_chunks else [_text(text)]
        ids = [np.array(self._inner.encode(piece, add_special_tokens=False).ids, np.int32) for piece in pieces]
        return np.concatenate(ids)

    def decode(self, ids):
        ids = _inside(ids, self.vocab_size)
        return self._inner.decode(
            ids[ids != (-1 if self.end is None else self.end)].tolist(), skip_special_tokens=False
        )

    def content(self):
        return self._inner.to_str().encode()

    @classmethod
    def restore(cls, content: bytes, has_end: bool):
        return cls(content.decode())


class SentencePiece(Tokenizer):
    """A sentencepiece model; its end of sentence is the end."""

    kind = "sentencepiece"

    def __init__(self, content: bytes, name: str = "sentencepiece"):
        library = _package("sentencepiece")
        try:
            self._inner = library.SentencePieceProcessor(model_proto=content)
            self.vocab_size = self._inner.vocab_size()
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{name} is truncated or no sentencepiece model: {' '.join(str(error).split())}") from None
        self.name, self._content = name, content
        self.end = self._inner.eos_id() if self._inner.eos_id() >= 0 else None

    def encode(self, text):
        return np.array(self._inner.encode(_text(text)), np.int32)

    def decode(self, ids):
        return self._inner.decode(_inside(ids, self.vocab_size).tolist())

    def content(self):
        return self._content

    @classmethod
    def restore(cls, content: bytes, has_end: bool):
        return cls(content)


class Ids(Tokenizer):
    """The vocabulary of a corpus of token ids whose text is not known."""

    kind = "ids"

    def __init__(self, vocab_size: int):
        self.vocab_size, self.name = vocab_size, f"ids:{vocab_size}"

    def encode(self, text):
        raise ValueError(f"tokenizer {self.name!r} has no text: only a .npy corpus of token ids goes with it")

    decode = encode

    def content(self):
        return str(self.vocab_size).encode()

    @classmethod
    def restore(cls, content: bytes, has_end: bool):
        return cls(int(content))


CLASSES = {cls.kind: cls for cls in (Bytes, Characters, Words, TokenizerJSON, SentencePiece, Ids)}
NAMES = ("bytes", "bytes+end", "characters", "characters+end", "words", "words:SIZE", "bpe:SIZE")
NAMES += ("file:PATH", "ids:SIZE")


def is_trained(spec: str) -> bool:
    """Whether `make` needs documents."""
    return spec.startswith(("characters", "words", "bpe:"))


def make(spec: str, documents: Iterable[bytes] = ()) -> Tokenizer:
    """The tokeniser of that name; `documents`, the training split, make the alphabet, the words or the merges."""
    kind, _, rest = spec.partition(":")
    if spec in ("bytes", "bytes+end"):
        return Bytes(spec.endswith("+end"))
    if spec in ("characters", "characters+end"):
        return Characters("".join(set().union(*map(_text, documents))), spec.endswith("+end"))
    if spec == "words":
        return train_words(documents)
    if kind in ("bpe", "ids", "words"):
        if not rest.isdecimal() or int(rest) < 1:
            raise ValueError(f"tokenizer {spec!r}: write {kind}:SIZE, the number of token ids")
        if kind == "words":
            return train_words(documents, int(rest))
        return Ids(int(rest)) if kind == "ids" else train_bpe(documents, int(rest))
    if kind == "file" and rest:
        path = Path(rest).expanduser()
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read tokenizer file {path}: {error.strerror}") from None
        if path.suffix == ".json":
            return TokenizerJSON(utf8(content, f"tokenizer file {path}"), path.name)
        if path.suffix == ".model":
            return SentencePiece(content, path.name)
        raise ValueError(f"tokenizer file {path}: a tokenizer.json or a sentencepiece .model is needed")
    raise ValueError(unknown("tokenizer", spec, NAMES))


def train_words(documents: Iterable[bytes], vocab_size: int | None = None) -> Words:
    """All words of the documents, or so many ids' worth of the commonest, in order of their count."""
    counts = Counter(word for document in documents for word in WORD.findall(_text(document)))
    name = "words" if vocab_size is None else f"words:{vocab_size}"
    if not counts.pop(UNKNOWN, 0) + len(counts):
        raise ValueError(f"tokenizer {name!r}: the training text is empty")
    words = sorted(counts, key=lambda word: (-counts[word], word))
    return Words(words if vocab_size is None else words[: vocab_size - 1], name)


def train_bpe(documents: Iterable[bytes], vocab_size: int) -> TokenizerJSON:
    """Byte-level byte pair encoding (Radford et al. 2019): 256 bytes, the end, and vocab_size - 257 merges."""
    if vocab_size < 257:
        raise ValueError(f"tokenizer 'bpe:{vocab_size}': at least 257 ids are needed, the bytes and the end")
    library = _package("tokenizers")
    inner = library.Tokenizer(library.models.BPE())
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[ENDS[0]],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (_text(document) for document in documents)
    inner.train_from_iterator((line for text in texts for line in text.splitlines(keepends=True)), trainer)
    return TokenizerJSON(inner.to_str(), f"bpe:{vocab_size}")


def save(tokenizer: Tokenizer, folder: str | os.PathLike) -> None:
    """Into the folder; ValueError if it holds another one. What is there is whole once about.json is."""
    folder = Path(folder)
    if (folder / "about.json").exists() and load(folder) != tokenizer:
        raise ValueError(f"{folder} holds another tokenizer than {tokenizer.name!r}: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    about = {"kind": tokenizer.kind, "name": tokenizer.name, "end": tokenizer.end, "hash": tokenizer.hash}
    about |= {"vocab_size": tokenizer.vocab_size}
    for name, content in (("content", tokenizer.content()), ("about.json", json.dumps(about).encode())):
        temporary = folder / f".{name}.{os.getpid()}"
        temporary.write_bytes(content)
        os.replace(temporary, folder / name)


def load(folder: str | os.PathLike) -> Tokenizer:
    """The tokeniser that `save` left; its hash must be the recorded one."""
    folder = Path(folder)
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        content = (folder / "content").read_bytes()
        tokenizer = CLASSES[about["kind"]].restore(content, about["end"] is not None)
    except OSError as error:
        raise ValueError(f"{folder} holds no tokenizer: {error.strerror} ({error.filename})") from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / 'about.json'} is damaged: {error!r}") from None
    tokenizer.name = about["name"]
    if tokenizer.hash != about["hash"]:
        raise ValueError(f"{folder} is damaged: its tokenizer {about['name']!r} does not have the recorded hash")
    return tokenizer


def _chunks(text: str) -> Iterator[str]:
    """Pieces of CHUNK characters and the rest of the line: a whole book at once would take a hundred times its size."""
    start = 0
    while (cut := CUT.search(text, start + CHUNK)) is not None:
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def _text(text: str | bytes) -> str:
    return text if isinstance(text, str) else utf8(text, "the text")


def _inside(ids: Sequence | ArrayLike, vocab_size: int) -> np.ndarray:
    ids = np.asarray(ids, np.int64).reshape(-1)
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise ValueError(f"token id {wrong[0]} is outside 0 .. {vocab_size - 1}, the vocabulary of the tokenizer")
    return ids


def _package(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"the package {name} is missing: pip install 'xlstm_jax[text]'") from None
