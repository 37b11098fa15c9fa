"""Generation: prefill, steps, beams and filters agree with the whole sequence and with NumPy; what is refused."""

import functools
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import decode
from experiments import generate as script
from tests import run_folder
from tests.configs import tiny
from xlstm_jax import convert, generate, models
from xlstm_jax.data import tokenizers
from xlstm_jax.generate import GREEDY, PADDING, Sampling, beam_search, bucket, candidates, draw, penalised, stream
from xlstm_jax.text import settled

VOCAB = 7
PROMPTS = [[0, 1, 2, 5, 6, 3, 3, 1, 0], [4], [2, 2, 6, 1]]
BACKBONES = {
    "lstm": dict(backbone="lstm", dim=8, num_layers=2),
    "xlstm[1:0]": dict(backbone="xlstm[1:0]", dim=8, num_layers=1, num_heads=2),
    "transformer": dict(backbone="transformer", dim=8, num_layers=2, num_heads=2, context=6),
}


@functools.cache
def model(name="lstm"):
    """Weights enlarged, so that the likeliest token changes along a text."""
    lm = models.LM(VOCAB, **BACKBONES[name], rngs=nnx.Rngs(0))
    nnx.update(lm, jax.tree.map(lambda a: 2 * a, nnx.state(lm)))
    return lm


def one_device():
    """Where the layers of a stack are taken apart; the tests have eight devices."""
    auto = (jax.sharding.AxisType.Auto,)
    return jax.set_mesh(jax.make_mesh((1,), ("data",), auto, devices=jax.devices()[:1]))


@functools.cache
def apply(name):
    graphdef, params = nnx.split(model(name))
    return jax.jit(lambda tokens: nnx.merge(graphdef, params)(tokens)[0])


def scores(name, rows):
    """log p (V) of the next token after each prefix of each row, by one whole-sequence call."""
    whole = np.zeros((12, 20), np.int32)
    for n, row in enumerate(rows):
        whole[n, : len(row)] = np.maximum(row, 0)
    return np.asarray(jax.nn.log_softmax(apply(name)(whole), axis=-1), np.float64)


@pytest.mark.parametrize("name", ["xlstm[1:0]", "transformer"])
def test_ragged_prompts_and_beams_equal_the_whole_sequence_call(name):
    with one_device():
        apart = generate.generate(model(name), PROMPTS, 8, sampling=GREEDY)
    tokens = generate.generate(model(name), PROMPTS, 8, sampling=GREEDY)
    np.testing.assert_array_equal(tokens, apart)
    assert tokens.shape == (3, 8)
    rows = [[*prompt, *answer] for prompt, answer in zip(PROMPTS, tokens)]
    for prompt, answer, log_p in zip(PROMPTS, tokens, scores(name, rows)):
        np.testing.assert_array_equal(np.argmax(log_p, axis=1)[len(prompt) - 1 :][:8], answer)
    if name == "xlstm[1:0]":
        return
    found = beam_search(model(name), PROMPTS, 6, 3, length_penalty=0)
    assert found.tokens.shape == (3, 3, 6) and np.all(np.diff(found.scores, axis=1) <= 0)
    rows = [[*prompt, *beam] for prompt, beams in zip(PROMPTS, found.tokens) for beam in beams]
    log_p = scores(name, rows)
    for n, (row, want) in enumerate(zip(rows, found.scores.reshape(-1))):
        steps = range(len(row) - 6, len(row))
        assert np.isclose(sum(log_p[n, t - 1, row[t]] for t in steps), want, atol=1e-4)


def test_a_text_goes_on_as_before_wherever_it_is_cut(monkeypatch):
    """Blocks and pieces of the prompt change nothing either."""
    key, sampling = jax.random.key(1), Sampling(temperature=1.5, repetition_penalty=1.2, top_k=6, top_p=0.95)
    want = generate.generate(model(), PROMPTS, 8, key, sampling)
    assert np.any(want != generate.generate(model(), PROMPTS, 8, jax.random.key(2), sampling))
    longer = [[*prompt, *answer[:3]] for prompt, answer in zip(PROMPTS, want)]
    np.testing.assert_array_equal(generate.generate(model(), longer, 5, key, sampling), want[:, 3:])
    monkeypatch.setattr(generate, "PIECE", 8)
    blocks = list(stream(model(), PROMPTS, 8, key, sampling, block=3))
    assert [block.shape for block in blocks] == [(3, 3), (3, 3), (3, 2)]
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), want)
    with one_device():
        np.testing.assert_array_equal(generate.generate(model(), PROMPTS, 8, key, sampling), want)


