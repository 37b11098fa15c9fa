"""Token files and batches: every token once, the same for any number of processes and workers, exact resets."""

import json
import pickle

import numpy as np
import pytest

from xlstm_jax.data import lookup, tokenizers, tokens, windows


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """1,000 ids that name their own position, as one running text."""
    path = tmp_path_factory.mktemp("running") / "ids.npy"
    np.save(path, np.arange(1000, dtype=np.uint16))
    return tokens.TokenFile(path)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """(corpus, token files) of 60 documents of 0 to 19 bytes; document n holds the byte n + 1 alone."""
    folder = tmp_path_factory.mktemp("documents")
    texts = [chr(n + 1) * (n * 7 % 20) for n in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = lookup.load(f"file:{folder / 'text.jsonl'}")
    return corpus, tokens.tokenise(corpus, tokenizers.make("bytes+end"), folder / "cache")


def test_documents_stand_between_ends(documents):
    corpus, files = documents
    for split, file in files.items():
        expected = b"".join(b"\0" + document for document in corpus.splits[split]) + b"\0"
        np.testing.assert_array_equal(np.where(file.tokens == 256, 0, file.tokens), np.frombuffer(expected, np.uint8))
        assert (file.num_bytes, file.num_documents) == (sum(map(len, corpus.splits[split])), len(corpus.splits[split]))
    assert files["train"].tokens.dtype == np.uint16


def test_a_corpus_is_tokenised_once_and_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("abcdefghij" * 10)
    corpus, tokenizer = lookup.load(f"file:{tmp_path / 'text.txt'}"), tokenizers.make("bytes")
    calls, cache = [], tmp_path / "cache"

    def encode(self, text):
        calls.append(len(text))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return np.frombuffer(text, np.uint8).astype(np.int32)

    monkeypatch.setattr(tokenizers.Bytes, "encode", encode)
    with pytest.raises(KeyboardInterrupt):
        tokens.tokenise(corpus, tokenizer, cache)
    assert list(cache.iterdir()) == []
    files = tokens.tokenise(corpus, tokenizer, cache)
    again = tokens.tokenise(corpus, tokenizer, cache)
    assert calls == [90, 5, 90, 5, 5] and files["test"].path == again["test"].path
    tokens.tokenise(corpus, tokenizers.make("bytes+end"), cache)
    (tmp_path / "text.txt").write_text("abcdefghij" * 9 + "a" * 10)
    tokens.tokenise(lookup.load(f"file:{tmp_path / 'text.txt'}"), tokenizer, cache)
    assert len(list(cache.iterdir())) == 3  # another vocabulary, another content
    files["train"].path.write_bytes(files["train"].path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="train.npy is truncated"):
        tokens.tokenise(corpus, tokenizer, cache)


def test_two_names_of_one_part_are_one_file(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij" * 10)
    corpus = lookup.load(f"file:{tmp_path / 'a.txt'}")
    splits = corpus.splits | {"test": corpus.splits["valid"]}
    files = tokens.tokenise(corpus._replace(splits=splits), tokenizers.make("bytes"), tmp_path / "cache")
    assert files["test"].path == files["valid"].path != files["train"].path


def test_a_token_file_is_pickled_as_its_path(running):
    source = windows.Windows(running, 8, 4)
    source[0]  # opens the file and the order
    assert len(pickle.dumps(source)) < 1000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[3].inputs, source[3].inputs)


def test_every_window_once_a_pass_in_a_new_order(running):
    source = windows.Windows(running, 7, 4, seed=3)
    assert source.per_pass == 142  # 999 pairs, 5 left over
    rows = np.concatenate([source[step].inputs for step in range(71)])  # two passes
    np.testing.assert_array_equal(np.diff(rows, axis=1), 1)
    first, second = rows[:142, 0], rows[142:, 0]
    for starts in (first, second):
        assert (np.diff(np.sort(starts)) == 7).all() and 0 <= starts.min() <= 5
    assert (first != second).any() and (windows.Windows(running, 7, 4, seed=4)[0].inputs != source[0].inputs).any()
    other = np.concatenate([windows.Windows(running, 7, 4, seed=4)[step].inputs[:, 0] for step in range(36)])[:142]
    assert (other - other.min() != second - second.min()).any()  # the next seed is not the next pass
    np.testing.assert_array_equal(source[9].targets, source[9].inputs + 1)
    assert source[0].inputs.dtype == source[0].targets.dtype == np.int32 and source[0].reset is None


def test_streams_go_on_and_reset_at_a_new_pass(running):
    source = windows.Streams(running, 64, 4, seed=1)
    batches = [source[step] for step in range(999 // 64 + 1)]
    for before, after in zip(batches[:-2], batches[1:]):
        assert ((after.inputs[:, 0] == before.targets[:, -1]) | after.reset[:, 0]).all()
    inputs, reset = (np.concatenate([getattr(b, name) for b in batches[:-1]], 1) for name in ("inputs", "reset"))
    assert (np.diff(inputs, axis=1)[~reset[:, 1:]] == 1).all() and (inputs[:, 1:][reset[:, 1:]] == 0).all()
    assert batches[0].reset[:, 0].all() and batches[-1].reset[:, 0].all() and reset.sum() <= 8
    np.testing.assert_array_equal(batches[3].targets, batches[3].inputs + 1)


@pytest.mark.parametrize("kind", [windows.Windows, windows.Streams])
def test_between_documents_the_state_is_emptied(documents, kind):
    batch = kind(documents[1]["train"], 50, 3)[0]
    np.testing.assert_array_equal(
        batch.reset | (np.arange(50) == 0)[None], (batch.inputs == 256) | (np.arange(50) == 0)[None]
    )
    inside = (batch.inputs != 256) & (batch.targets != 256)
    assert (batch.inputs == batch.targets)[inside].all()  # no pair of two documents


@pytest.mark.parametrize("algorithm", ["first_fit", "best_fit"])
@pytest.mark.parametrize("seq_len", [8, 24])
def test_packed_documents_are_each_there_once(documents, seq_len, algorithm):
    corpus, files = documents
    source = windows.PackedDocuments(files["train"], seq_len, 1, algorithm=algorithm)
    found = []
    for batch in (source[step] for step in range(source.per_pass)):
        for segment in range(1, batch.segment_ids.max() + 1):
            own = batch.segment_ids[0] == segment
            assert batch.positions[0][own].tolist() == list(range(own.sum()))
            assert batch.reset[0][own].tolist() == [True] + [False] * (own.sum() - 1)
            found.append((batch.inputs[0][own].tolist(), batch.targets[0][own].tolist()))
        assert (batch.weights == batch.mask).all() and (batch.mask == (batch.segment_ids > 0)).all()
    expected = []
    for document in corpus.splits["train"]:
        whole = [256, *document, 256]
        for start in range(0, len(whole) - 1, seq_len):
            stop = min(start + seq_len, len(whole) - 1)
            expected.append((whole[start:stop], whole[start + 1 : stop + 1]))
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("kind", [windows.Windows, windows.Streams, windows.PackedDocuments])
def test_the_batch_is_the_same_for_any_number_of_processes(documents, kind):
    file = documents[1]["train"]
    for step in (0, 11):
        whole = kind(file, 24, 6, seed=5)[step]
        for count in (2, 3, 6):
            parts = [kind(file, 24, 6, seed=5, shard=(index, count))[step] for index in range(count)]
            for name, value in whole._asdict().items():
                if value is not None:
                    np.testing.assert_array_equal(np.concatenate([getattr(p, name) for p in parts]), value)


def test_grain_reads_the_same_batches_from_any_step(running):
    pytest.importorskip("grain")
    source = windows.Windows(running, 7, 4)
    iterator = windows.iterate(source, step=5)
    for step in range(5, 9):
        np.testing.assert_array_equal(next(iterator).inputs, source[step].inputs)


def test_worker_processes_keep_the_order(running):
    pytest.importorskip("grain")
    source = windows.Windows(running, 7, 4)
    iterator = windows.iterate(source, step=3, workers=2, buffer=1)
    for step in range(3, 7):
        np.testing.assert_array_equal(next(iterator).inputs, source[step].inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 1000}, "ids.npy has 1000 tokens: one window of seq_len=1000 needs 1001"),
        ({"seq_len": 0}, "seq_len and batch_size must be at least 1"),
        ({"batch_size": 0}, "seq_len and batch_size must be at least 1"),
        ({"batch_size": 5, "shard": (0, 2)}, "batch_size 5 cannot be shared by 2 processes"),
        ({"shard": (2, 2)}, "shard must be"),
        ({"seed": -1}, "seed must be in 0"),
    ],
)
@pytest.mark.parametrize("kind", [windows.Windows, windows.Streams])
def test_bad_arguments_end_in_one_line(running, kind, change, message):
    with pytest.raises(ValueError, match=message) as error:
        kind(running, **({"seq_len": 7, "batch_size": 4} | change))
    assert "\n" not in str(error.value)


