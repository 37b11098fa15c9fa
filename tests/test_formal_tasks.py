"""Formal languages: what is asked for, where, and how often, against plain Python over the list of shown tokens."""

import itertools
import math
import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import lengths as lengths_script
from experiments import planning
from experiments import rows as sweep_rows
from xlstm_jax import models, tasks
from xlstm_jax.evaluate import evaluate
from xlstm_jax.tasks import FORMAL, SPLITS, Batch, check
from xlstm_jax.tasks.chomsky import Chomsky
from xlstm_jax.tasks.formal import FormalLanguage
from xlstm_jax.tasks.permutations import Permutations

ROOT = Path(__file__).resolve().parents[1]


def expression(tokens, zero, names="?+-*=()"):
    return "".join(str(t - zero) if t >= zero else names[t] for t in tokens)


def value(text):
    """Brackets decide, and Python binds a unary minus tighter than any operator that is drawn."""
    assert re.fullmatch(r"[0-4+\-*()]+", text)
    return eval(text) % 5


def solve(text):
    left, right = text.split("=")
    (answer,) = [x for x in range(5) if value(left.replace("x", str(x))) == int(right)]
    return answer


def without(tokens, last):
    assert tokens[-1] == last and last not in tokens[:-1]
    return tokens[:-1]


def sum_of_products(tokens):
    return eval(expression(tokens, 5)) % 5 + 5


def stack(tokens):
    held = []
    for token in tokens:
        held = held[:-1] if token == 2 else [*held, token if token < 7 else token - 4]
        assert held
    return held


def chomsky_stack(tokens):
    held = []
    for token in tokens:
        held = held[:-1] if token == 3 else [*held, token if token < 3 else token - 3]
    return [*held[::-1], 6]


def missing(tokens):
    """The symbol that makes both halves equal."""
    half, gap = len(tokens) // 2, tokens.index(1)
    repaired = [
        tokens[gap - half if t == 1 and gap >= half else gap + half if t == 1 else i] for i, t in enumerate(tokens)
    ]
    assert tokens.count(1) == 1 and repaired[:half] == repaired[half:]
    return [repaired[gap]]