def test_a_prompts_length_needs_no_other_program():
    assert [bucket(n) for n in (1, 8, 9, 12, 13, 17, 25, 2048)] == [8, 8, 12, 12, 16, 24, 32, 2048]
    sizes = lambda: (generate._read._cache_size(), generate._write._cache_size())  # noqa: E731
    generate.generate(model(), [[1] * 9], 2, sampling=GREEDY)
    read, written = sizes()
    generate.generate(model(), [[1] * 12], 2, sampling=GREEDY)  # fills its bucket: without a mask
    assert sizes() == (read + 1, written)
    for length in (10, 12, 11, 9):
        generate.generate(model(), [[1] * length], 2, sampling=GREEDY)
    assert sizes() == (read + 1, written)


def test_rows_end_at_a_stop_token():
    free = generate.generate(model(), PROMPTS, 8, sampling=GREEDY)
    stop = {int(row[n]) for n, row in enumerate(free)}
    blocks = list(stream(model(), PROMPTS, 40, sampling=GREEDY, stop=tuple(stop), block=8))
    assert len(blocks) == 1
    for row, whole in zip(blocks[0], free):
        end = next(i for i, token in enumerate(whole) if token in stop) + 1
        np.testing.assert_array_equal(row[:end], whole[:end])
        assert np.all(row[end:] == PADDING)
    assert np.all(generate.generate(model(), PROMPTS, 40, sampling=GREEDY, stop=tuple(stop), block=8)[:, 8:] == PADDING)


def test_beams_are_the_best_of_all_continuations():
    """As many beams as tokens keep all beginnings: two tokens are searched through, with stops and a penalty."""
    name, power, stop = "transformer", 0.7, 2
    found = beam_search(model(name), PROMPTS[:1], 2, VOCAB, length_penalty=power, stop=(stop,))
    prompt = PROMPTS[0]
    log_p = scores(name, [[*prompt, token] for token in range(VOCAB)])[:, len(prompt) - 1 :]
    every = {(stop, PADDING): log_p[0, 0, stop]}
    for a, b in itertools.product(set(range(VOCAB)) - {stop}, range(VOCAB)):
        every[a, b] = (log_p[a, 0, a] + log_p[a, 1, b]) / 2**power
    best = sorted(every, key=every.get, reverse=True)[:VOCAB]
    assert [tuple(beam) for beam in found.tokens[0].tolist()] == best
    np.testing.assert_allclose(found.scores[0], [every[pair] for pair in best], atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 5, "top_p": 0.7, "min_p": 0.2}]
)
def test_candidates_equal_numpy(options):
    sampling = Sampling(temperature=0.7, **options)
    logits = np.random.default_rng(0).normal(size=(20, 9)).astype(np.float32)
    kept, tokens = candidates(jnp.asarray(logits), sampling)
    tokens = np.broadcast_to(np.arange(9), (20, 9)) if tokens is None else np.asarray(tokens)
    for row, own, got in zip(logits, tokens, np.asarray(kept)):
        order = np.argsort(-row)[: sampling.top_k or 9]
        p = np.exp(row[order] / 0.7) / np.exp(row[order] / 0.7).sum()
        inside = np.concatenate([[0], np.cumsum(p)[:-1]]) < sampling.top_p
        inside &= p >= sampling.min_p * p[0]
        assert set(own[np.isfinite(got)]) == set(order[inside])
        np.testing.assert_allclose(got[np.isfinite(got)], row[own[np.isfinite(got)]] / np.float32(0.7), rtol=1e-5)


