"""Tasks: every answer against a plain-Python evaluation, purity in (seed, step, row), coverage of the text."""

import functools
import math

import jax
import numpy as np
import pytest

from xlstm_jax import tasks
from xlstm_jax.tasks import SPLITS, Batch, check

FORMAL = ["parity", "even_pairs", "cycle_navigation", "modular_arithmetic"]  # the others: test_formal_tasks
SHORT = dict(train_lengths=(3, 12), eval_lengths=(12, 30), num_eval=20)


@functools.cache
def drawer(task, split, batch_size):
    return jax.jit(lambda seed, step: task.batch(split, seed, step, batch_size))


def draw(task, split, seed, step, batch_size):
    return jax.tree.map(np.asarray, drawer(task, split, batch_size)(seed, step))


def parity(symbols):
    return 1 + symbols.count(2) % 2


def even_pairs(symbols):
    return 1 + sum(a != b for a, b in zip(symbols, symbols[1:])) % 2


def cycle_navigation(symbols):
    position = 0
    for symbol in symbols:
        position = (position + {1: 0, 2: 1, 3: -1}[symbol]) % 5
    return position + 4


def modular_arithmetic(symbols):
    assert symbols[-1] == 4 and 4 not in symbols[:-1]
    text = "".join({1: "+", 2: "-", 3: "*"}[s] if i % 2 else str(s - 5) for i, s in enumerate(symbols[:-1]))
    return eval(text) % 5 + 5


RULES = {f.__name__: f for f in (parity, even_pairs, cycle_navigation, modular_arithmetic)}


@pytest.mark.parametrize(
    ("name", "symbols", "answer"),
    [
        ("parity", [1, 2, 2, 1], 1),
        ("parity", [2, 1, 2, 2], 2),
        ("even_pairs", [1, 1, 2, 2, 1], 1),
        ("even_pairs", [1, 2, 1, 2], 2),
        ("cycle_navigation", [2, 2, 1, 3, 2], 6),
        ("cycle_navigation", [3, 3], 7),
        ("modular_arithmetic", [7, 1, 8, 3, 9, 4], 9),
        ("modular_arithmetic", [6, 2, 8, 4], 8),
    ],
)
def test_the_docstrings_examples_follow_the_rules(name, symbols, answer):
    assert RULES[name](symbols) == answer


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", FORMAL)
def test_answers_and_layout(name, split):
    task = tasks.make(name, num_eval=256)
    shortest, longest = task.train_lengths if split == "train" else task.eval_lengths
    batch = draw(task, split, 3, 0, 256)
    check(batch, task)
    assert batch.inputs.shape == (256, longest - 1) and batch.reset is None
    sizes = batch.mask.sum(1)
    np.testing.assert_array_equal(batch.mask, np.arange(longest - 1)[None] < sizes[:, None])
    np.testing.assert_array_equal(batch.weights, np.arange(longest - 1)[None] == sizes[:, None] - 1)
    assert (batch.inputs[~batch.mask] == 0).all() and (batch.inputs[batch.mask] > 0).all()
    for inputs, targets, size in zip(batch.inputs, batch.targets, sizes, strict=True):
        assert targets[size - 1] == RULES[name](inputs[:size].tolist())
    if name == "modular_arithmetic":  # odd lengths; an even bound counts as the odd one below it
        assert (sizes % 2 == 0).all()
        shortest, longest = shortest - 1 + shortest % 2, longest - 1 + longest % 2
    assert shortest <= sizes.min() + 1 and sizes.max() + 1 <= longest
    assert sizes.min() + 1 <= shortest + 10 and sizes.max() + 1 >= longest - 10  # 256 draws reach both ends


@pytest.mark.parametrize("name", FORMAL)
def test_every_row_is_a_function_of_split_seed_step_and_row(name):
    task = tasks.make(name, **SHORT)
    batch = draw(task, "train", 1, 2, 8)
    fewer = draw(task, "train", 1, 2, 5)
    np.testing.assert_array_equal(fewer.inputs, batch.inputs[:5])
    np.testing.assert_array_equal(fewer.targets, batch.targets[:5])
    rows = {
        row.tobytes() for seed, step in [(1, 2), (1, 3), (2, 2)] for row in draw(task, "train", seed, step, 8).inputs
    }
    assert len(rows) > 3 * 8 - 6  # short rows may coincide


