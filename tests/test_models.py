"""Models: pooling, layouts of a stack, names, and what bad inputs say (the contract is in test_contract.py)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xlstm_jax import models
from xlstm_jax.blocks import MLSTMLayer
from xlstm_jax.cells.wrappers import smallest_period
from xlstm_jax.regularizers import dropout


def build(kind=models.Tagger, backbone="lstm", **options):
    options = dict(dim=8, num_layers=2) | options
    return kind(5, 3, backbone=backbone, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_a_classifier_reads_valid_steps_only(pool):
    model = build(models.Classifier, pool=pool)
    tokens = jax.random.randint(jax.random.key(0), (3, 6), 0, 5)
    mask = jnp.arange(6)[None] < jnp.array([6, 4, 1])[:, None]
    run = jax.jit(lambda tokens, mask: model(tokens, mask=mask)[0])
    logits, other = run(tokens, mask), run(jnp.where(mask, tokens, 0), mask)
    alone = jax.jit(lambda: jnp.concatenate([model(tokens[b : b + 1, :n])[0] for b, n in enumerate((6, 4, 1))]))()
    np.testing.assert_array_equal(logits, other)
    np.testing.assert_allclose(logits, alone, atol=1e-6)


def test_repeating_blocks_are_stored_stacked():
    assert [smallest_period(tuple(p)) for p in ("mmmm", "msms", "mms", "m")] == [1, 2, 3, 1]
    params = nnx.state(build(backbone="xlstm[1:1]", dim=16, num_layers=6))
    assert params["backbone"]["layers"][0]["mixer"]["skip"].shape == (3, 64)
    assert params["backbone"]["layers"][1]["mixer"]["cell"]["R"].shape == (3, 4, 4, 4, 4)


def test_runs_of_equal_blocks_are_stored_stacked():
    layers = build(backbone="xlstm", dim=16, num_layers=6, slstm_at=(2,), slstm_num_heads=2).backbone.layers
    assert [getattr(layer, "repeats", None) for layer in layers] == [2, None, 3]
    assert layers[2].layers[0].mixer.skip.shape == (3, 64)


def test_blocks_differ_by_their_place():
    bias = build(backbone="xlstm[0:1]", dim=32, num_layers=4).backbone.layers[0].mixer.cell.b[:, 1]
    assert len(np.unique(np.asarray(bias)[:, 1])) == 4  # the exponent of the forget bias grows with depth


def test_gates_left_out_begin_as_those_that_are_there_and_learn_no_more_than_they_may():
    """A gate starts from its bias alone, so each kind computes the same at first; what has no gradient is constant."""
    xs = jax.random.normal(jax.random.key(0), (2, 4, 16))

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(graphdef, params):
        def loss(params):
            ys, _ = nnx.merge(graphdef, params)(xs)
            return jnp.square(ys).sum(), ys

        return jax.grad(loss, has_aux=True)(params)

    found = {}
    for kind in ("inputs", "bias", "constant"):
        layer = MLSTMLayer(16, num_heads=2, form="parallel", forget_gate_of=kind, input_bias=0.0, rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(layer)
        shared = params if kind == "inputs" else {**shared, "f": params["f"]}  # draws differ where a gate draws less
        found[kind] = gradients(graphdef, nnx.State(shared))
    (of_inputs, ys), (of_bias, same), (of_none, too) = found.values()
    np.testing.assert_allclose(same, ys, rtol=1e-6)
    np.testing.assert_array_equal(same, too)
    np.testing.assert_allclose(of_bias["f"]["bias"][...], of_inputs["f"]["bias"][...], rtol=1e-5)
    assert np.abs(of_bias["f"]["bias"][...]).min() > 0 and not of_none["f"]["bias"][...].any()
    assert "kernel" in of_inputs["f"] and "kernel" not in of_bias["f"]


def test_dropout_needs_a_key():
    model = build(backbone="lstm_block", dropout=0.5)
    tokens = jnp.zeros((2, 4), int)
    plain, again, dropped = model(tokens)[0], model(tokens)[0], model(tokens, key=jax.random.key(0))[0]
    np.testing.assert_array_equal(plain, again)
    assert not np.allclose(plain, dropped)
    ones = dropout(jnp.ones(10_000), 0.25, jax.random.key(0))
    assert abs(float(ones.mean()) - 1) < 0.03 and set(np.unique(ones)) == {0.0, np.float32(1 / 0.75)}


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_dropout_drops_whole_tokens(tied):
    options = dict(backbone="lstm", dim=8, num_layers=1, tie_weights=tied)
    plain, model = (models.LM(50, embedding_dropout=rate, rngs=nnx.Rngs(0), **options) for rate in (0.0, 0.4))
    tokens = jnp.tile(jnp.arange(50), (2, 2))
    model.backbone = lambda xs, state, *_, key=None: (xs, state)
    keys = None, jax.random.key(1), jax.random.key(2)
    whole, one, two = (np.asarray(model.hidden(tokens, None, None, None, key=key)[0]) for key in keys)
    np.testing.assert_array_equal(whole, plain.embedding(tokens))
    scale = one[0, :50, 0] / whole[0, :50, 0]
    np.testing.assert_allclose(one, whole * np.tile(scale, 2)[None, :, None], rtol=1e-6)
    np.testing.assert_allclose(np.unique(scale.round(4)), [0, 1.6667])
    assert 10 <= (scale == 0).sum() <= 30 and not np.array_equal(one, two)
    ys = jax.random.normal(jax.random.key(3), (2, 3, 8))
    np.testing.assert_array_equal(model.answers(ys, key=jax.random.key(1)), plain.answers(ys))


def test_inner_layers_may_be_wider():
    """AWD-LSTM's 24 million parameters on Penn Treebank (arXiv:1708.02182, table 1)."""
    options = dict(backbone="lstm", dim=400, inner_dim=1150, num_layers=3, tie_weights=True)
    params = nnx.state(nnx.eval_shape(lambda: models.LM(10_000, rngs=nnx.Rngs(0), **options)))
    assert round(sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6) == 24
    model = build(num_layers=4, inner_dim=12)
    assert [layer.mixer.W.shape for layer in model.backbone.layers] == [(8, 4, 12), *[(12, 4, 12)] * 2, (12, 4, 8)]
    assert model(jnp.zeros((2, 4), int))[0].shape == (2, 4, 3)