def test_penalty_and_draws():
    logits = jnp.asarray([[2.0, -2.0, 1.0, 0.5]])
    seen = jnp.asarray([[True, True, False, False]])
    np.testing.assert_allclose(penalised(logits, seen, 4.0), [[0.5, -8.0, 1.0, 0.5]])
    rows = jnp.broadcast_to(jnp.log(jnp.asarray([0.05, 0.5, 0.15, 0.3])), (8000, 4))
    keys = jax.random.split(jax.random.key(0), 8000)
    for sampling, want in (
        (Sampling(), [0.05, 0.5, 0.15, 0.3]),
        (Sampling(top_k=2), [0, 0.625, 0, 0.375]),
        (Sampling(temperature=0.5), np.square([0.05, 0.5, 0.15, 0.3]) / 0.365),
    ):
        np.testing.assert_allclose(np.bincount(draw(rows, keys, sampling), minlength=4) / 8000, want, atol=0.03)


WRONG = [
    ({"prompts": np.zeros((1, 0), int)}, "prompt 0 is empty: at least one token"),
    ({"prompts": [[1], []]}, "prompt 1 is empty"),
    ({"prompts": []}, "at least one row"),
    ({"prompts": [1, 2]}, "rows of token ids"),
    ({"prompts": "ab"}, "rows of token ids"),
    ({"prompts": [[0.5]]}, "prompt 0 is float64"),
    ({"prompts": [[1, 7]]}, "prompt 0 has the token 7: the vocabulary is 0 to 6"),
    ({"prompts": [[-1]]}, "the token -1"),
    ({"length": 0}, "length is 0"),
    ({"block": 0}, "block is 0"),
    ({"stop": (9,)}, "stop has the token 9"),
    ({"stop": ("x",)}, "stop holds 'x'"),
    ({"num_tokens": 8}, "num_tokens is 8: an integer from 1 to 7"),
    ({"key": None}, "key is None"),
    ({"sampling": Sampling(top_k=8)}, "top_k is 8: there are 7 tokens"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_requests(change, message):
    with pytest.raises(ValueError, match=message):
        stream(model(), **({"prompts": PROMPTS, "length": 2, "key": jax.random.key(0)} | change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0}, "top_p is 0: a number above 0"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    ],
)
def test_wrong_sampling(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


@pytest.mark.parametrize(("beams", "message"), [(8, "beams is 8: an integer from 1 to 7"), (0, "beams is 0")])
def test_wrong_beams(beams, message):
    with pytest.raises(ValueError, match=message):
        beam_search(model(), PROMPTS, 2, beams)
    with pytest.raises(ValueError, match="length_penalty is inf"):
        beam_search(model(), PROMPTS, 2, 2, length_penalty=float("inf"))


# experiments.generate


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "use_compilation_cache", lambda: None)
    return run_folder.write(tmp_path / "run")


def answer(arguments, capsys):
    assert script.main(arguments) == 0
    return capsys.readouterr().out


def test_a_run_writes_text(run, tmp_path, capsys):
    folder, prompt = f"--workdir={run}", "--prompt=And "
    text = answer([folder, prompt, "--length=12"], capsys)
    assert text.startswith("And ") and len(text) > 4
    assert answer([folder, prompt, "--length=12", "--stream"], capsys) == text
    (tmp_path / "prompt.txt").write_bytes(b"And ")
    two = answer([folder, f"--prompt_file={tmp_path / 'prompt.txt'}", "--length=12", "--num=2"], capsys)
    first, second = two.removeprefix("--- 1 of 2\n").split("--- 2 of 2\n")
    assert first == text and second != text
    stop = text[7]
    newer = run / "checkpoints/2"
    shutil.copytree(newer.with_name("1"), newer)
    (newer / "manifest.json").unlink()  # the newest is damaged: the one before it is read
    script.load(run)
    warning = capsys.readouterr().err
    assert f"{newer} is damaged (manifest.json" in warning and "going on from the intact one of step 1" in warning
    shutil.rmtree(newer)
    assert answer([folder, prompt, "--length=12", f"--stop={stop}"], capsys) == text[: text.index(stop, 4)] + "\n"
    best = answer([folder, prompt, "--length=3", "--beams=2", "--num=2"], capsys)
    assert best.count("And ") == 2
    for arguments, message in ((["--prompt="], "the prompt is empty"), (["--tokenizer=bytes"], "a run has its own")):
        refused([folder, *arguments], message, capsys)


def refused(arguments, message, capsys):
    assert script.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_published_weights(tmp_path, capsys, monkeypatch):
    """With the tokenizer.json beside them or a named one; the vocabulary may be rounded up, not differ."""
    monkeypatch.setattr(script, "use_compilation_cache", lambda: None)
    large = dict(backbone="xlstm_large", dim=8, num_layers=1, num_heads=1, logit_cap=30.0)
    folder = tmp_path / "model"
    convert.save_pretrained(models.LM(320, **large, rngs=nnx.Rngs(0)), folder)
    at = f"--checkpoint={folder}"
    refused([at], "has no tokenizer.json beside its weights: give --tokenizer=bytes", capsys)
    refused([at, "--tokenizer=bytes"], "the model has 320 tokens, tokenizer 'bytes' 256", capsys)
    refused([at, "--tokenizer=bpe:300"], "--tokenizer=bpe:300 needs training text", capsys)
    pytest.importorskip("tokenizers")
    coder = tokenizers.train_bpe([b"in the beginning god created the heaven and the earth"], 280)
    (folder / "tokenizer.json").write_bytes(coder.content())
    assert answer([at, "--prompt=in the", "--length=6"], capsys).startswith("in the")
    refused([at, "--workdir=x"], "one of --workdir", capsys)


def test_characters_that_may_still_change_wait():
    assert settled("abc\N{REPLACEMENT CHARACTER}", ()) == "abc"
    assert settled("one\n", ("\n\n", "x")) == "one"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num=0"], "--num=0: at least 1"),
        (["--length=0"], "--length=0: at least 1"),
        (["--beams=0"], "--beams=0: at least 1"),
        (["--stop="], "--stop is empty"),
        (["--beams=2", "--top_k=3"], "--top_k is for drawing"),
        (["--beams=2", "--num=3"], "--num=3 is more than --beams=2"),
        (["--length_penalty=1"], "--length_penalty goes with --beams"),
        (["--stream", "--num=2"], "--stream shows one drawn text"),
        (["--prompt=a", "--prompt_file=b"], "--prompt and --prompt_file"),
        (["--top_p=2"], "top_p is 2.0"),
        (["--length=x"], "length"),
        ([], "one of --workdir (a run) and --checkpoint (published weights) is required"),
    ],
)
def test_wrong_options(arguments, message, capsys):
    refused(arguments, message, capsys)


