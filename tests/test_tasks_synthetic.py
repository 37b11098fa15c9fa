"""Generated tasks and labelled sequences: every answer against a plain-Python evaluation, purity, layout, bad input."""

import functools
import gzip
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import small_data
from xlstm_jax import tasks
from xlstm_jax.data import images
from xlstm_jax.tasks import check, listops
from xlstm_jax.tasks.task import squared_error

SMALL = {
    "associative_recall": dict(length=40, pairs=5, vocab_size=20),
    "adding": dict(length=12),
    "copy_memory": dict(length=7),
    "selective_copying": dict(length=12, symbols=4, vocab_size=6),
    "nearest_neighbour": dict(length=9),
}


@functools.cache
def drawer(task, split, batch_size):
    return jax.jit(lambda seed, step: task.batch(split, seed, step, batch_size))


def draw(name, split, seed, step, batch_size, **options):
    task = tasks.make(name, **SMALL.get(name, {}), num_eval=20, **options)
    batch = jax.tree.map(np.asarray, drawer(task, split, batch_size)(seed, step))
    check(batch, task)
    return batch


def associative_recall(inputs, split):
    pairs = dict(inputs[:10].reshape(5, 2).tolist())
    assert len(pairs) == 5 and len(set(pairs.values())) == 5
    assert all(1 <= key < 10 <= value < 20 for key, value in pairs.items())
    assert sorted(inputs[10:][inputs[10:] > 0]) == sorted(pairs)
    assert (np.flatnonzero(inputs[10:]) % 2 == 0).all()
    return {place: pairs[inputs[place]] for place in range(10, 40) if inputs[place]}


def adding(inputs, split):
    assert sorted(inputs[:, 1].tolist()) == [0.0] * 10 + [1.0] * 2
    return {11: sum(number for number, mark in inputs.tolist() if mark)}


def copy_memory(inputs, split):
    assert (inputs[10:16] == 0).all() and (inputs[16:] == 9).all() and inputs.size == 27
    return dict.fromkeys(range(17), 0) | dict(enumerate(inputs[:10].tolist(), start=17))


def selective_copying(inputs, split):
    shown = [token for token in inputs[:12].tolist() if token]
    assert len(shown) == 4 and set(shown) <= {1, 2, 3, 4} and (inputs[12:] == 5).all()
    return dict(enumerate(shown, start=12))


def nearest_neighbour(inputs, split):
    reference, *others = inputs.tolist()
    assert reference[2] == 0 and all(
        math.isclose(math.hypot(x, y), 1, rel_tol=1e-5) for x, y, _ in [reference, *others]
    )
    answers = {}
    for place in range(1, 9):
        near = max(others[:place], key=lambda other: other[0] * reference[0] + other[1] * reference[1])
        answers[place] = near[2]
    return answers if split == "train" else {8: answers[8]}


RULES = {f.__name__: f for f in (associative_recall, adding, copy_memory, selective_copying, nearest_neighbour)}


@pytest.mark.parametrize("name", RULES)
def test_answers(name):
    for split in ("train", "test"):
        batch = draw(name, split, 3, 1, 16)
        counted = 16 if split == "train" else 4  # num_eval = 20
        for row, (inputs, targets, weights) in enumerate(zip(batch.inputs, batch.targets, batch.weights, strict=True)):
            answers = RULES[name](inputs, split)
            if row < counted:
                assert sorted(answers) == np.flatnonzero(weights).tolist() and set(weights) <= {0.0, 1.0}
            else:
                assert not weights.any()
            for place, answer in answers.items():
                assert np.ravel(targets[place])[0] == pytest.approx(answer, rel=1e-5)
    rows = [
        row.tobytes() for seed, step in [(3, 1), (3, 2), (4, 1)] for row in draw(name, "train", seed, step, 16).inputs
    ]
    assert len(set(rows)) == 48
    if name == "copy_memory":  # a row does not depend on the batch's size
        assert [row.tobytes() for row in draw(name, "train", 3, 1, 5).inputs] == rows[:5]


def test_queries_come_soon_after_the_pairs():
    """Zoology draws the gaps by p ~ gap^(power - 1): nearly 1 / gap."""
    task = tasks.make("associative_recall", length=64, pairs=1, vocab_size=4)
    gaps = np.asarray(drawer(task, "train", 1000)(0, 0).weights)[:, 2::2].argmax(1) + 1
    wanted = np.arange(1, 32) ** (task.power - 1)
    found = np.bincount(gaps, minlength=32)[1:] / 1000
    np.testing.assert_allclose(found, wanted / wanted.sum(), atol=0.045)


