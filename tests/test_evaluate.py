"""Token streams: chunks, windows and documents against one whole-sequence call; exact counts; the command line."""

import functools
import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import evaluate as script
from experiments import generate as generate_script
from tests import run_folder
from xlstm_jax import models
from xlstm_jax.data import tokenizers
from xlstm_jax.evaluate import (
    by_document,
    by_position,
    position_edges,
    row_scores,
    stream_losses,
    summary,
    text_size,
)

VOCAB = 5
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 40).astype(np.uint8)


@functools.cache
def model():
    return models.LM(VOCAB, backbone="lstm", dim=8, num_layers=1, rngs=nnx.Rngs(0))


@functools.cache
def apply():
    graphdef, params = nnx.split(model())
    return jax.jit(lambda tokens: nnx.merge(graphdef, params)(tokens)[0][0])


def alone(tokens):
    """Nats of all tokens but the first by one call without chunks, and whether each was the likeliest."""
    whole = np.zeros((1, 40), np.int32)
    whole[0, : len(tokens)] = tokens
    logits = np.asarray(apply()(whole)[: len(tokens) - 1], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -log_p[np.arange(len(log_p)), tokens[1:]], np.argmax(log_p, axis=1) == tokens[1:]


def test_rows_of_different_lengths_equal_each_alone():
    rows = [TOKENS[:20], TOKENS[:2], TOKENS[5:14], TOKENS[3:4]]
    for row, (nll, best) in zip(rows, row_scores(model(), rows, batch_size=3, chunk=8)):
        assert nll.shape == best.shape == (len(row) - 1,)
        if len(row) > 1:
            want, likeliest = alone(row)
            np.testing.assert_allclose(nll, want, atol=1e-5)
            np.testing.assert_array_equal(best, likeliest)


def test_windows_begin_anew_and_the_carried_state_does_not():
    nll = stream_losses(model(), TOKENS, 13, batch_size=3, chunk=8)
    want = np.concatenate([alone(TOKENS[start : start + 14])[0] for start in (0, 13, 26)])
    np.testing.assert_allclose(nll, want, atol=1e-5)
    carried = stream_losses(model(), TOKENS, None, batch_size=1, chunk=8)
    np.testing.assert_allclose(carried, alone(TOKENS)[0], atol=1e-5)
    np.testing.assert_array_equal(carried, stream_losses(model(), TOKENS, 10**9, batch_size=1, chunk=8))


def test_documents_equal_each_alone():
    end = 4
    tokens = np.array([4, 0, 1, 2, 4, 3, 4, 1, 1, 4], np.uint8)
    nll = stream_losses(model(), tokens, None, batch_size=1, chunk=8, end=end)
    documents = [tokens[0:5], tokens[4:7], tokens[6:10]]
    np.testing.assert_allclose(nll, np.concatenate([alone(each)[0] for each in documents]), atol=1e-5)
    rows = by_document(nll, tokens, end)
    assert [(row["document"], row["tokens"]) for row in rows] == [(0, 4), (1, 2), (2, 3)]
    np.testing.assert_allclose(rows[1]["loss"], nll[4:6].mean())
    with pytest.raises(ValueError, match="one running text: there are no documents"):
        by_document(nll, tokens, None)


def test_positions():
    assert position_edges(16) == [0, 1, 2, 3, 4, 6, 8, 12, 16]
    assert position_edges(5) == [0, 1, 2, 3, 4, 5] and position_edges(1) == [0, 1]
    nll = np.arange(20.0)
    rows = by_position(nll, 8)
    assert sum(row["tokens"] for row in rows) == 20 and rows[0] == {"first": 0, "last": 0, "tokens": 3, "loss": 8.0}
    late = next(row for row in rows if row["first"] == 6)
    assert late["tokens"] == 4 and late["loss"] == np.mean([6, 7, 14, 15])


def test_counts_are_exact():
    text = "Säule 1\n"
    coder = tokenizers.Bytes(has_end=True)
    tokens = np.append(coder.encode(text), 256)
    assert text_size(coder, tokens) == (9, 8)
    assert text_size(tokenizers.Characters(text), tokenizers.Characters(text).encode(text)) == (9, 8)
    assert text_size(tokenizers.Ids(9), tokens) == (None, None)
    row = summary(np.full(10, math.log(4)), 9, 8)
    np.testing.assert_allclose(row["loss"], math.log(4))
    np.testing.assert_allclose(row["perplexity"], 4)
    assert row["tokens"] == 10 and row["bytes"] == 9 and row["characters"] == 8
    np.testing.assert_allclose([row["bits_per_byte"], row["bits_per_character"]], [20 / 9, 20 / 8])
    assert summary(np.ones(2)).keys() == {"tokens", "loss", "perplexity"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": TOKENS[:1]}, "the data has 1 tokens: at least 2"),
        ({"tokens": np.array([1, 7])}, "the data has the token 7: the vocabulary is 0 to 4"),
        ({"length": 0}, "length is 0"),
        ({"batch_size": 0, "length": None}, "batch_size is 0"),
        ({"chunk": 0}, "chunk is 0"),
    ],
)
def test_wrong_streams(change, message):
    with pytest.raises(ValueError, match=message):
        stream_losses(model(), **({"tokens": TOKENS, "length": 8} | change))


