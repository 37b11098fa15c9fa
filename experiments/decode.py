"""Time a token and memory of generation against the length generated: python -m experiments.decode

    --backbone=NAME,...        default: lstm, xlstm[1:0], xlstm[1:1], transformer
    --lengths=128,...          tokens generated (default: 128 to 16384, doubling)
    --dim=256 --num_layers=4 --batch_size=1
    --out=results/decode       rows (decode.jsonl), a table (decode.md) and a figure (decode.png)

A recurrent model generates all tokens one after another; its time at a length is the median over the second half of
them, each block of 16 as fast as in the best of three rounds. A Transformer that is to look back on L tokens has a
cache of L, all of which every step reads: at each length a model with that cache is timed for a few blocks of tokens.
Weights are random, tokens the likeliest. Rows of backbones that are not timed now stay. Memory:

    state     all that a step hands to the next, by its shapes
    program   what the compiled block of tokens needs, as the compiler says: weights, state, results and temporaries
    in use    what the device has allocated after so many tokens (a CPU: what the process holds, JAX itself included)
"""

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments import command
from experiments.bench import writable
from experiments.evaluate import numbers
from xlstm_jax import metrics, models
from xlstm_jax.generate import GREEDY, compiled_block, stream

BACKBONES = ("lstm", "xlstm[1:0]", "xlstm[1:1]", "transformer")
LENGTHS = "128,256,512,1024,2048,4096,8192,16384"
VOCABULARY = 256
BLOCK = 16  # tokens of one time
BLOCKS = 5  # that a Transformer is timed for
ROUNDS = 3  # over the same tokens; what else the machine does disturbs some of them


def build(backbone: str, dim: int, num_layers: int, context: int) -> models.LM:
    """A byte-level model with random weights."""
    options = dict(context=context) if backbone == "transformer" else {}
    return models.LM(VOCABULARY, backbone=backbone, dim=dim, num_layers=num_layers, rngs=nnx.Rngs(0), **options)


def state_bytes(model: models.LM, batch_size: int) -> int:
    """Of the state of so many rows."""
    state = jax.eval_shape(lambda: model.initial_state(batch_size))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def program_bytes(model: models.LM, batch_size: int) -> int:
    """Of the compiled block of tokens; a state that is written in place counts once."""
    memory = compiled_block(model, batch_size, GREEDY, block=BLOCK).memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return kept + memory.temp_size_in_bytes


