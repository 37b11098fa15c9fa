"""A paper's table, ours beside theirs: python -m experiments.table --config=configs/F.py[:arg] --workdir=DIR

Reads DIR/results.jsonl and the config's TABLE; writes DIR/table.md, .csv, .tex and .png, and prints table.md.
What a cell is made of is in experiments/aggregation.py. TABLE["row"] and TABLE["column"] name a config field, or a few
as a tuple: their values are then joined by a slash, "64/4". TABLE["protocol"], a dictionary of config fields and the
paper's values (a list: all that the paper tried; a dictionary: by column), marks the cells whose runs have others, and
says in what.
"""

import difflib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments import aggregation, command, rows
from experiments.aggregation import Cell
from experiments.build import flatten
from experiments.formats import DASH, REDUCED, comma_separated, latex, markdown, picture, shown
from experiments.planning import Sweep, load
from xlstm_jax import metrics
from xlstm_jax.names import unknown

REQUIRED = ("title", "row", "rows", "column", "columns", "metric", "aggregate")
OPTIONAL = ("select", "select_over", "select_per", "best_of", "lower_is_better", "digits", "range", "paper")
OPTIONAL += ("references", "baselines", "differences", "protocol")


def cells(table: dict[str, Any], done: list[dict]) -> dict[tuple[str, str], Cell]:
    """(row, column) -> Cell, from the result rows of a sweep."""
    found = {}
    for place, results in places(table, done).items():
        made, runs = aggregation.cell(table, results, number)
        found[place] = made._replace(reduced=reduced(table, runs, place[1]))
    mixed = len({len(each.runs) for each in found.values()}) > 1
    return {place: each._replace(counted=mixed) for place, each in found.items()}


