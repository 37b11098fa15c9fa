"""Which LSTM variant is better, and which setting matters: python -m experiments.odyssey --config=... --workdir=DIR

Reads DIR/results.jsonl of a random search (configs/papers/odyssey.py); prints two tables and writes them to
DIR/odyssey.md. A variant is compared with the first one by the mean of its best tenth of trials (Greff et al., arXiv
1503.04069, section V.A; a permutation test stands for their t-test). The variance over settings is split as there by a
functional ANOVA (Hutter et al. 2014), here of a polynomial in place of a forest: settings are drawn uniformly, so that
Legendre polynomials are orthonormal and every squared coefficient is a share of the variance.
"""

import math
import sys
from itertools import combinations
from types import ModuleType

import numpy as np
from jaxtyping import Float

from experiments import command, rows
from experiments.planning import load
from experiments.table import field, number
from xlstm_jax import metrics

LEGENDRE = (lambda x: math.sqrt(3) * x, lambda x: math.sqrt(5) * (3 * x**2 - 1) / 2)  # orthonormal on [-1, 1]


def variance_shares(
    points: Float[np.ndarray, "N P"], values: Float[np.ndarray, " N"], names: list[str]
) -> dict[str, float]:
    """Share of the variance of `values` by each setting, each pair, and the rest; points uniform in [-1, 1]^P.

    Least squares with a slight ridge on polynomials of degree 2 of each setting and the products of pairs.
    """
    columns, owners = [], []
    for at, name in enumerate(names):
        for polynomial in LEGENDRE:
            columns.append(polynomial(points[:, at]))
            owners.append(name)
    for one, other in combinations(range(len(names)), 2):
        columns.append(LEGENDRE[0](points[:, one]) * LEGENDRE[0](points[:, other]))
        owners.append(f"{names[one]} x {names[other]}")
    if len(values) <= len(columns) + 1:
        raise ValueError(
            f"{len(values)} trials are too few for the {len(columns) + 1} terms of the analysis of variance"
        )
    design, centred = np.stack([np.ones(len(values)), *columns], 1), values - values.mean()
    ridge = 1e-6 * len(values) * np.eye(design.shape[1])
    weights = np.linalg.solve(design.T @ design + ridge, design.T @ centred)
    explained = {owner: 0.0 for owner in owners}
    for owner, weight in zip(owners, weights[1:]):
        explained[owner] += weight**2
    rest = float(np.mean((centred - design @ weights) ** 2))
    total = sum(explained.values()) + rest
    return {name: float(part / total) if total else 0.0 for name, part in (explained | {"rest": rest}).items()}


def best_tenth(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " M"]:
    """The lowest tenth, two at least."""
    return np.sort(values)[: max(len(values) // 10, 2)]


def permutation_test(a: Float[np.ndarray, " N"], b: Float[np.ndarray, " M"], draws: int = 10_000) -> float:
    """Probability of so large a difference of means (two-sided) if both came from one distribution."""
    rng, pooled = np.random.default_rng(0), np.concatenate([a, b])
    shuffled = rng.permuted(np.tile(pooled, (draws, 1)), axis=1)
    differences = np.abs(shuffled[:, : len(a)].mean(1) - shuffled[:, len(a) :].mean(1))
    return float((1 + (differences >= abs(a.mean() - b.mean()) - 1e-12).sum()) / (draws + 1))


def settings(module: ModuleType, results: list[dict]) -> Float[np.ndarray, "N P"]:
    """The searched settings of each result, on the scale that they were drawn on, in [-1, 1]."""
    points = np.zeros((len(results), len(module.SEARCH)))
    for at, (name, (low, high, logarithmic)) in enumerate(module.SEARCH.items()):
        scale = np.log if logarithmic else np.asarray
        drawn = scale([float(result["overrides"][name]) for result in results])
        points[:, at] = 2 * (drawn - scale(low)) / (scale(high) - scale(low)) - 1
    return points


def report(module: ModuleType, results: list[dict]) -> str:
    """Both tables, in markdown."""
    table = module.TABLE
    by_variant = {name: [] for name in table["rows"]}
    for result in results:
        by_variant[field(result, table["row"])].append(result)
    there = {name: each for name, each in by_variant.items() if each}
    if len(there) < 2:
        raise ValueError(f"an odyssey compares variants: finished trials of {', '.join(there) or 'none'} only")
    tested = {name: np.array([number(r, table["metric"]) for r in each]) for name, each in there.items()}
    first = next(iter(tested))
    lines = [f"| variant | trials | best | best tenth | p against {table['rows'][first]} |", "|---|--:|--:|--:|--:|"]
    for name, values in tested.items():
        p = "–" if name == first else f"{permutation_test(best_tenth(values), best_tenth(tested[first])):.3f}"
        best = f"{values.min():.3f} | {best_tenth(values).mean():.3f}"
        lines.append(f"| {table['rows'][name]} | {len(values)} | {best} | {p} |")
    names = [name.rpartition(".")[2] for name in module.SEARCH]
    # every variant's own mean is no setting's doing
    values = np.concatenate([each - each.mean() for each in tested.values()])
    points = np.concatenate([settings(module, each) for each in there.values()])
    shares = variance_shares(points, values, names)
    lines += ["", "| setting | share of the variance over trials |", "|---|--:|"]
    lines += [f"| {name} | {share:.3f} |" for name, share in shares.items()]
    return "\n".join(lines) + "\n"


@command.exit_code
def main(argv: list[str]) -> int:
    parser = command.Arguments("odyssey", __doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", type=command.folder, required=True)
    options = parser.with_overrides(argv)
    sweep = load(options.config, options.overrides)
    for name in ("TABLE", "SEARCH"):
        if not hasattr(sweep.module, name):
            raise ValueError(f"--config={options.config}: the file has no {name}")
    rows.check(options.workdir, sweep)
    text = report(sweep.module, list(rows.read(options.workdir).values()))
    metrics.write_atomically(options.workdir / "odyssey.md", text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
