"""Initialisers, the engine's arguments, and what bad inputs say."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xlstm_jax import cells, models
from xlstm_jax.cells.lstm import LSTMRule, LSTMState
from xlstm_jax.kernels import mlstm_chunkwise
from xlstm_jax.kernels.mlstm import MLSTMState, initial_state, mlstm, usual_chunk
from xlstm_jax.kernels.recurrent import recurrent


def test_recurrent_matrix_is_orthogonal_gate_by_gate():
    R = cells.LSTM(3, 8, rngs=nnx.Rngs(0)).R[0]
    for gate in range(4):
        np.testing.assert_allclose(R[:, gate] @ R[:, gate].T, np.eye(8), atol=1e-5)


def test_the_usual_chunk_is_that_of_the_widths():
    widths = {(8, 8): 32, (64, 64): 64, (128, 128): 128, (256, 512): 256, (1024, 1024): 256}
    assert {key: usual_chunk(*key) for key in widths} == widths


def test_forget_biases():
    assert np.array_equal(
        cells.LSTM(3, 4, forget_bias=2.5, rngs=nnx.Rngs(0)).b[...], [[0] * 4, [2.5] * 4, [0] * 4, [0] * 4]
    )
    # values of the published initialiser
    bias = cells.SLSTM(3, 32, num_heads=2, forget_bias="powerlaw(1, 2)", rngs=nnx.Rngs(0)).b[1]
    np.testing.assert_allclose(bias[:3], [5.000, 4.842, 4.522], atol=1e-3)
    np.testing.assert_allclose(bias[15:18], [-7, 5.000, 4.842], atol=1e-3)
    np.testing.assert_allclose(cells.MLSTM(3, 8, rngs=nnx.Rngs(0)).f.bias[...], [3, 4, 5, 6])


@pytest.mark.parametrize("form, B", [("scan", 2), ("fused", 2), ("fused", 32)])  # 32: the rows last
def test_reverse_is_the_mirrored_sequence(x64, form, B):
    keys = jax.random.split(jax.random.key(0), 5)
    gates, R = jax.random.normal(keys[0], (B, 7, 4, 3)), jax.random.normal(keys[1], (1, 3, 4, 3))
    mask, reset = jax.random.bernoulli(keys[2], 0.7, (B, 7)), jax.random.bernoulli(keys[3], 0.3, (B, 7))
    state = LSTMState(*jax.random.normal(keys[4], (2, B, 3)))

    def loss(gates, R, reverse):
        flags = [mask, reset] if reverse else [mask[:, ::-1], reset[:, ::-1]]
        xs = gates if reverse else gates[:, ::-1]
        options = dict(form=form, chunk_size=3, mask=flags[0], reset=flags[1], reverse=reverse)
        ys, last = recurrent(LSTMRule(), xs, R, state, **options)
        ys = ys if reverse else ys[:, ::-1]
        return jnp.sum(ys * jnp.arange(7.0)[None, :, None]) + jnp.sum(last.c), ys

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    for got, want in zip(jax.tree.leaves(run(gates, R, True)), jax.tree.leaves(run(gates, R, False))):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("derivative", [False, True])
def test_one_chunk_from_the_empty_memory_is_compiled_right(derivative):
    """Of a shape that XLA's fusions for CPUs take whole: at most compilations they gave other numbers each time."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 16, 64, 4, 32))
    i, f = jax.random.normal(jax.random.key(1), (2, 16, 64, 4))

    def run(*inputs, form="chunkwise"):
        return mlstm(*inputs, form=form)[0]

    def pulled(*inputs, form="chunkwise"):
        return jax.vjp(partial(run, form=form), *inputs)[1](v)

    function = pulled if derivative else run
    expected = function(q, k, v, i, f, form="recurrent")
    for _ in range(4):
        program = jax.jit(lambda *inputs: function(*inputs)).lower(q, k, v, i, f).compile()
        for got, want in zip(jax.tree.leaves(program(q, k, v, i, f)), jax.tree.leaves(expected)):
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())