def places(table: dict[str, Any], done: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """(row, column) -> the result rows that belong there."""
    found: dict[tuple[str, str], list[dict]] = {}
    for result in done:
        if "pruned" in result:  # given up on by a search: it has no test metrics
            continue
        place = field(result, table["row"]), field(result, table["column"])
        if place[0] in table["rows"] and place[1] in table["columns"]:
            found.setdefault(place, []).append(result)
    return found


def reduced(table: dict[str, Any], runs: list[dict], column: str) -> tuple[str, ...]:
    """ "steps 1000 (paper: 100000)", … for each field of TABLE["protocol"] that is not the paper's in some run."""
    differing = []
    for name, paper in table.get("protocol", {}).items():
        if isinstance(paper, dict):
            if column not in paper:
                continue
            paper = paper[column]
        known = [str(value) for value in (paper if isinstance(paper, list | tuple) else [paper])]
        here = dict.fromkeys(field(run, name) for run in runs)
        if any(value not in known for value in here):
            differing.append(f"{name} {' or '.join(here)} (paper: {' or '.join(known)})")
    return tuple(differing)


def check(sweep: Sweep, names: set[str] | None = None) -> dict[str, Any]:
    """The TABLE of a config; one line where it names what is not there. Needs no results.

    names: of the numbers that result rows will have, where they are known.
    """
    if not hasattr(sweep.module, "TABLE"):
        raise ValueError(f"--config={sweep.source}: the file has no TABLE")
    table = sweep.module.TABLE
    if not isinstance(table, dict):
        raise ValueError(f"TABLE is {table!r}: a dictionary is needed, with {', '.join(REQUIRED)}")
    for name in REQUIRED:
        if name not in table:
            raise ValueError(f"TABLE has no {name!r}: it needs {', '.join(REQUIRED)}")
    for name in ("rows", "columns"):
        if not isinstance(table[name], dict):
            raise ValueError(f"TABLE {name} is {table[name]!r}: a dictionary is needed, from value to what is shown")
    for name in table.keys() - {*REQUIRED, *OPTIONAL}:
        if near := difflib.get_close_matches(name, (*REQUIRED, *OPTIONAL), n=1, cutoff=0.75):
            raise ValueError(f"unknown TABLE entry {name!r}; nearest: {near[0]}")
    aggregation.check(table)
    for name in ("metric", "select"):
        if names is not None and name in table and table[name] not in names:
            raise ValueError(unknown(f"TABLE {name}", table[name], sorted(names)))
    runs = [{"id": r.id, "overrides": r.overrides, "config": sweep.config(r).to_dict()} for r in sweep.runs]
    for what in ("row", "column"):
        values = dict.fromkeys(field(run, table[what]) for run in runs)
        absent = [name for name in table[f"{what}s"] if name not in values]
        outside = [value for value in values if value not in table[f"{what}s"]]
        if absent and outside:  # a preset may leave rows out, and a table may leave runs out: both at once is a slip
            raise ValueError(unknown(f"TABLE {what}", absent[0], outside) + f" (values of {table[what]} in the sweep)")
    fields = {name for run in runs for name in (*run["overrides"], *flatten(run["config"]))} - {"seed"}
    for name in table.get("select_over", ()):  # a preset may leave it alone
        if name not in fields:
            raise ValueError(unknown("TABLE select_over", name, sorted(fields)))
    for name, paper in table.get("protocol", {}).items():
        field(runs[0], name)
        for column in paper if isinstance(paper, dict) else ():
            if column not in table["columns"]:
                raise ValueError(f"protocol of {name}: " + unknown("TABLE column", column, table["columns"]))
    sources = [*([table["paper"]] if "paper" in table else []), *table.get("references", [])]
    for source in sources:
        for row, column in source["values"]:
            for what, name in (("row", row), ("column", column)):
                if name not in table[f"{what}s"]:
                    raise ValueError(f"{source['name']}: " + unknown(f"TABLE {what}", name, table[f"{what}s"]))
    for values in table.get("baselines", {}).values():
        for column in values:
            if column not in table["columns"]:
                raise ValueError("baselines: " + unknown("TABLE column", column, table["columns"]))
    return table


def field(result: dict, name: str | tuple[str, ...]) -> str:
    """A dotted field of a result row's config; of several, those that the run has: "one/other"."""
    names = (name,) if isinstance(name, str) else name
    values = [value for each in names if (value := single_field(result, each)) is not None]
    if not values:
        near = difflib.get_close_matches(names[0], flatten(result.get("config", {})), n=1)
        nearest = f"; nearest: {near[0]}" if near else ""
        raise ValueError(f"TABLE names the field {name!r}, which the run {result['id']} does not have{nearest}")
    return "/".join(values)


def single_field(result: dict, name: str) -> str | None:
    """The sweep's override, else the config's value, else None."""
    value = result["overrides"].get(name)
    if value is not None:
        return str(value)
    value = result.get("config", {})
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
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
        lines.append(f"Ours: {aggregation.single(table, list(found.values()))}.")
    else:
        over = dict.fromkeys(name for cell in found.values() for name in cell.over)
        lines.append(f"Ours: {aggregation.words(table, list(over))}.")
    absent = [f"{table['rows'][r]} on {table['columns'][c]}" for r, c in expected(table, sweep) if (r, c) not in found]
    if absent:
        lines.append(f"Ours, {DASH}: no finished run yet: {', '.join(absent)}.")
    if "paper" in table:
        missing = f" {DASH}: {table['paper']['missing']}." if "missing" in table["paper"] else ""
        lines.append(f"{table['paper']['name'].capitalize()}: {table['paper']['source']}.{missing}")
    lines += [f"{source['name']}: {source['source']}." for source in table.get("references", [])]
    lines += protocols(table, found)
    if "differences" in table:
        swept = Values(sweep)
        lines.append(f"Protocol. {table['differences'].format(config=sweep.base.to_dict(), swept=swept)}")
    return lines


def protocols(table: dict[str, Any], found: dict) -> list[str]:
    """Which cells have the paper's protocol, and in what the others' is reduced."""
    if "protocol" not in table:
        return []
    kinds: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for place, made in found.items():
        kinds.setdefault(made.reduced, []).append(place)
    lines = []
    for reduced, places in kinds.items():
        where = "all cells" if len(kinds) == 1 else ", ".join(named(table, places, found))
        lines.append(f"{REDUCED}, reduced ({where}): {'; '.join(reduced)}." if reduced else f"As the paper: {where}.")
    return lines


def named(table: dict[str, Any], places: list[tuple[str, str]], found: dict) -> Iterator[str]:
    """Cells in words, by their row alone where all that it has are among them."""
    for row, label in table["rows"].items():
        columns = [column for r, column in places if r == row]
        if columns and len(columns) == sum(r == row for r, _ in found):
            yield label
        else:
            yield from (f"{label} on {table['columns'][column]}" for column in columns)


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
    table = check(sweep)
    rows.check(workdir, sweep)
    rows.tell_of_a_cut_line(workdir)
    done, ids = rows.read(workdir), {run.id for run in sweep.runs}
    if done and not done.keys() & ids:
        raise ValueError(
            f"{workdir} has {len(done)} finished runs, none of this sweep: name the config as it was run (a search as"
            " FILE.py:arg@random,20,0)"
        )
    found = cells(table, [row for name, row in done.items() if name in ids])
    shown(table, found)
    lines = notes(table, found, sweep)
    if others := done.keys() - ids:
        lines.append(f"Left out: {len(others)} finished runs in the folder that the sweep has no longer.")
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
    print(write(load(options.config, options.overrides, options.workdir), options.workdir))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
