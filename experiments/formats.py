"""A table's numbers as markdown, CSV, LaTeX and a picture.

`table` is a config's TABLE; `found` holds our numbers, (row, column) -> Cell.
"""

import csv
import io
from pathlib import Path
from typing import Any

from experiments.aggregation import Cell

DASH = "–"  # not known
REDUCED = "†"  # the protocol is not the paper's


def between_marks(page: str, name: str, content: str) -> str:
    """The page with this content between its lines <!-- NAME --> and <!-- /NAME -->."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page needs one line {begin.strip()} and one line {end} around what is to be replaced")
    head, _, rest = page.partition(begin)
    return head + begin + content + end + rest.partition(end)[2]


def shown(table: dict[str, Any], found: dict) -> tuple[list[str], list[str]]:
    """Keys of the rows and columns that have a result; one line if there is none, or the table names none of them."""
    names = [r for r in table["rows"] if any(r == place[0] for place in found)]
    columns = [c for c in table["columns"] if any(c == place[1] for place in found)]
    if not found:
        raise ValueError("no result row belongs to this table: run `experiments.sweep run` with the same config first")
    return names, columns


def text(table: dict[str, Any], value: float | str | None) -> str:
    """A number with the table's digits; a text as it is; an en dash for what is not known."""
    if value is None:
        return DASH
    if isinstance(value, str):
        return value
    rounded = round(value, table.get("digits", 2)) + 0.0  # no minus before zero
    return f"{rounded:.{table.get('digits', 2)}f}"


def ours(table: dict[str, Any], cell: Cell | None) -> str:
    """ "0.97 (0.95–1.00; 3)": aggregate, range and number of runs, or "0.97 ± 0.02 (3)"; a † for a reduced protocol."""
    if cell is None:
        return DASH
    count, mark = len(cell.runs), REDUCED if cell.reduced else ""
    if count == 1:
        return text(table, cell.value) + (" (1)" if cell.counted else "") + mark
    if cell.spread is not None:
        return f"{text(table, cell.value)} ± {text(table, cell.spread)} ({count}){mark}"
    return f"{text(table, cell.value)} ({text(table, min(cell.runs))}–{text(table, max(cell.runs))}; {count}){mark}"


def sources(table: dict[str, Any]) -> list[dict]:
    """The paper, then the independent numbers."""
    return [*([table["paper"]] if "paper" in table else []), *table.get("references", [])]


def grid(table: dict[str, Any], found: dict, source: dict | None) -> tuple[list[str], list[list[str]]]:
    """Header and body: each column ours, then `source`'s."""
    names, columns = shown(table, found)
    names = [*names, *table.get("baselines", {})]
    header, body = [""], [[table["rows"].get(row, row)] for row in names]
    for column in columns:
        header.append(table["columns"][column])
        for line, row in zip(body, names):
            baseline = table.get("baselines", {}).get(row, {}).get(column)
            line.append(text(table, baseline) if row not in table["rows"] else ours(table, found.get((row, column))))
        if source:
            header.append(source["name"])
            for line, row in zip(body, names):
                line.append(text(table, source["values"].get((row, column))))
    return header, body


def markdown(table: dict[str, Any], found: dict, lines: list[str]) -> str:
    def block(header, body):
        widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
        rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in (max(w, 4) for w in widths[1:]))]
        aligned = [
            [line[0].ljust(widths[0]), *(c.rjust(max(w, 4)) for c, w in zip(line[1:], widths[1:]))]
            for line in [header, *body]
        ]
        aligned.insert(1, rule)
        return "\n".join(f"| {' | '.join(line)} |" for line in aligned)

    parts = [f"## {table['title']}", block(*grid(table, found, table.get("paper")))]
    header, body = reference_grid(table, found)
    if body:
        parts += ["Independent numbers:", block(header, body)]
    return (
        "\n\n".join([*parts, *(f"- {line}" for line in lines)]).replace("\n\n- ", "\n- ").replace("\n- ", "\n\n- ", 1)
        + "\n"
    )


def reference_grid(table: dict[str, Any], found: dict) -> tuple[list[str], list[list[str]]]:
    """One row for each model and independent source that has any number for the columns shown."""
    names, columns = shown(table, found)
    body = []
    for source in table.get("references", []):
        for row in names:
            values = [source["values"].get((row, column)) for column in columns]
            if any(value is not None for value in values):
                body.append([f"{table['rows'][row]}, {source['name']}", *(text(table, value) for value in values)])
    return ["", *(table["columns"][column] for column in columns)], body


