"""The task over any corpus and tokeniser: the byte task's batches, documents with exact resets, coverage, bad input."""

import json
import math

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import data as script
from experiments import generate as generate_script
from experiments import train as train_script
from experiments.build import build_task, resolve
from experiments.planning import ROOT, load
from tests.configs import tiny
from xlstm_jax import tasks
from xlstm_jax.data import lookup, tokenizers


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XLSTM_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_bytes(bytes(97 + i * i % 23 for i in range(1000)))
    return f"file:{path}"


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """60 documents of 0 to 12 letters."""
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    rows = [{"text": chr(97 + n % 26) * (n * 5 % 13)} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"file:{path}"


@pytest.mark.parametrize("carries_state", [True, False])
def test_bytes_of_one_text_make_the_batches_of_the_byte_task(text, carries_state):
    old, new = (
        tasks.make(name, corpus=text, seq_len=16, carries_state=carries_state) for name in ("byte_lm", "text_lm")
    )
    assert (new.vocab_size, new.num_classes, new.chance, new.data_hash) == (256, 256, 1 / 256, old.data_hash)
    for split in tasks.SPLITS:
        batches = [task.batch(split, 3, 2, 4) for task in (old, new)]
        jax.tree.map(np.testing.assert_array_equal, *batches)
    assert new.num_batches("test", 4) == old.num_batches("test", 4)
    assert new.num_bytes == (900, 50, 50)


def test_characters_are_fewer_ids_for_the_same_text(text):
    task = tasks.make("text_lm", corpus=text, seq_len=16, tokenizer="characters")
    assert task.vocab_size == len(task.coder.alphabet) < 24
    batch = tasks.make("byte_lm", corpus=text, seq_len=16).batch("valid", 0, 1, 2)
    assert (
        task.coder.decode(task.batch("valid", 0, 1, 2).inputs[0])
        == bytes(np.asarray(batch.inputs[0], np.uint8)).decode()
    )
    scores = task.metrics({"nll": 3 * math.log(2), "correct": 1.0, "weight": 2.0})
    assert scores == pytest.approx({"loss": 1.5 * math.log(2), "perplexity": 2**1.5, "bits_per_character": 1.5})


def test_words_of_a_folder_as_the_penn_treebank_has_them(tmp_path):
    for split, words in (("train", "the cat <unk> N"), ("valid", "the dog"), ("test", "the cat")):
        (tmp_path / f"{split}.txt").write_text(f" {words} \n" * 10)
    config = load(f"{ROOT}/configs/papers/tcn_text.py:demo,ptb,debug", [f"task.corpus=file:{tmp_path}"]).base
    task = build_task(resolve(config))
    assert task.vocab_size == 5  # <unk>, the line end, N, cat, the
    assert task.coder.decode(task.batch("valid", 0, 0, 1).inputs[0]).endswith("\nthe <unk>\nthe <unk>\n")
    scores = task.metrics({"nll": 2 * math.log(8), "correct": 0.0, "weight": 2.0})
    assert scores == pytest.approx({"loss": math.log(8), "perplexity": 8.0})


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_every_token_and_end_of_the_documents_is_asked_for_once(documents, split, batch_size):
    task = tasks.make("text_lm", corpus=documents, seq_len=8, tokenizer="bytes+end")
    found, inputs = [], []
    for step in range(task.num_batches(split, batch_size)):
        batch = task.batch(split, 0, step, batch_size)
        tasks.check(jax.device_get(batch), task)
        np.testing.assert_array_equal(batch.reset, batch.inputs == 256)
        found.append(np.where(batch.weights > 0, batch.targets, -1))
        inputs.append(np.where(batch.weights > 0, batch.inputs, -1))
    targets, inputs = (np.concatenate(parts, 1) for parts in (found, inputs))
    expected = [token for document in lookup.load(documents).splits[split] for token in (*document, 256)]
    assert targets[targets >= 0].tolist() == expected
    assert inputs[targets >= 0].tolist() == [256, *expected[:-1]]


@pytest.mark.parametrize("carries_state", [True, False])
def test_training_on_documents_resets_between_them(documents, carries_state):
    task = tasks.make("text_lm", corpus=documents, seq_len=40, tokenizer="bytes+end", carries_state=carries_state)
    for step in range(12):
        batch = jax.device_get(task.batch("train", 0, step, 3))
        assert (batch.reset | (np.arange(40) == 0)[None])[batch.inputs == 256].all()
        inside = (batch.inputs != 256) & (batch.targets != 256)
        assert (batch.inputs == batch.targets)[inside].all() and inside.any()


def test_a_pytree_whose_tokens_are_an_argument(text):
    task, again = (tasks.make("text_lm", corpus=text, seq_len=8, tokenizer="characters") for _ in range(2))
    leaves, structure = jax.tree.flatten(task)
    assert (
        len(leaves) == 1
        and structure == jax.tree.structure(again)
        and hash(structure) == hash(jax.tree.structure(again))
    )
    assert structure != jax.tree.structure(tasks.make("text_lm", corpus=text, seq_len=8))
    copy = jax.tree.unflatten(structure, leaves)
    jax.tree.map(np.testing.assert_array_equal, copy.batch("test", 0, 0, 2), task.batch("test", 0, 0, 2))
    plain = tiny.get_config("lm").to_dict()
    plain["task"] = {"name": "text_lm", "corpus": text, "seq_len": 8, "tokenizer": "characters"}
    assert build_task(resolve(plain)).vocab_size == task.vocab_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 0}, "seq_len must be at least 1"),
        ({"seq_len": 900}, "has 900 training tokens, 1000 in all: need at least 901 .seq_len . 1."),
        ({"tokenizer": "byte"}, "unknown tokenizer 'byte'; nearest: bytes"),
        ({"tokenizer": "ids:9"}, "'ids:9' has no text"),
        ({"tokenizer": 3}, "tokenizer must be of the kind of 'bytes', not 3"),
        ({"corpus": "local:tinyshakespeare", "data_dir": "none"}, "is not there: looked for none/tinyshakespeare.txt"),
        ({"corpus": "file:none.txt"}, "cannot read corpus file none.txt"),
    ],
)
def test_bad_options_end_in_one_line(text, options, message):
    with pytest.raises(ValueError, match=message) as error:
        tasks.make("text_lm", **({"corpus": text} | options))
    assert "\n" not in str(error.value)


