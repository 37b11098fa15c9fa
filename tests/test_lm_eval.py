"""The harness's three kinds of request against the model's own probabilities; its package where it is installed."""

import functools
import types
from importlib.util import find_spec

import jax
import numpy as np
import pytest
from flax import nnx

from xlstm_jax import models
from xlstm_jax.data import tokenizers
from xlstm_jax.generate import GREEDY, generate
from xlstm_jax.lm_eval import Adapter, harness_model

CODER = tokenizers.Characters("abc \n")


@functools.cache
def adapter():
    lm = models.LM(CODER.vocab_size, backbone="lstm", dim=8, num_layers=1, rngs=nnx.Rngs(0))
    return Adapter(lm, CODER, batch_size=3, chunk=8, max_gen_toks=5)


def asked(*args):
    return types.SimpleNamespace(args=args)


@functools.cache
def apply():
    graphdef, params = nnx.split(adapter().model)
    return jax.jit(lambda tokens: nnx.merge(graphdef, params)(tokens)[0][0])


def log_p(text):
    """log p of each character but the first."""
    tokens = CODER.encode(text)
    whole = np.zeros((1, 32), np.int32)
    whole[0, : len(tokens)] = tokens
    logits = np.asarray(apply()(whole)[: len(tokens) - 1], np.float64)
    scores = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return scores[np.arange(len(scores)), tokens[1:]]


def test_log_likelihoods():
    likeliest = CODER.decode(generate(adapter().model, [CODER.encode("ab")], 2, sampling=GREEDY)[0])
    pairs = [("ab", "c"), ("a b c ", "ab\n"), ("", "cab"), ("ab", likeliest)]
    got = adapter().loglikelihood([asked(*pair) for pair in pairs])
    np.testing.assert_allclose(got[0][0], log_p("abc")[1], atol=1e-4)
    np.testing.assert_allclose(got[1][0], log_p("a b c ab\n")[4:].sum(), atol=1e-4)  # the space between is scored
    np.testing.assert_allclose(got[2][0], log_p("\ncab").sum(), atol=1e-4)
    assert got[3][1] and all(type(value) is float and type(greedy) is bool for value, greedy in got)
    texts = ["abc cab", "a", "ab " * 9]
    rolled = adapter().loglikelihood_rolling([asked(text) for text in texts])
    np.testing.assert_allclose(rolled, [log_p("\n" + text).sum() for text in texts], atol=1e-4)


def test_texts_are_generated():
    free, cut, drawn, again, short = adapter().generate_until(
        [
            asked("ab", {"until": []}),
            asked("ab", {"until": ["zz"], "max_gen_toks": 3}),
            asked("ab", {"do_sample": True, "temperature": 3.0, "top_k": 4, "max_gen_toks": 9}),
            asked("ab", {"until": "", "temperature": 0.0, "do_sample": False}),
            asked("ab", {"max_gen_toks": 3, "until": ["zz"]}),
        ]
    )
    want = CODER.decode(generate(adapter().model, [CODER.encode("ab")], 5, sampling=GREEDY)[0])
    assert free == again == want and cut == short == want[:3] and len(drawn) == 9
    (ended,) = adapter().generate_until([asked("ab", {"until": [want[2]]})])
    assert ended == want[: want.index(want[2])]
    with pytest.raises(ValueError, match="unknown generation argument 'temprature'; nearest: temperature"):
        adapter().generate_until([asked("ab", {"temprature": 1.0})])


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_without_the_harness_it_is_said_how_to_get_it():
    with pytest.raises(ValueError, match="lm-evaluation-harness is missing .*: pip install lm_eval"):
        harness_model(adapter().model, CODER)


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed: pip install -e '.[eval]'")
def test_the_harness_knows_the_model():
    from lm_eval.api.model import LM
    from lm_eval.api.registry import get_model

    model = adapter()
    known = harness_model(model.model, CODER, max_gen_toks=5)
    assert isinstance(known, LM) and get_model("xlstm_jax") is type(known)
    assert known.loglikelihood([asked("ab", "c")]) == model.loglikelihood([asked("ab", "c")])
