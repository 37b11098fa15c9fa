"""Times our forms beside the installed libraries: python -m experiments.bench --suite=cells|mlstm|train|decode|sweep

    --case=NAME,...            a case's name or a kind (default: all of the suite)
    --peers=auto|none|NAME,... torch, flax, nnx, keras; flashrnn, xlstm, mlstm_kernels, xlstm-jax by --peer_path
    --peer_path=NAME=DIR       the folder that holds a peer's package; several are possible
    --quick                    small sizes, few rounds, rows into runs/bench: to see it work
    --rounds=15 --seconds=10   samples of each program, and how long one may be sampled
    --out=results/bench        rows, one file a suite
    --memory                   times nothing: adds to the rows there the bytes that a process grows by in a run (Linux)
    --report                   the tables of docs/speed.md, and speed.png, of all rows there (alone: times nothing)

All contenders of a case run in turn in one process, and ratios are taken within the run only. The gradients of each of
our forms are checked against autodiff of the plain form in float64 in the same run; the exit code is 1 if one fails.
"""

import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from experiments import command, runner
from experiments.benchmarks import cases, peak, peers, record, report, suites, timing
from experiments.benchmarks.cases import Case
from experiments.benchmarks.record import Entry
from experiments.benchmarks.suites import Contender

OUT, QUICK_OUT = Path("results/bench"), Path("runs/bench")
QUICK_ROUNDS, QUICK_SECONDS = 3, 1.0


@command.exit_code
def main(argv: list[str]) -> int:
    parser = command.Arguments("bench", __doc__)
    parser.add_argument("--suite", help=", ".join(cases.SUITES))
    parser.add_argument("--case", help="a case's name or kind; several by commas")
    parser.add_argument("--peers", default="auto", help="auto, none, or names by commas")
    parser.add_argument("--peer_path", action="append", default=[], help="NAME=DIR")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--docs", type=Path, help="folder of the report (default: docs, of other rows than results/bench theirs)"
    )
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args(argv)
    if options.suite is None and not options.report:
        raise ValueError(f"--suite is missing: {', '.join(cases.SUITES)} (or --report alone)")
    rounds = options.rounds if options.rounds is not None else QUICK_ROUNDS if options.quick else 15
    seconds = options.seconds if options.seconds is not None else QUICK_SECONDS if options.quick else 10.0
    if rounds < 1 or not seconds > 0:
        raise ValueError(f"--rounds={rounds} --seconds={seconds}: at least 1 round and more than 0 seconds are needed")
    out = options.out or (QUICK_OUT if options.quick else OUT)
    docs = options.docs or (Path("docs") if out == OUT else out)
    console, failed = Console(width=None if sys.stdout.isatty() else 150), []
    if options.suite is not None:
        chosen = cases.choose(options.suite, options.case, options.quick)
        peers.add_paths(options.peer_path)
        names = peers.choose(options.peers)
        writable(out)
        jax.config.update("jax_enable_compilation_cache", False)  # compile times are those of a first run
        if options.memory:
            add_memory(options.suite, chosen, names, out, console)
        else:
            failed = run(options.suite, chosen, names, rounds, seconds, options.quick, out, console)
    if options.report:
        writable(docs)
        report.write(out, docs)
        console.print(f"{docs / report.PAGE}\n{docs / report.PICTURE}", highlight=False)
    for line in failed:
        console.print(line, style="bold", markup=False, highlight=False)
    return 1 if failed else 0