def test_documents_need_an_end(documents):
    with pytest.raises(ValueError, match="consists of documents, but tokenizer 'bytes' has no token to end one"):
        tasks.make("text_lm", corpus=documents, seq_len=4)


def test_a_run_keeps_its_tokenizer_and_generates_with_it(text, tmp_path, capsys, monkeypatch):
    for module in (train_script, generate_script):
        monkeypatch.setattr(module, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(train_script.train, "evaluate_params", lambda *_: {"loss": 0.0})
    plain = tiny.get_config("lm").to_dict() | {"steps": 2}
    plain["task"] = {"name": "text_lm", "corpus": text, "seq_len": 8, "tokenizer": "characters"}
    train_script.run(ConfigDict(plain), tmp_path / "run", progress=False)
    alphabet = tokenizers.load(tmp_path / "run/tokenizer").alphabet
    assert generate_script.main([f"--workdir={tmp_path / 'run'}", f"--prompt={alphabet[:3]}", "--length=12"]) == 0
    answer = capsys.readouterr().out.rstrip("\n")
    assert len(answer) == 15 and set(answer) <= set(alphabet)
    assert generate_script.main([f"--workdir={tmp_path / 'run'}", "--prompt=Q"]) == 2
    assert "character 'Q' at position 0 is not in the training text" in capsys.readouterr().err


# experiments.data


def answer(arguments, capsys):
    assert script.main(arguments) == 0
    return capsys.readouterr().out


def refused(arguments, message, capsys):
    assert script.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_the_command_line_lists_describes_and_prepares(text, documents, tmp_path, capsys):
    (tmp_path / "notes/1.0.0").mkdir(parents=True)
    (tmp_path / "notes/1.0.0/dataset_info.json").write_text("{}")
    listed = answer(["list", f"--data_dir={tmp_path}"], capsys)
    assert "bundled:kjv" in listed and "local:jsb" in listed and "absent" in listed and "tfds:notes:1.0.0" in listed
    described = answer(["info", text], capsys)
    assert "train: 900 bytes" in described and tasks.make("text_lm", corpus=text).data_hash in described
    assert "train: 54 documents" in answer(["info", documents], capsys)
    prepared = answer(["prepare", documents, "--tokenizer=bytes+end"], capsys)
    assert "tokens (bytes+end, 257 ids): train" in prepared
    np.save(tmp_path / "ids.npy", np.arange(100))
    assert "valid: 5 tokens" in answer(["info", f"file:{tmp_path / 'ids.npy'}"], capsys)


def test_what_the_command_line_refuses(tmp_path, capsys):
    refused(["lst"], "unknown action 'lst'; nearest: list", capsys)
    refused([], "required: action", capsys)
    refused(["info"], "info needs the name of a data set", capsys)
    refused(["list", "bundled:kjv"], "list takes no name", capsys)
    refused(["info", "bundled:kvj"], "nearest: kjv", capsys)
    refused(["info", "bundled:kjv", "--download"], "--download and --tokenizer go with prepare only", capsys)
    refused(["prepare", "bundled:kjv", "--time_limit=0"], "time_limit must be positive", capsys)
    refused(["prepare", "local:jsb", f"--data_dir={tmp_path}"], "prepare local:jsb --download", capsys)
    refused(["prepare", "bundled:kjv", "--tokenizer=byte"], "unknown tokenizer 'byte'", capsys)
