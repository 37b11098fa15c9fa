"""Two processes train one run: told to stop, killed, gone on with by one, it is the run that nobody disturbed."""

import json
import os
import signal
import time

import jax
import pytest

from experiments import train as run_train
from tests import chaos_train
from tests.configs import tiny
from tests.one_of_several import fit
from tests.stand_in import Recall, model
from xlstm_jax import distributed, optim, train


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    fit(folder)
    return folder


def test_two_processes_stopped_and_killed(tmp_path, whole):
    words, run = ["tests/one_of_several.py", str(tmp_path / "run")], tmp_path / "run"
    processes = chaos_train.start(2, words, tmp_path, devices=1)
    chaos_train.wait_until((run / "checkpoints/8").exists, processes)
    processes[1].send_signal(signal.SIGTERM)
    assert chaos_train.codes(processes, 60) == [75, 75], (tmp_path / "0.txt").read_text()
    stopped = chaos_train.saved_step(run)
    assert 8 <= stopped < 44
    for index in range(2):
        assert (
            f"told to stop: saved step {stopped}; the same command goes on" in (tmp_path / f"{index}.txt").read_text()
        )

    processes = chaos_train.start(2, words, tmp_path, devices=1)
    chaos_train.wait_until(lambda: chaos_train.saved_step(run) > stopped, processes)
    processes[1].send_signal(signal.SIGKILL)
    found = chaos_train.codes(processes, 60)
    assert found[0] != 0 and found[1] == -signal.SIGKILL
    assert not (run / "result.json").exists()

    fit(run)  # two devices of one process
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    results = [json.loads((folder / "result.json").read_text()) for folder in (run, whole)]
    assert results[0] | {"seconds": 0} == results[1] | {"seconds": 0}


OWN_SEED = """
import sys
from tests.configs import tiny

def get_config(arg=None):
    config = tiny.get_config()
    config.seed = int(sys.argv[-1][-1])  # --processes=HOST:PORT,2,INDEX
    return config
"""


@pytest.mark.parametrize(
    "config, words, message",
    [
        (OWN_SEED, [], "the processes differ in config or code: config.seed is 0 on process 0; 1 on process 1"),
        (None, ["--config.+mesh.data=3"], "config.mesh: mesh data=3 does not fit 2 devices: it needs 3"),
    ],
    ids=["configs", "mesh"],
)
def test_two_processes_say_alike_what_is_wrong(config, words, message, tmp_path):
    """One line on each, and 2."""
    file = tmp_path / "own.py" if config else "tests/configs/tiny.py"
    if config:
        file.write_text(config)
    words = ["-m", "experiments.train", f"--config={file}", f"--workdir={tmp_path / 'run'}", *words]
    assert chaos_train.codes(chaos_train.start(2, words, tmp_path, devices=1), 90) == [2, 2]
    said = [(tmp_path / f"{index}.txt").read_text() for index in range(2)]
    errors = [[line for line in each.splitlines() if line.startswith("error: ")] for each in said]
    assert errors[0] == errors[1] and len(errors[0]) == 1 and message in errors[0][0], said


def test_told_at_any_question(tmp_path, whole):
    """Between dispatches, in evaluations, before the first step: the run that goes on is the same to the last digit."""
    again, stops = True, []
    while again:
        questions = iter(range(100))
        try:
            fit(tmp_path / "run", lambda: next(questions) == 6 + len(stops))  # noqa: B023
            again = False
        except train.Stopped as error:
            stops.append(int(str(error).split("saved step ")[1].split(";")[0]))
    assert len(stops) > 2 and stops == sorted(stops) and 20 in stops
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    with pytest.raises(train.Stopped, match="told to stop before the first step was done"):
        fit(tmp_path / "new", lambda: True)
    with pytest.raises(train.Stopped, match="told to stop at step 0: nothing is kept, as there is no workdir"):
        fit(None, lambda: True)


def test_sigterm_while_the_step_is_compiled(tmp_path, whole, monkeypatch):
    """It is heeded after the first dispatch, which is saved."""
    dispatch = train._dispatch

    def compiled(*arguments, **settings):
        os.kill(os.getpid(), signal.SIGTERM)
        return dispatch(*arguments, **settings)

    with distributed.Stop() as stop, monkeypatch.context() as patch:
        patch.setattr(train, "_dispatch", compiled)
        with pytest.raises(train.Stopped, match="told to stop: saved step 4; the same command goes on"):
            fit(tmp_path, stop.told)
    fit(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_sigterm_ends_the_command_with_75(tmp_path, monkeypatch, capsys):
    def stop_at_once(model, task, tx, *, told, **settings):
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not told() and time.monotonic() < deadline:
            time.sleep(0.01)
        raise train.Stopped(f"told: {told()}")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(train, "fit", stop_at_once)
    assert run_train.main(["--config=tests/configs/tiny.py", f"--workdir={tmp_path}"]) == 75
    assert "told: True" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("given", ["somewhere", "host:1,2", "host:1,two,0", "host:1,2,0,0"])
def test_processes_that_cannot_be(given, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    words = ["--config=tests/configs/tiny.py", f"--workdir={tmp_path}", f"--processes={given}"]
    assert run_train.main(words) == 2
    assert f"processes is '{given}': auto, HOST:PORT,COUNT,INDEX or, under SLURM" in capsys.readouterr().err


def test_who_is_who(monkeypatch):
    started = []
    monkeypatch.setattr(distributed, "start", lambda *who, **_: started.append(who))
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "3")
    for each in ("auto", "host:1,2,1", "host:1"):
        distributed.join(each)
    assert started == [(), ("host:1", 2, 1), ("host:1", 4, 3)]


def test_what_processes_must_agree_on(tmp_path, monkeypatch):
    asked = {}

    def agree(what, values):
        asked[what] = values
        if what == "data or folder":
            raise ValueError("the processes differ in data")

    monkeypatch.setattr(distributed, "agree", agree)
    with pytest.raises(ValueError, match="differ in data"):
        run_train.run(tiny.get_config(), tmp_path)
    values = asked["config or code"]
    assert values["config.model.dim"] == 8 and values["versions.jax"] == jax.__version__ and "commit" in values
    assert not list(tmp_path.iterdir())


def test_several_processes_need_a_mesh(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="2 processes need a mesh over all 8 devices"):
        train.fit(model(), Recall(), optim.make(learning_rate=1e-2, steps=3), steps=3, batch_size=4)
