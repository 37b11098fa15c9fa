"""Processes that start together, agree or say in what they differ, and name the one that does not come."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from tests import chaos_train
from xlstm_jax import distributed

SCRIPT = """
import sys, time
import jax
from xlstm_jax import distributed
address, index = sys.argv[1], int(sys.argv[2])
distributed.start(address, 2, index, wait=60, heartbeat=20)
distributed.agree("the config", {"steps": 3, "seed": 1}, 30)
distributed.meet(30)
try:
    distributed.agree("the config", {"steps": 3, "seed": index}, 30)
except ValueError as error:
    print(error, flush=True)
if index == 0:
    try:
        distributed.meet(0.3, "to save step 5")
    except RuntimeError as error:
        print(error, flush=True)
else:
    time.sleep(0.5)
    distributed.meet(30)
print(distributed.of_first("look", lambda: [index, "looked"]), flush=True)
try:
    with distributed.together("read"):
        if index == 1:
            raise OSError("no such file")
except (ValueError, OSError) as error:
    print(type(error).__name__, error, flush=True)
with distributed.Watch(limit=1) as watch:
    watch.beat(7 + index)
    time.sleep(30)
"""


def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (tmp_path / "script.py").write_text(SCRIPT)
    root = Path(__file__).resolve().parents[1]
    processes = [
        subprocess.Popen(
            [sys.executable, tmp_path / "script.py", address, str(index)],
            env={"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "PATH": "", "XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    for out, _ in outputs:
        assert "the processes differ in the config: seed is 0 on process 0; 1 on process 1" in out
        assert "[0, 'looked']" in out
    assert "ValueError process 1: no such file" in outputs[0][0] and "OSError no such file" in outputs[1][0]
    assert "waited 0.3 s to save step 5: process 1 did not come" in outputs[0][0]
    assert "no step for 1 s" in outputs[0][1] + outputs[1][1]
    assert any("furthest behind, at step 7: process 0" in err for _, err in outputs)
    assert {process.returncode for process in processes} == {distributed.AGAIN}


def test_one_process_waits_for_nobody():
    distributed.meet(0.1)
    distributed.agree("the config", {"steps": 3})
    with distributed.Watch(limit=0.1) as watch:
        watch.beat(1)


@pytest.mark.parametrize(
    "arguments,limits,message",
    [
        (("somewhere", 2, 0), {}, "address is 'somewhere': host:port of process 0 is needed"),
        (("localhost:1", 2, 2), {}, "index is 2: the number of one of 2 processes is needed"),
        (("localhost:1", None, None), {}, "did not come together .*not given, .*: count, index"),
        (("localhost:1", 2, 0), {"wait": 0}, "the limit of a start is 0: seconds are needed, more than 0"),
        (("localhost:1", 2, 0), {"heartbeat": 0}, "heartbeat is 0: seconds are needed, at least 1"),
    ],
)
def test_a_start_with_wrong_arguments(arguments, limits, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        distributed.start(*arguments, **{"wait": 1} | limits)


def test_a_start_that_process_0_does_not_answer(monkeypatch, capfd):
    ended = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: time.sleep(0.3))
    monkeypatch.setattr(distributed.os, "_exit", ended.append)
    monkeypatch.setattr(distributed, "GRACE", 0)
    distributed.start("localhost:1", 2, 1, wait=0.05)
    assert ended == [distributed.AGAIN]
    assert "error: process 1: nothing was heard of process 0 at localhost:1 for 0.05 s" in capfd.readouterr().err
    distributed.start("localhost:1", 2, 1, wait=5)
    time.sleep(0.1)
    assert len(ended) == 1


START = """
import sys
from xlstm_jax import distributed
try:
    distributed.join(sys.argv[1], wait=2)
except ValueError as error:
    sys.exit(f"error: {error}")
"""


@pytest.mark.parametrize(
    "who, code, words",
    [
        (["4,0", "4,2"], distributed.AGAIN, "waited 2 s for all to come: process 1, 3 did not. Ending"),
        (["2,0", "3,1"], 1, "processes 0, 1, ... were told differently how many they are: 2, 3"),
    ],
)
def test_a_start_that_cannot_be(who, code, words):
    """One line on every process."""
    address, environment = chaos_train.free_address(), os.environ | chaos_train.variables(devices=1)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", START, f"{address},{each}"], env=environment, stderr=subprocess.PIPE, text=True
        )
        for each in who
    ]
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [code, code], said
    assert all(words in each and each.startswith("error: ") and each.count("\n") == 1 for each in said), said
