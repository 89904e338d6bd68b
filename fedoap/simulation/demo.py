"""A federation of invented patients: nothing but this package is needed to see one at work."""

import importlib.resources
from pathlib import Path

from rich.console import Console

from fedoap.report.results import Results
from fedoap.segmentation.datalist import Split
from fedoap.segmentation.phantoms import ORGANS, write_phantoms
from fedoap.simulation.config import load_simulation
from fedoap.simulation.layout import make_layout
from fedoap.simulation.run import simulate

SIZE = (64, 64)
COUNTS: dict[Split, int] = {"training": 8, "validation": 12, "test": 40}
"""Few cases to learn from, as in small hospitals, and enough to measure on."""


def run_demo(out: Path, console: Console, *, overwrite: bool = False) -> Results:
    """Run a simulation of three phantom sites and an unseen one in a folder and return its figures.

    Raises:
        ConfigError: the folder holds something already.
        ProcessError: a process ended before its work was done; all others were ended.
    """
    layout = make_layout(out, overwrite=overwrite)
    console.print(f"drawing {sum(COUNTS.values())} phantoms for each of {', '.join(ORGANS)}")
    for organ in ORGANS:
        write_phantoms(layout.out / "data" / organ, organ, COUNTS, SIZE, seed=0)
    config = layout.out / "simulate.toml"
    config.write_bytes(importlib.resources.files("fedoap.simulation").joinpath("demo.toml").read_bytes())
    return simulate(load_simulation(config), layout, console)
