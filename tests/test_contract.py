"""Every cell, form, block and model under the contract (tests/contract.py)."""

import pytest
from contract import Subject, check
from flax import nnx

from xlstm_jax import cells, models
from xlstm_jax.attention import Attention
from xlstm_jax.blocks import MLSTMLayer, SLSTMLayer

FORMS = {
    "scan": {"form": "scan"},
    "fused": {"form": "fused", "chunk_size": 5},
    "recurrent": {"form": "recurrent"},
    "parallel": {"form": "parallel"},
    "chunkwise": {"form": "chunkwise", "chunk_size": 5},
    "associative": {"form": "associative", "chunk_size": 5},
    "log": {"form": "log", "chunk_size": 5},
}
RECURRENT = (FORMS["scan"], {"form": "fused", "chunk_size": 4, "remat": True}, FORMS["fused"])
OPTIONS = {"projected_lstm": dict(projection=3), "conv_lstm": dict(kernel_size=3, space=(4, 3))}
OPTIONS["conv_gru"] = OPTIONS["conv_lstm"]


@pytest.mark.parametrize("name", cells.CELLS)
def test_cells(x64, name):
    def make(**options):
        return cells.CELLS[name](5, 8, rngs=nnx.Rngs(0), **OPTIONS.get(name, {}), **options)

    shape = (4, 3, 5) if name.startswith("conv") else (5,)
    check(Subject(make, shape, forms=tuple(FORMS[form] for form in cells.CELLS[name].forms)))


# What the cells' own tests do not reach: (cell, options)
VARIANTS = {
    "no gates, linear": (cells.LSTM, dict(input_gate=False, output_gate=False, input_activation=False)),
    "no forget gate, linear output": (cells.LSTM, dict(forget_gate=False, output_activation=False)),
    "full gate recurrence": (cells.LSTM, dict(gate_recurrence=True, peephole=True)),
    "coupled, projected, clipped": (
        cells.LSTM,
        dict(coupled=True, peephole=True, projection=4, num_heads=2, gate_clip=1.0, cell_clip=0.5),
    ),
    "reset before, heads": (cells.GRU, dict(reset_after=False, num_heads=2)),
    "zoneout, no bias": (cells.LSTM, dict(zoneout={"c": 0.3, "h": 0.1}, use_bias=False)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(x64, name):
    cell, options = VARIANTS[name]
    check(Subject(lambda **form: cell(5, 8, rngs=nnx.Rngs(0), **options, **form), (5,), forms=RECURRENT))


def test_strided_convolution(x64):
    def make(**options):
        size = dict(strides=2, padding="valid", space=(7,), peephole=True)
        return cells.ConvLSTM(3, 4, (3,), **size, rngs=nnx.Rngs(0), **options)

    check(Subject(make, (7, 3), forms=RECURRENT))


def test_bidirectional(x64):
    def make(**options):
        forward, backward = cells.LSTM(5, 4, num_heads=2, rngs=nnx.Rngs(0), **options), cells.MinGRU
        return cells.Bidirectional(forward, backward(5, 4, rngs=nnx.Rngs(1), **options), merge="product")

    check(Subject(make, (5,), causal=False))


def test_stack_of_bidirectional_cells(x64):
    def make(**options):
        pairs = [[cells.GRU(4, 2, rngs=nnx.Rngs(2 * n + k), **options) for k in range(2)] for n in range(2)]
        return cells.Stack([cells.Bidirectional(*pair) for pair in pairs], pattern=["pair", "pair"])

    check(Subject(make, (4,), causal=False))


@pytest.mark.parametrize("pattern", [None, ["gru", "lstm"] * 2])
def test_stack(x64, pattern):
    def make(**options):
        kinds = [cells.GRU, cells.LSTM] * (2 if pattern else 1)
        layers = [kind(5, 5, rngs=nnx.Rngs(seed), **options) for seed, kind in enumerate(kinds)]
        return cells.Stack(layers, residual=True, pattern=pattern)

    check(Subject(make, (5,)))


@pytest.mark.parametrize("layer", ["mlstm", "mlstm_no_conv", "slstm", "slstm_no_conv", "attention"])
def test_mixers(x64, layer):
    make = {
        "mlstm": lambda **options: MLSTMLayer(16, num_heads=2, rngs=nnx.Rngs(0), **options),
        "mlstm_no_conv": lambda **options: MLSTMLayer(
            16,
            num_heads=2,
            conv_width=0,
            use_bias=True,
            forget_gate_of="bias",
            form="recurrent",
            rngs=nnx.Rngs(0),
            **options,
        ),
        "slstm": lambda **options: SLSTMLayer(16, num_heads=2, rngs=nnx.Rngs(0), **options),
        "slstm_no_conv": lambda **options: SLSTMLayer(16, num_heads=2, conv_width=0, rngs=nnx.Rngs(0), **options),
        "attention": lambda **options: Attention(16, num_heads=2, context=7, rngs=nnx.Rngs(0), **options),
    }[layer]
    check(Subject(make, (16,)))


@pytest.mark.parametrize("backbone", ["lstm", "gru_block", "xlstm[1:1]", "transformer"])
def test_models(x64, backbone):
    def make(**options):
        return models.Tagger(7, 5, backbone=backbone, dim=16, num_layers=4, rngs=nnx.Rngs(0), **options)

    check(Subject(make, (16,), tokens=7))


def test_tied_language_model(x64):
    def make(**options):
        return models.LM(7, backbone="lstm", dim=16, num_layers=1, tie_weights=True, rngs=nnx.Rngs(0), **options)

    check(Subject(make, (16,), tokens=7))


@pytest.mark.parametrize("backbone", ["xlstm_large", "xlstm"])
def test_published_language_models(x64, backbone):
    options = {
        "xlstm_large": dict(use_bias=True, logit_cap=30.0, final_norm="rms_bias", num_heads=2),
        "xlstm": dict(slstm_at=(2,), tie_weights=True, use_bias=True, slstm_num_heads=2),
    }[backbone]

    def make(**form):
        return models.LM(7, backbone=backbone, dim=16, num_layers=3, rngs=nnx.Rngs(0), **options, **form)

    check(Subject(make, (16,), tokens=7))
