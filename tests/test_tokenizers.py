"""Tokenisers: text and back, training on what is given alone, ends, saving, and files and ids that do not fit."""

import io
import json

import numpy as np
import pytest

from xlstm_jax.data import lookup, tokenizers, tokens

TEXT = "the cat sat on the mat, the dog sat on the log.\n" * 20
ALL = TEXT + "né 日本 𝄞\n"
PACKAGES = {"bpe:300": "tokenizers", "json": "tokenizers", "sentencepiece": "sentencepiece"}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A tokeniser by its name, each made once; "json" and "sentencepiece" from files that their own package wrote."""
    made, folder = {}, tmp_path_factory.mktemp("models")

    def one(name):
        if name in PACKAGES:
            package = pytest.importorskip(PACKAGES[name])
        if name in made:
            return made[name]
        spec = name
        if name == "json":  # the layout of GPT-2's
            inner = package.Tokenizer.from_str(one("bpe:300").content().decode())
            inner.post_processor = package.processors.ByteLevel(trim_offsets=False)
            inner.enable_truncation(5)
            inner.save(str(folder / "tokenizer.json"))
            spec = f"file:{folder / 'tokenizer.json'}"
        if name == "sentencepiece":
            content = io.BytesIO()
            package.SentencePieceTrainer.train(
                sentence_iterator=iter(TEXT.splitlines()), model_writer=content, vocab_size=300, minloglevel=2,
                byte_fallback=True, hard_vocab_limit=False, normalization_rule_name="identity",
            )  # fmt: skip
            (folder / "some.model").write_bytes(content.getvalue())
            spec = f"file:{folder / 'some.model'}"
        made[name] = tokenizers.make(spec, [ALL.encode()] if "char" in name else [TEXT.encode()])
        return made[name]

    return one


@pytest.mark.parametrize("name", ["bytes", "bytes+end", "characters", "characters+end", *PACKAGES])
def test_text_comes_back_from_a_saved_tokenizer(make, name, tmp_path):
    tokenizer = make(name)
    ids = tokenizer.encode(ALL)
    assert ids.dtype == np.int32 and 0 <= ids.min() and ids.max() < tokenizer.vocab_size
    np.testing.assert_array_equal(tokenizer.encode(ALL.encode()), ids)
    blind = name == "sentencepiece"  # to a space at the beginning or end
    assert tokenizer.decode(ids).strip(" ") == ALL if blind else tokenizer.decode(ids) == ALL
    tokenizers.save(tokenizer, tmp_path)
    tokenizers.save(tokenizer, tmp_path)  # again: nothing to do
    again = tokenizers.load(tmp_path)
    assert again == tokenizer and hash(again) == hash(tokenizer)
    assert (again.name, again.vocab_size, again.end) == (tokenizer.name, tokenizer.vocab_size, tokenizer.end)
    np.testing.assert_array_equal(again.encode(ALL), ids)


def test_sizes_and_ends(make):
    sizes = {name: (make(name).vocab_size, make(name).end) for name in ("bytes", "bytes+end", "characters")}
    count = len(set(ALL))
    assert sizes == {"bytes": (256, None), "bytes+end": (257, 256), "characters": (count, None)}
    assert (make("characters+end").end, make("characters+end").vocab_size) == (count, count + 1)
    assert make("bytes").encode(b"\xff\x00").tolist() == [255, 0]  # bytes that are no UTF-8
    assert make("bytes+end").decode([104, 105, 256]) == "hi"
    assert len({make(name) for name in ("bytes", "bytes+end", "characters", "characters+end")}) == 4
    assert tokenizers.make("ids:50257").vocab_size == 50257


def test_words(tmp_path):
    text = "the cat <unk>\n the  dog\n\nthe cat\n"
    coder = tokenizers.make("words", [text.encode()])
    assert coder.encode(text).tolist() == [2, 3, 0, 1, 2, 4, 1, 1, 2, 3, 1]  # <unk>, then by count and code points
    assert coder.decode(coder.encode(text)) == "the cat <unk>\nthe dog\n\nthe cat\n"
    assert coder.encode("a dog").tolist() == [0, 4] and (coder.vocab_size, coder.end) == (5, None)
    few = tokenizers.make("words:3", [text.encode()])
    assert few.vocab_size == 3 and few.decode(few.encode("the dog\n")) == "the <unk>\n"
    for each in (coder, few):
        tokenizers.save(each, tmp_path / each.name)
        again = tokenizers.load(tmp_path / each.name)
        assert again == each and again.name == each.name
        np.testing.assert_array_equal(again.encode(text), each.encode(text))


def test_an_end_written_in_a_text_is_text(make):
    tokenizer = make("bpe:300")
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.end == 0 and 0 not in ids and tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode([0, *ids, 0]) == "a<|endoftext|>b"
    assert len(make("json").encode(TEXT)) > 5 and make("json").end == 0  # the file's truncation is not ours


def test_a_long_text_is_encoded_in_chunks_with_the_same_ids(make, monkeypatch):
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(["the ", "cat", " ", "\n", "sat.", "\n\n", "é", "\t", "\x1f", "s'", "\u2003"], size=2000))
    for name in ("bpe:300", "json"):
        whole = make(name).encode(text)
        for size in (1, 7, 50):
            monkeypatch.setattr(tokenizers, "CHUNK", size)
            assert len(list(tokenizers._chunks(text))) > 10
            np.testing.assert_array_equal(make(name).encode(text), whole)


def test_bpe_is_the_same_each_time_and_knows_its_training_text_only(make, tmp_path):
    pytest.importorskip("tokenizers")
    assert tokenizers.train_bpe([TEXT.encode()], 300) == make("bpe:300") != tokenizers.train_bpe([TEXT.encode()], 265)
    rows = [{"text": f"{'common words here' if n < 38 else 'zyzzyva qwerty'} {n % 10}"} for n in range(40)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = lookup.load(f"file:{path}")
    tokenizer = tokens.tokenizer_for(corpus, "bpe:290", tmp_path)
    assert len(tokenizer.encode("common")) < 3 and len(tokenizer.encode("zyzzyva")) == 7  # held out
    assert tokens.tokenizer_for(corpus, "bpe:290", tmp_path) == tokenizer  # from the cache folder
    with pytest.raises(ValueError, match=r"text.jsonl, train: .*bpe:9.* at least 257"):
        tokens.tokenizer_for(corpus, "bpe:9", tmp_path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("byte", "unknown tokenizer 'byte'; nearest: bytes"),
        ("", "unknown tokenizer ''; valid: bytes, "),
        ("bpe:", "'bpe:': write bpe:SIZE"),
        ("bpe:-1", "'bpe:-1': write bpe:SIZE"),
        ("ids:0", "'ids:0': write ids:SIZE"),
        ("words:none", "'words:none': write words:SIZE"),
        ("words", "tokenizer 'words': the training text is empty"),
        ("file:none.json", "cannot read tokenizer file none.json: No such file"),
        ("characters", "the training text is empty"),
    ],
)
def test_a_bad_name_ends_in_one_line(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        tokenizers.make(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b'{"model": ', "tokenizer.json is truncated or no tokenizer.json"),
        ("tokenizer.json", b"\xff", "no UTF-8: byte 0xff at offset 0"),
        ("spiece.model", b"nonsense", "spiece.model is truncated or no sentencepiece model"),
        ("vocab.txt", b"a b c", "a tokenizer.json or a sentencepiece .model is needed"),
    ],
)
def test_a_bad_file_ends_in_one_line(tmp_path, name, content, message):
    if name.endswith((".json", ".model")):
        pytest.importorskip("tokenizers" if name.endswith(".json") else "sentencepiece")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        tokenizers.make(f"file:{tmp_path / name}")
    assert "\n" not in str(error.value)


def test_what_a_tokenizer_does_not_know(make):
    with pytest.raises(ValueError, match="character 'Q' at position 4 is not in the training text; take bytes or bpe"):
        make("characters").encode("the Q")
    with pytest.raises(ValueError, match="the text is no UTF-8: byte 0xff at offset 2"):
        make("characters").encode(b"at\xff")
    with pytest.raises(ValueError, match="token id 256 is outside 0 .. 255"):
        make("bytes").decode([1, 256])
    with pytest.raises(ValueError, match="'ids:9' has no text"):
        tokenizers.make("ids:9").encode("a")


def test_a_folder_with_another_or_a_damaged_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer: No such file"):
        tokenizers.load(tmp_path)
    tokenizers.save(tokenizers.make("characters", [b"abc"]), tmp_path)
    with pytest.raises(ValueError, match="holds another tokenizer than 'bytes'"):
        tokenizers.save(tokenizers.make("bytes"), tmp_path)
    (tmp_path / "content").write_bytes(b"abd")
    with pytest.raises(ValueError, match="is damaged: its tokenizer 'characters' does not have the recorded hash"):
        tokenizers.load(tmp_path)
    (tmp_path / "about.json").write_text('{"kind": "morse"}')
    with pytest.raises(ValueError, match="about.json is damaged: KeyError"):
        tokenizers.load(tmp_path)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"package tokenizers is missing: pip install 'xlstm_jax\[text\]'"):
        tokenizers.make("bpe:300", [b"text"])
