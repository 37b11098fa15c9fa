"""Tasks on a Ray cluster, or on a local one that it starts: each task a worker process, retried elsewhere.

The nodes must see the folder and this source tree under the same names.
"""

import hashlib
import os
import subprocess
import warnings
from pathlib import Path

from rich.console import Console

from experiments import launchers, rows, runner, status
from experiments.launchers import local
from experiments.planning import Sweep

OPTIONS = {
    "address": (str, "the cluster, such as auto or ray://HOST:10001; a local one if left out"),
    "cpus": (float, "the cores of a task"),
    "gpus": (float, "the GPUs of a task"),
    "memory": (float, "the GB of a task"),
    "runs_per_task": (int, "the number of runs that a task does"),
    "retries": (int, "how often a task is started again that a node's end has killed"),
}
RETRIES = 3


def check(action: str, options: dict) -> None:
    """Ray is here; what goes on alone needs a cluster that stays."""
    if action == "submit" and "address" not in options:
        raise ValueError(
            "submit --launcher=ray needs a cluster that outlives this process: start one (ray start --head) and name"
            " it: --launcher_option=address=auto"
        )
    launchers.extra("ray", "ray")


def run(sweep: Sweep, workdir: Path, command: list[str], options: dict, console: Console) -> None:
    """Tasks for what is missing; returns when all have ended. If this process ends, Ray ends its tasks."""
    ray = connect(options)
    try:
        done, waiting = rows.read(workdir), {}
        missing = [run for run in sweep.runs if rows.state(workdir, run, done) == "missing"]
        for share in launchers.shares(missing, options.get("runs_per_task", 1)):
            names = [run.id for run in share]
            words = [*command, f"--only={','.join(names)}"], str(Path.cwd()), str(log(workdir, names[0]))
            waiting[task(ray, options).remote(*words)] = names[0]
        told: set = set()

        def alive() -> bool:
            ended, left = ray.wait(list(waiting), num_returns=len(waiting), timeout=0) if waiting else ([], [])
            for each in set(ended) - told:
                told.add(each)
                try:
                    ray.get(each)
                except ray.exceptions.RayError as error:
                    words = f"  {waiting[each]}: its task has ended: {runner.one_line(error)[-300:]}"
                    console.print(words, highlight=False, markup=False, soft_wrap=True)
            return bool(left)

        cores = ray.cluster_resources().get("CPU", 1.0)
        status.watch(sweep, workdir, alive, int(cores / options.get("cpus", 1.0)) or 1, console, "ray")
    finally:
        ray.shutdown()


def submit(sweep: Sweep, workdir: Path, command: list[str], options: dict, console: Console) -> None:
    """One detached actor on the cluster that runs this launcher there; its name keeps it from being started twice."""
    if not launchers.to_submit(sweep, workdir, console):
        return
    ray = connect(options)
    try:
        name = f"sweep-{hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:12]}"
        flags = [f"--launcher_option={option}={value}" for option, value in (options | {"address": "auto"}).items()]
        process = [*command, "--launcher=ray", *flags]

        class Launcher:
            def __init__(self, process: list[str], folder: str, log: str):
                import threading

                def follow():
                    with open(log, "ab") as file:
                        subprocess.run(process, cwd=folder, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
                    os._exit(0)

                threading.Thread(target=follow, daemon=True).start()

            def ready(self) -> bool:
                return True

        kind = ray.remote(Launcher).options(name=name, namespace="xlstm_jax", lifetime="detached", num_cpus=0)
        try:
            ray.get_actor(name, namespace="xlstm_jax")
            console.print("a launcher for this folder is at work on the cluster: nothing submitted", highlight=False)
        except ValueError:
            ray.get(kind.remote(process, str(Path.cwd()), str(log(workdir, "launcher"))).ready.remote())
            words = f"the cluster goes on by itself: {log(workdir, 'launcher')}"
            console.print(words, highlight=False, markup=False, soft_wrap=True)
    finally:
        ray.shutdown()


def alive(names: list[str]) -> set[str]:
    """Nothing is recorded as waiting: the cluster's launcher keeps the queue."""
    return set()


def connect(options: dict):
    """The ray module, connected to the cluster or to a local one with this machine's cores."""
    ray = launchers.extra("ray", "ray")
    known = {"PYTHONPATH": local.environment()["PYTHONPATH"]}
    settings = dict(runtime_env={"env_vars": known}, log_to_driver=False, logging_level="ERROR")
    if "address" not in options:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a cluster of this process alone needs no token
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves the runs on a machine with other work
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # JAX's: what Ray forks becomes a program
            ray.init(num_cpus=local.count(options), include_dashboard=False, **settings)
        return ray
    try:
        ray.init(address=options["address"], **settings)
    except (ConnectionError, RuntimeError, ValueError) as error:
        words = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--launcher_option=address={options['address']}: no Ray cluster answers there: {words}"
        ) from None
    return ray


def task(ray, options: dict):
    """The remote function with what it needs."""
    needs = {"num_cpus": options.get("cpus", 1.0), "num_gpus": options.get("gpus", 0.0)}
    if "memory" in options:
        needs["memory"] = options["memory"] * 1e9
    return ray.remote(work).options(max_retries=options.get("retries", RETRIES), **needs)


def work(command: list[str], folder: str, log: str) -> None:
    """A worker in a process of its own, which ends when Ray ends this one."""
    with open(log, "ab") as file:
        process = subprocess.run(command, cwd=folder, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
    if process.returncode:
        raise RuntimeError(f"the worker ended with code {process.returncode}: {log}")


def log(workdir: Path, name: str) -> Path:
    """Where a task's process writes."""
    return (workdir / "logs" / f"ray-{name}.txt").absolute()
