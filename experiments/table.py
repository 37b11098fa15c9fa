"""A paper's table, ours beside theirs: python -m experiments.table --config=configs/F.py[:arg] --workdir=DIR

Reads DIR/results.jsonl and the config's TABLE; writes DIR/table.md, .csv, .tex and .png, and prints table.md.
A cell is the mean (or median, or maximum) over the seeds of one setting; where a sweep also varies something else, such
as the learning rate, it is that of the best setting, chosen by TABLE["select"] (a validation metric).
"""

import statistics
import sys
from pathlib import Path
from typing import Any

from experiments import command, rows
from experiments.formats import DASH, Cell, comma_separated, latex, markdown, picture, shown
from experiments.planning import Sweep, load
from xlstm_jax import metrics
from xlstm_jax.names import unknown

AGGREGATES = {"mean": statistics.fmean, "median": statistics.median, "max": max, "min": min}
REQUIRED = ("title", "row", "rows", "column", "columns", "metric", "aggregate")


def cells(table: dict[str, Any], done: list[dict]) -> dict[tuple[str, str], Cell]:
    """(row, column) -> Cell, from the result rows of a sweep."""
    for name in REQUIRED:
        if name not in table:
            raise ValueError(f"TABLE has no {name!r}: it needs {', '.join(REQUIRED)}")
    if table["aggregate"] not in AGGREGATES:
        raise ValueError(unknown("TABLE aggregate", table["aggregate"], AGGREGATES))
    settings: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for result in done:
        place = field(result, table["row"]), field(result, table["column"])
        if place[0] not in table["rows"] or place[1] not in table["columns"]:
            continue
        setting = {k: v for k, v in result["overrides"].items() if k != "seed"}
        settings.setdefault(place, {}).setdefault(str(sorted(setting.items())), []).append(result)
    aggregate = AGGREGATES[table["aggregate"]]
    better = min if table.get("lower_is_better") else max

    def score(results):
        return aggregate([number(r, table.get("select", table["metric"])) for r in results])

    found = {}
    for place, each in settings.items():
        values = [number(r, table["metric"]) for r in better(each.values(), key=score)]
        found[place] = Cell(aggregate(values), values)
    return found


def field(result: dict, name: str) -> str:
    """A dotted field of a result row's config, the sweep's overrides first."""
    value = result["overrides"].get(name)
    if value is None:
        value = result.get("config", {})
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                raise ValueError(f"TABLE names the field {name!r}, which the result row {result['id']} does not have")
            value = value[part]
    return str(value)


def number(result: dict, name: str) -> float:
    if not isinstance(result.get(name), int | float):
        valid = [k for k, v in result.items() if isinstance(v, int | float) and not isinstance(v, bool)]
        raise ValueError(f"result row {result['id']}: {unknown('TABLE metric', name, valid)}")
    return float(result[name])


def notes(table: dict[str, Any], found: dict, sweep: Sweep) -> list[str]:
    """What the numbers are, where the others' come from, and how the protocols differ."""
    counts = sorted({len(cell.runs) for cell in found.values()})
    lines = []
    if counts == [1]:
        lines.append("Ours: one run a cell.")
    else:
        lines.append(f"Ours: {table['aggregate']} over the seeds (smallest–largest; number of runs).")
    absent = [f"{table['rows'][r]} on {table['columns'][c]}" for r, c in expected(table, sweep) if (r, c) not in found]
    if absent:
        lines.append(f"Ours, {DASH}: no finished run yet: {', '.join(absent)}.")
    if "paper" in table:
        missing = f" {DASH}: {table['paper']['missing']}." if "missing" in table["paper"] else ""
        lines.append(f"{table['paper']['name'].capitalize()}: {table['paper']['source']}.{missing}")
    lines += [f"{source['name']}: {source['source']}." for source in table.get("references", [])]
    if "differences" in table:
        swept = Values(sweep)
        lines.append(f"Protocol. {table['differences'].format(config=sweep.base.to_dict(), swept=swept)}")
    return lines


class Values:
    """{swept[a.b]} in a format string: every value that field takes in the sweep."""

    def __init__(self, sweep: Sweep):
        self._configs = [sweep.config(run) for run in sweep.runs]

    def __getitem__(self, name: str) -> str:
        values = []
        for config in self._configs:
            value = config
            for part in name.split("."):
                value = value[part]
            if value not in values:
                values.append(value)
        return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def expected(table: dict[str, Any], sweep: Sweep) -> list[tuple[str, str]]:
    """The places of the table that the sweep will fill."""
    found = []
    for run in sweep.runs:
        result = {"id": run.id, "overrides": run.overrides, "config": sweep.config(run).to_dict()}
        place = field(result, table["row"]), field(result, table["column"])
        if place not in found and place[0] in table["rows"] and place[1] in table["columns"]:
            found.append(place)
    return found


def write(sweep: Sweep, workdir: Path) -> str:
    """Writes the four files; returns the markdown."""
    if not hasattr(sweep.module, "TABLE"):
        raise ValueError(f"--config={sweep.source}: the file has no TABLE")
    rows.check(workdir, sweep)
    table = sweep.module.TABLE
    found = cells(table, list(rows.read(workdir).values()))
    shown(table, found)
    lines = notes(table, found, sweep)
    formatted = markdown(table, found, lines)
    metrics.write_atomically(workdir / "table.md", formatted)
    metrics.write_atomically(workdir / "table.csv", comma_separated(table, found))
    metrics.write_atomically(workdir / "table.tex", latex(table, found, lines))
    picture(table, found, workdir / "table.png")
    return formatted


@command.exit_code
def main(argv: list[str]) -> int:
    parser = command.Arguments("table", __doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", type=command.folder, required=True)
    options = parser.with_overrides(argv)
    print(write(load(options.config, options.overrides), options.workdir))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
