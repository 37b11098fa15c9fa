"""Groups of a sweep's runs that are one program each, and a launcher that runs a group at once.

Runs belong together where their configs differ in the seed, the label and numbers of the optimiser alone
(`optim.NUMBERS`; 0 and another value of one number are different programs).
"""

import contextlib
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict
from rich.console import Console

from experiments import pruning, rows, runner
from experiments.build import (
    COUNTS,
    INTERVALS,
    STEP,
    abstract_model,
    build_model,
    build_optimizer,
    build_task,
    chosen_forms,
    resolve,
)
from experiments.planning import Run, Sweep
from experiments.train import check_workdir, recorded_dtypes, use_compilation_cache
from experiments.train import run as run_alone
from xlstm_jax import metrics, optim, vectorize
from xlstm_jax.data import tokenizers

MODES = ("auto", "on", "off")
TOGETHER = 64  # runs of one program at most


def wanted(mode: str) -> bool:
    """auto: not on a CPU, where it saves compilations only."""
    return mode == "on" or (mode == "auto" and jax.default_backend() != "cpu")


def program(config: ConfigDict, together: bool = True) -> str:
    """What of a config decides the compiled program: equal for runs that share one; `together`: numbers are traced."""
    plain = {name: value for name, value in config.to_dict().items() if name not in ("seed", "label")}
    if together and isinstance(plain.get("optimizer"), dict):
        plain["optimizer"] = {k: bool(v) if k in optim.NUMBERS else v for k, v in plain["optimizer"].items()}
    return json.dumps(plain, sort_keys=True, default=str)


def groups(sweep: Sweep, runs: list[Run], most: int = TOGETHER) -> list[list[Run]]:
    """The runs by program, in the sweep order, at most `most` in each; one with its own mesh or step is alone."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        config = sweep.config(run)
        alone = config.get("mesh") or any(config.get(name, plain) != plain for name, plain in STEP.items())
        found.setdefault(run.id if alone else program(config), []).append(run)
    return [group[start : start + most] for group in found.values() for start in range(0, len(group), most)]


def launch_groups(
    sweep: Sweep, workdir: Path, *, console: Console, runs: list[Run] | None = None, run_group: Callable | None = None
) -> None:
    """Run what is missing, a group at a time; a run that fails leaves error.txt and the others go on.

    As `runner.inline`, this passes over what is done, failed or another process's, and a full disk stops all.
    """
    done, run_group = rows.read(workdir), run_group or together
    pruner = pruning.pruner(sweep, workdir)
    queue = groups(sweep, [run for run in (sweep.runs if runs is None else runs) if run.id not in done])
    while queue:
        group = queue.pop(0)
        with contextlib.ExitStack() as stack:
            mine = [run for run in group if stack.enter_context(rows.claim(workdir, run))]
            done = rows.read(workdir)
            mine = [run for run in mine if run.id not in done and not rows.error_file(workdir, run).exists()]
            if not mine:
                continue
            left = runner.clock_or_unknown(runner.seconds_left(sweep, [*mine, *(r for g in queue for r in g)], done))
            console.print(f"{len(mine)} runs at once: {mine[0].id} and on (sweep: {left} left)", highlight=False)
            runner.free_programs()
            folders = [workdir / "runs" / run.id for run in mine]
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            start = time.monotonic()
            try:
                judged = {"pruned": [pruner(run) for run in mine]} if pruner else {}
                results = run_group([sweep.config(run) for run in mine], folders, **judged)
            except Exception as error:
                if runner.is_full(error):
                    raise
                if len(mine) > 1 and "RESOURCE_EXHAUSTED" in str(error):
                    half = len(mine) // 2
                    console.print(f"  out of memory: {half} runs at once from now on", highlight=False)
                    queue = [part[i : i + half] for part in (mine, *queue) for i in range(0, len(part), half)]
                    continue
                results = [error] * len(mine)
            share = round((time.monotonic() - start) / len(mine), 3)
            for run, result in zip(mine, results):
                if isinstance(result, Exception):
                    rows.error_file(workdir, run).write_text("".join(traceback.format_exception(result)))
                    console.print(f"  failed: {run.id}: {runner.one_line(result)}", highlight=False, markup=False)
                    continue
                named = {"id": run.id, "overrides": run.overrides}
                rows.append(workdir, named | result | named | {"wall_seconds": share})


def together(
    configs: list[ConfigDict],
    folders: list[Path],
    progress: bool = True,
    pruned: list[Callable[[], bool]] | None = None,
) -> list[dict[str, Any] | Exception]:
    """Train runs of one program, or go on with them: each one's result row, or how it diverged. One is run alone.

    pruned: of each run, asked after each evaluation but the last; where it says yes the run ends, and stands still.
    """
    pruned = pruned or [bool] * len(configs)
    if len(configs) == 1:
        return [run_alone(configs[0], folders[0], progress=progress, pruned=pruned[0])]
    plains = [resolve(config) for config in configs]
    first, task = plains[0], build_task(plains[0])
    for plain in plains:
        build_optimizer(plain)
    graphdef, shapes = abstract_model(first, task)
    data_hash = getattr(task, "data_hash", None)
    folders = [Path(folder).absolute() for folder in folders]
    found = [check_workdir(folder, plain, data_hash) for folder, plain in zip(folders, plains)]
    if None not in found:
        return found
    use_compilation_cache()
    environment = metrics.environment()
    environment["precision"] |= recorded_dtypes(first)
    environment["forms"] = chosen_forms(graphdef, shapes, task, first)
    initial = jax.jit(lambda seed: nnx.split(build_model(first, task, seed))[1])
    members, places = [], [index for index, row in enumerate(found) if row is None]
    for index in places:
        plain, folder = plains[index], folders[index]
        if hasattr(task, "coder"):
            tokenizers.save(task.coder, folder / "tokenizer")
        record = {"id": folder.name, "config": plain} | environment | {"data_hash": data_hash}
        settings = optim.settings(**plain["optimizer"], steps=plain["steps"])
        members.append(vectorize.Member(initial(plain["seed"]), plain["seed"], settings, folder, record, pruned[index]))
    names = [name for name in (*COUNTS, *INTERVALS) if name not in ("seed", "max_bad_steps")]
    shared = {name: first[name] for name in names} | {"progress": progress, "label": f"{len(members)} runs"}
    for index, result in zip(places, vectorize.fit(members, graphdef, task, **shared)):
        found[index] = result
    return found
