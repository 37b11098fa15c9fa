"""Runs of a search that fall behind end early: `--search=random --prune=median`, Optuna's pruner (extra `search`).

After each evaluation but the last (config.eval_every) a run asks whether to go on: not if the best that it has reached
is worse than the median, at this step, of the other runs of its row of the sweep that have got as far (5 at least).
What counts is TABLE["select"] on the validation split. A pruned run's row has `pruned`, the step at which it ended, and
no test metrics; tables leave it out.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path

from experiments import search
from experiments.planning import Run, Sweep, parts
from xlstm_jax import metrics

OTHERS = 5  # runs that must have got as far


def pruner(sweep: Sweep, workdir: Path) -> Callable[[Run], Callable[[], bool]] | None:
    """run -> whether it is to end now; None where the sweep prunes nothing. ValueError where it cannot."""
    wanted = search.parse(parts(sweep.source)[2])
    if wanted is None or not wanted.pruner:
        return None
    optuna, table = search.optuna(), getattr(sweep.module, "TABLE", {})
    select = str(table.get("select", ""))
    if not select.startswith("valid_"):
        raise ValueError("--prune needs TABLE['select'], the validation metric (valid_…) by which runs are compared")
    for run in sweep.runs:
        config = sweep.config(run)
        if not 0 < config.get("eval_every", 0) < config.steps:
            raise ValueError("--prune needs evaluations before the last step: --config.eval_every=STEPS")
    lower = bool(table.get("lower_is_better"))

    def ask(run: Run) -> Callable[[], bool]:
        row = next(each for each in sweep.changes if search.is_of(run.overrides, each))
        others = [each for each in sweep.runs if each.id != run.id and search.is_of(each.overrides, row)]
        read = functools.partial(scores, workdir, name=select.removeprefix("valid_"))
        return lambda: behind(optuna, read(run), [read(each) for each in others], lower)

    return ask


def scores(workdir: Path, run: Run, name: str) -> dict[int, float]:
    """The validation metric at each step at which the run was evaluated."""
    file = workdir / "runs" / run.id / "metrics.jsonl"
    return dict(_scores(file, file.stat().st_size, name)) if file.exists() else {}


@functools.lru_cache(maxsize=1024)
def _scores(file: Path, size: int, name: str) -> tuple[tuple[int, float], ...]:
    lines = [line for line in metrics.read(file) if line.get("split") == "valid" and name in line]
    return tuple((line["step"], float(line[name])) for line in lines)


def behind(optuna, mine: dict[int, float], others: list[dict[int, float]], lower: bool) -> bool:
    """Whether Optuna's MedianPruner ends a run with these scores, among those that have got as far."""
    step = max(mine, default=None)
    others = [each for each in others if math.isfinite(each.get(step, math.nan))]
    if len(others) < OTHERS or not any(map(math.isfinite, mine.values())):
        return len(others) >= OTHERS
    trial, states = optuna.trial.create_trial, optuna.trial.TrialState
    study = optuna.create_study(direction="minimize" if lower else "maximize")
    study.add_trials(trial(state=states.COMPLETE, value=each[step], intermediate_values=each) for each in others)
    judge = optuna.pruners.MedianPruner(n_startup_trials=OTHERS)
    return judge.prune(study, trial(state=states.RUNNING, intermediate_values=mine))
