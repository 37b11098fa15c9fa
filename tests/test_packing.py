"""Packing: there and back, rows as the algorithms promise, a packed batch through a cell, and what is refused."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_jax import cells
from xlstm_jax.data.packing import ALGORITHMS, best_fit, first_fit, pack, reset_from_segments, unpack


def ragged(lengths, shape=(), dtype=np.int32):
    """Sequences of the given lengths; no two steps are equal and none is 0."""
    ends = np.cumsum(lengths)
    return [
        np.arange(1 + (end - n) * size, 1 + end * size).reshape(n, *shape).astype(dtype)
        for size in [int(np.prod(shape))]
        for n, end in zip(lengths, ends)
    ]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=30),
    st.integers(9, 20),
    st.sampled_from(sorted(ALGORITHMS)),
    st.sampled_from([(), (2,), (2, 3)]),
)
def test_there_and_back(lengths, length, algorithm, shape):
    sequences = ragged(lengths, shape)
    packed = pack(sequences, length, algorithm=algorithm)
    assert packed.tokens.shape == (*packed.mask.shape, *shape) and packed.tokens.dtype == np.int32
    back = unpack(packed.tokens, packed)
    assert len(back) == len(sequences) and all(np.array_equal(a, b) for a, b in zip(back, sequences))
    assert packed.mask.sum() == sum(lengths) and packed.reset.sum() == np.count_nonzero(lengths)
    assert not packed.tokens[~packed.mask].any() and not packed.positions[~packed.mask].any()
    for mask, segments, positions, reset in zip(packed.mask, packed.segment_ids, packed.positions, packed.reset):
        count = mask.sum()
        assert mask[:count].all() and not reset[count:].any()  # padding is at the end
        assert np.array_equal(segments[:count], np.cumsum(reset[:count])) and reset[0]
        assert np.array_equal(reset[:count], positions[:count] == 0)
        assert (np.diff(positions[:count])[~reset[1:count]] == 1).all()
    assert np.array_equal(reset_from_segments(packed.segment_ids), packed.reset)
    if len(packed.mask) > 1:  # a sequence opens a row only where no other has room, so any two rows overfill one
        assert np.sort(packed.mask.sum(1))[:2].sum() > length


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=40), st.integers(12, 30))
def test_the_algorithms_choose_the_rows_that_a_search_of_all_rows_finds(lengths, length):
    def search(best):
        room, rows = [], []
        for need in lengths:
            fitting = [row for row, left in enumerate(room) if left >= need]
            if not fitting:
                room.append(length)
            row = min(fitting, key=best(room), default=len(room) - 1)
            room[row] -= need
            rows.append(row)
        return rows

    assert first_fit(lengths, length) == search(lambda room: lambda row: row)
    assert best_fit(lengths, length) == search(lambda room: lambda row: (room[row], row))


@pytest.mark.parametrize(
    "algorithm,tokens",
    [
        ("first_fit", [[1, 1, 1, 3, 3, 9], [2, 2, 2, 2, 9, 9], [4, 4, 4, 9, 9, 9]]),
        ("best_fit", [[1, 1, 1, 4, 4, 4], [2, 2, 2, 2, 3, 3]]),
    ],
)
def test_worked_example(algorithm, tokens):
    packed = pack([[1] * 3, [2] * 4, [3] * 2, [], [4] * 3], 6, algorithm=algorithm, pad=9)
    assert packed.tokens.tolist() == tokens
    assert packed.places[-2:].tolist() == ([[0, 0], [12, 3]] if algorithm == "first_fit" else [[0, 0], [3, 3]])


def test_sequences_of_length_0_and_dtypes():
    packed = pack([np.zeros((0, 3), np.float32)] * 2, 4)
    assert packed.tokens.shape == (0, 4, 3)
    assert [a.shape for a in unpack(np.zeros((0, 4, 5)), packed)] == [(0, 5)] * 2
    assert pack([[], []], 4).tokens.shape == (0, 4)
    packed = pack([[], np.ones(2, np.uint8), jnp.arange(3, dtype=jnp.uint8)], 4, pad=255)
    assert packed.tokens.dtype == np.uint8 and packed.tokens.tolist() == [[1, 1, 255, 255], [0, 1, 2, 255]]
    halves = pack([jnp.ones((2, 3), jnp.bfloat16)], 4).tokens
    assert halves.dtype == jnp.bfloat16 and halves[0, :, 0].tolist() == [1, 1, 0, 0]


def test_segment_ids_made_elsewhere():
    ids = jnp.array([[3, 3, 5, 5, 0], [0, 0, 0, 0, 0], [1, 2, 3, 4, 4]])
    assert reset_from_segments(ids).astype(int).tolist() == [[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]]


def test_a_packed_batch_equals_each_sequence_alone(x64):
    """Outputs and the gradients of all parameters, through a GRU."""
    rng = np.random.default_rng(0)
    cell = cells.GRU(3, 4, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    sequences = [rng.normal(size=(n, 3)) for n in (4, 2, 4, 2, 4)]
    weights = [rng.normal(size=(len(s), 4)) for s in sequences]
    packed, packed_weights = (pack(a, 9, algorithm="best_fit") for a in (sequences, weights))
    assert packed.segment_ids.max() == 3 and not packed.mask.all()
    graphdef, params = nnx.split(cell)

    @jax.jit
    def run(params, xs, weights, mask, reset):
        def loss(params):
            ys, _ = nnx.merge(graphdef, params)(xs, mask=mask, reset=reset)
            return jnp.sum(ys * weights), ys

        (_, ys), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return ys, grads

    ys, grads = run(params, packed.tokens, packed_weights.tokens, packed.mask, packed.reset)
    alone = [run(params, xs[None], w[None], None, None) for xs, w in zip(sequences, weights)]
    for got, (want, _) in zip(unpack(ys, packed), alone):
        np.testing.assert_allclose(got, want[0], rtol=0, atol=1e-12)
    total = jax.tree.map(lambda *leaves: sum(leaves), *(g for _, g in alone))
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=0, atol=1e-12), grads, total)


@pytest.mark.parametrize(
    "sequences,options,message",
    [
        ([[1, 2, 3]], {"length": 0}, "length must be an integer of at least 1, not 0"),
        ([[1], [1, 2, 3]], {"length": 2}, "sequence 1 has 3 steps, more than length=2"),
        ([[1]], {"algorithm": "worst_fit"}, "unknown packing algorithm 'worst_fit'; nearest: first_fit, best_fit"),
        ([], {}, "there is no sequence to pack"),
        ([[1, 2], 3], {}, "sequence 1 is a single number"),
        ([np.ones(2, np.int32), np.ones(2, np.int8)], {}, r"sequence 1 is int8 \(T,\), the first one int32 \(T,\)"),
        ([np.ones((1, 2)), np.ones((1, 3))], {}, r"sequence 1 is float64 \(T, 3\), the first one float64 \(T, 2\)"),
        ([[1]], {"length": 2.0}, "length must be an integer of at least 1, not 2.0"),
        ([[1]], {"pad": "a"}, "pad='a' is no number"),
        ([[1], [[1, 2], [3]]], {}, "sequence 1 is ragged"),
        (3, {}, "sequences is a int"),
        ("abc", {}, "sequences is a str"),
        (["abc"], {}, "sequence 0 is 'abc': numbers are needed"),
        ([[1], None], {}, "sequence 1 is None: numbers"),
        ([["a"]], {}, "sequence 0 is <U1: numbers"),
        ([np.ones(2, np.uint8)], {"pad": -1}, "pad=-1 is no uint8"),
        ([np.ones(2, np.int32)], {"pad": 0.5}, "pad=0.5 is no int32"),
    ],
)
def test_what_cannot_be_packed_is_one_clear_line(sequences, options, message):
    with pytest.raises(ValueError, match=message) as error:
        inspect.unwrap(pack)(sequences, **({"length": 8} | options))
    assert "\n" not in str(error.value)


def test_outputs_of_another_batch():
    with pytest.raises(ValueError, match=r"outputs must begin with the packed shape \(1, 4\), not \(1, 5, 2\)"):
        unpack(np.zeros((1, 5, 2)), pack([[1, 2]], 4))


@pytest.mark.parametrize(
    "ids,message",
    [
        ([[1, 1, 0], [1, -1, 0]], "row 1, position 1: -1 is negative"),
        ([[1, 1, 1], [0, 0, 1]], r"row 1, position 2: 1 follows padding \(0\)"),
        ([[1, 0, 2]], r"row 0, position 2: 2 follows padding \(0\)"),
        ([[1, 2, 1]], "row 0, position 2: 1 is less than the id before it"),
        ([1, 1, 2], r"must be integers \(B, T\), not int64 \(3,\)"),
        ([[1.0, 2.0]], r"must be integers \(B, T\), not float64 \(1, 2\)"),
    ],
)
def test_wrong_segment_ids_are_one_line_that_names_the_place(ids, message):
    with pytest.raises(ValueError, match=message):
        reset_from_segments(np.array(ids))