def test_first_layer_may_be_narrower():
    model = build(embedding_dim=3)
    assert model.backbone.layers[0].mixer.W.shape == (3, 4, 8) and model.backbone.layers[1].mixer.W.shape == (8, 4, 8)
    assert model(jnp.zeros((2, 4), int))[0].shape == (2, 4, 3)


BAD = {
    "name": (lambda: build(backbone="ltsm"), "unknown backbone 'ltsm'.*lstm"),
    "ratio": (lambda: build(backbone="xlstm[1:1]", num_layers=3), "num_layers=3 must be a multiple of the 2 blocks"),
    "empty ratio": (lambda: build(backbone="xlstm[0:0]"), r"xlstm\[0:0\] has no blocks"),
    "layers": (lambda: build(num_layers=0), "num_layers is 0: an integer of at least 1"),
    "heads": (lambda: build(backbone="xlstm[0:1]", num_heads=3), "num_heads=3 must divide features=8"),
    "attention heads": (lambda: build(backbone="transformer", num_heads=8), "heads of even width"),
    "embedding": (lambda: build(backbone="transformer", embedding_dim=4), "only bare cells take others"),
    "inner width": (lambda: build(backbone="lstm_block", inner_dim=4), "inner_dim=4 is for bare cells"),
    "inner width of nothing": (lambda: build(inner_dim=0), "inner_dim must be at least 1, not 0"),
    "embedding dropout": (lambda: build(embedding_dropout=1.0), r"embedding_dropout is 1.0: it must lie in \[0, 1\)"),
    "embedding dropout of numbers": (
        lambda: build(models.FeatureTagger, embedding_dropout=0.1),
        "embedding_dropout is for tokens",
    ),
    "places": (lambda: build(backbone="xlstm", slstm_at=(2,)), r"slstm_at=\(2,\) must be different places from 0 to 1"),
    "places twice": (lambda: build(backbone="xlstm", slstm_at=(1, 1)), "must be different places"),
    "places of a ratio": (lambda: build(backbone="xlstm[1:1]", slstm_at=(0,)), "slstm_at is for backbone='xlstm'"),
    "what a gate depends on": (
        lambda: build(backbone="xlstm[1:0]", input_gate_of="biases"),
        "unknown gate of 'biases'; nearest: bias",
    ),
    "option of other blocks": (
        lambda: build(backbone="xlstm[1:0]", slstm_conv_width=0),
        r"slstm_conv_width: for sLSTM blocks, of which xlstm\[1:0\] has none",
    ),
    "blocks of q, k, v": (
        lambda: build(backbone="xlstm[1:0]", qkv_block=3),
        "qkv_block=3 must divide the inner width 64",
    ),
    "activation": (lambda: build(backbone="xlstm[0:1]", ffn_activation="gelo"), "unknown activation 'gelo'.*gelu"),
    "large heads": (
        lambda: build(backbone="xlstm_large", num_heads=3),
        "num_heads=3 must divide the widths 4 of q and k, 8 of v",
    ),
    "large form": (lambda: build(backbone="xlstm_large", form="scan"), "unknown form of MLSTMLargeLayer 'scan'"),
    "final norm": (lambda: build(final_norm="rsm"), "unknown final_norm 'rsm'; nearest: rms"),
    "tied": (
        lambda: models.LM(5, backbone="lstm", dim=8, num_layers=1, embedding_dim=4, tie_weights=True, rngs=nnx.Rngs(0)),
        "tie_weights=True needs embedding_dim=4 to be dim=8",
    ),
    "pool": (lambda: build(models.Classifier, pool="max"), "pool must be 'last' or 'mean'"),
    "no time": (lambda: build()(jnp.zeros((2, 0), int)), "tokens has no time step"),
    "one axis": (
        lambda: build().hidden(jnp.zeros(2, int), None, None, None),
        r"tokens must have the shape \(B, T\), not \(2,\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_what_is_wrong(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "backbone, num_layers",
    [
        ("lstm", 1),
        ("lstm_block", 1),
        ("xlstm[1:0]", 1),
        ("xlstm[0:1]", 1),
        ("xlstm[3:1]", 4),
        ("xlstm_large", 4),
        ("transformer", 1),
    ],
)
def test_language_models_start_at_the_uniform_loss(backbone, num_layers, tied):
    model = models.LM(256, backbone=backbone, dim=128, num_layers=num_layers, tie_weights=tied, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 64)))

    @jax.jit
    def loss(tokens):
        log_p = jax.nn.log_softmax(model(tokens)[0][:, :-1])
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean()

    assert abs(float(loss(tokens)) / np.log(256) - 1) < 0.02
