"""Bidirectional and Stack; the contract itself is checked in test_contract.py."""

import contextlib
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xlstm_jax import cells
from xlstm_jax.cells import wrappers

XS = jax.random.normal(jax.random.key(0), (3, 7, 4))


def pair(merge="concat", **options):
    forward, backward = (cells.GRU(4, 5, rngs=nnx.Rngs(seed), **options) for seed in range(2))
    return cells.Bidirectional(forward, backward, merge=merge)


@pytest.mark.parametrize("merge", ["concat", "sum", "mean", "product"])
def test_merges(merge):
    cell = pair(merge)
    a, b, got = jax.jit(lambda xs: (cell.forward(xs)[0], cell.backward(xs[:, ::-1])[0][:, ::-1], cell(xs)[0]))(XS)
    a, b = np.asarray(a), np.asarray(b)
    want = {"concat": np.concatenate([a, b], -1), "sum": a + b, "mean": (a + b) / 2, "product": a * b}[merge]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_each_sequence_is_read_backwards_as_if_alone():
    """Any mask and packed sequences: each equals a run of its own, both ways."""
    keys = jax.random.split(jax.random.key(1))
    mask, reset = jax.random.bernoulli(keys[0], 0.6, (3, 7)), jax.random.bernoulli(keys[1], 0.3, (3, 7))
    mask, xs = mask.at[2].set(False), np.asarray(XS)
    cell = pair()
    ys = np.asarray(jax.jit(lambda mask, reset: cell(XS, mask=mask, reset=reset)[0])(mask, reset))
    alone = jax.jit(lambda xs: cell(xs)[0][0])
    assert np.all(ys[~np.asarray(mask)] == 0)
    segment = np.cumsum(reset, axis=1)
    for row in range(3):
        for s in np.unique(segment[row]):
            own = np.asarray(mask[row]) & (segment[row] == s)
            if own.any():
                np.testing.assert_allclose(ys[row][own], alone(jnp.asarray(xs[row][own][None])), rtol=1e-5, atol=1e-6)


def test_states_enter_and_leave_at_both_ends():
    cell = pair()
    state = jax.tree.map(lambda a: a + 0.5, cell.initial_state(3))

    @jax.jit
    def lasts(xs, state):
        backward, forward = cell.backward(xs[:, ::-1], state.backward), cell.forward(xs, state.forward)
        return cell(xs, state)[1], backward[1].h, forward[1].h

    last, backward, forward = lasts(XS, state)
    np.testing.assert_allclose(last.backward.h, backward, rtol=1e-6)
    np.testing.assert_allclose(last.forward.h, forward, rtol=1e-6)


def test_a_pattern_changes_nothing_but_the_storage():
    def layers():
        return [cells.GRU(4, 4, rngs=nnx.Rngs(seed)) for seed in range(3)]

    plain, scanned = cells.Stack(layers(), residual=True), cells.Stack(layers(), residual=True, pattern=["gru"] * 3)
    assert scanned.repeats == 3
    (ys, state), (zs, stacked) = jax.jit(lambda xs: (plain(xs), scanned(xs)))(XS)
    np.testing.assert_allclose(zs, ys, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stacked[0].h, np.stack([s.h for s in state]), rtol=1e-5, atol=1e-6)


def test_layers_are_compiled_one_by_one_on_one_cpu_device_alone(monkeypatch):
    layers = [cells.GRU(4, 4, rngs=nnx.Rngs(seed)) for seed in range(3)]
    graphdef, params = nnx.split(cells.Stack(layers, pattern=["gru"] * 3))

    def loss(params, xs):
        return (nnx.merge(graphdef, params)(xs)[0] ** 2).sum()

    def unrolled():
        program = jax.make_jaxpr(lambda *args: loss(*args))(params, XS)
        scans = [eqn.params for eqn in program.eqns if eqn.primitive.name == "scan"]
        return [scan["unroll"] for scan in scans if scan["length"] == 3]

    looped = jax.jit(jax.grad(loss))(params, XS)
    assert unrolled() == [1]  # the tests' 8 devices
    with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])):
        assert unrolled() == [3]
        same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(same, jax.jit(jax.grad(lambda *args: loss(*args)))(params, XS), looped)
        monkeypatch.setattr(wrappers, "UNROLLED", 2)
        assert unrolled() == [1]


