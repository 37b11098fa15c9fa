"""Accuracy by length, a curve a model: python -m experiments.lengths --config=configs/F.py[:arg] --workdir=DIR

Reads DIR/results.jsonl and the config's TABLE; writes DIR/lengths.csv and DIR/lengths.png: a panel a task, a curve a
model, over the same runs as the table's cells: TABLE's aggregate at every length, the band from the smallest to the
largest; where a cell is the best run, that run. Dotted: guessing. Training lengths end where the panel says so.
"""

import csv
import io
import sys
from pathlib import Path

from experiments import aggregation, command, rows
from experiments.build import build_task
from experiments.planning import Sweep, load
from experiments.table import check, number, places
from xlstm_jax import metrics

METRIC = "test_accuracy_by_length"


def write(sweep: Sweep, workdir: Path) -> str:
    """Writes both files; returns the CSV."""
    table = check(sweep)
    rows.check(workdir, sweep)
    done = [row for row in rows.read(workdir).values() if METRIC in row]
    found = {place: behind(table, results) for place, results in places(table, done).items()}
    if not found:
        raise ValueError(f"{workdir} has no result row with {METRIC}: a formal language with a finished run is needed")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", "column", "lengths", "accuracy", "min", "max", "runs"])
    curves = {}
    for (row, column), results in found.items():
        for lengths in results[0][METRIC]:
            values = [result[METRIC][lengths] for result in results if lengths in result[METRIC]]
            point = aggregation.centre(table)(values), min(values), max(values)
            middle = sum(map(int, lengths.split("-"))) / 2
            curves.setdefault(column, {}).setdefault(row, []).append((middle, *point))
            writer.writerow([row, column, lengths, *point, len(values)])
    metrics.write_atomically(workdir / "lengths.csv", out.getvalue())
    tasks = {column: build_task(results[0]["config"]) for (_, column), results in found.items()}
    picture(table, curves, tasks, workdir / "lengths.png")
    return out.getvalue()


def behind(table: dict, results: list[dict]) -> list[dict]:
    """The runs that a table's cell is made of; of those of which it shows one, that one."""
    runs = aggregation.chosen(table, results, number)
    if table["aggregate"] not in aggregation.POOLING:
        return runs
    best = aggregation.centre(table)([number(run, table["metric"]) for run in runs])
    return [next(run for run in runs if number(run, table["metric"]) == best)]


def picture(table: dict, curves: dict, tasks: dict, file: Path) -> None:
    """curves: column -> row -> [(length, accuracy, smallest, largest)]."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = [column for column in table["columns"] if column in curves]
    wide = min(len(columns), 5)
    high = -(-len(columns) // wide)
    figure, axes = pyplot.subplots(
        high, wide, figsize=(1 + 2.6 * wide, 1 + 2.2 * high), sharey=True, squeeze=False, layout="constrained"
    )
    colours, legend = pyplot.get_cmap("tab10").colors, {}
    for axis, column in zip(axes.flat, columns):
        for place, row in enumerate(table["rows"]):
            if points := curves[column].get(row):
                lengths, accuracy, low, high = zip(*points)
                colour = colours[place % len(colours)]
                (legend[table["rows"][row]],) = axis.plot(lengths, accuracy, ".-", color=colour, linewidth=1.2)
                axis.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.axhline(tasks[column].chance, color="#444444", linestyle=":", linewidth=1)
        axis.set_title(table["columns"][column], fontsize=10)
        axis.set_xlabel(f"length (trained to {tasks[column].train_lengths[1]})", fontsize=8)
        axis.set_ylim(-0.03, 1.03)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(columns) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy")
    figure.legend(
        legend.values(), legend.keys(), loc="outside lower center", ncols=min(len(legend), 2 * wide), frameon=False
    )
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


@command.exit_code
def main(argv: list[str]) -> int:
    parser = command.Arguments("lengths", __doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", type=command.folder, required=True)
    options = parser.with_overrides(argv)
    print(write(load(options.config, options.overrides), options.workdir), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
