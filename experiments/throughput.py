"""Time of N runs, vectorised and one after the other: python -m experiments.throughput [--config=FILE.py[:arg]]

    --config=configs/papers/xlstm_formal_languages.py:reduced   its base config (the LSTM on parity), N seeds of it
    --runs=1,8,64              values of N
    --steps=200                of each run; its evaluation is that of the config
    --out=results/throughput    rows.jsonl, one row a measurement
    --page=docs/sweeps.md      where the table of all rows goes too, between its marks <!-- throughput -->
    --config.a.b=v             changes a field

Both are timed twice, with seeds of their own, from an empty folder to the written results, evaluation included: `first`
compiles what no measurement before it had (one after the other, all N share one program), `again` nothing. The last
column of the table is the time of N vectorised runs over that of one run alone.
"""

import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console

from experiments import command, planning, train, vectorize
from experiments.formats import DASH, between_marks
from xlstm_jax import metrics

CONFIG = "configs/papers/xlstm_formal_languages.py:reduced"


def measure(base: ConfigDict, count: int, together: bool) -> dict[str, Any]:
    """One row: seconds of `count` runs, the first time and again."""
    seconds = []
    for repeat in range(2):
        configs = [planning.override(base, {"seed": repeat * count + index}) for index in range(count)]
        with tempfile.TemporaryDirectory() as folder:
            folders = [Path(folder) / f"run{index}" for index in range(count)]
            start = time.monotonic()
            if together:
                found = vectorize.together(configs, folders, progress=False)
            else:
                found = [train.run(config, where, progress=False) for config, where in zip(configs, folders)]
            seconds.append(round(time.monotonic() - start, 3))
        for failed in (result for result in found if isinstance(result, Exception)):
            raise ValueError(f"a run failed: {failed}")
    first, again = seconds
    speed = round(count * base.steps / max(again, 1e-3), 2)
    return {"runs": count, "vectorized": together, "first": first, "again": again, "steps_per_second": speed}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The newest measurement of each number of runs, both ways, as one table."""
    found = {(row["runs"], row["vectorized"]): row for row in rows}
    alone, newest = found.get((1, False)), rows[-1]
    lines = ["| runs | one by one, s | vectorised, s | first, s | steps a second | over one run |"]
    lines.append("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for count in sorted({runs for runs, _ in found}):
        single, many = both = found.get((count, False)), found.get((count, True))
        cells = [f"{row['again']:.2f}" if row else DASH for row in both]
        cells.append(" / ".join(f"{row['first']:.2f}" if row else DASH for row in both))
        cells.append(" / ".join(f"{row['steps_per_second']:.0f}" if row else DASH for row in both))
        cells.append(f"{many['again'] / max(alone['again'], 1e-3):.2f}" if many and alone else DASH)
        lines.append(f"| {count} | {' | '.join(cells)} |")
    device = newest["device"]
    words = [newest["config"], *newest["overrides"], f"{newest['steps']} steps of batch {newest['batch_size']} a run"]
    words += [
        f"{device['count']} x {device['kind']}",
        f"commit {str(newest['commit'])[:10]}",
        "pairs: one by one / vectorised",
    ]
    return "\n".join([*lines, "", f"{'; '.join(words)}."]) + "\n"


@command.exit_code
def main(argv: list[str]) -> int:
    parser = command.Arguments("throughput", __doc__)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--runs", default="1,8,64")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=command.folder, default=Path("results/throughput"))
    parser.add_argument("--page", type=Path)
    options = parser.with_overrides(argv)
    if not all(number.isdecimal() and int(number) > 0 for number in options.runs.split(",")):
        raise ValueError(f"--runs={options.runs}: numbers of runs, at least 1 each, separated by commas")
    base, _ = planning.read(options.config, options.overrides)
    base = planning.override(base, {"steps": options.steps, "+save_every": 0, "+eval_every": 0})
    if options.page:  # before anything starts
        between_marks(options.page.read_text(encoding="utf-8"), "throughput", "")
    options.out.mkdir(parents=True, exist_ok=True)
    environment, console = metrics.environment(), Console()
    shared = {
        "config": options.config,
        "overrides": options.overrides,
        "steps": base.steps,
        "batch_size": base.batch_size,
    } | environment
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)  # an empty one
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        for count, together in itertools.product(map(int, options.runs.split(",")), (False, True)):
            row = shared | measure(base, count, together)
            with metrics.Lines(options.out / "rows.jsonl") as lines:
                lines.write(**row)
            how = "vectorised" if together else "one by one"
            console.print(f"{count} runs {how}: {row['first']} s, again {row['again']} s", highlight=False)
    text = markdown(metrics.read(options.out / "rows.jsonl"))
    if options.page:
        page = options.page.read_text(encoding="utf-8")
        metrics.write_atomically(options.page, between_marks(page, "throughput", text))
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
