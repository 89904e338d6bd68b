"""From a configuration to `results.json` and `report.html`."""

import time

from rich.console import Console

from fedoap.report.page import write_report
from fedoap.report.results import Results
from fedoap.simulation.after import run_after
from fedoap.simulation.config import SimulationConfig
from fedoap.simulation.display import Display
from fedoap.simulation.federation import read_ledger, run_federation
from fedoap.simulation.layout import Layout
from fedoap.simulation.processes import Processes, termination_raises
from fedoap.simulation.results import collect


def simulate(config: SimulationConfig, layout: Layout, console: Console) -> Results:
    """Run a whole federation in a folder, write `results.json` and `report.html` and return the figures.

    Raises:
        ProcessError: a process ended before its work was done; all others were ended.
    """
    began = time.monotonic()
    with (
        termination_raises(),
        Processes(layout.logs) as processes,
        Display(console, config.plan, list(config.sites)) as display,
    ):
        run_federation(config, layout, processes, display)
        run_after(config, layout, processes, display)
        ledger = read_ledger(layout, processes)
    results = collect(config, ledger, layout, seconds=time.monotonic() - began)
    layout.results.write_text(results.model_dump_json(indent=1), encoding="utf-8")
    write_report(layout.results, layout.report)
    return results
