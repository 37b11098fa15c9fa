"""Jobs on other machines: what would be run, without a machine."""

import json
import shlex
from pathlib import Path

import pytest

from experiments.launch import __main__ as launch
from experiments.launch import job, tpu

CONFIG = str(Path(__file__).resolve().parents[1] / "configs/bible.py") + ":reduced,lstm"
TPU = ["--name=a", "--zone=us-west4-a", "--topology=v5e:16x16"]
TRAIN = [f"--config={CONFIG}", "--workdir=gs://bucket/a"]


@pytest.mark.parametrize(
    "topology,accelerator,hosts",
    [("v5e:16x16", "v5litepod-256", 64), ("v5e:2x4", "v5litepod-8", 1), ("v4:4x4x4", "v4-128", 16)]
    + [("v5p:8x8x8", "v5p-1024", 128), ("v6e:4x4", "v6e-16", 4)],
)
def test_slices(topology, accelerator, hosts):
    found = job.parse(topology)
    assert (found.accelerator, found.hosts) == (accelerator, hosts)


def test_a_dry_run_shows_the_commands_of_every_slice(capsys):
    assert launch.main(["tpu", "run", *TPU, *TRAIN, "--slices=2", "--config.steps=7", "--dry_run"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[:6] for line in lines] == [["gcloud", "compute", "tpus", "tpu-vm", "ssh", f"a-{n}"] for n in (0, 1)]
    (words,) = {word for word in lines[0] if word.startswith("--command=")}
    assert f"--config={CONFIG} --workdir=gs://bucket/a --processes=auto --config.steps=7" in words
    assert launch.main(["tpu", "create", *TPU, "--slices=2", "--spot", "--dry_run"]) == 0
    created = capsys.readouterr().out
    assert "--node-prefix=a --node-count=2 --accelerator-type=v5litepod-256" in created and "--spot" in created


def test_a_watched_job_outlives_a_preemption(monkeypatch):
    monkeypatch.setattr(tpu.time, "sleep", lambda seconds: None)
    states = iter(["ACTIVE", "ACTIVE", "SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE"])
    running = iter(["17", ""])
    pod = tpu.Pod("a", "zone", job.parse("v5e:2x4"))

    def ask(words):
        return next(states) if "describe" in words else next(running)

    commands = list(tpu.watch(pod, ["train"], "code.tar.gz", ask))
    actions = [shlex.join(words[3:5]) if words[0] == "gcloud" else words[0] for words in commands]
    ssh, queue = "tpu-vm ssh", "queued-resources"
    assert actions == [ssh, f"{queue} delete", f"{queue} create", "git", "tpu-vm scp", ssh, ssh]


def test_a_slurm_job_is_told_in_time_and_queued_again(capsys):
    words = ["slurm", "script", "--nodes=4", "--option=partition=long", f"--config={CONFIG}", "--workdir=/data/a"]
    assert launch.main(words) == 0
    script = capsys.readouterr().out
    for line in ("--nodes=4", "--signal=TERM@300", "--requeue", "--partition=long", "--output=/data/a/slurm-%j.log"):
        assert f"#SBATCH {line}\n" in script
    assert '--processes="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):12321"' in script
    assert 'scontrol requeue "$SLURM_JOB_ID"' in script


def test_a_jobset_has_a_pod_a_host(capsys):
    words = ["kubernetes", "manifest", "--name=a", "--image=i", "--topology=v5e:16x16", "--slices=2", *TRAIN]
    assert launch.main(words) == 0
    (jobs,) = json.loads(capsys.readouterr().out)["spec"]["replicatedJobs"]
    spec = jobs["template"]["spec"]
    assert (jobs["replicas"], spec["parallelism"], spec["completions"]) == (2, 64, 64)
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "16x16"
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}


@pytest.mark.parametrize(
    "words,message",
    [
        (["tpv", "run"], "unknown place 'tpv'; nearest: tpu"),
        (["tpu", "crate", *TPU], "unknown action of tpu 'crate'; nearest: create"),
        (["tpu", "create", "--name=a"], "tpu create needs --zone, --topology"),
        (["tpu", "run", *TPU], "tpu run needs --config, --workdir"),
        (["tpu", "create", *TPU[:2], "--topology=v5:4x4"], "unknown TPU generation 'v5'; nearest: v5"),
        (["tpu", "create", *TPU[:2], "--topology=v4:4x4"], "v4 has 3 axes, such as v4:4x4x4"),
        (["tpu", "create", *TPU, "--slices=0"], "--slices is 0: at least 1 is needed"),
        (["tpu", "run", *TPU, "--config=none.py", "--workdir=a"], "--config=none.py: no such Python file"),
    ],
)
def test_wrong_arguments_are_one_line(words, message, capsys):
    assert launch.main(words) == 2
    assert message in capsys.readouterr().err


def test_a_tool_that_is_missing(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert launch.main(["tpu", "delete", *TPU]) == 2
    assert "gcloud is not installed here: install it, or see the commands by --dry_run" in capsys.readouterr().err
