"""Learning curves of a sweep: python -m experiments.curves --config=configs/F.py[:arg] --workdir=DIR

Reads DIR/runs/*/metrics.jsonl and the config's TABLE; writes DIR/curves.jsonl and DIR/curves.png: a panel a column of
the table, a colour a row, the table's metric over the steps; validation with dots, training thin, the table's baselines
as lines across. Where DIR has no runs any more, the figure is drawn from DIR/curves.jsonl.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from experiments import command
from experiments.planning import Sweep, load
from experiments.table import check, field
from xlstm_jax import metrics

POINTS = 200  # of one curve; longer ones are thinned
STYLES = {"train": dict(linewidth=0.8, alpha=0.6), "valid": dict(marker="o", markersize=3, linewidth=1.4)}
BASELINES = ("--", ":", "-.")


def write(sweep: Sweep, workdir: Path) -> Path:
    """Writes both files; returns the figure's."""
    table, file = check(sweep), workdir / "curves.jsonl"
    if (workdir / "runs").is_dir():
        found = [row for run in sweep.runs for row in of_run(sweep, table, run, workdir)]
        metrics.write_atomically(file, "".join(json.dumps(row) + "\n" for row in found))
    found = metrics.read(file)
    if not found:
        raise ValueError(f"{workdir} has no run of this sweep with a metrics.jsonl, and no curves.jsonl: run it first")
    picture(table, found, workdir / "curves.png")
    return workdir / "curves.png"


def of_run(sweep: Sweep, table: dict[str, Any], run: Any, workdir: Path) -> list[dict[str, Any]]:
    """A row a split: {"id", "row", "column", "split", "steps", "values"}."""
    resolved = {"id": run.id, "overrides": run.overrides, "config": sweep.config(run).to_dict()}
    row, column = (field(resolved, table[each]) for each in ("row", "column"))
    name, splits = table["metric"].removeprefix("test_"), {}
    for line in metrics.read(workdir / "runs" / run.id / "metrics.jsonl"):
        value = line.get(name)
        if value is None and name.startswith("bits_per_") and "loss" in line:
            value = line["loss"] / math.log(2)  # a training line has the loss alone
        if value is not None and line["split"] in STYLES:
            splits.setdefault(line["split"], []).append((line["step"], float(f"{value:.5g}")))
    found = []
    for split, points in splits.items():
        steps, values = zip(*points[:: -math.ceil(len(points) / POINTS)][::-1])
        found.append(dict(id=run.id, row=row, column=column, split=split, steps=steps, values=values))
    return found


def picture(table: dict[str, Any], found: list[dict[str, Any]], file: Path) -> None:
    """A panel a column of the table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = [column for column in table["columns"] if any(row["column"] == column for row in found)]
    figure, axes = pyplot.subplots(
        1, len(columns), figsize=(1.5 + 5.5 * len(columns), 4.2), squeeze=False, layout="constrained"
    )
    colours = pyplot.get_cmap("tab10").colors
    for axis, column in zip(axes[0], columns):
        for place, row in enumerate(table["rows"]):
            label = table["rows"][row]
            for each in (each for each in found if (each["row"], each["column"]) == (row, column)):
                shown = label if each["split"] == "valid" else None
                axis.plot(
                    each["steps"], each["values"], color=colours[place % 10], label=shown, **STYLES[each["split"]]
                )
                label = None if shown else label
        for (name, values), style in zip(table.get("baselines", {}).items(), BASELINES):
            if column in values:
                axis.axhline(values[column], color="#444444", linestyle=style, linewidth=1, label=name)
        axis.set(xlabel="step", ylabel=table["columns"][column], title=table["title"].split(":")[0])
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
        values = sorted(value for each in found if each["column"] == column for value in each["values"])
        axis.set_ylim(top=values[int(0.95 * (len(values) - 1))])
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


@command.exit_code
def main(argv: list[str]) -> int:
    parser = command.Arguments("curves", __doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", type=command.folder, required=True)
    options = parser.with_overrides(argv)
    print(write(load(options.config, options.overrides), options.workdir))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
