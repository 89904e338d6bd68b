"""Marks everything here `gpu` and skips it where there is none."""

from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests; elsewhere a marker is set by hand."""
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker("gpu")
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip("needs a GPU"))