def writable(folder: Path) -> None:
    """Make the folder, or say in one line that nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None


def run(
    suite: str, chosen: list[Case], names: list[str], rounds: int, seconds: float, quick: bool, out: Path, console
) -> list[str]:
    """Time the cases one after another, writing rows as they come; returns a line for each failed gradient check."""
    failed, stamp = [], {"suite": suite, "run": time.strftime("%Y-%m-%d %H:%M:%S"), "quick": quick}
    with Progress(console, suite, [(case, pass_) for case in chosen for pass_ in case.targets]) as progress:
        progress.show("the machine's matrix products and copies")
        machine = timing.machine(quick)
        console.print(
            f"{jax.devices()[0].device_kind}, {timing.cores()} cores: products {machine.flops / 1e9:.0f} GFLOP/s, "
            f"memory {machine.bandwidth / 1e9:.1f} GB/s; peers: {', '.join(names) or 'none'}",
            highlight=False,
        )
        for case in chosen:
            progress.show(f"{case.name}: gradients in float64")
            try:
                contenders, checks = list(suites.contenders(case, names)), suites.check(case)
            except (RuntimeError, MemoryError) as error:  # not even its inputs, or a slice of it, fit
                contenders, checks = [Contender(record.OURS, record.DEFAULT, partial(peers.raising, error))], {}
            bad = [
                f"{case.name}: gradients of {form} are wrong by {c['error']}"
                for form, c in checks.items()
                if not c["ok"]
            ]
            failed += bad
            for pass_ in case.targets:
                entries = measure(case, pass_, contenders, checks, rounds, seconds, progress)
                operations = suites.operations(case, pass_)
                rows = record.rows(stamp, case, pass_, entries, operations, machine)
                record.add(out, suite, rows)
                progress.done()
                for line in report.screen(rows):
                    console.print(line, markup=False, highlight=False)
    return failed


def measure(
    case: Case, pass_: str, contenders: list[Contender], checks: dict, rounds: int, seconds: float, progress
) -> list[Entry]:
    """Build all programs, compare what they compute, and time them in turn."""
    programs, errors, differences, want = {}, {}, {}, None
    for contender in contenders:
        progress.show(f"{case.name}, {pass_}: compiling {contender.label}")
        try:
            program = contender.build(pass_)
            results = program.run()
            got = contender.outputs(results) if contender.outputs else None
            del results
            programs[contender.label] = program
        except Exception as error:  # too large; and whatever is wrong with another library is said in its row
            mine = contender.library in (record.OURS, record.BOUND)
            if mine and not isinstance(error, RuntimeError | MemoryError):
                raise
            errors[contender.label] = runner.one_line(error)
            continue
        if got is not None:
            want = got if want is None else want
            differences[contender.label] = float(np.max(np.abs(got - want)))
    samples = timing.interleave(
        programs, rounds, seconds, lambda n: progress.show(f"{case.name}, {pass_}: round {n + 1} of {rounds}")
    )
    entries = []
    for contender in contenders:
        label = contender.label
        times = samples.get(label)
        if isinstance(times, Exception):
            errors[label], times = runner.one_line(times), None
        entries.append(
            Entry(
                contender.library,
                label,
                programs.get(label),
                times,
                errors.get(label),
                differences.get(label),
                checks.get(label),
            )
        )
    return entries


def add_memory(suite: str, chosen: list[Case], names: list[str], out: Path, console) -> None:
    """Measure each contender that has a row of this machine and no peak memory yet, and write that into its row."""
    if jax.default_backend() != "cpu" or not peak.RESET.exists():
        raise ValueError("--memory needs Linux and JAX on its CPU: it is the process's own memory that is counted")
    here = jax.devices()[0].device_kind, timing.cores()
    wanted, all_names = {case.name for case in chosen}, (record.OURS, record.BOUND, *names)
    rows = [row for row in record.read(out, suite) if row["case"] in wanted and record.key(row)[2:] == here]
    if not rows:
        raise ValueError(f"{out} holds no rows of these cases: time them first, without --memory")
    for group in report.groups(rows):
        for row in group:
            if row["library"] in all_names and report.timed(row) and row.get("peak_bytes") is None:
                try:
                    row["peak_bytes"] = peak.measure(row)
                    found = f"{row['peak_bytes'] / 2**20:,.1f} MiB"
                except RuntimeError as error:
                    found = runner.one_line(error)
                console.print(f"{row['case']}, {row['pass']}, {row['implementation']}: {found}", highlight=False)
        record.add(out, suite, group)


class Progress:
    """What runs, how much is done, and how long it still takes; a line a pass where there is no terminal."""

    def __init__(self, console: Console, suite: str, parts: list):
        self._console, self._suite, self._parts, self._done = console, suite, len(parts), 0
        self._start = time.monotonic()
        self._status = console.status("") if console.is_terminal else None

    def show(self, what: str) -> None:
        spent = time.monotonic() - self._start
        left = spent / self._done * (self._parts - self._done) if self._done else None
        line = f"{self._suite}: {what}; {self._done} of {self._parts} done, {runner.clock_or_unknown(left)} left"
        if self._status:
            self._status.update(line)
        elif what.startswith("the machine") or ": round 1 of" in what:
            self._console.print(line, markup=False, highlight=False)

    def done(self) -> None:
        self._done += 1

    def __enter__(self):
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_):
        if self._status:
            self._status.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
