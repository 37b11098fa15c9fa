"""The fit of a known law, its best sizes against a search, and the report of a grid."""

import json

import numpy as np
import pytest

from experiments import planning, rows, scaling_laws

LAW = scaling_laws.Law(1.2, 40.0, 300.0, 0.34, 0.4, 0.0)


def points():
    N, D = np.meshgrid([1e4, 4e4, 2e5, 1e6], [2e5, 1e6, 5e6])
    return N.ravel(), D.ravel()


def test_a_known_law_is_found():
    N, D = points()
    found = scaling_laws.fit(N, D, LAW.loss(N, D))
    np.testing.assert_allclose(found[:5], LAW[:5], rtol=0.02)
    assert found.error < 1e-4
    with pytest.raises(ValueError, match="3 runs of 1 sizes and 3 numbers of tokens: a fit needs"):
        scaling_laws.fit(np.full(3, 1e4), np.array([1.0, 2.0, 3.0]), np.ones(3))
    with pytest.raises(ValueError, match="no law with falling losses fits"):
        scaling_laws.fit(N, D, 1 - 1e9 / N - 1e9 / D)


def test_the_best_size_is_the_minimum_over_sizes():
    C = 1e12
    N = np.geomspace(1e3, 1e7, 20_001)
    best, tokens = LAW.best(C)
    assert best == pytest.approx(N[np.argmin(LAW.loss(N, C / 6 / N))], rel=1e-2)
    assert 6 * best * tokens == pytest.approx(C)


def test_report_of_a_grid(tmp_path, capsys):
    arguments = ["--config=configs/papers/scaling_laws.py:reduced", f"--workdir={tmp_path}"]
    assert scaling_laws.main(arguments) == 2 and "no finished run yet" in capsys.readouterr().err
    sweep = planning.load("configs/papers/scaling_laws.py:reduced")
    rows.prepare(tmp_path, sweep)
    lines = []
    for run in sweep.runs:
        config = sweep.config(run).to_dict()
        parameters = 50 * config["model"]["dim"] ** 2
        tokens = config["steps"] * config["batch_size"] * config["task"]["seq_len"]
        result = {"id": run.id, "overrides": run.overrides, "config": config, "steps": config["steps"], "seconds": 1.0}
        lines.append(json.dumps(result | {"parameters": parameters, "valid_loss": float(LAW.loss(parameters, tokens))}))
    (tmp_path / rows.RESULTS).write_text("\n".join(lines) + "\n")
    assert scaling_laws.main(arguments) == 0
    text = capsys.readouterr().out
    assert "| Transformer | 1.2" in text and text == (tmp_path / "scaling_laws.md").read_text()
    assert (tmp_path / "scaling_laws.png").stat().st_size > 5_000