def test_evaluation_may_be_longer():
    task = tasks.make("copy_memory", length=5, eval_length=9)
    for split, size in (("train", 25), ("test", 29)):
        assert jax.eval_shape(lambda split=split: task.batch(split, 0, 0, 1)).inputs.shape == (1, size)
    floor = 10 * math.log(8) / 29
    found = task.metrics({"nll": 58 * floor, "correct": 29.0, "weight": 58.0})
    assert found == pytest.approx({"loss": floor, "accuracy": 0.5, "of_memoryless": 1.0})
    assert task.num_batches("valid", 1000) == 2
    with pytest.raises(ValueError, match="takes valid or test"):
        task.num_batches("train", 4)


def test_squared_error_of_the_constant_answers():
    """1/6 for the sum of two uniform numbers, 1/12 for one."""
    for name, answer, error in (("adding", 1.0, 1 / 6), ("nearest_neighbour", 0.5, 1 / 12)):
        batch = drawer(tasks.make(name, length=4, num_eval=1000), "test", 1000)(0, 0)
        loss, correct = squared_error(jnp.full((1000, 4, 1), answer), batch.targets)
        assert float((loss * batch.weights).sum() / batch.weights.sum()) == pytest.approx(error, rel=0.1)
        assert not np.asarray(correct).any()


