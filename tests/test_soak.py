"""What `make soak` runs is there, and heeds the variable that says how much of it."""

from pathlib import Path

import pytest

from benchmarks.soak import PARTS, Part

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_each_part_is_a_test_that_says_its_counts(part: Part) -> None:
    text = (ROOT / part.file).read_text(encoding="utf-8")

    assert not part.variable or f'"{part.variable}", "' in text
    assert f"\\n{part.name}: " in text
    assert not part.chosen or any(part.chosen in line for line in text.splitlines() if line.startswith("def test_"))
