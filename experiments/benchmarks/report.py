"""The page and the picture of a benchmark, from its rows alone."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.benchmarks import record
from experiments.benchmarks.cases import SUITES
from experiments.benchmarks.record import BOUND, DEFAULT, LOOP, OURS, PRODUCTS
from experiments.formats import between_marks
from xlstm_jax.metrics import write_atomically

PAGE, PICTURE = "speed.md", "speed.png"
GROWTH = ("mlstm-1x1024x4x64x64", "mlstm-1x8192x4x64x64", 9.0)  # short, long, at most this many times as long
COLOURS = {"ours": "#24527a", "form": "#9db8cf", "target": "#c8471e", "products": "#3b8a55"}
Row = dict[str, Any]
EMPTY = "# Speed\n\n<!-- bench -->\n<!-- /bench -->\n"  # the page is text around these marks
SUMMARY = (
    "case",
    "pass",
    "ours, ms",
    "fastest form, ms",
    "fastest other, ms",
    "ours / other",
    "target",
    "",
    "products alone / ours",
    "loop alone / ours",
    "gradient error",
)
DETAILS = (
    "case",
    "pass",
    "implementation",
    "ms",
    "lowest – highest",
    "of fastest other",
    "temporary MiB",
    "growth MiB",
    "compile s",
    "of product peak",
    "of bandwidth",
    "difference",
    "parameters",
    "rate",
    "run",
)


def groups(rows: list[Row]) -> Iterator[list[Row]]:
    """The rows of each case and pass, in the order of the cases."""
    order = [case.kind for cases in SUITES.values() for case in cases]
    keys = dict.fromkeys(map(record.key, rows))
    together = {key: [row for row in rows if record.key(row) == key] for key in keys}
    yield from sorted(together.values(), key=lambda group: order.index(group[0]["kind"]))


def ours(group: list[Row]) -> Row | None:
    """Our default form, if it could be timed."""
    return next((r for r in group if r["library"] == OURS and r["implementation"] == DEFAULT and timed(r)), None)


def timed(row: Row) -> bool:
    return "milliseconds" in row


def median(row: Row) -> float:
    return row["milliseconds"]["median"]


def fastest(group: list[Row], mine: bool) -> Row | None:
    """Among our forms, or among the others."""
    found = [r for r in group if timed(r) and r["library"] != BOUND and (r["library"] == OURS) == mine]
    return min(found, key=median, default=None)


def verdict(row: Row) -> str:
    """How the ratio stands to the target."""
    if row["target"] is None or row["ratio"] is None:
        return ""
    over = row["ratio"]["median"] / row["target"] - 1
    return "met" if over <= 0 else f"missed by {100 * over:.0f} %"


def number(value: float | None, digits: int = 3) -> str:
    """Of three digits or all before the point; – where there is none."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %" if value >= 0.095 else f"{100 * value:.1f} %"


def with_quartiles(row: Row, field: str) -> str:
    q = row[field]
    return f"{number(q['median'])} ({number(q['lower_quartile'])}–{number(q['upper_quartile'])})"


def summary(group: list[Row]) -> list[str]:
    """The line of one case and pass."""
    first, mine = group[0], ours(group)
    form, other = fastest(group, True), fastest(group, False)
    named = lambda row: "–" if row is None else f"{number(median(row))} {row['implementation']}"  # noqa: E731
    bounds = {r["implementation"]: median(r) for r in group if r["library"] == BOUND and timed(r)}
    errors = [r["gradient_check"] for r in group if r["gradient_check"]]
    wrong = next((check for check in errors if not check["ok"]), None)
    return [
        first["case"],
        first["pass"],
        with_quartiles(mine, "milliseconds") if mine else "–",
        named(form),
        named(other),
        with_quartiles(mine, "ratio") if mine and mine["ratio"] else "–",
        "–" if first["target"] is None else f"{first['target']:g}",
        verdict(mine) if mine else "not timed",
        *(share(bounds[name] / median(mine)) if mine and name in bounds else "–" for name in (PRODUCTS, LOOP)),
        ("**wrong**: " if wrong else "") + (f"{max(check['error'] for check in errors):.0e}" if errors else "–"),
    ]


def details(row: Row) -> list[str]:
    """The line of one contender."""
    start = [row["case"], row["pass"], row["implementation"]]
    if not timed(row):
        return [*start, row["error"].replace("|", "/"), *[""] * (len(DETAILS) - 5), row["run"]]
    ms, mib = row["milliseconds"], lambda name: number(row[name] / 2**20 if row.get(name) is not None else None)
    return [
        *start,
        number(ms["median"]),
        f"{number(ms['lowest'])} – {number(ms['highest'])}",
        with_quartiles(row, "ratio") if row["ratio"] else "–",
        mib("temp_bytes"),
        mib("peak_bytes"),
        number(row["compile_seconds"], 2),
        "–" if row["implementation"] == LOOP else share(row["share_of_products"]),  # it has none
        share(row["share_of_bandwidth"]),
        "–" if row["difference"] is None else f"{row['difference']:.0e}",
        number(row["parameters"]),
        f"{number(row['rate']['value'])} {row['rate']['unit']}" if row["rate"] else "–",
        row["run"],
    ]


