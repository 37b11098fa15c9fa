"""Convolutional cells: sizes, peepholes, and what bad arguments say; values are in test_golden_cells.py."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xlstm_jax import cells
from xlstm_jax.cells import conv

SIZES = pytest.mark.parametrize(
    "space, options, want",
    [
        ((8,), dict(kernel_size=(3,)), (8,)),
        ((8, 7), dict(kernel_size=(3, 2), padding="valid"), (6, 6)),
        ((8, 7), dict(kernel_size=3, strides=2), (4, 4)),
        ((9, 7), dict(kernel_size=3, dilation=(2, 1), padding="valid"), (5, 5)),
        ((4, 5, 3), dict(kernel_size=2, rank=3, strides=(1, 2, 1)), (4, 3, 3)),
    ],
)


@SIZES
def test_the_state_has_the_size_of_the_convolved_inputs(space, options, want):
    cell = cells.ConvLSTM(2, 4, rngs=nnx.Rngs(0), **options)
    shapes = jax.eval_shape(lambda xs: cell(xs), jnp.zeros((1, 2, *space, 2)))
    assert shapes[0].shape == (1, 2, *want, 4)
    assert cell.initial_state(3, space).c.shape == (3, *want, 4) and shapes[1].c.shape == (1, *want, 4)


@SIZES
def test_the_gradient_by_taps_is_that_of_the_convolution(space, options, want):
    with jax.enable_x64(True):
        cell = cells.ConvLSTM(2, 1, rngs=nnx.Rngs(0), param_dtype=jnp.float64, **options)
        keys = jax.random.split(jax.random.key(0), 3)
        x, d_kernel = jax.random.normal(keys[0], (3, *space, 2)), jax.random.normal(keys[1], (*cell.W.shape[:-2], 4))
        kernel, ys = cell.W[...].reshape(d_kernel.shape), jax.random.normal(keys[2], (3, *want, 4))
        of_both = []
        for run in (conv._convolution, conv._convolution_on_cpu):
            apply = lambda x, kernel, run=run: run(x, kernel, x.dtype, cell.maps.window)  # noqa: E731
            of_both.append((jax.vjp(apply, x, kernel)[1](ys), jax.jvp(apply, (x, kernel), (-x, d_kernel))))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), *of_both)


def test_peepholes_are_one_weight_a_channel():
    """Random peepholes change the outputs, alike at every place of a constant image away from the border."""
    cell = cells.ConvLSTM(1, 2, (3,), peephole=True, rngs=nnx.Rngs(0))
    xs = jnp.ones((1, 3, 11, 1))
    before, _ = cell(xs)
    cell.peephole[...] = jnp.ones((3, 2))
    after, _ = cell(xs)
    assert not np.allclose(before, after)
    np.testing.assert_allclose(after[:, :, 4], after[:, :, 6], rtol=1e-5)


def test_peepholes_by_position_that_are_equal_are_those_by_channel():
    peepholes = (True, "position")
    channel, position = (cells.ConvLSTM(1, 2, 3, peephole=p, space=(4, 5), rngs=nnx.Rngs(0)) for p in peepholes)
    weights = jax.random.normal(jax.random.key(0), (3, 2))
    channel.peephole[...] = weights
    position.peephole[...] = jnp.broadcast_to(weights[:, None, None], (3, 4, 5, 2))
    xs = jax.random.normal(jax.random.key(1), (2, 3, 4, 5, 1))
    np.testing.assert_allclose(position(xs)[0], channel(xs)[0], rtol=1e-5, atol=1e-6)


IMAGES = jnp.ones((2, 3, 4, 5, 1))
CONV = dict(rngs=nnx.Rngs(0))
BAD = {
    "wide kernel": (
        lambda: call(cells.ConvLSTM(1, 2, (3, 6), padding="valid", **CONV), IMAGES),
        r"a kernel of extent 6 \(kernel_size=6, dilation=1\) is wider than the input's 5",
    ),
    "wide dilated kernel": (
        lambda: call(cells.ConvGRU(1, 2, 3, dilation=2, padding="valid", **CONV), IMAGES),
        r"a kernel of extent 5 \(kernel_size=3, dilation=2\) is wider than the input's 4",
    ),
    "axes": (
        lambda: call(cells.ConvLSTM(1, 2, (3,), **CONV), IMAGES),
        r"xs must have the shape \(B, T, space, 1\), not \(2, 3, 4, 5, 1\)",
    ),
    "channels": (lambda: call(cells.ConvLSTM(2, 2, 3, **CONV), IMAGES), r"\(B, T, 4, 5, 2\), not"),
    "padding": (lambda: cells.ConvLSTM(1, 2, 3, padding="full", **CONV), "padding must be 'same' or 'valid'"),
    "rank": (lambda: cells.ConvLSTM(1, 2, (3, 3, 3, 3), **CONV), "1 to 3 axes"),
    "strides": (lambda: cells.ConvLSTM(1, 2, 3, strides=(1, 2, 3), **CONV), r"strides is \(1, 2, 3\)"),
    "zero": (lambda: cells.ConvLSTM(1, 2, (3, 0), **CONV), "wanted is a positive integer"),
    "peephole": (lambda: cells.ConvLSTM(1, 2, 3, peephole="all", **CONV), "peephole must be False, True or"),
    "peephole by position": (
        lambda: cells.ConvLSTM(1, 2, 3, peephole="position", **CONV),
        "the size of the inputs is not known",
    ),
    "another size": (
        lambda: call(cells.ConvLSTM(1, 2, 3, peephole="position", space=(5, 4), **CONV), IMAGES),
        r"xs must have the shape \(B, T, 5, 4, 1\)",
    ),
    "heads": (lambda: cells.ConvLSTM(1, 2, 3, num_heads=2, **CONV), "neither heads"),
    "size": (lambda: cells.ConvLSTM(1, 2, 3, **CONV).initial_state(2), "the size of the inputs is not known"),
}


def call(cell, xs):
    """The call as users have it, without the run-time annotations that pytest adds."""
    return inspect.unwrap(type(cell).__call__)(cell, xs)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_says_what_is_wrong(case):
    build, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)
