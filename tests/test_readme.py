"""The README's tables are those that the committed rows make."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("table", sorted((ROOT / "results").rglob("table.md")), ids=lambda file: file.parent.name)
def test_every_line_of_the_table_is_in_the_readme(table):
    first = table.read_text().split("\n\n")[1].splitlines()
    assert len(first) > 2 and set(first) <= set((ROOT / "README.md").read_text().splitlines())
