"""Music: frames, loss and padding against plain numpy; a model of real inputs; one training run from a config."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import Subject
from contract import check as check_contract
from flax import nnx
from ml_collections import ConfigDict

from experiments import build
from experiments import train as run_train
from tests import small_data
from tests.small_data import KEYS
from xlstm_jax import evaluate, models, tasks
from xlstm_jax.tasks import check


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    path = tmp_path_factory.mktemp("music") / "play.mat"
    pieces = small_data.music(path)
    return path, pieces, tasks.make("music", corpus=f"file:{path}")


def rows_of(batch):
    """The frames that each row asks for, with those before them."""
    return [
        (inputs[mask], targets[mask])
        for inputs, targets, mask in zip(np.asarray(batch.inputs), np.asarray(batch.targets), np.asarray(batch.mask))
    ]


def test_evaluation_shows_every_frame_once(music):
    _, pieces, task = music
    draw = jax.jit(lambda step: task.batch("test", 0, step, 2))
    check(draw(0), task)
    assert (task.num_features, task.num_classes, task.num_batches("test", 2)) == (KEYS, KEYS, 2)
    batches = [draw(step) for step in range(2)]
    rows = [row for batch in batches for row in rows_of(batch)]
    for piece, (inputs, targets) in zip(pieces["test"], rows[:3], strict=True):
        np.testing.assert_array_equal(inputs, piece[:-1])
        np.testing.assert_array_equal(targets, piece[1:])
    assert sum(float(batch.weights.sum()) for batch in batches) == sum(len(piece) - 1 for piece in pieces["test"])
    assert not np.asarray(batches[1].weights[1]).any()  # the row past the last piece


def test_training_passes_over_all_pieces(music):
    path, pieces, task = music
    known = {piece[:-1].tobytes() for piece in pieces["train"]}
    orders, draw = [], jax.jit(lambda step: task.batch("train", 1, step, 2))
    for turn in range(2):
        rows = [row for step in range(3) for row in rows_of(draw(3 * turn + step))]
        orders.append([inputs.astype(float).tobytes() for inputs, _ in rows])
        assert set(orders[-1]) == known
    assert orders[0] != orders[1]
    cut = tasks.make("music", corpus=f"file:{path}", max_frames=4)
    draw = jax.jit(lambda step: cut.batch("train", 0, step, 3))
    places = set()
    for step in range(12):
        for inputs, targets in rows_of(draw(step)):
            assert len(inputs) <= 4
            np.testing.assert_array_equal(inputs[1:], targets[:-1])
            found = [
                (number, place)
                for number, piece in enumerate(pieces["train"])
                for place in range(len(piece) - len(inputs))
                if (piece[place : place + len(inputs)] == inputs).all()
            ]
            places |= set(found)
            assert found
    assert {place for _, place in places} == {0, 1, 2, 3, 4}


def test_loss_is_the_negative_log_likelihood_of_a_frame(music):
    _, pieces, task = music
    rng = np.random.default_rng(1)
    outputs, targets = rng.normal(0, 4, (2, 5, KEYS)), (rng.random((2, 5, KEYS)) < 0.3).astype(float)
    loss, accuracy = task.scores(jnp.asarray(outputs, jnp.float32), jnp.asarray(targets, jnp.float32))
    p = 1 / (1 + np.exp(-outputs))
    np.testing.assert_allclose(loss, -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum(-1), rtol=1e-4)
    said = outputs > 0
    wanted = (said & (targets > 0)).sum(-1) / (said | (targets > 0)).sum(-1)
    np.testing.assert_allclose(accuracy, wanted, rtol=1e-5)
    far, _ = task.scores(jnp.full((1, 1, KEYS), 1e4), jnp.zeros((1, 1, KEYS)))
    assert float(far[0, 0]) == pytest.approx(KEYS * 1e4)  # a logit that a product of probabilities would lose


def test_evaluation_weighs_frames_not_pieces(music):
    """A model whose outputs are constant: by hand over all frames of the split, padding and last batch included."""
    _, pieces, task = music
    model = models.FeatureTagger(KEYS, KEYS, backbone="gru", dim=4, num_layers=1, rngs=nnx.Rngs(0))
    model.head.kernel[...] = jnp.zeros((4, KEYS))
    model.head.bias[...] = jnp.linspace(-3, 1, KEYS)
    p = 1 / (1 + np.exp(-np.linspace(-3, 1, KEYS)))
    frames = np.concatenate([piece[1:] for piece in pieces["test"]])
    wanted = -(frames * np.log(p) + (1 - frames) * np.log(1 - p)).sum(1).mean()
    assert evaluate.evaluate(model, task, "test", 2)["nll"] == pytest.approx(wanted, rel=1e-5)


def test_a_model_of_real_inputs_keeps_the_contract(x64):
    def make(**form):
        return models.FeatureTagger(3, 2, backbone="gru_block", dim=8, num_layers=1, rngs=nnx.Rngs(0), **form)

    check_contract(Subject(make, (3,)))


def config_for(path, **changes):
    config = ConfigDict(
        dict(
            kind="features",
            model=dict(backbone="gru", dim=8, num_layers=1, final_norm="none"),
            task=dict(name="music", corpus=f"file:{path}", max_frames=4),
            optimizer=dict(learning_rate=0.1),
            steps=30,
            batch_size=3,
            seed=0,
            steps_per_dispatch=10,
        )
    )
    config.update(changes)
    return config


def test_a_config_trains_it(music, tmp_path):
    found = run_train.run(config_for(music[0]), tmp_path / "run", progress=False)
    assert found["test_nll"] < 40  # 61 nats at the beginning, 29 for random bits of p = 0.1
    assert 0 <= found["test_accuracy"] <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "tagger"}, "config.kind is 'tagger', but the task music has real inputs: use 'features'"),
        ({"task": dict(name="parity")}, "'features', but the task parity has tokens as inputs: use 'tagger' or 'lm'"),
        ({"task": dict(name="music", max_frames=-1)}, "max_frames must be at least 1, or 0 for whole pieces, not -1"),
    ],
)
def test_wrong_configs(music, changes, message):
    config = config_for(music[0])
    if "task" in changes:
        changes = changes | {"task": dict(corpus=f"file:{music[0]}") | changes["task"]}
        if changes["task"]["name"] == "parity":
            del changes["task"]["corpus"]
    with pytest.raises(ValueError, match=message) as error:
        build.build_task(build.resolve(config) | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"valid": [np.ones((1, KEYS))]}, r"a valid document .number 0. of shape \(1, 88\): piano rolls"),
        ({"test": [np.ones((5, 4))]}, r"test document .number 0. of shape \(5, 4\)"),
        ({"test": [2 * np.ones((5, KEYS))]}, "a frame with the value 2: 0 and 1 are needed"),
    ],
)
def test_wrong_rolls(tmp_path, changes, message):
    small_data.music(tmp_path / "play.mat", **changes)
    with pytest.raises(ValueError, match=message) as error:
        tasks.make("music", corpus=f"file:{tmp_path / 'play.mat'}")
    assert "\n" not in str(error.value)


def test_text_is_no_music(music):
    with pytest.raises(ValueError, match="a train document .number 0. of text: piano rolls"):
        tasks.make("music", corpus="bundled:kjv")
    with pytest.raises(ValueError, match="6 training samples are fewer than batch_size 7"):
        music[2].batch("train", 0, 0, 7)
    batch = jax.jit(lambda: music[2].batch("test", 0, 0, 1))()
    for field, value, message in (
        ("inputs", batch.inputs[..., 0], r"inputs must be \(B, T, F\)"),
        ("inputs", batch.inputs[..., :3], "inputs has shape .* is needed"),
        ("targets", batch.targets * jnp.nan, "targets hold a value that is not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            check(batch._replace(**{field: value}), music[2])
