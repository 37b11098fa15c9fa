"""How a cell of a table comes out of the runs behind it: which runs, and which statistic of them.

rule (TABLE["aggregate"])                      shown as
mean, median, max, min                         value (smallest–largest; number of runs)
mean_std     with the sample standard deviation            value ± deviation (number of runs)
median_mad   with the median absolute deviation            the same, as Grazzi et al. (arXiv 2411.12537), Tab. 5
best_of      the best of the first TABLE["best_of"] runs   value (smallest–largest; number of runs)

Runs of one cell that differ in more than the seed have several settings. With TABLE["select"], a validation metric, one
setting is chosen by it and reported by TABLE["metric"]: one for the cell, or one for each seed (TABLE["select_per"] =
"seed"). TABLE["select_over"] names the fields that make a setting (default: all but the seed); runs that differ in
others are repetitions, as seeds are. Without "select" the rules max, min and best_of take all runs of the cell, as
Delétang et al. (arXiv 2207.02098) take the maximum over seeds and learning rates; the other rules refuse.
"""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from xlstm_jax.names import unknown

POOLING = ("max", "min", "best_of")
CENTRES: dict[str, Callable] = {
    "mean": statistics.fmean,
    "median": statistics.median,
    "max": max,
    "min": min,
    "mean_std": statistics.fmean,
    "median_mad": statistics.median,
}
RULES = (*CENTRES, "best_of")


class Cell(NamedTuple):
    """One of our numbers: the aggregate, the value of every run behind it, and what else the cell says."""

    value: float
    runs: list[float]
    spread: float | None = None  # standard or median absolute deviation
    over: tuple[str, ...] = ()  # the fields that made several settings of the cell's runs
    settings: int = 1  # how many
    counted: bool = False  # a single run's cell says so, as other cells have more
    reduced: tuple[str, ...] = ()  # in what the protocol is not the paper's


def cell(table: dict[str, Any], results: list[dict], number: Callable[[dict, str], float]) -> tuple[Cell, list[dict]]:
    """The number of one place in the table and the result rows behind it; number(result, name) reads a metric."""
    runs = chosen(table, results, number)
    values = [number(run, table["metric"]) for run in runs]
    rule, spread = table["aggregate"], None
    value = centre(table)(values)
    if rule == "mean_std":
        spread = statistics.stdev(values) if len(values) > 1 else None
    elif rule == "median_mad":
        spread = statistics.median([abs(each - value) for each in values]) if len(values) > 1 else None
    over = select_over(table, results)
    return Cell(value, values, spread, tuple(over), len(group(results, over))), runs


def centre(table: dict[str, Any]) -> Callable:
    """From values to the aggregate."""
    if table["aggregate"] == "best_of":
        return min if table.get("lower_is_better") else max
    return CENTRES[table["aggregate"]]


def chosen(table: dict[str, Any], results: list[dict], number: Callable) -> list[dict]:
    """The runs of one place that its number is made of."""
    over = select_over(table, results)
    settings = group(results, over)
    if len(settings) > 1 and "select" in table:
        better = min if table.get("lower_is_better") else max

        def score(runs):
            return centre(table)([number(run, table["select"]) for run in runs])

        if table.get("select_per", "cell") == "seed":
            repeats = {name for run in results for name in run["overrides"]} - set(over)
            each = group(results, sorted(repeats)).values()
            results = [better(runs, key=lambda run: score([run])) for runs in each]
        else:
            results = better(settings.values(), key=score)
    elif len(settings) > 1 and table["aggregate"] not in POOLING:
        raise ValueError(
            f"TABLE has no 'select': runs of one cell differ in {', '.join(over)}, and {table['aggregate']} needs a"
            f" validation metric that chooses among them (the rules {', '.join(POOLING)} take all)"
        )
    if table["aggregate"] == "best_of":
        results = sorted(results, key=lambda run: run["overrides"].get("seed", 0))[: table["best_of"]]
    return results


def select_over(table: dict[str, Any], results: list[dict]) -> list[str]:
    """The overrides that make a setting and differ among these runs."""
    names = dict.fromkeys(name for run in results for name in run["overrides"] if name not in ("seed", "label"))
    names = [name for name in names if name in table.get("select_over", names)]
    return [name for name in names if len({str(run["overrides"].get(name)) for run in results}) > 1]


def group(results: list[dict], names: list[str]) -> dict[str, list[dict]]:
    """Result rows by the values of these overrides."""
    found: dict[str, list[dict]] = {}
    for run in results:
        found.setdefault(str([run["overrides"].get(name) for name in names]), []).append(run)
    return found


def check(table: dict[str, Any]) -> None:
    """ValueError where the rule or what it needs is not there."""
    if table["aggregate"] not in RULES:
        raise ValueError(unknown("TABLE aggregate", table["aggregate"], RULES))
    count = table.get("best_of")
    if table["aggregate"] == "best_of" and not (type(count) is int and count > 0):
        raise ValueError(f"TABLE best_of is {count!r}: the rule best_of needs the number of runs, such as 3")
    if table.get("select_per", "cell") not in ("cell", "seed"):
        raise ValueError(unknown("TABLE select_per", table["select_per"], ("cell", "seed")))


def single(table: dict[str, Any], found: list[Cell]) -> str:
    """What "ours" is, for a note, where a cell is one run: of how many settings it is the best."""
    counts = sorted({cell.settings for cell in found if cell.over})
    if not counts or "select" not in table:
        return "one run a cell"
    of = " or ".join(str(count) for count in counts)
    names = dict.fromkeys(name.rpartition(".")[2] for cell in found for name in cell.over)
    few = "" if all(cell.over for cell in found) else ", where there are several"
    return (
        f"one run a cell, the best of {of} settings ({', '.join(names)}) by {table['select'].removeprefix('valid_')} on"
        f" the validation split{few}"
    )


def words(table: dict[str, Any], over: list[str]) -> str:
    """What "ours" is, for a note; `over`: what the settings of the cells differ in."""
    rule = table["aggregate"]
    pooled = over if "select" not in table else []
    among = " and ".join(["the seeds", *(name.rpartition(".")[2] for name in pooled)])
    shown = "(smallest–largest; number of runs)"
    if rule == "mean_std":
        said = f"mean ± standard deviation over {among} (number of runs)"
    elif rule == "median_mad":
        said = f"median ± median absolute deviation over {among} (number of runs)"
    elif rule == "best_of":
        said = f"the best of {table['best_of']} runs, over {among} {shown}"
    else:
        said = f"{rule} over {among} {shown}"
    if over and "select" in table:
        fields = ", ".join(name.rpartition(".")[2] for name in over)
        said += f"; {fields} chosen by {table['select']} for each {table.get('select_per', 'cell')}"
    return said
