"""Each file of a checkpoint damaged in turn: python -m tests.corrupt_train [--out=results/chaos/corruption.jsonl]

A run is stopped behind its second checkpoint. For each file of that, and each damage (a byte cut off, a byte flipped,
the file removed), a copy of the run goes on: from the intact checkpoint before it, saying so, to the metrics of the
run that nobody disturbed, byte for byte. Nothing is lost with `UNREAD`: there the newest goes on.
"""

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

from tests.stand_in import Recall, model
from xlstm_jax import metrics, optim, train
from xlstm_jax.run import Run

UNREAD = "commit_success.txt"  # orbax's mark beside what it marks, whose manifest says as much
STEPS, SAVE_EVERY, STOP = 30, 10, 20
TX = optim.make(learning_rate=1e-2, steps=STEPS)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


DAMAGE = {"truncated": truncate, "flipped": flip, "removed": Path.unlink}


def fit(workdir: Path) -> str:
    """Trains, or goes on; what it says."""
    settings = {"batch_size": 4, "save_every": SAVE_EVERY, "eval_every": 10, "log_every": 4, "steps_per_dispatch": 4}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train.fit(model(), Recall(), TX, steps=STEPS, workdir=workdir, **settings)
    return said.getvalue()


def stopped(workdir: Path) -> None:
    """As a kill right behind the second checkpoint would leave it."""
    save = Run.save

    def save_and_stop(run, step, state):
        save(run, step, state)
        if step == STOP:
            run.checkpoints.wait()
            raise KeyboardInterrupt

    Run.save = save_and_stop
    with contextlib.suppress(KeyboardInterrupt):
        fit(workdir)
    Run.save = save


def main(words: list[str]) -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args(words)
    about = {name: metrics.environment()[name] for name in ("commit", "versions", "device")}
    rows, wrong = [], 0
    with tempfile.TemporaryDirectory() as temporary:
        whole, run, copy = (Path(temporary) / name for name in ("whole", "run", "copy"))
        fit(whole)
        stopped(run)
        newest = run / f"checkpoints/{STOP}"
        for file in sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file()):
            size = (newest / file).stat().st_size
            for name, damage in DAMAGE.items():
                if not size and name != "removed":  # nothing to cut off
                    continue
                shutil.copytree(run, copy)
                damage(copy / f"checkpoints/{STOP}" / file)
                said = fit(copy)
                from_step = next((s for s in (STOP - SAVE_EVERY, STOP) if f"resumed at step {s}\n" in said), None)
                warned = f"checkpoints/{STOP} is damaged ({file}" in said and "going on from the intact one" in said
                same = (copy / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
                row = dict(file=str(file), bytes=size, damage=name, newest=STOP, resumed_at=from_step)
                rows.append(row | {"said_so": warned, "as_undisturbed": same})
                sound = str(file) == UNREAD
                good = same and (from_step == STOP if sound else warned and from_step == STOP - SAVE_EVERY)
                wrong += not good
                print("" if good else "WRONG: ", rows[-1], flush=True)
                shutil.rmtree(copy)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("".join(json.dumps(row | about) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} damages, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