def test_splits_differ_at_equal_lengths():
    task = tasks.make("parity", train_lengths=(40, 40), eval_lengths=[40, 40])
    rows = {row.tobytes() for split in SPLITS for row in draw(task, split, 0, 0, 4).inputs}
    assert len(rows) == 12


def test_evaluation_counts_num_eval_samples():
    task = tasks.make("parity", **SHORT)
    assert task.num_batches("valid", 8) == 3
    assert sum(draw(task, "valid", 0, step, 8).weights.sum() for step in range(3)) == 20


def test_parity_answers_are_balanced():
    batch = draw(tasks.make("parity"), "train", 0, 0, 2000)
    assert abs((batch.targets.max(1) == 1).mean() - 0.5) < 0.05


@pytest.mark.parametrize(
    ("name", "vocab_size", "chance"),
    [("parity", 3, 0.5), ("even_pairs", 3, 0.5)] + [("cycle_navigation", 9, 0.2), ("modular_arithmetic", 10, 0.2)],
)
def test_vocabulary_and_scaled_score(name, vocab_size, chance):
    """xLSTM, arXiv 2405.04517, App. B.1.1."""
    task = tasks.make(name)
    assert (task.name, task.vocab_size, task.num_classes, task.chance) == (name, vocab_size, vocab_size, chance)
    assert not task.carries_state and hash(task) == hash(tasks.make(name))
    for accuracy, score in ((chance, 0.0), (1.0, 1.0)):
        metrics = task.metrics({"nll": 50.0, "correct": 100 * accuracy, "weight": 100.0})
        assert metrics == pytest.approx({"loss": 0.5, "accuracy": accuracy, "scaled_accuracy": score})


def test_longer_cycle_and_other_modulus():
    assert tasks.make("cycle_navigation", cycle_length=7).vocab_size == 11
    assert tasks.make("modular_arithmetic", modulus=3).chance == pytest.approx(1 / 3)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """1,000 bytes that name their own position modulo 250."""
    path = tmp_path_factory.mktemp("corpus") / "text.bin"
    path.write_bytes(bytes(i % 250 for i in range(1000)))
    return f"file:{path}"


def test_streams_continue_and_reset_at_a_new_pass(text):
    task = tasks.make("byte_lm", corpus=text, seq_len=64, carries_state=True)
    steps_a_pass = 899 // 64
    batches = [draw(task, "train", 0, step, 4) for step in range(steps_a_pass + 1)]
    for step, batch in enumerate(batches):
        check(batch, task)
        assert ((batch.inputs[:, 1:] == batch.targets[:, :-1]) | batch.reset[:, 1:]).all()
        assert batch.reset[:, 0].all() == (step % steps_a_pass == 0)
    for before, after in zip(batches[:-2], batches[1:-1]):
        assert ((after.inputs[:, 0] == before.targets[:, -1]) | after.reset[:, 0]).all()
    inner = np.concatenate([batch.inputs for batch in batches[:-1]], 1)
    reset = np.concatenate([batch.reset for batch in batches[:-1]], 1)
    assert (inner[:, 1:][reset[:, 1:]] == 0).all() and reset.sum(1).max() <= 2  # the text begins with byte 0
    assert (np.diff(inner.astype(int), axis=1)[~reset[:, 1:]] % 250 == 1).all()  # nothing else breaks the order
    assert (draw(task, "train", 1, 0, 4).inputs != batches[0].inputs).any()


def test_windows_are_drawn_by_seed_step_and_row(text):
    task = tasks.make("byte_lm", corpus=text, seq_len=64, carries_state=False)
    batch = draw(task, "train", 0, 5, 8)
    assert batch.reset is None and len(set(batch.inputs[:, 0].tolist())) > 4
    np.testing.assert_array_equal((batch.inputs + 1) % 250, batch.targets)
    np.testing.assert_array_equal(draw(task, "train", 0, 5, 3).inputs, batch.inputs[:3])
    assert (draw(task, "train", 0, 6, 8).inputs != batch.inputs).any()