@pytest.mark.parametrize("options", [{}, dict(input_gate="sigmoid"), dict(input_gate="sigmoid", normalize=False)])
@pytest.mark.parametrize("numbers", [1, 64])
def test_groups_of_chunks_change_nothing(x64, monkeypatch, numbers, options):
    """However few of the memories and matrices of pairs are worked on at once, and whatever the definition."""
    monkeypatch.setattr(mlstm_chunkwise, "GROUP", numbers)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = jax.random.normal(keys[0], (3, 1, 17, 2, 3))
    i, f = jax.random.normal(keys[1], (2, 1, 17, 2))
    mask, reset = jax.random.bernoulli(keys[2], 0.8, (1, 17)), jax.random.bernoulli(keys[3], 0.2, (1, 17))

    def run(form):
        def outputs(*inputs):
            return mlstm(*inputs, form=form, chunk_size=2, mask=mask, reset=reset, **options)

        out, pull = jax.vjp(
            outputs, q, k, v, i, f, MLSTMState(*(jnp.ones(a) for a in ((1, 2, 3, 3), (1, 2, 3), (1, 2))))
        )
        return out, pull(jax.tree.map(jnp.cos, out))

    for got, want in zip(jax.tree.leaves(run("chunkwise")), jax.tree.leaves(run("recurrent"))):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", ["recurrent", "parallel", "chunkwise"])
@pytest.mark.parametrize("size", [15.0, 30.0, 1000.0])
def test_mlstm_with_extreme_gates_is_finite_and_a_reset_is_exact(form, size):
    """Nothing of the 13 steps and of the state before the reset is in what follows, in values and gradients."""
    keys = jax.random.split(jax.random.key(0), 6)
    q, k, v = (jax.random.normal(key, (1, 24, 2, 4)) for key in keys[:3])
    i, f = (size * jnp.sign(jax.random.normal(key, (1, 24, 2))) for key in keys[3:5])
    reset = jax.random.bernoulli(keys[5], 0.2, (1, 24)).at[:, 13].set(True)

    def loss(state, *args):
        h, last = mlstm(*args, state, form=form, chunk_size=8, reset=reset)
        return jnp.sum(h[:, 13:]) + jnp.sum(last.C), (h[:, 13:], last)

    run = jax.jit(jax.value_and_grad(loss, argnums=range(6), has_aux=True))
    empty = initial_state(1, 2, 4, 4)
    (value, (h, last)), (d_state, *grads) = run(empty, q, k, v, i, f)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((value, d_state, grads)))
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(d_state))
    assert all(np.all(np.asarray(leaf[:, :13]) == 0) for leaf in grads)
    early = (q.at[:, :13].multiply(-1), k.at[:, :13].add(1), v, i.at[:, :13].multiply(-1), f)
    (_, (other, other_last)), _ = run(jax.tree.map(lambda leaf: leaf + size, empty), *early)
    assert np.array_equal(h, other) and all(np.array_equal(a, b) for a, b in zip(last, other_last))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "make, forms",
    [
        (lambda **form: cells.MLSTM(3, 4, num_heads=2, **form), ("recurrent", "parallel", "chunkwise")),
        (lambda **form: cells.MLSTM(3, 4, num_heads=2, input_gate="sigmoid", **form), ("chunkwise",)),
        (lambda **form: cells.MinGRU(3, 4, **form), ("scan", "associative", "log")),
        (lambda **form: cells.SLSTM(3, 4, **form), ("scan", "fused")),
    ],
    ids=["mlstm", "mlstm_sigmoid", "min_gru", "slstm"],
)
def test_a_reset_empties_a_state_that_is_no_number(make, forms, bad):
    """At step 0 nothing of it is seen, in values and all gradients; at step 5, in what comes from there on."""
    xs = jax.random.normal(jax.random.key(0), (1, 11, 3))
    made = [make(form=form, chunk_size=4, rngs=nnx.Rngs(0)) for form in forms]
    params, empty = nnx.state(made[0]), made[0].initial_state(1)
    spoilt = jax.tree.map(lambda leaf: jnp.full_like(leaf, bad), empty)

    def loss(params, xs, state, graphdef, start):
        ys, last = nnx.merge(graphdef, params)(xs, state, reset=(jnp.arange(11) == start)[None])
        return jnp.sum(jnp.sin(ys[:, start:])) + sum(map(jnp.sum, last)), (ys[:, start:], last)

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    run = jax.jit(lambda *args: [[gradient(*args, nnx.graphdef(cell), start) for cell in made] for start in (0, 5)])
    for start, got, want in zip((0, 5), run(params, xs, spoilt), run(params, xs, empty)):
        for (values, grads), (values_wanted, grads_wanted) in zip(got, want):
            late = [grads[1][:, start:], grads_wanted[1][:, start:]]
            grads, grads_wanted = (grads, grads_wanted) if start == 0 else late
            for a, b in zip(jax.tree.leaves((values, grads)), jax.tree.leaves((values_wanted, grads_wanted))):
                assert np.all(np.isfinite(a)) and np.array_equal(a, b)


