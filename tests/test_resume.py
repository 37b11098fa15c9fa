"""kill -9, then the same command: the metrics are those of a run that nobody disturbed, to the last digit."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.stand_in import Recall, model
from xlstm_jax import metrics, optim, train
from xlstm_jax.run import Run


def start(workdir, root):
    command = [sys.executable, "tests/stand_in.py", str(workdir), "300"]
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache"),  # compiled by the first of them alone
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.DEVNULL)


def test_killed_and_repeated_equals_undisturbed(tmp_path, request):
    root = request.config.rootpath
    with start(tmp_path / "killed", root) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "killed/checkpoints/60").is_dir() and time.monotonic() < deadline:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed/result.json").exists()
    half = (tmp_path / "killed/metrics.jsonl").read_bytes()
    with start(tmp_path / "killed", root) as process:
        assert process.wait(timeout=120) == 0
    with start(tmp_path / "whole", root) as process:
        assert process.wait(timeout=120) == 0
    whole = (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert 0 < len(half) < len(whole)
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == whole
    results = [metrics.json.loads((tmp_path / n / "result.json").read_text()) for n in ("killed", "whole")]
    assert results[0] | {"seconds": 0} == results[1] | {"seconds": 0}


def fit(workdir, steps=30):
    settings = {"batch_size": 4, "save_every": 10, "eval_every": 10, "log_every": 4, "steps_per_dispatch": 4}
    tx = optim.make(learning_rate=1e-2, steps=30)
    return train.fit(model(), Recall(), tx, steps=steps, workdir=workdir, progress=False, **settings)


@pytest.mark.parametrize("stop", [10, 20])
def test_stopped_at_a_checkpoint(tmp_path, stop, monkeypatch):
    """What was written after the checkpoint is written again, once; a line cut short does no harm."""
    fit(tmp_path / "whole")
    save = Run.save

    def save_and_stop(run, step, state):
        save(run, step, state)
        if step == stop:
            run.checkpoints.wait()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "stopped")
    with open(tmp_path / "stopped/metrics.jsonl", "a") as file:
        file.write('{"step": 24, "split": "train", "loss": 9.0}\n{"step": 25, "spl')
    timing = tmp_path / "stopped/timing.jsonl"
    saved = metrics.read(timing)[-1]
    assert saved["step"] == stop and "lost" not in saved["spent"]
    with metrics.Lines(timing) as lines:  # 100 seconds after the checkpoint, 40 of which were not training
        lines.write(step=24, seconds=saved["seconds"] + 100, spent=saved["spent"] | {"data": 40.0})
    fit(tmp_path / "stopped")
    found = metrics.read(timing)[-1]
    assert found["seconds"] > saved["seconds"] + 100
    assert (found["spent"]["lost"], found["spent"]["data"]) == (pytest.approx(60, abs=0.01), 40)
    assert (tmp_path / "stopped/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()


def test_truncate_keeps_what_was_written_when_the_checkpoint_was(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with metrics.Lines(path) as lines:
        for step, split in ((4, "train"), (5, "train"), (5, "valid"), (6, "train")):
            lines.write(step=step, split=split)
    kept = metrics.truncate(path, 5)
    assert [(row["step"], row["split"]) for row in kept] == [(4, "train"), (5, "train")]
    assert metrics.read(path) == kept
    assert metrics.truncate(tmp_path / "absent.jsonl", 5) == []


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 is no JSON object"):
        metrics.read(path)
