"""The memory that one run takes: python -m experiments.benchmarks.peak SUITE CASE PASS LIBRARY LABEL [NAME=DIR ...]

In a process of its own, where nothing that another contender left hides what this one needs, and by the kernel's count
of the process's pages, which is the same for all libraries. Arguments are there before; results count.
"""

import ctypes
import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.benchmarks import cases, peers, suites
from experiments.benchmarks.record import BOUND, OURS
from experiments.benchmarks.timing import Program

COUNTS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux; writing 5 resets the highest count


def count(name: str) -> int:
    """Bytes of VmRSS, now, or VmHWM, the most since the reset."""
    line = next(line for line in COUNTS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def growth(program: Program) -> int:
    """By how many bytes the process grows in a run, after one that loads and compiles what it needs."""
    program.run()
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)  # or the freed pages of the first run serve the second
    before = count("VmRSS")
    RESET.write_text("5")
    program.run()
    return max(0, count("VmHWM") - before)


def measure(row: dict[str, Any]) -> int:
    """That of a row's contender, in a fresh process."""
    what = [row["suite"], row["case"], row["pass"], row["library"], row["implementation"]]
    folders = [f"{name}={folder}" for name, folder in peers.FOLDERS.items()]
    done = subprocess.run([sys.executable, "-m", __name__, *what, *folders], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1])
    return int(done.stdout.split()[-1])


def main(suite: str, name: str, pass_: str, library: str, label: str, *folders: str) -> None:
    peers.add_paths(list(folders))
    case = next(case for quick in (False, True) for case in cases.choose(suite, None, quick) if case.name == name)
    contenders = suites.contenders(case, [] if library in (OURS, BOUND) else [library])
    print(growth(next(each for each in contenders if (each.library, each.label) == (library, label)).build(pass_)))


if __name__ == "__main__":
    main(*sys.argv[1:])
