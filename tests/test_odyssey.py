"""The analysis of a random search: variance shares of known functions, the test of variants, the report."""

import itertools

import numpy as np
import pytest

from experiments import odyssey, planning

CONFIG = "configs/papers/odyssey.py:reduced"


def test_shares_of_a_known_function():
    """y = 3a + 2(b^2 - 1/3) + ac: variances 9/3, 4 * 4/45 and 1/9 under uniform a, b, c."""
    points = np.random.default_rng(0).uniform(-1, 1, (4000, 3))
    a, b, c = points.T
    found = odyssey.variance_shares(points, 5 + 3 * a + 2 * (b**2 - 1 / 3) + a * c, ["a", "b", "c"])
    total = 3 + 16 / 45 + 1 / 9
    wanted = {"a": 3, "b": 16 / 45, "c": 0, "a x b": 0, "a x c": 1 / 9, "b x c": 0, "rest": 0}
    assert found == pytest.approx({name: part / total for name, part in wanted.items()}, abs=2e-3)
    assert sum(found.values()) == pytest.approx(1)
    noise = odyssey.variance_shares(points, np.random.default_rng(1).normal(size=4000), ["a", "b", "c"])
    assert noise["rest"] > 0.98
    with pytest.raises(ValueError, match="9 trials are too few for the 10 terms"):
        odyssey.variance_shares(points[:9], a[:9], ["a", "b", "c"])


def test_permutation_test_equals_the_count_of_all_arrangements():
    a, b = np.array([1.0, 2.0, 2.5]), np.array([3.0, 4.0, 2.2, 5.0])
    pooled, extreme = np.concatenate([a, b]), []
    for chosen in itertools.combinations(range(7), 3):
        rest = [n for n in range(7) if n not in chosen]
        difference = abs(pooled[list(chosen)].mean() - pooled[rest].mean())
        extreme.append(difference >= abs(a.mean() - b.mean()) - 1e-12)
    assert odyssey.permutation_test(a, b) == pytest.approx(np.mean(extreme), abs=0.01)
    np.testing.assert_array_equal(odyssey.best_tenth(np.arange(40.0)[::-1]), [0, 1, 2, 3])
    np.testing.assert_array_equal(odyssey.best_tenth(np.array([3.0, 1.0, 2.0])), [1, 2])


def test_report_of_a_search():
    """Results made from the settings alone, the variant NFG worse by 2."""
    sweep = planning.load(CONFIG)
    points = odyssey.settings(sweep.module, [{"overrides": run.overrides} for run in sweep.runs])
    assert (
        points.shape == (9 * 12, 3) and np.abs(points).max() <= 1.01 and np.ptp(points, axis=0).min() > 1
    )  # of 2, by 12 draws
    trials = points.reshape(9, 12, 3)
    assert (trials == trials[:1]).all()  # trial n is the same in every variant
    results = [
        {"id": run.id, "overrides": run.overrides, "test_nll": 9 + point[1] + 2 * (run.overrides["label"] == "NFG")}
        for run, point in zip(sweep.runs, points, strict=True)
    ]
    text = odyssey.report(sweep.module, results)
    shares = dict(line.strip("| ").split(" | ") for line in text.split("\n\n")[1].splitlines()[2:])
    assert float(shares["learning_rate"]) > 0.95
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in text.splitlines()}
    assert float(rows["no forget gate"][2]) == pytest.approx(float(rows["vanilla (peepholes)"][2]) + 2, abs=2e-3)
    assert rows["no forget gate"][0] == "12" and float(rows["no output gate"][3]) == 1
    with pytest.raises(ValueError, match="compares variants: finished trials of V only"):
        odyssey.report(sweep.module, results[:12])


def test_a_config_without_a_search_is_refused(tmp_path, capsys):
    assert odyssey.main(["--config=configs/papers/mqar.py:demo", f"--workdir={tmp_path}"]) == 2
    assert "the file has no SEARCH" in capsys.readouterr().err
