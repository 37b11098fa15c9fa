"""Jobs of a SLURM array (submitit): requeued when preempted or out of time, each run going on from its checkpoint.

The nodes must see the folder and this source tree under the same names.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

from rich.console import Console

from experiments import launchers, status
from experiments.launchers import local
from experiments.planning import Sweep

PARAMETERS = {
    "partition": (str, "the partition"),
    "time": (int, "the time limit of a job in minutes"),
    "cpus_per_task": (int, "the cores of a job"),
    "mem": (str, "the memory of a job, such as 4GB"),
    "gpus_per_node": (int, "the GPUs of a job"),
    "account": (str, "the account"),
    "qos": (str, "the quality of service"),
    "constraint": (str, "the features that a node must have"),
    "exclude": (str, "the nodes to leave out"),
    "nodelist": (str, "the nodes to use"),
    "array_parallelism": (int, "the largest number of jobs at once"),
    "signal_delay_s": (int, "the seconds between the warning and the end of a job"),
}
OPTIONS = PARAMETERS | {
    "runs_per_job": (int, "the number of runs that a job does"),
    "requeues": (int, "how often a job that ran out of time is queued again"),
}
DEFAULTS = {"time": 60, "cpus_per_task": 1, "array_parallelism": 256, "signal_delay_s": 90}
INTERVAL = 5.0  # seconds between two questions to the queue


def check(action: str, options: dict) -> None:
    """submitit is here, and SLURM."""
    launchers.extra("submitit", "slurm")
    for name in ("sbatch", "squeue"):
        if shutil.which(name) is None:
            raise ValueError(f"--launcher=slurm: there is no {name} on this machine: go to a login node of the cluster")


class Job:
    """What a job does: a worker process, which ends when this one does; submitit pickles it."""

    def __init__(self, command: list[str], folder: str):
        self.command, self.folder = command, folder

    def __call__(self) -> int:
        options = dict(cwd=self.folder, env=local.environment(), start_new_session=True)  # signals are for submitit
        code = subprocess.run(self.command, **options).returncode
        if code:
            raise RuntimeError(f"the worker ended with code {code}")
        return code

    def checkpoint(self):
        """Preempted or out of time: the same again; what the runs have saved is where they go on."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def submit(sweep: Sweep, workdir: Path, command: list[str], options: dict, console: Console) -> None:
    """One array for all that is missing and that no earlier job still waits to do."""
    runs = launchers.to_submit(sweep, workdir, console)
    if not runs:
        return
    shares = launchers.shares(runs, options.get("runs_per_job", 1))
    work = [Job([*command, f"--only={','.join(run.id for run in share)}"], os.getcwd()) for share in shares]
    started = start(workdir, options, work)
    launchers.record(workdir, "slurm", {job.job_id: share for job, share in zip(started, shares)})
    words = f"submitted {len(runs)} runs as {len(started)} jobs: {started[0].job_id.partition('_')[0]}"
    console.print(words, highlight=False, markup=False, soft_wrap=True)


def start(workdir: Path, options: dict, work: list[Job]) -> list:
    """submitit's jobs, one an element."""
    submitit = launchers.extra("submitit", "slurm")
    folder = (workdir / "logs" / "slurm").absolute()
    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=options.get("requeues", 100))
    given = DEFAULTS | {name: value for name, value in options.items() if name in PARAMETERS}
    executor.update_parameters(job_name=workdir.name, additional_parameters={"requeue": True}, **given)
    os.environ["PYTHONPATH"] = local.environment()["PYTHONPATH"]  # sbatch hands it on: the job must find this file
    try:
        with executor.batch():
            return [executor.submit(each) for each in work]
    except submitit.core.utils.FailedJobError as error:
        raise ValueError(f"--launcher=slurm: sbatch says: {' '.join(str(error).split())}") from None


def run(sweep: Sweep, workdir: Path, command: list[str], options: dict, console: Console) -> None:
    """Submit, and watch until none of the sweep's jobs is left; an interruption leaves the jobs alone."""
    submit(sweep, workdir, command, options, console)
    queue = Queue(workdir)
    workers = options.get("array_parallelism", DEFAULTS["array_parallelism"])
    status.watch(sweep, workdir, queue.alive, workers, console, "slurm", queued=queue.runs)


class Queue:
    """The runs in the queue, asked for now and then only."""

    def __init__(self, workdir: Path):
        self._workdir, self._runs = workdir, launchers.queued(workdir)
        self._time = time.monotonic()

    def runs(self) -> set[str]:
        if time.monotonic() - self._time > INTERVAL:
            self._runs, self._time = launchers.queued(self._workdir), time.monotonic()
        return self._runs

    def alive(self) -> bool:
        return bool(self.runs())


def alive(names: list[str]) -> set[str]:
    """Those of the jobs that the queue still lists; none where there is no queue to ask."""
    if shutil.which("squeue") is None:
        return set()
    asked = subprocess.run(
        ["squeue", "--noheader", "--array", "--format=%i", "--states=PD,R,CF,CG,S,RQ,RH,SO,RS"],
        capture_output=True,
        text=True,
    )
    if asked.returncode:
        raise ValueError(f"squeue cannot say which jobs wait: {' '.join(asked.stderr.split())}")
    return set(names) & set(asked.stdout.split())