def markdown(head: tuple[str, ...], lines: list[list[str]]) -> str:
    table = [list(head), ["---"] * 3 + ["---:"] * (len(head) - 3), *lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in table)


def screen(rows: list[Row]) -> Iterator[str]:
    """What is printed when a pass is done."""
    line = dict(zip(SUMMARY, summary(rows)))
    against = f"; {line['fastest other, ms']}, ratio {line['ours / other']}" if line["fastest other, ms"] != "–" else ""
    target = f", target {line['target']} {line['']}" if line[""] else ""
    ours = f"ours {line['ours, ms']} ms, best {line['fastest form, ms']}"
    yield f"{line['case']}, {line['pass']}: {ours}{against}{target}"
    for row in rows:
        if row["error"]:
            yield f"  {row['implementation']}: {row['error']}"


def growth(rows: list[Row]) -> list[str]:
    """How the mLSTM's time grows with T, and everybody's compile time; or that no run has both lengths."""
    short, long, most = GROWTH
    lines = []
    for pass_ in dict.fromkeys(row["pass"] for row in rows if row["case"] in (short, long)):
        here = [row for row in rows if row["pass"] == pass_ and row["library"] != BOUND and timed(row)]
        after = {(row["run"], row["implementation"]): row for row in here if row["case"] == long}
        pairs = [(row, after.get((row["run"], row["implementation"]))) for row in here if row["case"] == short]
        pairs = [(a, b) for a, b in pairs if b]
        times = next((median(b) / median(a) for a, b in pairs if ours([a])), None)
        if times is None:
            lines.append(
                f"mLSTM, {pass_}: T = 8,192 and T = 1,024 are not in one run, so the target of {most:g} times is open: "
                f"`--suite=mlstm --case={short},{long}` is needed."
            )
            continue
        how = "met" if times <= most else f"missed by {100 * (times / most - 1):.0f} %"
        compiled = [
            f"{'ours' if ours([a]) else a['implementation']} {number(a['compile_seconds'], 2)} s, "
            f"then {number(b['compile_seconds'], 2)} s"
            for a, b in pairs
            if a["compile_seconds"] and b["compile_seconds"] and (ours([a]) or a["library"] != OURS)
        ]
        seconds = f" Compile time at both: {'; '.join(compiled)}." if compiled else ""
        lines.append(f"mLSTM, {pass_}: T = 8,192 takes {times:.1f} times T = 1,024 (target {most:g}: {how}).{seconds}")
    return lines


def absent(rows: list[Row]) -> list[str]:
    """The peers that some case or pass of a kind has and another has not."""
    each, lines = list(groups(rows)), []
    named = lambda row: f"{row['case']} {row['pass']}"  # noqa: E731
    for kind in dict.fromkeys(group[0]["kind"] for group in each):
        here = [group for group in each if group[0]["kind"] == kind]
        for label in dict.fromkeys(r["implementation"] for g in here for r in g if r["library"] not in (OURS, BOUND)):
            without = [named(group[0]) for group in here if all(row["implementation"] != label for row in group)]
            if without:
                lines.append(f"{label} at {', '.join(without)}")
    return [f"Not measured, though another case of the kind has it: {'; '.join(lines)}."] if lines else []


def runs(rows: list[Row]) -> str:
    """How many runs the rows are of, and when each began; a ratio is of one of them."""
    stamps = sorted({(row["run"], row["suite"]) for row in rows})
    each = ", ".join(f"{stamp} ({suite})" for stamp, suite in stamps)
    return f"Rows of {len(stamps)} run{'s' if len(stamps) > 1 else ''}: {each}."


def device_name(row: Row) -> str:
    device, cores = row["device"], row["machine"]["cores"]
    return f"{device['kind']}, {cores} cores" if device["platform"] == "cpu" else device["kind"]


def span(machines: list[dict], field: str) -> str:
    """The least and the most of it."""
    values = [machine[field] for machine in machines]
    return f"{min(values):.0f}–{max(values):.0f}"


