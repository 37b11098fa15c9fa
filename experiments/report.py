"""One page about a folder: python -m experiments.report --workdir=DIR    writes DIR/index.html; no network is needed

DIR is the folder of a sweep, of one run, or holds only a results.jsonl. The page has a table of the runs (sorted by a
click, filtered by words such as "lstm seed=1 test_accuracy>0.9"), learning curves, accuracy by length, the sweep in
parallel coordinates, and each run's config and environment. --output=FILE.html writes elsewhere.
"""

import html
import json
import math
import string
import sys
from pathlib import Path
from typing import Any

from experiments import command, rows
from experiments.build import flatten
from experiments.planning import Run
from experiments.train import read_json
from xlstm_jax import metrics

PAGE = Path(__file__).with_name("report_page.html")
POINTS = 400  # of one curve; longer ones are thinned
SPEEDS = ("tokens_per_second", "serial_steps_per_second", "flops_per_second", "mfu")
ENVIRONMENT = ("versions", "commit", "device", "precision", "forms", "data_hash")


def collect(workdir: Path) -> list[dict[str, Any]]:
    """Every run of the folder: id, state, config, environment, numbers, curves, accuracies by length, error."""
    if not workdir.is_dir():
        raise ValueError(f"--workdir={workdir}: there is no such folder")
    if (workdir / "config.json").exists():
        row = read_json(workdir / "result.json") if (workdir / "result.json").exists() else None
        runs = [describe(workdir.absolute().name, "done" if row else "unfinished", workdir, row)]
    elif (workdir / rows.RESULTS).exists() or (workdir / "runs").is_dir():
        done = rows.read(workdir)
        folders = sorted(path.name for path in (workdir / "runs").glob("*") if path.is_dir())
        names = [*done, *(name for name in folders if name not in done)]
        states = {name: rows.state(workdir, Run(name, {}), done) for name in names}
        states = {name: "unfinished" if state == "missing" else state for name, state in states.items()}
        runs = [describe(name, states[name], workdir / "runs" / name, done.get(name)) for name in names]
    else:
        raise ValueError(
            f"--workdir={workdir}: no results.jsonl, no runs/ and no config.json in it; name a run or a sweep"
        )
    flat = [
        flatten(run["config"]) | {name.removeprefix("+"): value for name, value in run.pop("overrides").items()}
        for run in runs
    ]
    for run, here in zip(runs, flat):
        differing = [name for name in here if len({json.dumps(other.get(name)) for other in flat if other}) > 1]
        run["fields"] = {name: here[name] for name in differing}
    return runs


def describe(name: str, state: str, folder: Path, row: dict | None) -> dict[str, Any]:
    """What the page holds about one run; `row` is its result, where it has one."""
    record = row or (read_json(folder / "config.json") if (folder / "config.json").exists() else {})
    timing = metrics.read(folder / "timing.jsonl")
    speeds = [line | {"split": "speed"} for line in timing if SPEEDS[0] in line]
    numbers = {key: value for key, value in (row or {}).items() if type(value) in (int, float)}
    numbers |= {key: line[key] for line in timing for key in (*SPEEDS, "goodput") if key in line}  # the last of each
    spent = {"seconds spent, but on training": timing[-1]["spent"]} if timing else {}
    error = folder / "error.txt"
    return {
        "id": name,
        "state": state,
        "overrides": record.get("overrides", {}),
        "config": record.get("config", {}),
        "environment": {key: record[key] for key in ENVIRONMENT if key in record} | spent,
        "numbers": numbers,
        "curves": curves(metrics.read(folder / "metrics.jsonl") + speeds),
        "lengths": {key: value for key, value in (row or {}).items() if key.endswith("_by_length")},
        "error": error.read_text(errors="replace") if state == "failed" and error.exists() else None,
    }


def curves(rows: list[dict[str, Any]]) -> dict[str, dict[str, list]]:
    """{"train": {"steps": [...], "loss": [...]}, ...}, evenly thinned, the last point kept."""
    found = {}
    for line in rows:
        if "step" in line:
            found.setdefault(str(line.get("split", "train")), []).append(line)
    for split, lines in found.items():
        stride = math.ceil(len(lines) / POINTS)
        kept = lines[::-stride][::-1]
        numeric = [k for k in kept[-1] if k != "step" and type(kept[-1][k]) in (int, float)]
        found[split] = {"steps": [line["step"] for line in kept]} | {
            k: [_short(line.get(k)) for line in kept] for k in numeric
        }
    return found


def _short(value: Any) -> Any:
    """Six digits are enough for a figure."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def plain(value: Any) -> Any:
    """As JSON that every browser reads: "nan" and "inf" as text."""
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def page(runs: list[dict[str, Any]], title: str) -> str:
    """The whole HTML file. Text reaches it escaped, or as data that the script only ever sets as text."""
    data = json.dumps({"runs": plain(runs)}, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    counts = {}
    for run in runs:
        counts[run["state"]] = counts.get(run["state"], 0) + 1
    summary = ", ".join(f"{count} {state}" for state, count in counts.items()) or "no runs yet"
    template = string.Template(PAGE.read_text(encoding="utf-8"))
    return template.substitute(title=html.escape(title), summary=html.escape(summary), data=data)


def write(workdir: Path, output: Path | None = None) -> Path:
    """Writes the page; returns where."""
    output = output or workdir / "index.html"
    about = read_json(workdir / "sweep.json").get("source", "") if (workdir / "sweep.json").exists() else ""
    title = " · ".join(filter(None, [workdir.absolute().name, Path(str(about)).name]))
    metrics.write_atomically(output, page(collect(workdir), title))
    return output


@command.exit_code
def main(argv: list[str]) -> int:
    parser = command.Arguments("report", __doc__)
    parser.add_argument("--workdir", type=command.folder, required=True)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    print(write(options.workdir, options.output))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
