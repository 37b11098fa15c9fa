"""The README's tables are those that the committed rows make."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("table", sorted((ROOT / "results").rglob("table.md")), ids=lambda file: file.parent.name)
def test_every_line_of_the_table_is_in_the_readme(table):
    first = table.read_text().split("\n\n")[1].splitlines()
    assert len(first) > 2 and set(first) <= set((ROOT / "README.md").read_text().splitlines())


def test_the_examples_run():
    """Every Python block but the one that shows a rule, one after another as a reader types them."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    examples = [block for block in blocks if not block.startswith("def rule")]
    assert len(examples) == 2
    ran = subprocess.run([sys.executable, "-c", "\n".join(examples)], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
