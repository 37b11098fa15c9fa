"""Search beyond grids: `--config=FILE.py[:arg]@random,TRIALS,SEED` or `@tpe,TRIALS,SEED`, behind the same sweep; with
`,median` behind it, runs that fall behind end early (`experiments.pruning`).

A config's `search(arg)` gives a space, {"optimizer.learning_rate": log_uniform(1e-4, 0.1), "seed": choice(0, 1, 2)};
every row of its `sweep(arg)` gets TRIALS runs, each the row and a draw from the space.

random    draw t depends on (SEED, t) alone: the same for every row, and a larger TRIALS keeps the runs that there are
tpe       Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), a study a row, on the validation metric
          TABLE["select"]; what was proposed is in DIR/search.jsonl, so that a killed search goes on
"""

import itertools
import json
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xlstm_jax import metrics
from xlstm_jax.names import unknown

METHODS = ("random", "tpe")
PRUNERS = ("median",)
PROPOSED = "search.jsonl"


class Number(NamedTuple):
    """A float in [low, high], or its logarithm, uniformly; four digits are kept."""

    low: float
    high: float
    log: bool

    def draw(self, random: np.random.Generator) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = random.uniform(low, high)
        return self.rounded(math.exp(value) if self.log else value)

    def rounded(self, value: float) -> float:
        return min(max(float(f"{value:.4g}"), self.low), self.high)

    def suggest(self, trial: Any, name: str) -> float:
        return self.rounded(trial.suggest_float(name, self.low, self.high, log=self.log))


class Choice(NamedTuple):
    """One of some values, all alike."""

    values: tuple

    def draw(self, random: np.random.Generator) -> Any:
        return self.values[random.integers(len(self.values))]

    def suggest(self, trial: Any, name: str) -> Any:
        return trial.suggest_categorical(name, self.values)


def uniform(low: float, high: float) -> Number:
    """A float between the two."""
    return _number(low, high, False)


def log_uniform(low: float, high: float) -> Number:
    """A float between the two, each factor as likely as any other."""
    if not low > 0:
        raise ValueError(f"log_uniform({low}, {high}): the lower bound must be positive")
    return _number(low, high, True)


def choice(*values: Any) -> Choice:
    """One of the values."""
    if not values:
        raise ValueError("choice(): at least one value is needed")
    return Choice(values)


def _number(low: float, high: float, log: bool) -> Number:
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"{'log_' * log}uniform({low}, {high}): two finite bounds, the lower first, are needed")
    return Number(float(low), float(high), log)


class Search(NamedTuple):
    """What stands after the @ of a source."""

    method: str
    trials: int
    seed: int
    pruner: str = ""


def parse(text: str) -> Search | None:
    """ "random,20,0" -> Search("random", 20, 0); "" -> None."""
    if not text:
        return None
    method, *numbers = text.split(",")
    if method not in METHODS:
        raise ValueError(unknown("search", method, METHODS))
    pruner = numbers.pop() if len(numbers) == 3 else ""
    if pruner and pruner not in PRUNERS:
        raise ValueError(unknown("pruner", pruner, PRUNERS))
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers) or int(numbers[0]) < 1:
        raise ValueError(
            f"search {text!r}: wanted is {method},TRIALS,SEED with at least 1 trial, such as {method},20,0"
        )
    return Search(method, *map(int, numbers), pruner)


def check_space(space: Any, changes: list[dict[str, Any]]) -> None:
    """ValueError for what is no space, or for a field that the sweep sets itself."""
    if not isinstance(space, dict) or not space:
        raise ValueError("search() must return a dictionary of fields, such as {'seed': choice(0, 1)}")
    for name, each in space.items():
        if not isinstance(each, Number | Choice):
            raise ValueError(f"search(): {name} is {each!r}: uniform, log_uniform or choice is needed")
        if any(name in row for row in changes):
            raise ValueError(f"search() and sweep() both set {name}: leave it out of one of them")


def is_of(overrides: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether a run belongs to this row of the sweep."""
    return all(name in overrides and overrides[name] == value for name, value in row.items())


def random_rows(space: dict, search: Search, changes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every row with every draw; equal draws once."""
    draws: list[dict] = []
    for trial in range(search.trials):
        random = np.random.default_rng([search.seed, trial])
        drawn = {name: each.draw(random) for name, each in space.items()}
        if drawn not in draws:
            draws.append(drawn)
    return [row | drawn for row, drawn in itertools.product(changes, draws)]


def proposals(workdir: Path) -> list[dict[str, Any]]:
    """What TPE has proposed so far: {"row", "drawn", "overrides"} each."""
    return metrics.read(workdir / PROPOSED)


def propose(
    workdir: Path, space: dict, search: Search, changes: list[dict], values: dict[str, tuple], lower: bool, most: int
) -> int:
    """Write down up to `most` further proposals for every row; returns how many there are new.

    values: of each finished run, by its overrides (JSON, sorted), the validation metric, and the step at which it was
    pruned or None; `lower`: smaller is better.
    """
    learner = optuna()
    known = proposals(workdir)
    metrics.write_atomically(workdir / PROPOSED, "".join(json.dumps(each) + "\n" for each in known))  # no cut line
    new = 0
    with metrics.Lines(workdir / PROPOSED) as lines:
        for row, base in enumerate(changes):
            mine = [each for each in known if each["row"] == row]
            with warnings.catch_warnings(action="ignore"):  # that the constant liar is experimental
                seed = (search.seed * 100_003 + len(mine)) % 2**32
                sampler = learner.samplers.TPESampler(seed=seed, constant_liar=True)
            study = learner.create_study(sampler=sampler, direction="minimize" if lower else "maximize")
            for each in mine:
                study.add_trial(
                    _trial(learner, each["drawn"], space, *values.get(key(each["overrides"]), (None, None)))
                )
            for _ in range(min(most, search.trials - len(mine))):
                trial = study.ask()
                drawn = {name: each.suggest(trial, name) for name, each in space.items()}
                lines.write(row=row, drawn=drawn, overrides=base | drawn)
                new += 1
    return new


def key(overrides: dict[str, Any]) -> str:
    return json.dumps(overrides, sort_keys=True)


def _trial(learner, drawn: dict, space: dict, value: float | None, pruned: int | None):
    """A trial that Optuna learns from; without a finite value it failed."""
    float_, categorical = learner.distributions.FloatDistribution, learner.distributions.CategoricalDistribution
    kinds = {
        name: float_(each.low, each.high, log=each.log) if isinstance(each, Number) else categorical(each.values)
        for name, each in space.items()
    }
    good = value is not None and math.isfinite(value)
    states = learner.trial.TrialState
    made = dict(state=states.FAIL)
    if good and pruned is None:
        made = dict(state=states.COMPLETE, value=value)
    elif good:
        made = dict(state=states.PRUNED, value=value, intermediate_values={pruned: value})
    return learner.trial.create_trial(params=drawn, distributions=kinds, **made)


def optuna():
    """The package, quiet; one line where it is absent."""
    try:
        import optuna
    except ImportError:
        raise ValueError(
            "--search=tpe and --prune need Optuna: pip install 'xlstm_jax[search]'; --search=random alone needs nothing"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