# experiments.evaluate


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_folder.write(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setattr(script, "use_compilation_cache", lambda: None)


def test_runs_are_evaluated_and_compared(run, tmp_path, capsys):
    out = tmp_path / "extrapolation"
    short = ["--max_tokens=96", "--batch_size=2", "--chunk=16"]
    arguments = [f"--workdir={run}", "--contexts=16,48", "--stateful", f"--out={out}", *short]
    assert script.main(arguments) == 0
    shown = capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "extrapolation.jsonl").read_text().splitlines()]
    totals = [row for row in rows if "by" not in row]
    assert [(row["context"], row["carried"], row["tokens"]) for row in totals] == [
        (16, False, 96),
        (48, False, 96),
        (None, True, 96),
    ]
    assert shown.count("bits per byte") == 3 and (out / "extrapolation.png").read_bytes().startswith(b"\x89PNG")
    lm = generate_script.load(run)
    task = generate_script.load_run(run).task
    start, _ = task.bounds("test")
    tokens = np.asarray(task.data[start - 1 : start + 96])
    want = stream_losses(lm, tokens, 16, batch_size=2, chunk=16)
    np.testing.assert_allclose(totals[0]["loss"], want.mean(dtype=np.float64), rtol=1e-6)
    positions = [row for row in rows if row.get("by") == "position" and not row["carried"]]
    np.testing.assert_allclose(sum(row["loss"] * row["tokens"] for row in positions) / 96, totals[1]["loss"], rtol=1e-6)
    refused([f"--workdir={run}", "--by=document", *short], "one running text", capsys)


def test_other_data_by_the_runs_tokenizer(run, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("And God said, Let there be light: and there was light.\n" * 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLSTM_JAX_CACHE", str(tmp_path / "cache"))
        assert script.main([f"--workdir={run}", f"--data=file:{tmp_path / 'other.txt'}", "--by=position"]) == 0
    shown = capsys.readouterr().out
    assert "tiny; context 16; " in shown and "position 12-15" in shown


def refused(arguments, message, capsys):
    assert script.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--workdir (one run or several) or --checkpoint (published weights) is required"),
        (["--workdir=a", "--checkpoint=b"], "is required, one of them"),
        (["--workdir=a", "--tokenizer=bytes"], "a run has its own"),
        (["--workdir=x/a", "--workdir=y/a"], "must have different names"),
        (["--checkpoint=b"], "--checkpoint needs --data"),
        (["--workdir=a", "--split=tset"], "unknown split 'tset'"),
        (["--workdir=a", "--by=positon"], "unknown --by 'positon'; nearest: position"),
        (["--workdir=a", "--contexts=256,x"], "--contexts=256,x: integers of at least 1"),
        (["--workdir=a", "--chunk=0"], "--chunk=0: at least 1"),
        (["--workdir=a", "--figure=a.jpg"], "a .png file"),
        (["--workdir=a", "--figure=a.png", "--by=document"], "--by=document has no figure"),
        (["--workdir=/absent"], "no such folder"),
    ],
)
def test_wrong_options(arguments, message, capsys):
    refused(arguments, message, capsys)
