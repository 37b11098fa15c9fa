"""The precision policies: what stays float32 under bfloat16, in the traced program; a bfloat16 run learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.jaxprs import equations
from tests.stand_in import Recall
from xlstm_jax import models, optim, precision, train

WIDE_ONLY = {"exp", "log", "log1p", "rsqrt", "sqrt", "cumsum", "reduce_max", "argmax"}  # gates, norms, softmax, loss


def lm(backbone, policy="bfloat16", **options):
    shared = dict(dim=16, num_layers=2, rngs=nnx.Rngs(0)) | precision.dtypes(policy)
    return models.LM(64, backbone=backbone, **shared | options)


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("xlstm[1:1]", dict(num_heads=2)),
        ("xlstm_large", dict(num_heads=2, logit_cap=30.0)),
        ("transformer", dict(num_heads=2, tie_weights=True)),
        ("lstm_block", {}),
    ],
)
def test_bfloat16_leaves_gates_norms_softmax_logits_and_loss_in_float32(backbone, options):
    model = nnx.eval_shape(lambda: lm(backbone, **options))
    graphdef, params = nnx.split(model)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    tokens = jax.ShapeDtypeStruct((2, 6), jnp.int32)

    def loss(params, tokens):
        logits, state = nnx.merge(graphdef, params)(tokens)
        nll, _ = train.token_scores(logits, tokens)
        return nll.mean(), (logits, state)

    traced, (value, (logits, state)) = jax.make_jaxpr(loss, return_shape=True)(params, tokens)
    assert value.dtype == logits.dtype == jnp.float32
    floating = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floating) == {np.dtype("float32")}
    found, products = set(), []
    for equation in equations(traced.jaxpr):
        kinds = {v.aval.dtype for v in equation.invars if hasattr(v.aval, "dtype")}
        if equation.primitive.name == "dot_general":
            products.append((kinds, equation.outvars[0].aval))
        elif equation.primitive.name in WIDE_ONLY:
            found.add(equation.primitive.name)
            assert np.dtype("bfloat16") not in {np.dtype(kind) for kind in kinds}, equation
    assert {"exp", "rsqrt"} <= found or {"exp", "sqrt"} <= found
    heads = [(kinds, out) for kinds, out in products if out.shape[-1] == 64]
    assert any(
        out.dtype == jnp.float32 and kinds == {np.dtype("bfloat16")} for kinds, out in heads
    )  # no rounded logits
    assert any(out.dtype == jnp.bfloat16 for _, out in products)  # and it does compute in bfloat16


def test_float32_policy_is_float32_throughout():
    graphdef, params = nnx.split(nnx.eval_shape(lambda: lm("xlstm[1:1]", "float32", num_heads=2)))
    traced = jax.make_jaxpr(lambda p, t: nnx.merge(graphdef, p)(t)[0])(params, jnp.zeros((1, 4), jnp.int32))
    assert "bf16" not in str(traced)


def test_a_bfloat16_run_learns():
    model = models.Tagger(
        4, 4, backbone="elman", dim=16, num_layers=1, rngs=nnx.Rngs(0), **precision.dtypes("bfloat16")
    )
    tx = optim.make(learning_rate=3e-2, steps=40)
    state = train.init_state(model, Recall(), tx, 8, seed=0)
    step = jax.jit(lambda s: train.train_step(s, graphdef=nnx.graphdef(model), task=Recall(), tx=tx, batch_size=8))
    losses = []
    for _ in range(40):
        state, row = step(state)
        losses.append(float(row.loss))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5]) and row.loss.dtype == jnp.float32


def test_an_unknown_precision_is_named():
    with pytest.raises(ValueError, match="unknown precision 'bfloat15'; nearest: bfloat16"):
        precision.dtypes("bfloat15")