@pytest.mark.parametrize("batch_size", [1, 3, 7, 60])
@pytest.mark.parametrize(("split", "start", "stop"), [("valid", 900, 950), ("test", 950, 1000)])
def test_every_byte_of_a_split_is_asked_for_once(text, split, start, stop, batch_size):
    task = tasks.make("byte_lm", corpus=text, seq_len=8)
    batches = [draw(task, split, 0, step, batch_size) for step in range(task.num_batches(split, batch_size))]
    targets = np.concatenate([batch.targets for batch in batches], 1)
    weights = np.concatenate([batch.weights for batch in batches], 1)
    inputs = np.concatenate([batch.inputs for batch in batches], 1)
    assert targets[weights > 0].tolist() == [i % 250 for i in range(start, stop)]  # row by row, in order
    np.testing.assert_array_equal((inputs[weights > 0] + 1) % 250, targets[weights > 0])
    assert weights[:, -8:].any()  # no batch too many


def test_byte_lm_is_a_pytree_whose_text_is_an_argument(text):
    task = tasks.make("byte_lm", corpus=text, seq_len=8)
    leaves, structure = jax.tree.flatten(task)
    again = jax.tree.unflatten(structure, leaves)
    assert len(leaves) == 1 and structure == jax.tree.structure(tasks.make("byte_lm", corpus=text, seq_len=8))
    jax.tree.map(np.testing.assert_array_equal, again.batch("test", 0, 0, 2), task.batch("test", 0, 0, 2))
    assert len(task.data_hash) == 64
    bits = task.metrics({"nll": 3 * math.log(2), "correct": 1.0, "weight": 2.0})["bits_per_byte"]
    assert bits == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("party", {}, "unknown task 'party'; nearest: parity"),
        ("parity", {"length": 3}, "unknown option of task parity 'length'; nearest: eval_lengths, train_lengths"),
        ("byte_lm", {"data": 3}, "unknown option of task byte_lm 'data'; valid: corpus, seq_len, carries_state"),
        ("parity", {"train_lengths": (40, 3)}, "shortest <= longest, not"),
        ("parity", {"train_lengths": (0, 3)}, "3 <= shortest"),
        ("parity", {"eval_lengths": 40}, "must be of the kind of .40, 256., not 40"),
        ("parity", {"eval_lengths": (40, "256")}, "must be of the kind of .40, 256."),
        ("parity", {"num_eval": 0}, "num_eval must be at least 1"),
        ("cycle_navigation", {"cycle_length": 1}, "cycle_length must be at least 2"),
        ("modular_arithmetic", {"modulus": "5"}, "modulus must be of the kind of 5, not '5'"),
        ("byte_lm", {"seq_len": 0}, "seq_len must be at least 1"),
        ("byte_lm", {"seq_len": 10**7}, "need 11111113"),
        ("byte_lm", {"carries_state": 1}, "carries_state must be of the kind of True, not 1"),
        ("byte_lm", {"corpus": "bundled:kvj"}, "unknown corpus"),
    ],
)
def test_bad_options_end_in_one_line(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        tasks.make(name, **options)
    assert "\n" not in str(error.value)


def test_bad_splits_end_in_one_line():
    task = tasks.make("parity")
    with pytest.raises(ValueError, match="unknown split 'val': choose one of train, valid, test"):
        task.batch("val", 0, 0, 2)
    with pytest.raises(ValueError, match="takes valid or test"):
        task.num_batches("train", 2)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("inputs", [[0, 3]], "inputs hold 3, outside 0 .. 2 .vocab_size = 3."),
        ("inputs", [[0, -1]], "inputs hold -1"),
        ("inputs", [[0.0, 1.0]], "inputs must be integers, not float64"),
        ("targets", [[0, 9]], "targets hold 9, outside 0 .. 2 .num_classes = 3."),
        ("targets", [[0, 1, 2]], r"targets has shape \(1, 3\) where \(1, 2\) is needed"),
        ("weights", [[0.0, np.nan]], "weights must be finite and not negative"),
        ("mask", [True, False], "mask has shape"),
        ("inputs", [[]], "B and T at least 1"),
        ("inputs", [1, 2], r"inputs must be \(B, T\)"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_in_one_line(field, value, message):
    good = Batch(np.array([[1, 2]]), np.array([[0, 2]]), np.array([[0.0, 1.0]]), None, None)
    check(good, tasks.make("parity"))
    with pytest.raises(ValueError, match=message) as error:
        check(good._replace(**{field: np.array(value)}), tasks.make("parity"))
    assert "\n" not in str(error.value)
