"""The budgets of results/plans, compiled again and compared: python -m experiments.budgets [NAME...]    needs libtpu

    python -m experiments.budgets                  all of them, minutes each; exit code 1 where one is not kept to
    python -m experiments.budgets debug            results/plans/debug.json alone
    python -m experiments.budgets --write debug    the file becomes what was found, and the table of docs/scaling.md too
    python -m experiments.budgets --table          only the table, from the files

A budget is what `experiments.plan --json` wrote: a config on a topology, its peak memory, its collectives, none of them
in a loop over time.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments import command
from experiments.formats import between_marks
from experiments.topology import GIB
from xlstm_jax import metrics
from xlstm_jax.names import unknown

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "results" / "plans"
PAGE = ROOT / "docs" / "scaling.md"
MEMORY = 1.01  # how far above its budget a peak may be: what another version of the compiler adds is looked at


def read() -> dict[str, dict[str, Any]]:
    """{name: budget}, the smallest models first."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.json")}
    return dict(sorted(found.items(), key=lambda item: (item[1]["parameters"], item[1]["chips"], item[0])))


def compiled(budget: dict[str, Any]) -> dict[str, Any]:
    """The plan of the same config on the same topology; ValueError where it cannot be made."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        words = [f"--config={budget['config']}", f"--topology={budget['topology']}", f"--json={file}"]
        words += [f"--config.{each}" for each in budget["overrides"]]
        command_line = [sys.executable, "-m", "experiments.plan", *words]
        done = subprocess.run(command_line, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ValueError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])
        return json.loads(file.read_text())


def differences(budget: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What a plan does not keep to, a line each; none where it keeps to all."""
    lines = []
    if found["in_time_loops"]:
        lines.append(f"{found['in_time_loops']} collectives stand in loops over time, none may")
    if found["peak_bytes"] > found["limit_bytes"]:
        lines.append(f"the peak of {found['peak_bytes']:,} bytes is above the chip's {found['limit_bytes']:,}")
    for name in ("peak_bytes", "link_bytes", "network_bytes"):
        if found[name] > MEMORY * budget[name]:
            lines.append(f"{name} is {found[name]:,}, its budget {budget[name]:,}")
    counts = [{kind: c["count"] for kind, c in each["collectives"].items()} for each in (budget, found)]
    if counts[0] != counts[1]:
        lines.append(f"collectives are {counts[1]}, in the budget {counts[0]}")
    return lines


def table(plans: list[dict[str, Any]]) -> str:
    """The budgets as Markdown."""
    heads = ("config", "topology", "mesh", "batch", "stored a chip", "peak a chip", "collectives a step")
    heads += ("in time loops", "floor of a step", "chip hours, at least")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for p in plans:
        kinds = ", ".join(f"{c['count']} {kind} ({c['bytes'] / GIB:.2f} GiB)" for kind, c in p["collectives"].items())
        stored = " + ".join(f"{p[name] / GIB:.2f}" for name in ("parameter_bytes", "optimizer_bytes"))
        cells = [
            f"`{' '.join([p['config'].partition(':')[2], *p['overrides']])}`",
            p["topology"],
            ", ".join(f"{axis} {size}" for axis, size in p["mesh"].items()),
            f"{p['batch_size']} rows, {p['layer_remat']}",
            f"{stored} GiB",
            f"{p['peak_bytes'] / GIB:.2f} of {p['limit_bytes'] / GIB:.0f} GiB",
            kinds,
            str(p["in_time_loops"]),
            f"{1e3 * p['step_seconds']:,.4g} ms ({max(p['floors'], key=p['floors'].get)})",
            f"{p['chip_hours']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page(text: str, plans: list[dict[str, Any]]) -> str:
    """The page's text with the table of these budgets in it."""
    return between_marks(text, "plans", table(plans))


@command.exit_code
def main(argv: list[str]) -> int:
    parser = command.Arguments("budgets", __doc__)
    parser.add_argument("names", nargs="*", help="results/plans/NAME.json; all if none is named")
    parser.add_argument("--write", action="store_true", help="what is found becomes the budget")
    parser.add_argument("--table", action="store_true", help="only the table of docs/scaling.md, from the files")
    options = parser.parse_args(argv)
    budgets, broken = read(), 0
    for name in options.names:
        if name not in budgets:
            raise ValueError(unknown("budget", name, budgets))
    for name in () if options.table else options.names or budgets:
        found = compiled(budgets[name])
        if options.write:
            metrics.write_atomically(FOLDER / f"{name}.json", json.dumps(found, indent=1) + "\n")
        lines = differences(found if options.write else budgets[name], found)
        versions = "" if budgets[name].get("versions") == found["versions"] else f" (versions: {found['versions']})"
        print("\n".join(f"{name}: {line}{versions}" for line in lines or ["keeps to its budget"]), flush=True)
        broken += bool(lines)
    if options.write or options.table:
        plans = list(read().values())
        metrics.write_atomically(PAGE, page(PAGE.read_text(encoding="utf-8"), plans))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
