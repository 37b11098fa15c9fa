"""Sampling: prefill and steps agree with the whole sequence; what the command line refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import generate as script
from experiments import train as train_script
from tests.configs import tiny
from tests.stand_in import model
from xlstm_jax.generate import generate, sample

PROMPT = jnp.asarray([[0, 1, 2], [3, 3, 1]])


def test_greedy_equals_the_whole_sequence_call():
    tiny_model = model()
    tokens = generate(tiny_model, PROMPT, 6, jax.random.key(0), temperature=0.0)
    assert tokens.shape == (2, 6)
    whole = jnp.concatenate([PROMPT, tokens], axis=1)
    logits, _ = tiny_model(whole)
    np.testing.assert_array_equal(jnp.argmax(logits[:, 2:-1], axis=-1), tokens)


def test_same_key_same_text():
    first, again, other = (generate(model(), PROMPT, 16, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(np.asarray(first) != np.asarray(other))


def test_samples_follow_the_distribution():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    rows = jnp.broadcast_to(logits, (8000, 4))
    drawn = np.bincount(sample(rows, jax.random.key(0)), minlength=4) / 8000
    np.testing.assert_allclose(drawn, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    drawn = np.bincount(sample(rows, jax.random.key(0), top_k=2), minlength=4) / 8000
    np.testing.assert_allclose(drawn, [0.625, 0.375, 0, 0], atol=0.03)
    cold = np.bincount(sample(rows, jax.random.key(0), temperature=0.5), minlength=4) / 8000
    squares = np.asarray([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(cold, squares / squares.sum(), atol=0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": jnp.zeros((1, 0), int)}, "at least one token"),
        ({"length": 0}, "length is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 5}, "top_k is 5: there are 4 tokens"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        generate(model(), **({"prompt": PROMPT, "length": 2, "key": jax.random.key(0)} | change))


def test_a_trained_run_writes_text(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_script, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(script, "use_compilation_cache", lambda: None)
    plain = tiny.get_config("lm").to_dict() | {"steps": 2}
    monkeypatch.setattr(train_script.train, "evaluate_params", lambda *_: {"loss": 0.0})
    train_script.run(ConfigDict(plain), tmp_path / "run", progress=False)
    arguments = [f"--workdir={tmp_path / 'run'}", "--prompt=And ", "--length=12"]
    assert script.main(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("And ") and len(text) > 4
    assert script.main(arguments) == 0
    assert capsys.readouterr().out == text
    refused([*arguments[:1], "--prompt="], "the prompt is empty", capsys)


def refused(arguments, message, capsys):
    assert script.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_folders_without_a_language_model(tmp_path, capsys):
    refused([f"--workdir={tmp_path / 'absent'}"], "no such folder", capsys)
    refused([f"--workdir={tmp_path}"], "no config.json", capsys)
    refused([], "required: --workdir", capsys)
    refused([f"--workdir={tmp_path}", "--length=x"], "length", capsys)
    (tmp_path / "config.json").write_text(json.dumps({"config": tiny.get_config().to_dict()}))
    refused([f"--workdir={tmp_path}"], "holds a tagger", capsys)
    (tmp_path / "config.json").write_text(json.dumps({"config": tiny.get_config("lm").to_dict()}))
    refused([f"--workdir={tmp_path}"], "no checkpoint yet", capsys)