def test_folders_without_a_language_model(tmp_path, capsys):
    refused([f"--workdir={tmp_path / 'absent'}"], "no such folder", capsys)
    refused([f"--workdir={tmp_path}"], "no config.json", capsys)
    (tmp_path / "config.json").write_text(json.dumps({"config": tiny.get_config().to_dict()}))
    refused([f"--workdir={tmp_path}"], "holds a tagger", capsys)
    (tmp_path / "config.json").write_text(json.dumps({"config": tiny.get_config("lm").to_dict()}))
    refused([f"--workdir={tmp_path}"], "no checkpoint yet", capsys)


# experiments.decode


def test_decoding_is_timed_and_the_transformers_cache_grows(tmp_path, capsys):
    sizes = ["--dim=8", "--num_layers=1", "--lengths=64,128", f"--out={tmp_path}"]
    assert decode.main(["--backbone=lstm,transformer", *sizes]) == 0
    rows = [json.loads(line) for line in (tmp_path / "decode.jsonl").read_text().splitlines()]
    assert [(row["backbone"], row["length"]) for row in rows] == [
        ("lstm", 64),
        ("lstm", 128),
        ("transformer", 64),
        ("transformer", 128),
    ]
    lstm, _, short, long = (row["state_bytes"] for row in rows)
    assert lstm == 2 * 8 * 4 and long - short == 64 * (2 * 8 + 1) * 4
    lstm, same, less, more = (row["program_bytes"] for row in rows)
    assert lstm == same and more - less >= long - short and all(row["bytes_in_use"] > 0 for row in rows)
    assert all(row["milliseconds"] > 0 for row in rows) and rows[0]["ratio"] == rows[2]["ratio"] == 1
    assert "| transformer, state, KiB |" in (tmp_path / "decode.md").read_text() and (tmp_path / "decode.png").exists()
    for argument, message in (("--lengths=16", "at least 64 tokens"), ("--backbone=lsmt", "unknown backbone 'lsmt'")):
        capsys.readouterr()
        assert decode.main([argument, f"--out={tmp_path}"]) == 2
        assert message in capsys.readouterr().err