def evaluate(words):
    """The value of a list of ListOps tokens, consumed from the front: another way round than the generator's."""
    word = words.pop(0)
    if not word.startswith("["):
        return int(word)
    digits = []
    while words[0] != "]":
        digits.append(evaluate(words))
    words.pop(0)
    if word == "[MED":
        digits.sort()
        return (digits[(len(digits) - 1) // 2] + digits[len(digits) // 2]) // 2
    return {"[MIN": min, "[MAX": max, "[SM": lambda each: sum(each) % 10}[word](digits)


def test_listops():
    task = tasks.make("listops", lengths=(5, 40), max_depth=4, max_arguments=5, num_train=150, num_eval=20)
    seen = set()
    for split, steps in (("train", 15), ("valid", 2), ("test", 2)):
        for step in range(steps):
            batch = jax.tree.map(np.asarray, drawer(task, split, 10)(0, step))
            check(batch, task)
            for inputs, targets, weights, mask in zip(*batch[:4]):
                words = [listops.TOKENS[token] for token in inputs[mask]]
                assert mask[: len(words)].all() and 5 <= len(words) <= 40 and not inputs[~mask].any()
                assert np.flatnonzero(weights).tolist() == [len(words) - 1]
                seen.add(tuple(words))
                assert targets[len(words) - 1] == evaluate(words) and not words
    assert len(seen) == 190  # a pass shows all of them, and the splits share none
    assert evaluate("[MAX 2 9 [MIN 4 7 ] 0 ]".split()) == 9 and evaluate("[MED 1 4 8 9 ]".split()) == 6
    deep = listops.generate((60, 90), 10, 10, 3, 1, 0)["train"]
    assert (deep[1] >= 60).all() and (deep[1] <= 90).all()


@pytest.fixture
def folder(tmp_path):
    return small_data.images(tmp_path)


def test_pixels(folder):
    task = tasks.make("pixels", images=f"file:{folder}")
    assert (task.num_features, task.num_classes, task.counts) == (1, 3, (15, 1, 4))
    batch = jax.tree.map(np.asarray, drawer(task, "test", 8)(0, 0))
    check(batch, task)
    np.testing.assert_allclose(batch.inputs[:4, :, 0] * 255, np.arange(64).reshape(4, 16), atol=1e-4)
    assert batch.targets[:4, -1].tolist() == [0, 1, 2, 0] and batch.weights.sum(1).tolist() == [1.0] * 4 + [0.0] * 4
    permuted = tasks.make("pixels", images=f"file:{folder}", permuted=True)
    shuffled = np.asarray(permuted.data["test"][0]) / np.float32(255)
    order = np.round(shuffled[0] * 255).astype(int)
    assert sorted(order) == list(range(16)) != order.tolist()
    np.testing.assert_allclose(shuffled, batch.inputs[:4, :, 0][:, order], atol=1e-6)
    pooled = tasks.make("pixels", images=f"file:{folder}", pool=2).data["test"][0]
    np.testing.assert_allclose(pooled[0], [2.5, 4.5, 10.5, 12.5], atol=0.51)


def test_labelled_sequences_from_files(tmp_path):
    contents = {
        split: dict(inputs=np.array([[7, 2, 0], [3, 3, 9]]), lengths=np.array([2, 3]), labels=np.array([1, 0]))
        for split in ("train", "valid", "test")
    }
    for split, content in contents.items():
        np.savez(tmp_path / f"{split}.npz", **content)
    task = tasks.make("labelled", folder=str(tmp_path))
    batch = drawer(task, "valid", 2)(0, 0)
    check(batch, task)
    assert (task.vocab_size, task.num_classes, task.chance) == (10, 2, 0.5)
    assert batch.targets.tolist() == [[0, 1, 0], [0, 0, 0]] and batch.weights.tolist() == [[0, 1, 0], [0, 0, 1]]
    leaves, structure = jax.tree.flatten(task)
    assert len(leaves) == 9 and structure == jax.tree.structure(tasks.make("labelled", folder=str(tmp_path)))
    for change, message in (
        ({"lengths": np.array([0, 3])}, "lengths are int64 of 0 to 3: integers of 1 to 3"),
        ({"labels": np.array([0.5, 1])}, "labels are float64"),
        ({"inputs": np.zeros(3, int)}, r"inputs \(3,\).*are needed"),
    ):
        np.savez(tmp_path / "test.npz", **contents["test"] | change)
        with pytest.raises(ValueError, match=message):
            tasks.make("labelled", folder=str(tmp_path))
    np.savez(tmp_path / "test.npz", inputs=contents["test"]["inputs"])
    with pytest.raises(ValueError, match="lengths.* inputs, lengths and labels are needed"):
        tasks.make("labelled", folder=str(tmp_path))
    (tmp_path / "test.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="truncated or no .npz file"):
        tasks.make("labelled", folder=str(tmp_path))
    (tmp_path / "test.npz").unlink()
    with pytest.raises(ValueError, match="is missing: train.npz, valid.npz and test.npz"):
        tasks.make("labelled", folder=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adding", {"length": 1}, "length must be at least 2, not 1"),
        ("adding", {"eval_length": 1}, "eval_length must be at least 2"),
        ("adding", {"num_eval": 0}, "num_eval must be at least 1"),
        ("associative_recall", {"pairs": 17}, "pairs must be 1 to length / 4 = 16, not 17"),
        ("associative_recall", {"vocab_size": 8}, "even and at least 2 pairs . 2 = 10, not 8"),
        ("associative_recall", {"power": 0.0}, "power must be above 0"),
        ("selective_copying", {"symbols": 5000}, "symbols must be 1 to length = 4096, not 5000"),
        ("selective_copying", {"vocab_size": 2}, "vocab_size must be at least 3"),
        ("listops", {"lengths": (9, 4)}, "shortest <= longest"),
        ("listops", {"max_arguments": 1}, "max_arguments must be at least 2"),
        ("listops", {"lengths": (5, 6), "num_train": 100, "num_eval": 1}, "expressions after .* draws: widen lengths"),
        ("labelled", {"folder": "no/such"}, "no folder no/such, nor in the data folder"),
        ("pixels", {"images": "fashion"}, "unknown images 'fashion'; nearest: fashion_mnist"),
        ("pixels", {"images": "file:/no/such"}, "no train-images-idx3-ubyte.gz in /no/such; put"),
    ],
)
def test_bad_options_end_in_one_line(name, options, message, monkeypatch):
    monkeypatch.setattr(listops, "TRIES", 1)
    with pytest.raises(ValueError, match=message) as error:
        tasks.make(name, **options)
    assert "\n" not in str(error.value)


def test_damaged_images_end_in_one_line(folder):
    with pytest.raises(ValueError, match="pool must divide the 4 x 4 pixels, not 3"):
        tasks.make("pixels", images=f"file:{folder}", pool=3)
    with pytest.raises(ValueError, match="15 training samples are fewer than batch_size 17"):
        tasks.make("pixels", images=f"file:{folder}").batch("train", 0, 0, 17)
    path = folder / "train-labels-idx1-ubyte.gz"
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[:-1]))
    with pytest.raises(ValueError, match="truncated or holds no array of 1 axes"):
        images.load(f"file:{folder}")
    path.write_bytes(gzip.compress(content)[:-9])
    with pytest.raises(ValueError, match="missing or truncated"):
        images.load(f"file:{folder}")