def comma_separated(table: dict[str, Any], found: dict) -> str:
    """One line a cell: row, column, ours at full precision, its range, the number of runs, and each source's value."""
    names, columns = shown(table, found)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    marked = ["protocol"] if "protocol" in table else []
    names_of = [*marked, *(s["name"] for s in sources(table))]
    writer.writerow(["row", "column", table["metric"], "min", "max", "runs", *names_of])
    for row in names:
        for column in columns:
            cell = found.get((row, column))
            mine = [cell.value, min(cell.runs), max(cell.runs), len(cell.runs)] if cell else ["", "", "", 0]
            if marked:
                mine.append("" if cell is None else "; ".join(cell.reduced) or "paper")
            writer.writerow([row, column, *mine, *(s["values"].get((row, column), "") for s in sources(table))])
    for name, values in table.get("baselines", {}).items():
        for column in columns:
            writer.writerow([name, column, values.get(column, ""), "", "", 0, *("" for _ in names_of)])
    return out.getvalue()


def latex(table: dict[str, Any], found: dict, lines: list[str]) -> str:
    """A tabular for booktabs, the notes as comments above it."""
    replacements = {
        "\\": r"\textbackslash{}",
        "–": "--",
        "≥": r"$\geq$",
        "±": r"$\pm$",
        "†": r"$\dagger$",
        "%": r"\%",
        "_": r"\_",
        "&": r"\&",
        "#": r"\#",
    }

    def escape(cell):
        return "".join(replacements.get(letter, letter) for letter in cell)

    header, body = grid(table, found, table.get("paper"))
    out = [f"% {table['title']}", *(f"% {line}" for line in lines), rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}"]
    out += [r"\toprule", f"{' & '.join(map(escape, header))} \\\\", r"\midrule"]
    out += [f"{' & '.join(map(escape, line))} \\\\" for line in body]
    return "\n".join([*out, r"\bottomrule", r"\end{tabular}"]) + "\n"


def picture(table: dict[str, Any], found: dict, file: Path) -> None:
    """One panel a column: our aggregate as a bar and a number, every run as a dot, the others' numbers as marks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    names, columns = shown(table, found)
    size = max(2.2 + 2.5 * len(columns), 7.0), 1.9 + 0.42 * len(names)
    figure, axes = pyplot.subplots(1, len(columns), figsize=size, sharey=True, squeeze=False, layout="constrained")
    places = {row: len(names) - 1 - index for index, row in enumerate(names)}
    legend = {"ours": Patch(color="#7aa6d1")}
    for axis, column in zip(axes[0], columns):
        for row, place in places.items():
            if cell := found.get((row, column)):
                axis.barh(place, cell.value, height=0.62, color="#7aa6d1", zorder=1)
                axis.text(
                    1, place, text(table, cell.value), transform=axis.get_yaxis_transform(), ha="right", va="center"
                )
                if len(cell.runs) > 1:
                    axis.plot(cell.runs, [place] * len(cell.runs), ".", color="#24527a", markersize=4, zorder=3)
        for source, mark, colour in zip(sources(table), "Dv^s", ("#c8471e", "#7b5ea7", "#3b8a55", "#8a6d3b")):
            known = [(source["values"].get((row, column)), place) for row, place in places.items()]
            known = [(value, place) for value, place in known if isinstance(value, int | float)]
            style = dict(
                linestyle="", marker=mark, markerfacecolor="none", markeredgecolor=colour, markersize=7, zorder=4
            )
            (legend[source["name"]],) = axis.plot([v for v, _ in known], [p for _, p in known], **style)
        for (name, values), style in zip(table.get("baselines", {}).items(), ("--", ":", "-.")):
            if column in values:
                legend[name] = axis.axvline(values[column], color="#444444", linestyle=style, linewidth=1, zorder=0)
        low, high = table.get("range") or axis.get_xlim()
        low = min([low, *(value for cell in found.values() for value in cell.runs)])
        axis.set_xlim(low - 0.03 * (high - low), high + 0.28 * (high - low))  # room for the numbers
        axis.set_xticks([tick for tick in axis.get_xticks() if low <= tick <= high])
        axis.set_title(table["columns"][column], fontsize=10)
        axis.set_yticks(list(places.values()), [table["rows"][row] for row in names])
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    figure.suptitle(table["title"], fontsize=11, wrap=True)
    figure.legend(
        legend.values(), legend.keys(), loc="outside lower center", ncols=len(legend), frameon=False, fontsize=9
    )
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