def test_what_cannot_be_packed_or_read(running, documents):
    with pytest.raises(ValueError, match="running text: only documents can be packed"):
        windows.PackedDocuments(running, 8, 4)
    with pytest.raises(ValueError, match="unknown packing algorithm 'first'; nearest: first_fit"):
        windows.PackedDocuments(documents[1]["train"], 8, 4, algorithm="first")
    with pytest.raises(ValueError, match="threads and buffer 1"):
        windows.iterate(windows.Windows(running, 8, 4), step=-1)
    with pytest.raises(IndexError):
        windows.Windows(running, 8, 4)[-1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bytes", "ids.npy, train: token id 899 does not match tokenizer 'bytes': its ids are 0 .. 255"),
        ("ids:950", "ids.npy, test: token id 999 does not match tokenizer 'ids:950'"),
    ],
)
def test_a_vocabulary_that_does_not_match(running, tmp_path, spec, message):
    corpus = lookup.load(f"file:{running.path}")
    with pytest.raises(ValueError, match=message):
        tokens.tokenise(corpus, tokenizers.make(spec), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(tokens.tokenise(corpus, tokenizers.make("ids:1000"), tmp_path)["train"]) == 900


def test_what_cannot_be_tokenised(documents, running, tmp_path):
    corpus, _ = documents
    with pytest.raises(ValueError, match="consists of documents, but tokenizer 'bytes' has no token .*take bytes.end"):
        tokens.tokenise(corpus, tokenizers.make("bytes"), tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        ValueError, match="cannot write the tokens to .*file/cache: Not a directory; set XLSTM_JAX_CACHE"
    ):
        tokens.tokenise(corpus, tokenizers.make("bytes+end"), tmp_path / "file/cache")
    with pytest.raises(ValueError, match="holds no text to train the tokenizer 'characters' on: write ids:SIZE"):
        tokens.tokenizer_for(lookup.load(f"file:{running.path}"), "characters", tmp_path)
    broken = corpus._replace(splits={"train": [b"ok", b"\xff"]})
    with pytest.raises(ValueError, match="train, document 1: the text is no UTF-8: byte 0xff at offset 0"):
        tokens.tokenise(broken, tokenizers.make("characters+end", [b"ok"]), tmp_path)
    music = corpus._replace(splits={"train": [np.zeros((3, 88), np.uint8)]})
    with pytest.raises(ValueError, match="document 0: a document is uint8 .3, 88.: text or token ids"):
        tokens.tokenise(music, tokenizers.make("bytes+end"), tmp_path)
    with pytest.raises(ValueError, match="valid: there are no tokens"):
        tokens.tokenise(corpus._replace(splits={"valid": []}), tokenizers.make("bytes+end"), tmp_path)
