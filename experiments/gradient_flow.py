"""Why LSTMs remember: python -m experiments.gradient_flow --workdir=DIR [--steps=500 --dim=64 --cells=lstm,gru ...]

Draws |dL/ds_t| against the distance T - t for cells at their initialisation, and how long their forget gates keep what
they hold. On white noise L is a random projection of the last output; on a task, whose tokens come in one-hot, it is
the task's own loss (cross-entropy, weighted as in training) through a random linear head.
Writes DIR/gradient_flow.png and DIR/gradient_flow.jsonl, one row a cell and initialisation. It computes in float64, so
that what vanishes is seen and not rounded to zero. The norm is over all fields of the state as the cell holds them:
c, n and C of sLSTM and mLSTM are in units of exp(m), which change from step to step, and the curves' scale with them.
"""

import functools
import json
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments import command
from experiments.train import use_compilation_cache
from xlstm_jax import analysis, cells, metrics, tasks
from xlstm_jax.models.backbone import BARE
from xlstm_jax.names import unknown
from xlstm_jax.tasks.formal import FormalLanguage


def gaussian(gain: float):
    """Independent entries, scaled so that the spectral radius is near `gain`."""
    return jax.nn.initializers.variance_scaling(gain**2, "fan_in", "normal")


# cell, what it is called, its options: a row more or less is a line here
ROWS = (
    ("elman", "Elman, Gaussian R, gain 0.5", {"recurrent_init": gaussian(0.5)}),
    ("elman", "Elman, orthogonal R", {"recurrent_init": "orthogonal"}),
    ("elman", "Elman, identity R", {"recurrent_init": "identity"}),
    ("elman", "Elman, ReLU, identity R", {"recurrent_init": "identity", "nonlinearity": "relu"}),
    ("elman", "Elman, Gaussian R, gain 2.5", {"recurrent_init": gaussian(2.5)}),
    ("lstm", "LSTM, forget bias 0", {"forget_bias": 0.0}),
    ("lstm", "LSTM, forget bias 1", {"forget_bias": 1.0}),
    ("lstm", "LSTM, forget bias 3", {"forget_bias": 3.0}),
    ("lstm", "LSTM, chrono(500)", {"forget_bias": "chrono(500)"}),
    ("gru", "GRU", {}),
    ("slstm", "sLSTM, power-law forget bias", {}),
    ("mlstm", "mLSTM, forget bias 3 to 6", {}),
)
FILE = "gradient_flow"
EVERY = 10  # lags between the numbers that a result row keeps
COLOURS = {  # safe for the colour-blind (Okabe and Ito 2008)
    "elman": "#D55E00",
    "lstm": "#0072B2",
    "gru": "#E69F00",
    "slstm": "#009E73",
    "mlstm": "#CC79A7",
}
OTHERS = ("#000000", "#56B4E9", "#8C8C8C", "#7A4B00")  # of other cells
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
STYLES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)))
UNITS = "sLSTM, mLSTM: c, n, C are in units of exp(m), which change from step to step, and the curves' scale with them"
LIMITS = ((1e-60, 1e60), (1e-20, 1e20))  # of the axes, without and with gates


class Settings(NamedTuple):
    """Of all rows."""

    steps: int
    dim: int
    batch: int
    seed: int
    task: str


class Measured(NamedTuple):
    """What is known of one row; lags k = 1 .. T."""

    gradient: np.ndarray  # (T,): |dL/ds_{T-k}|, mean over the batch
    log_forget: np.ndarray | None  # (B, T, ...)
    saturation: dict[str, list[float]]  # by gate: mean shares below 0.05 and above 0.95

    @property
    def relative(self) -> np.ndarray:
        """To lag 1, the state that enters the last step."""
        return self.gradient / self.gradient[0]

    @property
    def half_lives(self) -> list[float] | None:
        """Of the forget gate, in steps: QUANTILES over rows, steps and units."""
        if self.log_forget is None:
            return None
        quantiles = np.quantile(self.log_forget, QUANTILES)
        return [float(value) for value in analysis.half_life_of_log(quantiles)]


def choose(names: str) -> list[tuple[str, str, dict]]:
    """The rows of the cells "a,b"; a cell that ROWS has no row for stands for itself, as it is by default."""
    chosen = []
    for name in names.split(","):
        if name not in cells.CELLS:
            raise ValueError(unknown("cell", name, BARE))
        rows = [row for row in ROWS if row[0] == name]
        if not rows and name not in BARE:
            raise ValueError(
                f"--cells={name}: this laboratory feeds vectors to cells of one width that need no further options;"
                f" it takes {', '.join(BARE)}"
            )
        chosen += rows or [(name, cells.CELLS[name].__name__, {})]
    return chosen


class Question(NamedTuple):
    """Inputs (B, T, D_in), the linear head (dim, C), and what L asks of it: targets (B, T) and weights, or neither."""

    xs: jax.Array
    head: jax.Array
    targets: jax.Array | None = None
    weights: jax.Array | None = None

    def loss(self, ys: jax.Array) -> jax.Array:
        """L of the outputs (B, T, dim), summed over rows, which do not touch each other."""
        if self.targets is None:
            return jnp.sum(ys[:, -1] @ self.head)
        losses = optax.softmax_cross_entropy_with_integer_labels(ys @ self.head, self.targets)
        return jnp.sum(losses * self.weights)


