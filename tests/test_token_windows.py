"""Batches that the host reads: those of `data.windows` for any shards; training on them, resumed to the digit."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from experiments import train as script
from tests.configs import tiny
from tests.stand_in import TinyRNN
from xlstm_jax import feed, metrics, optim, sharding, tasks, train
from xlstm_jax.checkpoint import Checkpoints
from xlstm_jax.data import lookup, tokenizers, windows
from xlstm_jax.evaluate import evaluate

SETTINGS = dict(batch_size=4, log_every=2, steps_per_dispatch=3, save_every=4, progress=False)
OPTIMIZER = optim.make(learning_rate=3e-2, steps=12, warmup_steps=2)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XLSTM_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_bytes(bytes(97 + i * i % 23 for i in range(1000)))
    return f"file:{path}"


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """60 documents of 0 to 12 letters."""
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    rows = [{"text": chr(97 + n % 26) * (n * 5 % 13)} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"file:{path}"


def task(corpus, rows="streams", **options):
    options = dict(seq_len=8, rows=rows, carries_state=rows == "streams", tokenizer="bytes+end") | options
    return tasks.make("token_windows", corpus=corpus, **options)


def fit(task, workdir, steps=10, **settings):
    model = TinyRNN(257, 257, 16, rngs=nnx.Rngs(0))
    return model, train.fit(model, task, OPTIMIZER, steps=steps, workdir=workdir, **(SETTINGS | settings))


def rows_of(folder):
    return metrics.read(folder / "metrics.jsonl")


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("rows", ["windows", "streams", "packed"])
def test_shards_make_the_batches_of_the_source_at_any_step(documents, rows):
    host = task(documents, rows)
    source = {"windows": windows.Windows, "streams": windows.Streams, "packed": windows.PackedDocuments}[rows]
    source = source(host.files["train"], 8, 4, seed=3)
    halves = [host.host_batches("train", 3, 5, 4, (index, 2)) for index in range(2)]
    for step in range(5, 9):
        whole = jax.tree.map(lambda *parts: np.concatenate(parts), *map(next, halves))
        same(whole, tasks.Batch(*source[step][:5]))
        same(whole, host.batch("train", 3, step, 4))
        tasks.check(whole, host)
        assert whole.reset[whole.inputs == 256].all() if rows != "packed" else whole.mask is not None
    assert host.vocab_size == host.num_classes == 257


@pytest.mark.parametrize("corpus", ["text", "documents"])
def test_evaluation_reads_what_text_lm_reads(corpus, request):
    host = task(corpus := request.getfixturevalue(corpus))
    device = tasks.make("text_lm", corpus=corpus, seq_len=8, tokenizer="bytes+end")
    for split in ("valid", "test"):
        count = host.num_batches(split, 3)
        assert count == device.num_batches(split, 3)
        halves = [host.host_batches(split, 0, 0, 3, (index, 3)) for index in range(3)]
        for step in range(count):
            whole = jax.tree.map(lambda *parts: np.concatenate(parts), *map(next, halves))
            same(whole, jax.device_get(device.batch(split, 0, step, 3)))
        assert next(halves[0], None) is None
    with pytest.raises(ValueError, match="training has no end"):
        host.num_batches("train", 3)


def test_streams_train_as_those_of_text_lm_where_they_begin_alike(text, tmp_path, monkeypatch):
    def draw(source, turn, bound):
        with jax.ensure_compile_time_eval():
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(source.seed), 0), turn)
            return int(jax.random.randint(key, (), 0, bound, jax.numpy.int32))

    monkeypatch.setattr(windows.Streams, "_draw", draw)
    device = tasks.make("text_lm", corpus=text, seq_len=8, tokenizer="bytes+end")
    (_, one), (_, other) = fit(task(text), tmp_path / "host"), fit(device, tmp_path / "device")
    assert one == pytest.approx(other | {"seconds": one["seconds"]}, rel=1e-5)
    for row, expected in zip(*(rows_of(tmp_path / name) for name in ("host", "device")), strict=True):
        assert row.pop("split") == expected.pop("split") and row == pytest.approx(expected, rel=1e-4)
    timing = metrics.read(tmp_path / "host/timing.jsonl")
    assert "data" in timing[-1]["spent"] and "data" not in metrics.read(tmp_path / "device/timing.jsonl")[-1]["spent"]


def test_resumes_to_the_digit_around_a_rollback(documents, tmp_path, monkeypatch):
    rows, save, saved, asked = windows.Streams.rows, Checkpoints.save, [], []

    def spoilt(source, step, wanted):
        asked.append(step)
        found = rows(source, step, wanted)
        return found._replace(weights=found.weights * np.float32("nan")) if step == 8 else found

    def stop(self, step, state):
        save(self, step, state)
        saved.append(step)
        if step == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(windows.Streams, "rows", spoilt)
    options = train.StepOptions(on_bad_step="rollback")
    whole, _ = fit(task(documents), tmp_path / "whole", options=options)
    monkeypatch.setattr(Checkpoints, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(task(documents), tmp_path / "cut", options=options)
    monkeypatch.setattr(Checkpoints, "save", save)
    asked.clear()
    host = task(documents)
    resumed, result = fit(host, tmp_path / "cut", options=options)
    assert saved == [4, 8] and rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert rows_of(tmp_path / "cut")[-3]["bad_steps"] == 1
    assert asked[:3] == [0, 0, 8] and min(asked[2:]) == 8  # the two checks of a start, then on from the checkpoint
    same(*(nnx.state(model) for model in (whole, resumed)))
    assert evaluate(resumed, host, "test", 4)["loss"] == result["test_loss"]


def test_a_rollback_moves_on_in_the_file(text):
    number = train.guard.initial("rollback", 0.0)
    number = number._replace(moved_on=number.moved_on + 7)
    host = task(text, "windows")
    reader = feed.Feed(host, "train", 0, 4, 3)
    first, moved = reader.take(0, 2), reader.take(0, 3, number)
    assert (int(first.first), int(moved.first)) == (0, 7)
    same(jax.device_get(first.batch("train", 0, 1, 4)), host.batch("train", 0, 1, 4))
    same(jax.device_get(reader.take(3, 1, ()).batch("train", 0, 10, 4)), host.batch("train", 0, 10, 4))


def test_a_mesh_divides_the_rows(documents):
    host = task(documents, "packed")
    with sharding.use(sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        assert feed.own_rows(4) == (0, 1)
        fed = feed.Feed(host, "train", 0, 4, 2).take(6, 2)
        assert fed.batches.inputs.sharding.spec == PartitionSpec(None, ("data", "fsdp"))
        same(jax.device_get(fed.batch("train", 0, np.int32(7), 4)), host.batch("train", 0, 7, 4))


def test_each_process_reads_the_rows_that_its_devices_hold(monkeypatch):
    def own(*spans):
        parts = {index: (slice(None), slice(*span)) for index, span in enumerate(spans)}
        fake = type("Sharding", (), {"addressable_devices_indices_map": lambda self, shape: parts})
        monkeypatch.setattr(feed, "_sharding", fake)
        return feed.own_rows(8)

    assert own((4, 6), (6, 8)) == own((4, 8), (4, 8)) == (1, 2)
    assert own((2, 4)) == (1, 4) and own((None, None)) == (0, 1)
    assert own((0, 2), (4, 6)) == own((2, 4), (4, 6)) == (0, 1)  # no equal part: it reads all, and keeps its own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 0}, "seq_len must be at least 1, not 0"),
        ({"seq_len": 900}, "train.npy has 900 tokens: one window of seq_len=900 needs 901"),
        ({"rows": "stream"}, "rows 'stream'; nearest: streams"),
        ({"rows": "windows"}, "rows='windows' do not go on, streams do: set carries_state=False"),
        ({"rows": "packed", "carries_state": False}, "is running text: only documents can be packed"),
        ({"ar": -1.0}, "ar must be finite and at least 0, not -1.0"),
        ({"tokenizer": "ids:9"}, "'ids:9' has no text"),
        ({"corpus": "file:none.txt"}, "cannot read corpus file none.txt"),
    ],
)
def test_bad_options_end_in_one_line(text, options, message):
    with pytest.raises(ValueError, match=message) as error:
        tasks.make("token_windows", **({"corpus": text} | options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ids.npy", np.full(100, 9), "token id 9 does not match tokenizer 'ids:9': its ids are 0 .. 8"),
        ("ids.npy", np.zeros(0, np.int32), "ids.npy"),
        ("text.txt", b"", "text.txt"),
    ],
)
def test_bad_corpora_end_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(ValueError, match=message) as error:
        tasks.make("token_windows", corpus=f"file:{path}", tokenizer="ids:9" if name == "ids.npy" else "bytes")
    assert "\n" not in str(error.value)


def test_the_command_line_trains_it_and_keeps_its_tokenizer(text, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(script.train, "evaluate_params", lambda *_, **__: {"loss": 0.0})
    plain = tiny.get_config("lm").to_dict() | {"steps": 4}
    plain["task"] = {"name": "token_windows", "corpus": text, "seq_len": 8, "tokenizer": "characters"}
    row = script.run(ConfigDict(plain), tmp_path / "run", progress=False)
    assert row["steps"] == 4 and row["data_hash"] == lookup.load(text).hash
    assert tokenizers.load(tmp_path / "run/tokenizer").vocab_size < 24


def test_a_compiled_program_cannot_read_the_file(text):
    with pytest.raises(ValueError, match="a compiled program cannot: train it with train.fit, or take text_lm"):
        jax.eval_shape(lambda step: task(text).batch("train", 0, step, 4), 0)