def bytes_in_use() -> int:
    """Allocated on the device now, or where it does not count that, held by this process."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["bytes_in_use"]
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def blocks(model: models.LM, batch_size: int, length: int) -> list[tuple[float, int]]:
    """Of each block of BLOCK tokens but the first, which begins with the prompt: the fewest seconds and most bytes."""
    prompts = [[0]] * batch_size
    for _ in stream(model, prompts, BLOCK, sampling=GREEDY, block=BLOCK):  # compiles
        pass
    times, used = np.zeros((ROUNDS, length // BLOCK)), np.zeros((ROUNDS, length // BLOCK), np.int64)
    for each in range(ROUNDS):
        for number, _ in enumerate(stream(model, prompts, length, sampling=GREEDY, block=BLOCK)):
            times[each, number], used[each, number] = time.perf_counter(), bytes_in_use()
    return list(zip(np.diff(times).min(axis=0).tolist(), used.max(axis=0)[1:].tolist()))


def measure(backbone: str, lengths: list[int], dim: int, num_layers: int, batch_size: int) -> list[dict[str, Any]]:
    """A row a length: milliseconds a token, as a ratio to the first length's, and the bytes of the memory."""
    rows, found, growing = [], [], backbone == "transformer"
    for length in lengths:
        model = build(backbone, dim, num_layers, length)
        if growing:
            found = blocks(model, batch_size, (BLOCKS + 1) * BLOCK)
        elif not found:
            found = blocks(model, batch_size, max(lengths) + BLOCK)
        now = found if growing else found[length // BLOCK // 2 : length // BLOCK]
        milliseconds = float(f"{1e3 * np.median([seconds for seconds, _ in now]) / BLOCK:.4g}")
        row = dict(backbone=backbone, dim=dim, num_layers=num_layers, batch_size=batch_size, length=length)
        row |= dict(milliseconds=milliseconds)
        row |= dict(ratio=float(f"{milliseconds / (rows[0] if rows else row)['milliseconds']:.3g}"))
        row |= dict(state_bytes=state_bytes(model, batch_size), program_bytes=program_bytes(model, batch_size))
        row |= dict(bytes_in_use=now[-1][1], device=jax.devices()[0].device_kind, commit=metrics.commit())
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: for each backbone time a token, its ratio to the first length's, and the memory."""
    lengths = sorted({row["length"] for row in rows})
    lines = ["| | " + " | ".join(f"{n:,}" for n in lengths) + " |", "|---|" + "---:|" * len(lengths)]
    for backbone in dict.fromkeys(row["backbone"] for row in rows):
        own = {row["length"]: row for row in rows if row["backbone"] == backbone}
        for what, shown in (
            ("ms a token", lambda row: f"{row['milliseconds']:.3g}"),
            ("ratio", lambda row: f"{row['ratio']:.2f}"),
            ("state, KiB", lambda row: f"{row['state_bytes'] / 1024:,.0f}"),
            ("program, MiB", lambda row: f"{row['program_bytes'] / 2**20:,.1f}"),
            ("in use, MiB", lambda row: f"{row['bytes_in_use'] / 2**20:,.0f}"),
        ):
            cells = (shown(own[n]) if n in own else "–" for n in lengths)
            lines.append(f"| {backbone}, {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(rows: list[dict[str, Any]], file: Path) -> None:
    """Time a token, the state's size and the compiled program's over the length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for backbone in dict.fromkeys(row["backbone"] for row in rows):
        own = [row for row in rows if row["backbone"] == backbone]
        x = [row["length"] for row in own]
        axes[0].plot(x, [row["milliseconds"] for row in own], marker="o", markersize=3, label=backbone)
        axes[1].plot(x, [row["state_bytes"] / 2**20 for row in own], marker="o", markersize=3)
        axes[2].plot(x, [row["program_bytes"] / 2**20 for row in own], marker="o", markersize=3)
    for axis, label in zip(axes, ("milliseconds a token", "state, MiB", "compiled block of tokens, MiB")):
        axis.set(xlabel="tokens generated", ylabel=label, xscale="log", yscale="log")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    picture.savefig(file, dpi=150)
    pyplot.close(picture)


@command.exit_code
def main(argv: list[str]) -> int:
    arguments = command.Arguments("decode", __doc__)
    arguments.add_argument("--backbone", default=",".join(BACKBONES))
    arguments.add_argument("--lengths", default=LENGTHS)
    arguments.add_argument("--dim", type=int, default=256)
    arguments.add_argument("--num_layers", type=int, default=4)
    arguments.add_argument("--batch_size", type=int, default=1)
    arguments.add_argument("--out", type=command.folder, default=Path("results/decode"))
    options = arguments.parse_args(argv)
    lengths, backbones = sorted(numbers("lengths", options.lengths)), options.backbone.split(",")
    if lengths[0] < 4 * BLOCK:
        raise ValueError(f"--lengths={options.lengths}: at least {4 * BLOCK} tokens are needed to be timed")
    if options.batch_size < 1:
        raise ValueError(f"--batch_size={options.batch_size}: at least 1 is needed")
    sizes = (options.dim, options.num_layers)
    for backbone in backbones:  # a wrong name or size ends here
        nnx.eval_shape(lambda backbone=backbone: build(backbone, *sizes, lengths[0]))
    writable(options.out)
    file = options.out / "decode.jsonl"
    rows = [row for row in metrics.read(file) if row["backbone"] not in backbones]
    for backbone in backbones:
        print(f"{backbone}: {len(lengths)} lengths up to {lengths[-1]} ...", flush=True)
        rows += measure(backbone, lengths, *sizes, options.batch_size)
        metrics.write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))
    metrics.write_atomically(options.out / "decode.md", table(rows))
    figure(rows, options.out / "decode.png")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
