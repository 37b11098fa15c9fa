"""How the missing runs of a sweep get done elsewhere: one file a launcher, chosen by name.

Each file has OPTIONS, {name: (type, what it is)}, and these functions:

    check(action, options)       ValueError, before anything starts, where the launcher cannot be used
    run(sweep, workdir, command, options, console)       start what is missing; return when nothing more will happen
    submit(sweep, workdir, command, options, console)    start what is missing and return
    alive(names)                 which of the submitted jobs still wait or run

`command` is that of a worker, which does runs one after the other: it takes --worker=K/N (all that is missing,
beginning with every N-th) or --only=ID,ID. Whoever starts it, a run is done by the one process that holds its lock.
"""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from experiments import rows, runner
from experiments.planning import Run, Sweep, parse_override
from xlstm_jax import metrics
from xlstm_jax.names import unknown

SUBMITTED = "submitted.jsonl"
NAMES = ("inline", "local", "slurm", "ray")  # inline: in the asking process itself, `runner.inline`


def get(name: str) -> ModuleType:
    """The module of a launcher other than inline."""
    return importlib.import_module(f"experiments.launchers.{name}")


def parse_options(name: str, words: list[str]) -> dict[str, Any]:
    """["time=60"] -> {"time": 60}; ValueError for a name or a type that the launcher does not take."""
    valid = {} if name == "inline" else get(name).OPTIONS
    found = {}
    for word in words:
        option, value = parse_override(word) if "=" in word else (word, None)
        if option not in valid:
            if not valid:
                raise ValueError(f"--launcher_option={word}: the launcher {name} takes no options")
            raise ValueError(f"--launcher_option={word}: {unknown(f'option of the launcher {name}', option, valid)}")
        kind, what = valid[option]
        if kind is str and value is not None:
            value = word.partition("=")[2]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (kind is not str and value <= 0):
            wanted = {str: "text", int: "a positive integer", float: "a positive number"}[kind]
            raise ValueError(f"--launcher_option={word}: {option} is {what}: {wanted} is needed, as {option}=VALUE")
        found[option] = value
    return found


def extra(package: str, launcher: str) -> ModuleType:
    """A package that only this launcher needs; one line with the command where it is absent."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(
            f"--launcher={launcher} needs the package {package}: pip install 'xlstm_jax[{launcher}]' or"
            f" pip install {package}"
        ) from None


def record(workdir: Path, launcher: str, jobs: dict[str, list[Run]]) -> None:
    """Note which runs were handed to which jobs."""
    with metrics.Lines(workdir / SUBMITTED) as lines:
        for name, runs in jobs.items():
            lines.write(launcher=launcher, job=name, runs=[run.id for run in runs])


def queued(workdir: Path) -> set[str]:
    """The runs that a submitted job, still waiting or running, will do."""
    jobs = metrics.read(workdir / SUBMITTED)
    found = set()
    for launcher in {job["launcher"] for job in jobs}:
        here = [job for job in jobs if job["launcher"] == launcher]
        names = get(launcher).alive([job["job"] for job in here])
        found |= {name for job in here if job["job"] in names for name in job["runs"]}
    return found


def to_submit(sweep: Sweep, workdir: Path, console: Console) -> list[Run]:
    """What nobody has done, does, or will do; says so if that is nothing."""
    done, waiting = rows.read(workdir), queued(workdir)
    found = [run for run in sweep.runs if rows.state(workdir, run, done) == "missing" and run.id not in waiting]
    if not found:
        words = "nothing to submit: each run is done, has failed, runs, or waits in a queue"
        console.print(words, highlight=False, markup=False, soft_wrap=True)
    return found


def shares(runs: list[Run], size: int) -> list[list[Run]]:
    """The runs in jobs of `size`, seeds of one setting together (they share compiled programs)."""
    ordered = runner.in_order(runs)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]