def question(settings: Settings) -> Question:
    """White noise of width `dim` and one class, or a task's first training batch of full length, one-hot."""
    head_key = jax.random.key(settings.seed + 1)
    if settings.task == "noise":
        shape = settings.batch, settings.steps, settings.dim
        noise = jax.random.normal(jax.random.key(settings.seed), shape, jnp.float64)
        return Question(noise, jax.random.normal(head_key, (settings.dim,), jnp.float64))
    if settings.task not in tasks.TASKS:
        raise ValueError(unknown("task", settings.task, ["noise", *tasks.TASKS]))
    kind = tasks.TASKS[settings.task]
    formal = issubclass(kind, FormalLanguage)
    length = {"train_lengths": (settings.steps + 1,) * 2} if formal else {"seq_len": settings.steps}
    task = kind(**length)
    batch = task.batch("train", settings.seed, 0, settings.batch)
    head = jax.random.normal(head_key, (settings.dim, task.num_classes), jnp.float64)
    return Question(
        jax.nn.one_hot(batch.inputs, task.vocab_size, dtype=jnp.float64), head, batch.targets, batch.weights
    )


@functools.partial(jax.jit, static_argnames="graphdef")
def probe(graphdef, params, asked: Question) -> tuple[jax.Array, jax.Array | None, dict]:
    """Gradient norms (B, T), log of the forget factor (B, T, ...), saturation of the gates."""
    cell = nnx.merge(graphdef, params)
    xs = asked.xs
    gradients = analysis.state_gradients(cell, xs, asked.loss)
    norms = analysis.gradient_norms(gradients)["state"]
    log_forget = analysis.log_forget(cell, xs) if analysis.has_forget_gate(cell) else None
    return norms, log_forget, analysis.gate_saturation(cell, xs) if analysis.gate_names(cell) else {}


def measure(name: str, options: dict[str, Any], asked: Question, settings: Settings) -> Measured:
    """One cell, initialised from the seed."""
    rngs = nnx.Rngs(jax.random.key(settings.seed))
    cell = cells.CELLS[name](asked.xs.shape[-1], settings.dim, param_dtype=jnp.float64, rngs=rngs, **options)
    norms, log_forget, saturation = jax.device_get(probe(*nnx.split(cell), asked))
    shares = {gate: [round(float(share.mean()), 4) for share in shares] for gate, shares in saturation.items()}
    return Measured(norms.mean(axis=0)[::-1], log_forget, shares)


class Line(NamedTuple):
    """How a row is drawn."""

    label: str
    colour: str
    style: str | tuple
    measured: Measured


