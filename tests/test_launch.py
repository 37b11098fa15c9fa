"""Jobs on other machines: what would be run, without a machine."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.launch import __main__ as launch
from experiments.launch import job, slurm, tpu
from experiments.topology import topology
from xlstm_jax import metrics

CONFIG = str(Path(__file__).resolve().parents[1] / "configs/bible.py") + ":reduced,lstm"
TPU = ["--name=a", "--zone=us-west4-a", "--topology=v5e:16x16"]
TWO = [*TPU[:2], "--topology=v5e:16x16*2"]
TRAIN = [f"--config={CONFIG}", "--workdir=/mnt/bucket/a"]


@pytest.mark.parametrize(
    "name,accelerator,hosts",
    [("v5e-256", "v5litepod-256", 64), ("v5e:2x4", "v5litepod-8", 1), ("v4:4x4x4", "v4-128", 16)]
    + [("v5p:8x8x8*2", "v5p-1024", 128), ("v6e:4x4", "v6e-16", 4), ("tpu7x:4x4x4", "tpu7x-128", 16)],
)
def test_slices(name, accelerator, hosts):
    found = topology(name)
    assert (job.accelerator(found), job.hosts_of(found)) == (accelerator, hosts)


def test_a_dry_run_shows_the_commands_of_every_slice(capsys):
    assert launch.main(["tpu", "run", *TWO, *TRAIN, "--config.steps=7", "--dry_run"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[:6] for line in lines] == [["gcloud", "compute", "tpus", "tpu-vm", "ssh", f"a-{n}"] for n in (0, 1)]
    (words,) = {word for word in lines[0] if word.startswith("--command=")}
    assert f"--config={CONFIG} --workdir=/mnt/bucket/a --processes=auto --config.steps=7" in words
    assert launch.main(["tpu", "create", *TWO, "--spot", "--dry_run"]) == 0
    created = capsys.readouterr().out
    assert "--node-prefix=a --node-count=2 --accelerator-type=v5litepod-256" in created and "--spot" in created


def test_a_watched_job_outlives_a_preemption_and_a_lost_process(monkeypatch):
    monkeypatch.setattr(tpu.time, "sleep", lambda seconds: None)
    states = iter(
        ["", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", "SUSPENDED", "ACTIVE", "ACTIVE", "ACTIVE", "ACTIVE"]
    )
    found = iter(["", "running", "", "75", "running", "0"])  # of the training, asked where the slices are there
    pod = tpu.Pod("a", "zone", topology("v5e:2x4"))

    def ask(words):
        return next(states) if "describe" in words else next(found)

    commands = list(tpu.watch(pod, ["train"], "code.tar.gz", ask))
    actions = [shlex.join(words[3:5]) if words[0] == "gcloud" else words[0] for words in commands]
    ssh, queue = "tpu-vm ssh", "queued-resources"
    setup = ["git", "tpu-vm scp", ssh]
    assert actions == [f"{queue} create", *setup, ssh, f"{queue} delete", f"{queue} create", *setup, ssh, ssh]
    assert next(states, None) is None and next(found, None) is None


def remote(commands):
    """What the shell of each host is told."""
    return [word.removeprefix("--command=") for words in commands for word in words if word.startswith("--command=")]


def test_what_a_host_is_told(tmp_path):
    """Started once, seen to be at work, told to stop; then its exit code is there, and it is started again."""
    pod = tpu.Pod("a", "zone", topology("v5e:2x4"))
    python = tmp_path / "code" / tpu.PYTHON
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (tmp_path / "code/experiments").mkdir()
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
    (tmp_path / "code/experiments/train.py").write_text(f"{code}print('begun', flush=True)\ntime.sleep(30)\n")

    def tell(commands):
        (command,) = remote(commands)
        with open(tmp_path / "said", "w") as said:
            subprocess.run(["bash", "-c", command], cwd=tmp_path, stdout=said, stderr=said, env={"PATH": os.defpath})
        return (tmp_path / "said").read_text().strip()

    def wait_for(condition):
        deadline = time.monotonic() + 30
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)

    def begun():
        return log.exists() and log.read_text().count("begun")

    log = tmp_path / tpu.LOG
    run = pod.run([tpu.PYTHON, "-m", "experiments.train", "--workdir=a b"])
    assert "No such file" in tell([pod.status()])
    for times in (1, 2):
        tell(run)
        wait_for(lambda: begun() == times)  # noqa: B023 (called at once)
        assert tell(run).isdecimal() and tell([pod.status()]) == "running"  # one is enough
        assert "at work here: stop it first" in tell(pod.setup("code.tar.gz")[-1:])
        tell(pod.stop())
        wait_for((tmp_path / tpu.ENDED).exists)
        wait_for(lambda: (tmp_path / tpu.ENDED).read_text())
        assert tell([pod.status()]) == "75"
    assert begun() == 2


def test_logs_of_any_host(capsys):
    for host, where in ((3, ["a-0", "--worker=3"]), (65, ["a-1", "--worker=1"])):
        assert launch.main(["tpu", "logs", *TWO, f"--host={host}", "--dry_run"]) == 0
        assert shlex.split(capsys.readouterr().out)[5:7] == where


def test_an_archive_names_its_commit(tmp_path, monkeypatch):
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        pytest.skip("no git repository here")
    archive = subprocess.run(["git", "archive", "HEAD", "xlstm_jax"], cwd=root, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x"], cwd=tmp_path, input=archive, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()
    assert (tmp_path / "xlstm_jax/COMMIT").read_text().strip() == head
    monkeypatch.setattr(metrics, "__file__", str(tmp_path / "xlstm_jax/metrics.py"))
    assert metrics.commit() == head


def test_results_are_no_change_of_the_code(tmp_path, monkeypatch):
    files = [tmp_path / "xlstm_jax/metrics.py", tmp_path / "results/rows.jsonl"]
    for file in files:
        file.parent.mkdir()
        file.write_text("as committed")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(metrics, "__file__", str(files[0]))
    head = metrics.commit()
    files[1].write_text("a row more")
    assert len(head) == 40 and metrics.commit() == head
    files[0].write_text("changed")
    assert metrics.commit() == head + "+dirty"


@pytest.mark.parametrize(
    "code, restarts, again",
    [(0, 0, False), (1, 0, False), (2, 0, False), (75, 99, True), (137, 0, True), (137, slurm.KILLS, False)],
)
def test_a_slurm_job_is_told_in_time_and_queued_again(code, restarts, again, tmp_path, capsys):
    words = ["slurm", "script", "--nodes=4", "--option=partition=long", f"--config={CONFIG}", "--workdir=/data/a"]
    assert launch.main(words) == 0
    script = capsys.readouterr().out
    for line in ("--nodes=4", "--signal=TERM@300", "--requeue", "--partition=long", "--output=/data/a/slurm-%j.log"):
        assert f"#SBATCH {line}\n" in script
    for name, does in (
        ("srun", f'echo "$@"; exit {code}'),
        ("scontrol", '[ "$1" = requeue ] && echo "requeue $2" || printf "n1\\nn2\\n"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.defpath}", "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]"}
    environment |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == code and "--processes=n1:12321" in done.stdout and not done.stderr
    assert ("requeue 17" in done.stdout) == again


def test_a_jobset_has_a_pod_a_host(capsys):
    words = ["kubernetes", "manifest", "--name=a", "--image=i", "--topology=v5e:16x16*2", *TRAIN]
    assert launch.main(words) == 0
    whole = json.loads(capsys.readouterr().out)["spec"]
    (jobs,) = whole["replicatedJobs"]
    spec = jobs["template"]["spec"]
    assert (jobs["replicas"], spec["parallelism"], spec["completions"]) == (2, 64, 64)
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "16x16"
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    (ends,) = spec["podFailurePolicy"]["rules"]
    assert ends["action"] == "FailJob" and ends["onExitCodes"]["values"] == [1, 2]
    assert whole["failurePolicy"]["rules"][0]["action"] == "FailJobSet"


def test_a_dry_run_shows_the_command_that_a_file_is_for(capsys):
    kubernetes = ["kubernetes", "--name=a", "--image=i", "--topology=v5e:16x16"]
    for (where, *words), write, act, command in (
        (["slurm"], "script", "submit", "$ sbatch /data/a/job.sh\n"),
        (kubernetes, "manifest", "apply", "$ kubectl apply -f -\n"),
    ):
        told = [*words, f"--config={CONFIG}", "--workdir=/data/a"]
        assert launch.main([where, write, *told]) == launch.main([where, act, *told, "--dry_run"]) == 0
        said = capsys.readouterr()
        assert said.err == command and said.out[: len(said.out) // 2] * 2 == said.out


@pytest.mark.parametrize(
    "words,message",
    [
        (["tpv", "run"], "unknown place 'tpv'; nearest: tpu"),
        (["tpu", "crate", *TPU], "unknown action of tpu 'crate'; nearest: create"),
        (["tpu", "create", "--name=a"], "tpu create needs --zone, --topology"),
        (["tpu", "run", *TPU], "tpu run needs --config, --workdir"),
        (["tpu", "create", *TPU[:2], "--topology=v4:4x4"], "unknown topology 'v4:4x4'; nearest: v4:4x4x8, v4:4x4x4"),
        (["tpu", "create", *TPU[:2], "--topology=tpu7x:4x4x4"], "there are no TPU VMs of tpu7x: use kubernetes"),
        (["slurm", "script", *TRAIN, "--nodes=0"], "--nodes is 0: at least 1 is needed"),
        (["slurm", "script", *TRAIN, "--warning=-3"], "--warning is -3: at least 1 is needed"),
        (["tpu", "run", *TPU, *TRAIN, "--config.+mesh.data=3"], "mesh data=3 does not fit 256 devices: it needs 3"),
        (["tpu", "run", *TPU, "--config=none.py", "--workdir=a"], "--config=none.py: no such Python file"),
        (["tpu", "run", *TPU, *TRAIN, "--config.stepz=3"], "unknown field 'stepz'; nearest: steps"),
        (["slurm", "script", TRAIN[0], "--workdir=gs://bucket/a"], "gs://bucket/a is not a folder: name the one where"),
        (["tpu", "logs", *TPU, "--host=64"], "--host is 64: there are 64 hosts, counted from 0"),
    ],
)
def test_wrong_arguments_are_one_line(words, message, capsys):
    assert launch.main(words) == 2
    assert message in capsys.readouterr().err


def test_a_tool_that_is_missing(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert launch.main(["tpu", "delete", *TPU]) == 2
    assert "gcloud is not installed here: install it, or see the commands by --dry_run" in capsys.readouterr().err
