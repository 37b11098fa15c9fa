"""The best size for a budget: python -m experiments.scaling_laws --config=... --workdir=DIR

Reads DIR/results.jsonl of a grid of sizes and tokens (configs/papers/scaling_laws.py) and fits, for each model,

    L(N, D) = E + A N^-a + B D^-b                              (Hoffmann et al., arXiv 2203.15556, section 3.3)
    N*(C) = G (C/6)^(b/(a+b))    D*(C) = (C/6)^(a/(a+b)) / G    G = (a A / (b B))^(1/(a+b))    with C = 6 N D

N: all parameters, D: tokens trained on, L: the loss in nats a token on the validation split. Prints a table and writes
DIR/scaling_laws.md and DIR/scaling_laws.png.
"""

import sys
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from experiments import command, rows
from experiments.planning import load
from experiments.table import field, number
from xlstm_jax import metrics


class Law(NamedTuple):
    """L(N, D) = E + A N^-a + B D^-b, and the root of the mean squared error of its fit."""

    E: float
    A: float
    B: float
    a: float
    b: float
    error: float

    def loss(self, N, D):
        """Nats a token."""
        return self.E + self.A * N**-self.a + self.B * D**-self.b

    def best(self, C):
        """(N*, D*) of a budget of C floating-point operations."""
        G = (self.a * self.A / (self.b * self.B)) ** (1 / (self.a + self.b))
        return G * (C / 6) ** (self.b / (self.a + self.b)), (C / 6) ** (self.a / (self.a + self.b)) / G


def fit(N: Float[np.ndarray, " R"], D: Float[np.ndarray, " R"], L: Float[np.ndarray, " R"]) -> Law:
    """Least squares: linear in E, A and B for every pair of exponents of a grid that is refined around the best."""
    if len(L) < 6 or len(set(N)) < 2 or len(set(D)) < 2:
        raise ValueError(
            f"{len(L)} runs of {len(set(N))} sizes and {len(set(D))} numbers of tokens: a fit needs at least 6 runs, 2"
            " sizes and 2 numbers of tokens"
        )
    low, high, best = np.array([0.02, 0.02]), np.array([2.0, 2.0]), None
    n, d = N / np.exp(np.log(N).mean()), D / np.exp(np.log(D).mean())  # powers of large numbers lose digits
    for _ in range(8):
        for a in np.linspace(low[0], high[0], 21):
            for b in np.linspace(low[1], high[1], 21):
                design = np.stack([np.ones(len(L)), n**-a, d**-b], 1)
                weights = np.linalg.lstsq(design, L, rcond=None)[0]
                error = np.sqrt(np.mean((design @ weights - L) ** 2))
                if (weights >= 0).all() and (best is None or error < best[0]):
                    best = error, a, b, weights
        if best is None:
            raise ValueError("no law with falling losses fits: train longer, or with other learning rates")
        step = (high - low) / 10
        centre = np.array(best[1:3])
        low, high = np.maximum(centre - step, 0.01), centre + step
    error, a, b, (E, A, B) = best
    scale_n, scale_d = np.exp(np.log(N).mean()), np.exp(np.log(D).mean())
    return Law(*map(float, (E, A * scale_n**a, B * scale_d**b, a, b, error)))


def grid(results: list[dict]) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(N, D, L) of every model."""
    found: dict[str, list] = {}
    for result in results:
        config = result["config"]
        tokens = result["steps"] * config["batch_size"] * config["task"]["seq_len"]
        point = number(result, "parameters"), float(tokens), number(result, "valid_loss")
        found.setdefault(field(result, "model.backbone"), []).append(point)
    return {model: tuple(np.array(points).T) for model, points in found.items()}


def report(laws: dict[str, Law], budgets: Float[np.ndarray, " K"], names: dict[str, str]) -> str:
    """The laws and the best sizes, in markdown."""
    lines = ["| model | E | A | a | B | b | root mean squared error |", "|---|--:|--:|--:|--:|--:|--:|"]
    for model, law in laws.items():
        numbers = f"{law.E:.3f} | {law.A:.4g} | {law.a:.3f} | {law.B:.4g} | {law.b:.3f} | {law.error:.4f}"
        lines.append(f"| {names[model]} | {numbers} |")
    lines += ["", "| model | C (FLOPs) | N* | D* | loss |", "|---|--:|--:|--:|--:|"]
    for model, law in laws.items():
        for C in budgets:
            N, D = law.best(C)
            lines.append(f"| {names[model]} | {C:.1e} | {N:.3g} | {D:.3g} | {law.loss(N, D):.3f} |")
    return "\n".join(lines) + "\n"


def picture(points: dict, laws: dict[str, Law], names: dict[str, str], path) -> None:
    """Loss over budget, a line a size, dots the runs, dashed the best size's loss; and N*(C)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for colour, (model, (N, D, L)) in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"], points.items()):
        C = np.geomspace((6 * N * D).min(), (6 * N * D).max(), 50)
        for size in sorted(set(N)):
            order = np.argsort(D[N == size])
            left.plot(
                (6 * size * D[N == size])[order], L[N == size][order], "o-", color=colour, markersize=3, linewidth=0.7
            )
        best, tokens = laws[model].best(C)
        left.plot(C, laws[model].loss(best, tokens), "--", color=colour, label=names[model])
        right.plot(C, best, "--", color=colour, label=names[model])
    left.set(xscale="log", xlabel="C = 6 N D (FLOPs)", ylabel="nats a token")
    right.set(xscale="log", yscale="log", xlabel="C (FLOPs)", ylabel="best N")
    left.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


@command.exit_code
def main(argv: list[str]) -> int:
    parser = command.Arguments("scaling_laws", __doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", type=command.folder, required=True)
    options = parser.with_overrides(argv)
    sweep = load(options.config, options.overrides)
    rows.check(options.workdir, sweep)
    points = grid(list(rows.read(options.workdir).values()))
    if not points:
        raise ValueError(f"--workdir={options.workdir}: no finished run yet")
    laws, names = {model: fit(*each) for model, each in points.items()}, sweep.module.TABLE["rows"]
    every = np.concatenate([6 * N * D for N, D, _ in points.values()])
    text = report(laws, np.geomspace(every.min(), every.max(), 4), names)
    metrics.write_atomically(options.workdir / "scaling_laws.md", text)
    picture(points, laws, names, options.workdir / "scaling_laws.png")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