def draw(rows: list[tuple], found: list[Measured], settings: Settings, file: Path) -> None:
    """Gradient against lag, without gates and with, and how the half-lives of the forget gates are spread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name, *_ in rows]
    others = iter(OTHERS * len(names))
    colours = {name: COLOURS.get(name) or next(others) for name in dict.fromkeys(names)}
    styles = [STYLES[names[:index].count(name) % len(STYLES)] for index, name in enumerate(names)]
    lines = [Line(row[1], colours[row[0]], style, each) for row, style, each in zip(rows, styles, found)]
    gated = [line for line in lines if line.measured.saturation]
    plain = [line for line in lines if not line.measured.saturation]
    forgetting = [line for line in gated if line.measured.log_forget is not None]
    panels = [each for each in (plain, gated) if each]
    count = len(panels) + bool(forgetting)
    figure, axes = pyplot.subplots(1, count, figsize=(4.6 * count, 5.0), squeeze=False, layout="constrained")
    for axis, members in zip(axes[0], panels):
        draw_gradients(axis, members, plain if members is gated else [], settings.steps)
        axis.set_title("With gates" if members is gated else "Without gates", fontsize=11)
    if forgetting:
        draw_half_lives(axes[0][-1], forgetting, settings.steps)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    noise = settings.task == "noise"
    what, loss = ("white noise", "the last output") if noise else (settings.task, "the loss")
    title = f"Why LSTMs remember: the gradient of {loss} over {settings.steps} steps of {what}, before training"
    figure.suptitle(textwrap.fill(title, 50 * count), fontsize=12)
    if {"slstm", "mlstm"} & set(names):
        figure.supxlabel(UNITS, fontsize=8, color="#666666")
    figure.savefig(file, dpi=96)
    pyplot.close(figure)


def draw_gradients(axis, lines: list[Line], faint: list[Line], steps: int) -> None:
    """The relative gradient over lags; those of `faint` for comparison."""
    lags = np.arange(1, steps + 1)
    for line in lines:
        curve = np.where(line.measured.relative > 0, line.measured.relative, np.nan)
        axis.plot(lags, curve, color=line.colour, linestyle=line.style, linewidth=1.8, label=line.label)
    for number, line in enumerate(faint):
        label = None if number else "without gates"
        axis.plot(lags, line.measured.relative, color="#BBBBBB", linewidth=0.9, zorder=1, label=label)
    values = np.concatenate([line.measured.relative for line in lines])
    lowest, highest = LIMITS[bool(faint)]
    top = np.clip(values[np.isfinite(values)].max(), 1, highest)
    axis.set(yscale="log", ylim=(max(lowest, 0.1 * values.min()), 10 * top), xlim=(0, steps))
    axis.set(xlabel=r"lag $T - t$, steps", ylabel=r"$|\partial L/\partial s_t|$ relative to lag 1")
    axis.axhline(1, color="#999999", linewidth=0.8, zorder=0)
    place = dict(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    axis.legend(frameon=False, fontsize=8, handlelength=3.4, columnspacing=1.2, **place)


def draw_half_lives(axis, lines: list[Line], steps: int) -> None:
    """A dot at the median, a thick line from 10 to 90 %, a thin one from 1 to 99 %."""
    for place, line in enumerate(reversed(lines)):
        least, low, middle, high, most = line.measured.half_lives
        axis.plot((least, most), (place, place), color=line.colour, linewidth=0.9)
        axis.plot((low, high), (place, place), color=line.colour, linewidth=3.5, solid_capstyle="butt")
        axis.plot(middle, place, "o", color=line.colour, markersize=7)
    axis.axvline(steps, color="#999999", linewidth=0.8, zorder=0)
    note = dict(rotation=90, ha="right", va="center", fontsize=8, color="#666666")
    axis.text(steps, len(lines) - 1.45, f"{steps} steps", **note)
    axis.set_yticks(range(len(lines)), [line.label for line in reversed(lines)], fontsize=8)
    axis.set(xscale="log", ylim=(-0.6, len(lines) - 0.4), xlabel="half-life, steps (median; 10–90 %; 1–99 %)")
    axis.set_title(r"Forget gates: $\ln 2\,/\,{-\ln f}$", fontsize=11)


def table(rows: list[tuple], found: list[Measured], settings: Settings) -> str:
    """The gradient that is left after a fifth of the way back and after all of it, and the median half-life."""
    shown = sorted({max(settings.steps // 5, 1), settings.steps})
    width = max(len(label) for _, label, _ in rows)
    lines = ["".ljust(width) + "".join(f"  lag {lag:>5}" for lag in shown) + "  half-life"]
    for (_, label, _), each in zip(rows, found):
        kept = "".join(f"  {each.relative[lag - 1]:9.1e}" for lag in shown)
        lines.append(label.ljust(width) + kept + (f"  {each.half_lives[2]:9.2f}" if each.half_lives else "          –"))
    return "\n".join(lines)


def record(row: tuple, each: Measured, settings: Settings) -> dict[str, Any]:
    """A result row: the curve at every EVERY-th lag."""
    lags = [1, *range(EVERY, settings.steps + 1, EVERY)]
    curve = {"lags": lags, "gradient": [float(f"{each.gradient[lag - 1]:.4g}") for lag in lags]}
    config = {"cell": row[0], "initialisation": row[1]} | settings._asdict()
    measured = curve | {"half_life": each.half_lives, "saturation": each.saturation}
    return {"config": config} | metrics.environment() | measured


@command.exit_code
def main(argv: list[str]) -> int:
    arguments = command.Arguments("gradient_flow", __doc__)
    arguments.add_argument(
        "--workdir", type=command.folder, required=True, help="folder for the picture and the numbers"
    )
    arguments.add_argument("--steps", type=int, default=500, help="T")
    arguments.add_argument("--dim", type=int, default=64, help="width of the cells")
    arguments.add_argument("--batch", type=int, default=8, help="rows")
    arguments.add_argument("--seed", type=int, default=0, help="of the parameters, the inputs and the projection")
    arguments.add_argument("--task", default="noise", help="whose inputs and loss; noise: white noise")
    names = ",".join(dict.fromkeys(row[0] for row in ROWS))
    arguments.add_argument("--cells", default=names, help=f"a,b,... of {', '.join(BARE)}; default: {names}")
    options = arguments.parse_args(argv)
    settings = Settings(*(getattr(options, name) for name in Settings._fields))
    for name, least in {"steps": 2, "dim": 1, "batch": 1, "seed": 0}.items():
        if getattr(settings, name) < least:
            raise ValueError(f"--{name}={getattr(settings, name)}: at least {least} is needed")
    rows = choose(options.cells)
    options.workdir.mkdir(parents=True, exist_ok=True)
    use_compilation_cache()
    with jax.enable_x64(True):
        asked = question(settings)
        found = [measure(name, given, asked, settings) for name, _, given in rows]
        lines = [json.dumps(record(row, each, settings)) + "\n" for row, each in zip(rows, found)]
    picture, numbers = options.workdir / f"{FILE}.png", options.workdir / f"{FILE}.jsonl"
    metrics.write_atomically(numbers, "".join(lines))
    draw(rows, found, settings, picture)
    print(table(rows, found, settings), f"{picture}\n{numbers}", sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
