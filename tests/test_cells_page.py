"""docs/cells.md: up to date and complete, and its formulas."""

import pytest

from experiments import cells_page
from xlstm_jax import cells


@pytest.fixture(scope="module")
def page():
    return cells_page.page()


def test_the_committed_page_is_up_to_date(page):
    assert cells_page.PAGE.read_text() == page, "run `python -m experiments.cells_page`"


def test_every_cell_has_a_row_and_a_section(page):
    for cls in (*cells.CELLS.values(), cells.Bidirectional, cells.Stack):
        assert f"\n### {cls.__name__}\n" in page and f"| [{cls.__name__}](#{cls.__name__.lower()}) |" in page
    assert all(f'`"{name}"`' in page for name in cells.CELLS)


@pytest.mark.parametrize(
    "name,parameters,flops,state",
    [
        ("lstm", "4 D_in D + 4 D²/N + 4 D", "8 D_in D + 8 D²/N", "2 D"),
        ("projected_lstm", "4 D_in D + 5 D H/N + 4 D", "8 D_in D + 10 D H/N", "D + H"),
        ("mlstm", "4 D_in D + 2 D_in N + D + 2 N", "8 D_in D + 5 D²/N", "D²/N + D + N"),
        ("conv_lstm", "4 k² D_in D + 4 k² D² + 4 D", "8 X² k² D_in D + 8 X² k² D²", "2 X² D"),
    ],
)
def test_formulas(name, parameters, flops, state):
    """LSTM: 4 gates see x and h. mLSTM: q, k, v, o; f C + (i k) v^T is 3 operations an entry of C, and C^T q is 2."""
    facts = cells_page.facts(cells.CELLS[name])
    total, formula = cells_page.total, cells_page.formula
    assert [formula(total(facts.parameters)), formula(facts.flops), formula(total(facts.state))] == [
        parameters,
        flops,
        state,
    ]


def test_a_page_that_is_out_of_date_ends_in_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cells_page, "PAGE", tmp_path / "docs" / "cells.md")
    monkeypatch.setattr(cells_page, "page", lambda: "# New\n")
    assert cells_page.main(["--check"]) == 1
    assert capsys.readouterr().err == "error: docs/cells.md is out of date: run `python -m experiments.cells_page`\n"
    assert cells_page.main([]) == 0 and cells_page.main(["--check"]) == 0
    assert cells_page.PAGE.read_text() == "# New\n" and capsys.readouterr().err == ""
    assert cells_page.main(["--chekc"]) == 2


def test_an_argument_that_the_generator_does_not_know():
    class Unknown(cells.LSTM):
        def __init__(self, in_features, features, depth, **options):
            super().__init__(in_features, features, **options)

    with pytest.raises(ValueError, match="Unknown needs the argument 'depth'"):
        cells_page.build(Unknown)


def test_docstrings_become_prose_and_code():
    text = """Title with h~ and `h~`.

        h = x + y

    with x = y for all steps

    b = 1

    name   aligned
    """
    assert cells_page.docstring(text) == [
        "Title with h\\~ and `h~`.",
        "```\nh = x + y\n```",
        "with x = y for all steps",
        "```\nb = 1\n```",
        "```\nname   aligned\n```",
    ]
