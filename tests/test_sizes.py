"""Published sizes have the published numbers of parameters, without an array being made."""

import math

import jax
import pytest
from flax import nnx

from configs import scaling
from experiments import plan
from experiments.build import resolve
from xlstm_jax import models

TRAINING = {"dtype": "bfloat16", "layer_remat": "layer", "dropout": 0.0}
# millions, arXiv:2405.04517, table 3 (50,304 tokens)
PAPER = {
    "xlstm[1:0] 125M": 163.8,
    "xlstm[7:1] 125M": 163.7,
    "llama 125M": 162.2,
    "xlstm[1:0] 350M": 409.3,
    "xlstm[7:1] 350M": 408.4,
    "llama 350M": 406.6,
    "xlstm[1:0] 760M": 840.4,
    "xlstm[7:1] 760M": 839.7,
    "llama 760M": 834.1,
    "xlstm[1:0] 1.3B": 1422.6,
    "xlstm[7:1] 1.3B": 1420.1,
    "llama 1.3B": 1420.4,
}


def count(**arguments):
    model = nnx.eval_shape(lambda: models.LM(**arguments, rngs=nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model)))


def count_by_kind(num_layers, slstm_at=(), **arguments):
    """The same, from models of one and two blocks."""
    one, two = (count(num_layers=n, **arguments) for n in (1, 2))
    slstm = count(num_layers=1, slstm_at=(0,), **arguments) - one if slstm_at else 0
    return one + (num_layers - 1) * (two - one) + len(slstm_at) * slstm


def test_blocks_add_up():
    arguments = models.SIZES["xlstm[7:1] 125M"]
    assert count(**arguments) == count_by_kind(**arguments)


@pytest.mark.parametrize("name", PAPER)
def test_sizes_of_the_xlstm_paper(name):
    assert round(count_by_kind(**models.SIZES[name]) / 1e6, 1) == PAPER[name]


def test_ablation_without_convolution():
    """arXiv:2405.04517, table 2: 408.8 M parameters, and 409.3 M with it."""
    assert round(count_by_kind(**models.SIZES["xlstm[1:0] 350M"], conv_width=0) / 1e6, 1) == 408.8


def test_lstm_of_the_ablations():
    """arXiv:2405.04517, table 2: 607.8 M parameters, with a second bias a gate and layer, as in torch."""
    size = models.SIZES["lstm 608M"]
    second = size["num_layers"] * 4 * size["dim"]
    assert round((count_by_kind(**size) + second) / 1e6, 1) == 607.8


def test_xlstm_7b():
    """arXiv:2503.13427: 6,865,424,896 parameters."""
    assert count(**models.SIZES["xlstm_large 7B"]) == 6_865_424_896


@pytest.mark.parametrize("size", ["160M", "400M", "830M", "1.4B", "2.7B"])
def test_sizes_of_the_scaling_laws(size):
    """The paper gives widths and blocks; its names are round numbers."""
    named = float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]
    assert abs(count_by_kind(**models.SIZES[f"xlstm_large {size}"]) / named - 1) < 0.04


@pytest.mark.parametrize("size", models.SIZES)
def test_every_size_is_a_config(size):
    plain = resolve(scaling.get_config(scaling.spelled(size)))
    model = plain["model"]
    vocabulary = int(plain["task"]["tokenizer"].removeprefix("ids:"))
    published = {k: list(v) if k == "slstm_at" else v for k, v in models.SIZES[size].items()}
    assert {**model, "vocab_size": vocabulary} == published | TRAINING
    tokens = 2.3e12 if size == "xlstm_large 7B" else 3e11
    assert plain["batch_size"] * plain["steps"] * plain["task"]["seq_len"] == pytest.approx(tokens, rel=1e-4)


@pytest.mark.parametrize(
    "name, millions", [("xlstm[7:1]_125m", 163.7), ("xlstm_large_7b", 6865.4), ("llama_125m", 162.2)]
)
def test_a_config_makes_a_model_of_its_size(name, millions):
    params = plan.abstract(resolve(scaling.get_config(name))).state.params
    assert round(sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6, 1) == millions