def test_layers_apart_are_the_same_without_a_copy_and_on_one_cpu_device_alone():
    layers = [cells.GRU(16, 16, rngs=nnx.Rngs(seed)) for seed in range(3)]
    xs = jax.random.normal(jax.random.key(1), (3, 7, 16))
    stack = cells.Stack([cells.Stack(layers, pattern=["gru"] * 3), cells.GRU(16, 16, rngs=nnx.Rngs(3))])
    want, states = stack(xs)
    assert wrappers.layers_apart(stack) is stack  # the tests' 8 devices
    with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])):
        apart = wrappers.layers_apart(stack)
        ys, new = apart(xs)
        assert nnx.eval_shape(wrappers.layers_apart, stack).layers[0].repeats == 1
    assert (stack.layers[0].repeats, apart.layers[0].repeats, len(apart.layers[0].layers)) == (3, 1, 3)
    np.testing.assert_allclose(ys, want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(np.stack([state.h for state in new[0]]), states[0][0].h, rtol=1e-6, atol=1e-6)
    whole = jax.tree.leaves(nnx.state(stack.layers[0].layers))
    for n, layer in enumerate(apart.layers[0].layers):
        for part, stacked in zip(jax.tree.leaves(nnx.state(layer)), whole, strict=True):
            at = stacked.unsafe_buffer_pointer() + n * part.nbytes
            assert part.unsafe_buffer_pointer() == at or at % 64


@pytest.mark.parametrize("inner", [2, 3])
def test_stacks_in_stacks_are_taken_apart_from_the_outside(inner):
    def group(seed):
        layers = [cells.GRU(4, 4, rngs=nnx.Rngs(seed + n)) for n in range(inner)]
        return cells.Stack(layers, pattern=["gru"] * inner)

    stack = cells.Stack([group(0), group(10)], pattern=["stack"] * 2)
    want, _ = stack(XS)
    with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])):
        apart = wrappers.layers_apart(stack)
        ys, _ = apart(XS)
    assert [len(each.layers) for each in apart.layers] == [inner] * 2
    np.testing.assert_allclose(ys, want, rtol=1e-5, atol=1e-6)


@contextlib.contextmanager
def unchecked():
    """The calls as users have them, without the run-time annotations that pytest adds."""
    with pytest.MonkeyPatch.context() as patch:
        for cell in (cells.Bidirectional, cells.Stack):
            patch.setattr(cell, "__call__", inspect.unwrap(cell.__call__))
        yield


GRU = cells.GRU(4, 5, rngs=nnx.Rngs(0))
BAD = {
    "merge": (lambda: pair("add"), "unknown merge 'add'"),
    "state": (lambda: pair()(XS, GRU.initial_state(3)), "state must be a BidirectionalState, not a GRUState"),
    "widths": (
        lambda: cells.Bidirectional(GRU, cells.GRU(4, 6, rngs=nnx.Rngs(0)), merge="sum")(XS),
        r"merge='sum' needs outputs of one shape, not \(3, 7, 5\) and \(3, 7, 6\)",
    ),
    "no layers": (lambda: cells.Stack([]), "at least one layer"),
    "residual": (lambda: cells.Stack([GRU], residual=True)(XS), "residual=True needs layers of equal widths"),
    "layers' states": (lambda: cells.Stack([GRU])(XS, GRU.initial_state(3)._replace()), "state must be a tuple of 1"),
    "dropout": (lambda: cells.Stack([GRU], dropout=1.0), r"dropout is 1.0"),
    "unlike layers": (
        lambda: cells.Stack(
            [cells.Elman(4, 4, nonlinearity=n, rngs=nnx.Rngs(0)) for n in ("tanh", "relu")], pattern="ee"
        ),
        "layers of one kind must be built alike",
    ),
    "unlike widths": (
        lambda: cells.Stack([GRU, cells.GRU(5, 5, rngs=nnx.Rngs(0))], pattern="gg"),
        "layers of one kind must be built alike",
    ),
    "pattern": (lambda: cells.Stack([GRU], pattern=["a", "b"]), "pattern names 2 kinds for 1 layers"),
}


def test_what_contains_a_bidirectional_cell_has_no_step():
    stack = cells.Stack([pair()])
    assert not stack.has_step and cells.Stack([GRU]).has_step
    with pytest.raises(TypeError, match="this Stack needs the whole sequence and has no step"):
        stack.step(XS[:, 0], stack.initial_state(3))


def test_a_masked_reset_at_the_end_stops_the_backward_state():
    """As an unmasked one does: what enters after the last step belongs to the sequence that begins there."""
    mask, reset = jnp.asarray([[True, True, False]]), jnp.asarray([[False, False, True]])
    cell = pair()
    full = jax.tree.map(lambda a: a + 1, cell.initial_state(1))
    run = jax.jit(lambda state: cell(XS[:1, :3], state, mask, reset)[0][..., 5:])
    assert np.array_equal(run(full), run(cell.initial_state(1)))


def test_residual_layers_that_give_zero_pass_the_inputs_on_whatever_is_dropped():
    layers = [cells.GRU(4, 4, kernel_init="zeros", recurrent_init="zeros", rngs=nnx.Rngs(0)) for _ in range(3)]
    stack = cells.Stack(layers, residual=True, dropout=0.5)
    assert np.array_equal(jax.jit(lambda key: stack(XS, key=key)[0])(jax.random.key(0)), XS)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_says_what_is_wrong(case):
    call, message = BAD[case]
    with unchecked(), pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_bidirectional_cell_has_no_step():
    with pytest.raises(TypeError, match="has no step"):
        pair().step(XS[:, 0], pair().initial_state(3))