def page(rows: list[Row]) -> str:
    """One section a device."""
    parts = [f"![Ratios and roofline]({PICTURE})\n"]
    for name in dict.fromkeys(map(device_name, rows)):
        here = [row for row in rows if device_name(row) == name]
        machines = [row["machine"] for row in here]
        versions = {k: v for row in here for k, v in row["versions"].items() if v}
        commits = ", ".join(sorted({re.sub(r"(?<=^.{10})\w+", "", str(row["commit"])) for row in here}))
        small = "Small sizes, few rounds: no measurement.\n" if any(row["quick"] for row in here) else ""
        parts += [
            f"\n## {name}\n\n{small}",
            f"Matrix products in float32: {span(machines, 'gigaflops')} GFLOP/s; ",
            f"memory: {span(machines, 'gigabytes_a_second')} GB/s, measured in each run. ",
            f"Commit {commits}; {', '.join(f'{k} {v}' for k, v in versions.items())}.\n{runs(here)}\n\n",
            markdown(SUMMARY, [summary(group) for group in groups(here)]),
            "".join(f"\n{line}\n" for line in growth(here) + absent(here)),
            "\n<details><summary>All contenders</summary>\n\n",
            markdown(DETAILS, [details(row) for group in groups(here) for row in group]),
            "\n</details>\n",
        ]
    return "".join(parts)


def write(out: Path, docs: Path) -> None:
    """The picture in `docs` and what stands between the page's marks, from all rows in `out`."""
    rows = [row for suite in SUITES for row in record.read(out, suite)]
    if not rows:
        raise ValueError(f"{out} holds no rows: run --suite=NAME first")
    file = docs / PAGE
    text = between_marks(file.read_text(encoding="utf-8") if file.exists() else EMPTY, "bench", page(rows))
    draw(rows, docs / PICTURE)
    write_atomically(file, text)


def draw(rows: list[Row], file: Path) -> None:
    """Ratios beside their targets, and the roofline; one line of panels a device."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(map(device_name, rows)))
    each = [list(groups([row for row in rows if device_name(row) == name])) for name in names]
    heights = [1.6 + max(0.24 * len(found), 2.4) for found in each]
    figure, axes = pyplot.subplots(
        len(names), 2, figsize=(12, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for name, found, (left, right) in zip(names, each, axes):
        draw_ratios(left, found)
        draw_roofline(right, found)
        left.set_title(f"{name}: share of the fastest other's time", fontsize=10)
        for axis in (left, right):
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def draw_ratios(axis, found: list[list[Row]]) -> None:
    """A dot for our default form with its quartiles, small ones for the other forms, a bar at the target."""
    labels = []
    for group in reversed(found):
        rows = [row for row in group if row["library"] == OURS and timed(row) and row["ratio"]]
        if not rows:
            continue
        y = len(labels)
        labels.append(f"{group[0]['case']}, {group[0]['pass']}")
        for row in rows:
            q = row["ratio"]
            if row["implementation"] == DEFAULT:
                axis.plot((q["lower_quartile"], q["upper_quartile"]), (y, y), color=COLOURS["ours"], linewidth=2)
                axis.plot(q["median"], y, "o", color=COLOURS["ours"], markersize=6, label="ours" if y == 0 else None)
            else:
                axis.plot(q["median"], y, "o", color=COLOURS["form"], markersize=3, zorder=1)
        if group[0]["target"] is not None:
            axis.plot(group[0]["target"], y, "|", color=COLOURS["target"], markersize=12, markeredgewidth=2)
    if labels:
        axis.set(xscale="log", ylim=(-0.7, len(labels) - 0.3))
        axis.axvline(1, color="#999999", linewidth=0.8, zorder=0)
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.set_xlabel("dot: our default form; small: our other forms; bar: target", fontsize=8)


def draw_roofline(axis, found: list[list[Row]]) -> None:
    """Operations a second against operations a byte moved, under what the machine does at most."""
    points = {"ours": [], "products": []}
    for group in found:
        bound = next((r for r in group if r["implementation"] == PRODUCTS), None)
        for kind, row in (("ours", ours(group)), ("products", bound)):
            if row and timed(row) and row["operations"] and row["traffic_bytes"]:
                rate = row["operations"] / median(row) / 1e6  # ms to GFLOP/s
                points[kind].append((row["operations"] / row["traffic_bytes"], rate, row["case"]))
    machines = [group[0]["machine"] for group in found]
    peak, bandwidth = (max(m[name] for m in machines) for name in ("gigaflops", "gigabytes_a_second"))
    xs = [x for each in points.values() for x, *_ in each] or [1.0]
    low, high = min(*xs, peak / bandwidth) / 2, max(*xs, peak / bandwidth) * 2
    axis.plot((low, peak / bandwidth, high), (low * bandwidth, peak, peak), color="#444444", linewidth=1.2)
    for kind, label, marker in (("products", "matrix products alone", "^"), ("ours", "ours", "o")):
        if points[kind]:
            x, y, _ = zip(*points[kind])
            axis.plot(x, y, marker, color=COLOURS[kind], markersize=5, linestyle="none", label=label)
    axis.set(xscale="log", yscale="log", xlabel="operations of the products a byte moved", ylabel="GFLOP/s")
    axis.set_title("Roofline of this machine, measured", fontsize=10)
    if any(points.values()):
        axis.legend(frameon=False, fontsize=8)
