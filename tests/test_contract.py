"""Every cell, form, block and model under the contract (tests/contract.py)."""

import jax
import jax.numpy as jnp
import pytest
from contract import Subject, check
from flax import nnx

from xlstm_jax import cells, models
from xlstm_jax.attention import Attention
from xlstm_jax.blocks import MLSTMLayer, SLSTMLayer

RECURRENT = ({"form": "scan"}, {"form": "fused", "chunk_size": 4, "remat": True}, {"form": "fused", "chunk_size": 5})
MATRIX = tuple({"form": form, "chunk_size": 5} for form in ("recurrent", "parallel", "chunkwise"))


@pytest.mark.parametrize("name", cells.CELLS)
def test_cells(x64, name):
    def make(**options):
        return cells.CELLS[name](5, 8, rngs=nnx.Rngs(0), **options)

    check(Subject(make, 5, forms=MATRIX if name == "mlstm" else RECURRENT))


@pytest.mark.parametrize("layer", ["mlstm", "slstm", "slstm_no_conv", "attention"])
def test_mixers(x64, layer):
    make = {
        "mlstm": lambda **options: MLSTMLayer(16, num_heads=2, rngs=nnx.Rngs(0), **options),
        "slstm": lambda **options: SLSTMLayer(16, num_heads=2, rngs=nnx.Rngs(0), **options),
        "slstm_no_conv": lambda **options: SLSTMLayer(16, num_heads=2, conv_width=0, rngs=nnx.Rngs(0), **options),
        "attention": lambda **options: Attention(16, num_heads=2, context=7, rngs=nnx.Rngs(0), **options),
    }[layer]
    check(Subject(make, 16, forms=({},)))


@pytest.mark.parametrize(
    "backbone", ["lstm", "gru_block", "slstm", "xlstm[1:0]", "xlstm[0:1]", "xlstm[1:1]", "transformer"]
)
def test_models(x64, backbone):
    def make(**options):
        return models.Tagger(7, 5, backbone=backbone, dim=16, num_layers=4, rngs=nnx.Rngs(0), **options)

    check(Subject(make, 16, tokens=7))


def test_tied_language_model(x64):
    def make(**options):
        return models.LM(7, backbone="lstm", dim=16, num_layers=1, tie_weights=True, rngs=nnx.Rngs(0), **options)

    check(Subject(make, 16, tokens=7))


def test_language_model_starts_near_the_uniform_loss():
    tokens = jax.random.randint(jax.random.key(0), (4, 32), 0, 256)
    for tied in (False, True):
        model = models.LM(256, backbone="xlstm[1:1]", dim=64, num_layers=2, tie_weights=tied, rngs=nnx.Rngs(0))
        nll = -jnp.mean(
            jax.nn.log_softmax(model(tokens)[0][:, :-1])[jnp.arange(4)[:, None], jnp.arange(31)[None], tokens[:, 1:]]
        )
        assert abs(float(nll) - 5.545) < 0.3