def chomsky_missing(tokens):
    assert tokens.count(4) == len(tokens) % 2
    return missing(tokens[: len(tokens) // 2 * 2])


def majority(tokens):
    count = Counter(tokens)
    return [min(token for token in count if count[token] == max(count.values()))]


def numbers(tokens):
    """Two numbers, lowest bit first, separated by 3."""
    text = "".join(str(t - 1) for t in tokens)
    return [int(bits[::-1], 2) for bits in text.split("2")]


def binary(number):
    return [1 + int(bit) for bit in f"{number:b}"[::-1]] + [3]


def square_root(tokens):
    root = math.isqrt(int("".join(str(t - 1) for t in tokens), 2))
    return [1 + int(bit) for bit in f"{root:0{-(-len(tokens) // 2)}b}"]


def products(points, even=False):
    def sign(p):
        return round(np.linalg.det(np.eye(points)[list(p)]))

    group = [p for p in itertools.permutations(range(points)) if not even or sign(p) == 1]

    def answers(tokens):
        state, found = tuple(range(points)), []
        for token in tokens:
            state = tuple(group[token - 1][point] for point in state)
            found.append(1 + group.index(state))
        return found

    return answers


RULES = {  # shown tokens -> answers
    "parity": lambda s: [1 + s.count(2) % 2],
    "even_pairs": lambda s: [1 + sum(a != b for a, b in zip(s, s[1:])) % 2],
    "cycle_navigation": lambda s: [4 + (s.count(2) - s.count(3)) % 5],
    "modular_arithmetic": lambda s: [sum_of_products(without(s, 4))],
    "modular_arithmetic_brackets": lambda s: [7 + value(expression(without(s, 4), 7))],
    "solve_equation": lambda s: [9 + solve(expression(without(s, 7), 9, "?+-*=()?x"))],
    "stack_manipulation": lambda s: stack(without(s, 1)),
    "bucket_sort": sorted,
    "missing_duplicate": missing,
    "odds_first": lambda s: without(s, 1)[::2] + without(s, 1)[1::2],
    "repetition": lambda s: without(s, 1),
    "reverse_string": lambda s: without(s, 1)[::-1],
    "set": lambda s: list(dict.fromkeys(without(s, 1))),
    "majority": majority,
    "majority_count": lambda s: [min(max(Counter(s).values()), 63)],
    "chomsky_modular_arithmetic": lambda s: [sum_of_products(s)],
    "chomsky_modular_arithmetic_brackets": lambda s: [7 + value(expression(s, 7))],
    "chomsky_solve_equation": lambda s: [9 + solve(expression(s, 9, "?+-*=()?x"))],
    "chomsky_stack_manipulation": chomsky_stack,
    "chomsky_reverse_string": lambda s: s[::-1],
    "chomsky_duplicate_string": lambda s: s + s,
    "chomsky_odds_first": lambda s: s[::2] + s[1::2],
    "chomsky_missing_duplicate": chomsky_missing,
    "chomsky_bucket_sort": sorted,
    "chomsky_binary_addition": lambda s: binary(sum(numbers(s))),
    "chomsky_binary_multiplication": lambda s: binary(math.prod(numbers(s))),
    "chomsky_compute_sqrt": square_root,
    "s3": products(3),
    "a5": products(5, even=True),
    "s5": products(5),
}
RULES |= {f"chomsky_{name}": RULES[name] for name in ("even_pairs", "cycle_navigation")}
RULES["chomsky_parity_check"] = RULES["parity"]

VOCABULARIES = {  # the paper's V and 1 / s_rand (xLSTM, App. B.1.1)
    "bucket_sort": (11, 10), "cycle_navigation": (9, 5), "even_pairs": (3, 2), "majority": (64, 63),
    "majority_count": (64, 63), "missing_duplicate": (11, 9), "modular_arithmetic": (10, 5),
    "modular_arithmetic_brackets": (12, 5), "odds_first": (12, 10), "parity": (3, 2), "repetition": (12, 10),
    "reverse_string": (12, 10), "stack_manipulation": (11, 4), "set": (128, 126), "solve_equation": (14, 5),
}  # fmt: skip
EXAMPLES = {  # of the docstrings
    "modular_arithmetic_brackets": ([5, 5, 9, 1, 10, 6, 3, 2, 11, 6, 4], [7]),
    "solve_equation": ([5, 12, 2, 8, 6, 4, 13, 7], [13]),
    "stack_manipulation": ([3, 5, 2, 8, 8, 1], [3, 4, 4]),
    "missing_duplicate": ([4, 2, 9, 4, 1, 9], [2]),
    "odds_first": ([2, 7, 3, 5, 9, 1], [2, 3, 9, 7, 5]),
    "set": ([4, 2, 4, 9, 2, 1], [4, 2, 9]),
    "majority": ([9, 2], [2]),
    "chomsky_stack_manipulation": ([1, 2, 2, 1, 5, 3, 3], [2, 2, 1, 6]),
    "chomsky_missing_duplicate": ([2, 3, 1, 2, 3, 3], [3]),
    "chomsky_binary_addition": ([1, 1, 2, 3, 1, 2, 2, 1, 2], [1, 2, 1, 2, 2, 3]),
    "chomsky_binary_multiplication": ([1, 1, 2, 3, 1, 2, 2, 1, 2], [1, 1, 1, 2, 2, 1, 2, 3]),
    "chomsky_compute_sqrt": ([2, 1, 1, 2, 1, 2], [2, 2, 1]),
    "s3": ([2, 3, 2], [2, 4, 6]),
}
NAMES = [task.name for task in FORMAL]


def test_every_language_has_its_rule_and_the_papers_have_theirs():
    assert set(NAMES) == set(RULES) and len(NAMES) == 15 + 15 + 3
    assert all(task.batch is FormalLanguage.batch for task in FORMAL)  # one way of drawing, so one test of the streams
    for name, (vocab_size, classes) in VOCABULARIES.items():
        task = tasks.make(name)
        assert (task.vocab_size, task.num_classes, task.chance) == (vocab_size, vocab_size, pytest.approx(1 / classes))
    assert [tasks.make(name).vocab_size for name in ("s3", "a5", "s5")] == [7, 61, 121]
    assert sum(issubclass(task, Chomsky) for task in FORMAL) == 15
    for name, (shown, answers) in EXAMPLES.items():
        assert RULES[name](shown) == answers


@pytest.mark.parametrize("name", NAMES)
def test_answers_and_layout(name):
    chomsky, longest = issubclass(tasks.TASKS[name], Chomsky), 41
    task = tasks.make(name, eval_lengths=(1 if chomsky else 3, longest), num_eval=90)
    batch = jax.tree.map(np.asarray, jax.jit(lambda seed, step: task.batch("test", seed, step, 96))(3, jnp.int32(0)))
    check(batch, task)
    assert batch.inputs.shape == (96, task.steps(longest)) and batch.reset is None
    lengths, seen = np.asarray(task.lengths(batch)), set()
    for row in range(96):
        inputs, targets = batch.inputs[row].tolist(), batch.targets[row].tolist()
        size, asked = sum(token > 0 for token in inputs), np.flatnonzero(batch.targets[row])
        shown, first = inputs[:size], 0 if isinstance(task, Permutations) else size if chomsky else size - 1
        answers = RULES[name](shown)
        assert all(shown) and targets[first : first + len(answers)] == answers
        assert asked.tolist() == list(range(first, first + len(answers)))
        assert batch.mask[row].tolist() == [place < max(first + len(answers), size) for place in range(len(inputs))]
        weight = (row < 90) / (len(answers) if chomsky else 1)
        np.testing.assert_allclose(batch.weights[row][asked], weight, rtol=1e-6)
        assert np.delete(batch.weights[row], asked).sum() == 0
        length = size if chomsky or isinstance(task, Permutations) else first + 1 + len(answers)
        assert lengths[row] == length <= longest
        seen.add(length)
    assert len(seen) > 12 and min(seen) < 10 and max(seen) > (24 if name in ("set", "stack_manipulation") else 37)


def test_streams_of_the_splits_seeds_and_steps_differ():
    """At equal lengths no row of one stream is a row of another."""
    task = tasks.make("repetition", train_lengths=(41, 41), eval_lengths=(41, 41))
    draw = jax.jit(lambda seed, step: [task.batch(split, seed, step, 4).inputs for split in SPLITS])
    rows = [np.asarray(inputs) for seed, step in ((0, 0), (0, 1), (1, 0)) for inputs in draw(seed, step)]
    assert len({row.tobytes() for batch in rows for row in batch}) == 9 * 4


def test_a_number_as_long_as_the_papers_is_multiplied_and_its_root_taken():
    """500 symbols: far beyond any integer of the device."""
    for name in ("chomsky_binary_multiplication", "chomsky_compute_sqrt"):
        task = tasks.make(name, eval_lengths=(499, 500))
        batch = jax.jit(lambda task=task: task.batch("test", 0, 0, 2))()
        for inputs, targets in zip(np.asarray(batch.inputs), np.asarray(batch.targets)):
            assert targets[targets > 0].tolist() == RULES[name](inputs[inputs > 0].tolist())


def test_accuracy_by_length():
    task = tasks.make("parity", eval_lengths=(40, 256))
    names = task.buckets()
    assert names[0] == "40-67" and names[-1].endswith("-256") and len(names) == 8
    bounds = [tuple(map(int, name.split("-"))) for name in names]
    assert all(high + 1 == low for (_, high), (low, _) in zip(bounds, bounds[1:]))
    lengths = np.arange(40, 257)
    mask = np.arange(255)[None] < lengths[:, None] - 1
    places = np.asarray(task.bucket(Batch(mask * 1, mask * 0, mask * 1.0, jnp.asarray(mask), None)))
    assert all(bounds[place][0] <= length <= bounds[place][1] for place, length in zip(places, lengths))
    assert tasks.make("parity", eval_lengths=(40, 41)).buckets() == ["40-40", "41-41"]
    sums = {"nll": 1.0, "correct": 3.0, "weight": 4.0, "correct_by_length": np.array([2.0, 0, 1] + [0] * 5)}
    found = task.metrics(sums | {"weight_by_length": np.array([2.0, 0, 2] + [0] * 5)})
    assert found["accuracy_by_length"] == {"40-67": 1.0, names[2]: 0.5}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("solve_equation", {"train_lengths": (3, 4)}, "solve_equation: train_lengths must reach 5, not (3, 4)"),
        ("chomsky_binary_addition", {"eval_lengths": (1, 2)}, "eval_lengths must reach 3, not (1, 2)"),
        ("chomsky_reverse_string", {"train_lengths": (0, 4)}, "must be 1 <= shortest <= longest, not (0, 4)"),
        ("set", {"train_lengths": (2, 4)}, "must be 3 <= shortest <= longest, not (2, 4)"),
        ("reverse_strng", {}, "unknown task 'reverse_strng'; nearest: reverse_string"),
    ],
)
def test_bad_options_end_in_one_line(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        tasks.make(name, **options)
    assert "\n" not in str(error.value)


def test_an_evaluation_counts_its_rows_by_length(tmp_path):
    """One length a bucket: the mean of the buckets, weighted by their rows, is the accuracy; and a figure of it."""
    task = tasks.make("parity", eval_lengths=(3, 6), num_eval=30)
    found = evaluate(models.Tagger(3, 3, backbone="gru", dim=4, num_layers=1, rngs=nnx.Rngs(0)), task, "test", 8)
    batches = [task.batch("test", 0, step, 8) for step in range(4)]
    lengths = np.concatenate([np.where(b.weights.any(1), task.lengths(b), 0) for b in batches])
    rows = [np.sum(lengths == length) for length in range(3, 7)]
    assert list(found["accuracy_by_length"]) == ["3-3", "4-4", "5-5", "6-6"] and sum(rows) == 30
    mean = np.average(list(found["accuracy_by_length"].values()), weights=rows)
    assert found["accuracy"] == pytest.approx(mean)

    sweep = planning.load(f"{ROOT / 'configs/papers/xlstm_formal_languages.py'}:demo,debug")
    with pytest.raises(ValueError, match="no result row with test_accuracy_by_length"):
        lengths_script.write(sweep, tmp_path)
    sweep_rows.prepare(tmp_path, sweep)
    for run in sweep.runs[:2]:
        values = {f"test_{name}": value for name, value in found.items()}
        record = {"id": run.id, "overrides": run.overrides, "config": sweep.config(run).to_dict()}
        sweep_rows.append(tmp_path, record | values | {f"valid_{name}": value for name, value in found.items()})
    lines = lengths_script.write(sweep, tmp_path).splitlines()
    assert len(lines) == 1 + 2 * 4 and lines[1].startswith("lstm,parity,3-3,")
    assert (tmp_path / "lengths.csv").read_text().splitlines() == lines
    assert (tmp_path / "lengths.png").read_bytes()[:4] == b"\x89PNG"
