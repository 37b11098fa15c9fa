"""Launchers: options, what they hand out and when, killed processes, full disks, and real clusters where they are."""

import errno
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from experiments import launchers, rows, runner, status, sweep
from experiments.launchers import local, slurm
from experiments.planning import load
from xlstm_jax import metrics

HERE = Path(__file__).parent
MANY = f"{HERE / 'configs' / 'many.py'}"


@pytest.fixture
def plan():
    return load(f"{MANY}:4")


def trainer(config, folder, progress=True):
    return {"steps": config.steps, "seconds": 1.0, "valid_loss": 1.0 + config.seed}


def start(action, workdir, *arguments, run_one=trainer):
    return sweep.main([action, f"--config={MANY}:4", f"--workdir={workdir}", *arguments], run_one=run_one)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--launcher=local", "--launcher_option=worker=2"],
            "unknown option of the launcher local 'worker'; nearest: w",
        ),
        (
            ["--launcher=local", "--launcher_option=workers=two"],
            "workers is the largest number of processes: a positive",
        ),
        (
            ["--launcher=local", "--launcher_option=memory=0"],
            "memory is the GB that one run may need: a positive number",
        ),
        (["--launcher=local", "--launcher_option=workers"], "as workers=VALUE"),
        (["--launcher=slurm", "--launcher_option=tme=60"], "nearest: time"),
        (["--launcher_option=time=60"], "the launcher inline takes no options"),
        (["--launcher=slurm", "--workers=2"], "--workers=2: it goes with --launcher=local, not slurm"),
        (["--launcher=slurm"], "--launcher=slurm needs the package submitit: pip install 'xlstm_jax[slurm]'"),
        (["--launcher=ray"], "--launcher=ray needs the package ray: pip install 'xlstm_jax[ray]' or pip install ray"),
        (["--retry=done"], "failed"),
    ],
)
def test_what_cannot_be_launched_is_told_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    for package in ("submitit", "ray"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    assert start("run", tmp_path / "w", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "w").exists()


def test_submit_needs_somebody_who_goes_on(tmp_path, capsys):
    for arguments, message in (([], "submit needs a launcher"), (["--launcher=ray"], "a cluster that outlives")):
        assert start("submit", tmp_path / "w", *arguments) == 2
        assert message in capsys.readouterr().err


def test_as_many_workers_as_cores_and_memory_hold(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for free, options, wanted in (
        (None, {}, 8),
        (100e9, {}, 8),
        (5.5e9, {}, 5),
        (5.5e9, {"memory": 2.0}, 2),
        (5.5e9, {"memory": 9.0}, 1),
        (100e9, {"workers": 3}, 3),
    ):
        monkeypatch.setattr(local, "free_memory", lambda free=free: free)
        assert local.count(options) == wanted
    monkeypatch.undo()
    for name, content in (
        ("proc/meminfo", "MemTotal: 9\nMemAvailable:  2000 kB\n"),
        ("sys/fs/cgroup/memory.max", "max\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(content)
    assert local.free_memory(tmp_path) == 2000 * 1024
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("5000\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("1000\n")
    assert local.free_memory(tmp_path) == 4000
    assert local.free_memory(tmp_path / "absent") is None


VICTIM = """
import fcntl, os, signal, sys
from pathlib import Path
workdir = Path(sys.argv[1])
names = sorted(p.name for p in (workdir / "runs").iterdir() if not (p / "error.txt").exists())
if names:
    file = open(workdir / "locks" / names[0], "w")
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(str(os.getpid()))
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_worker_is_replaced_and_a_run_that_kills_each_has_failed(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(status, "POLL", 0.02)
    workdir, out = tmp_path / "w", io.StringIO()
    rows.prepare(workdir, plan)
    for run in plan.runs[:2]:
        (workdir / "runs" / run.id).mkdir()
    (tmp_path / "victim.py").write_text(VICTIM)
    local.run(
        plan, workdir, [sys.executable, str(tmp_path / "victim.py"), str(workdir)], {"workers": 1}, Console(file=out)
    )
    states = [rows.state(workdir, run, {}) for run in plan.runs]
    assert states == ["failed", "failed", "missing", "missing"]
    error = rows.error_file(workdir, plan.runs[0]).read_text()
    assert "killed (SIGKILL) 2 times" in error and f"its log: {workdir / 'logs' / 'worker-0.txt'}" in error
    assert out.getvalue().count("another takes its place") == 4


def test_a_worker_that_ends_on_a_full_disk_cannot_write_why(plan, tmp_path, monkeypatch):
    rows.prepare(tmp_path, plan)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    with pytest.raises(ValueError, match="the disk is full; 0 of 4 results are safe: make room") as error:
        with runner.telling_of_a_full_disk(plan, tmp_path):
            local.run(plan, tmp_path, [sys.executable, "-c", "raise SystemExit(2)"], {}, Console(file=io.StringIO()))
    assert "\n" not in str(error.value)


def test_two_launchers_share_and_each_run_is_done_once(tmp_path, capsys):
    workdir, calls = tmp_path / "w", []

    def outer(config, folder, progress=True):
        calls.append(config.seed)
        if config.seed == 1:  # meanwhile somebody else begins, and cannot have this one
            assert start("run", workdir, run_one=inner) == 1
            assert start("submit", workdir, "--launcher=local") == 0
        return trainer(config, folder)

    def inner(config, folder, progress=True):
        calls.append(config.seed)
        return trainer(config, folder)

    assert start("run", workdir, run_one=outer) == 0
    assert sorted(calls) == [0, 1, 2, 3] and len((workdir / "results.jsonl").read_text().splitlines()) == 4
    told = capsys.readouterr().out
    assert f"process {os.getpid()} is a launcher at work on this folder: sharing" in told
    assert f"process {os.getpid()} is a launcher at work on this folder: nothing submitted" in told


@pytest.mark.parametrize("where", ["run", "row", "error"])
def test_a_full_disk_stops_the_sweep_and_loses_nothing(tmp_path, monkeypatch, capsys, where):
    full, workdir = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), tmp_path / "w"

    def run_one(config, folder, progress=True):
        if config.seed == 2 and where == "run":
            raise ValueError("cannot save") from full
        if config.seed == 2 and where == "error":
            monkeypatch.setattr(Path, "write_text", stop)
            raise ValueError("no")
        if config.seed == 2:
            monkeypatch.setattr(os, "fsync", stop)
        return trainer(config, folder)

    def stop(*_, **__):
        raise full

    assert start("run", workdir, run_one=run_one) == 2
    monkeypatch.undo()
    error = capsys.readouterr().err
    assert "the disk is full; 2 of 4 results are safe: make room" in error and error.count("\n") == 1
    assert len((workdir / "results.jsonl").read_text().splitlines()) == 2
    assert start("run", workdir) == 0 and len((workdir / "results.jsonl").read_text().splitlines()) == 4


def test_a_file_that_does_not_fit_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        metrics.write_atomically(tmp_path / "a", "new")
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def test_only_what_is_missing_and_not_queued_is_submitted(plan, tmp_path, monkeypatch):
    queue, started = set(), []

    class Started:
        def __init__(self, number):
            self.job_id = f"{len(started)}_{number}"

    def submitted(workdir, options, work):
        jobs = [Started(number) for number in range(len(work))]
        queue.update(job.job_id for job in jobs)
        started.append([job.command[-1] for job in work])
        return jobs

    monkeypatch.setattr(slurm, "start", submitted)
    monkeypatch.setattr(slurm, "alive", lambda names: queue & set(names))
    workdir, names, console = tmp_path / "w", [run.id for run in plan.runs], Console(file=io.StringIO())
    rows.prepare(workdir, plan)
    runner.inline(plan, workdir, trainer, console=console, runs=plan.runs[:1])
    for _ in range(2):
        slurm.submit(plan, workdir, ["worker"], {"runs_per_job": 2}, console)
    assert started == [[f"--only={names[1]},{names[2]}", f"--only={names[3]}"]]
    assert status.snapshot(plan, workdir, lambda: launchers.queued(workdir)).count("queued") == 3
    queue.remove("0_0")  # it ended without a result
    slurm.submit(plan, workdir, ["worker"], {}, console)
    assert started[1:] == [[f"--only={names[1]}", f"--only={names[2]}"]]


def test_nothing_is_started_where_nothing_is_missing(tmp_path, monkeypatch, capsys):
    assert start("run", tmp_path) == 0
    monkeypatch.setattr(local.subprocess, "Popen", None)
    assert start("submit", tmp_path, "--launcher=local") == 0
    assert "nothing to submit: each run is done" in capsys.readouterr().out


def test_the_live_table_keeps_to_the_screen(plan, tmp_path):
    workdir, out = tmp_path / "w", io.StringIO()
    rows.prepare(workdir, plan)
    runner.inline(plan, workdir, trainer, console=Console(file=io.StringIO()), runs=plan.runs[2:])
    console = Console(file=out, width=120)
    console.print(status.table(plan, workdir, status.snapshot(plan, workdir), height=2))
    lines = out.getvalue().splitlines()
    assert len(lines) == 4 and lines[1].split()[0] == "2" and lines[1].endswith("*") and "and 2 more" in lines[3]
    out.truncate(0)
    runner.inline(plan, workdir, trainer, console=Console(file=io.StringIO()))
    status.show(plan, workdir, console, live=True)
    assert "4 done, 0 running, 0 failed, 0 missing; best valid_loss 1.0000" in out.getvalue()


def test_killed_launchers_lose_and_double_nothing(tmp_path):
    command = [sys.executable, HERE / "chaos_sweep.py", "--runs=8", "--kills=2", "--stand_in", f"--folder={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "8 rows, each once, all equal" in done.stdout, done.stderr[-2000:]


def absent(*names):
    """What of these packages and programs is not here."""
    found = [n for n in names if importlib.util.find_spec(n) is None and shutil.which(n) is None]
    return ", ".join(found)


def same_rows(left, right, launcher, version, found="4 rows, each once, equal to those of inline"):
    """But for the clocks; a row about it is added to the file that $LAUNCHER_ROWS names."""
    lines, clocks = (right / "results.jsonl").read_text().splitlines(), ("seconds", "wall_seconds")
    left, right = (
        {name: {k: v for k, v in row.items() if k not in clocks} for name, row in rows.read(folder).items()}
        for folder in (left, right)
    )
    assert left == right and len(left) == len(lines) == 4
    if file := os.environ.get("LAUNCHER_ROWS"):
        about = {name: json.loads(lines[0])[name] for name in ("commit", "versions", "device")}
        with metrics.Lines(file) as out:
            config = "tests/configs/many.py:4"
            out.write(launcher=launcher, version=version, config=config, found=found, but_for=clocks, **about)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reference")
    assert sweep.main(["run", f"--config={MANY}:4", f"--workdir={workdir}"]) == 0
    return workdir


def queue():
    """[(job, state)] of all that SLURM knows."""
    asked = subprocess.run(["squeue", "-h", "-o", "%i %T"], capture_output=True, text=True, check=True)
    return [tuple(line.split()) for line in asked.stdout.splitlines()]


SLURM = absent("submitit", "slurmctld", "slurmd", "munged")


@pytest.mark.skipif(bool(SLURM) or os.geteuid() != 0, reason=f"real SLURM needs root and {SLURM or 'nothing else'}")
def test_a_real_slurm_gives_the_same_rows_and_a_requeue_loses_nothing(reference, tmp_path, monkeypatch):
    script = [HERE / "start_slurm.sh", tmp_path / "slurm"]
    if (begun := subprocess.run(script, capture_output=True, text=True)).returncode:
        pytest.skip(f"SLURM does not start: {begun.stderr.strip()[-300:]}")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm" / "slurm.conf"))
    workdir = tmp_path / "w"
    try:
        assert start("submit", workdir, "--launcher=slurm", "--launcher_option=runs_per_job=4", run_one=None) == 0
        plan, limit = load(f"{MANY}:4"), time.monotonic() + 240
        while not any(rows.state(workdir, run, {}) == "running" for run in plan.runs):
            assert time.monotonic() < limit
            time.sleep(0.05)
        ((job, _),) = queue()
        subprocess.run(["scontrol", "requeue", job], check=True)
        time.sleep(1.0)
        while queue() != [(job, "RUNNING")]:  # SLURM lets a requeued job wait for two minutes
            assert time.monotonic() < limit
            subprocess.run(["scontrol", "update", f"jobid={job}", "StartTime=now"], capture_output=True)
            time.sleep(0.5)
        assert start("run", workdir, "--launcher=slurm", run_one=None) == 0
        version = subprocess.run(["sinfo", "--version"], capture_output=True, text=True, check=True).stdout.strip()
        found = "two nodes, a running job requeued: 4 rows, each once, equal to those of inline"
        same_rows(reference, workdir, "slurm", version, found)
        assert len((workdir / "submitted.jsonl").read_text().splitlines()) == 1
    finally:
        subprocess.run([*script, "stop"])


@pytest.mark.skipif(bool(absent("ray")), reason="a real Ray cluster needs the package ray")
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_real_ray_gives_the_same_rows(reference, tmp_path):
    assert start("run", tmp_path / "w", "--launcher=ray", "--launcher_option=runs_per_task=2", run_one=None) == 0
    same_rows(reference, tmp_path / "w", "ray", f"ray {importlib.metadata.version('ray')}")