XS = jnp.ones((2, 5, 3))
BAD_CALLS = {
    "a list": (dict(xs=[[[1.0]]]), "xs must be an array, not a list"),
    "a mask that is a list": (dict(mask=[[True]]), "mask must be an array, not a list"),
    "integers": (dict(xs=jnp.ones((2, 5, 3), int)), "xs must be floating, not int"),
    "an integer mask": (dict(mask=jnp.ones((2, 5), int)), "mask must be bool"),
    "a state in low precision": (
        dict(state=jax.tree.map(lambda a: a.astype(jnp.bfloat16), cells.LSTM(3, 4, rngs=nnx.Rngs(0)).initial_state(2))),
        r"state.c must be float32 of the shape \(2, 4\) for these inputs, not bfloat16",
    ),
    "width": (dict(xs=jnp.ones((2, 5, 4))), r"xs must have the shape \(B, T, 3\), not \(2, 5, 4\)"),
    "no time": (dict(xs=jnp.ones((2, 0, 3))), "T = 0"),
    "mask shape": (dict(mask=jnp.ones((2, 4), bool)), r"mask must be bool of the shape \(2, 5\)"),
    "reset type": (dict(reset=jnp.ones((2, 5), bool).astype(jnp.float32)), "reset must be bool"),
    "state of another cell": (
        dict(state=cells.GRU(3, 4, rngs=nnx.Rngs(0)).initial_state(2)),
        "LSTMState, not a GRUState",
    ),
    "state of another batch": (
        dict(state=cells.LSTM(3, 4, rngs=nnx.Rngs(0)).initial_state(3)),
        r"state.c must be float32 of the shape \(2, 4\) for these inputs, not float32 \(3, 4\)",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_says_what_is_wrong(case):
    arguments, message = BAD_CALLS[case]
    call = unchecked(cells.LSTM(3, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=message) as error:
        call(**{"xs": XS} | arguments)
    assert "\n" not in str(error.value)


def unchecked(cell):
    """The call as users have it, without the run-time annotations that pytest adds."""
    import inspect

    function = inspect.unwrap(type(cell).__call__)
    return lambda xs, **options: function(cell, xs, **options)


BAD_CONSTRUCTIONS = {
    "heads": (lambda: cells.SLSTM(3, 6, num_heads=4, rngs=nnx.Rngs(0)), "num_heads=4 must divide features=6"),
    "matrix heads": (lambda: cells.MLSTM(3, 6, num_heads=4, rngs=nnx.Rngs(0)), "num_heads=4 must divide features=6"),
    "initialiser": (lambda: cells.LSTM(3, 4, recurrent_init="ortho", rngs=nnx.Rngs(0)), "unknown initialiser 'ortho'"),
    "form": (lambda: cells.LSTM(3, 4, form="fast", rngs=nnx.Rngs(0)), "unknown form of LSTM 'fast'"),
    "chunk": (lambda: cells.LSTM(3, 4, chunk_size=0, rngs=nnx.Rngs(0)), "chunk_size is 0: an integer of at least 1"),
    "matrix form": (lambda: cells.MLSTM(3, 4, form="fused", rngs=nnx.Rngs(0)), "unknown form of MLSTM 'fused'"),
    "width": (lambda: cells.MLSTM(0, 4, rngs=nnx.Rngs(0)), "in_features is 0"),
    "sLSTM's option": (
        lambda: models.LM(5, backbone="xlstm[1:0]", dim=16, num_layers=1, recurrent_init="zeros", rngs=nnx.Rngs(0)),
        "recurrent_init: for sLSTM blocks",
    ),
    "gate": (lambda: cells.MLSTM(3, 4, input_gate="relu", rngs=nnx.Rngs(0)), "input_gate must be"),
    "no normaliser": (lambda: cells.MLSTM(3, 4, normalize=False, rngs=nnx.Rngs(0)), "needs input_gate='sigmoid'"),
}


@pytest.mark.parametrize("case", BAD_CONSTRUCTIONS)
def test_a_bad_argument_says_what_is_wrong(case):
    build, message = BAD_CONSTRUCTIONS[case]
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)
