"""What follows the federation: each site trained alone, unseen sites, pictures; several processes at a time."""

import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from fedoap.config import SiteConfig
from fedoap.errors import ProcessError
from fedoap.simulation.config import SimulationConfig
from fedoap.simulation.display import Display
from fedoap.simulation.federation import POLL_SECONDS, Log
from fedoap.simulation.layout import Layout
from fedoap.simulation.processes import Child, Processes
from fedoap_node.job import JOB, JobProgress, write_local_job


@dataclass(frozen=True, slots=True)
class Work:
    """A command to run, and its name on the display and among the logs."""

    name: str
    command: tuple[str, ...]


def run_after(config: SimulationConfig, layout: Layout, processes: Processes, display: Display) -> None:
    """Write the local-only results, the unseen sites' figures and the pictures to their folders.

    Raises:
        ProcessError: one of them failed.
    """
    work = [_alone(name, site, config, layout) for name, site in config.sites.items() if config.local_only]
    work += [_pictures(name, layout) for name in config.sites]
    work += [_unseen(name, layout) for name in config.unseen]
    run_side_by_side(work, processes_at_once(config.threads), processes, display)


def processes_at_once(threads: int) -> int:
    """Return how many processes of so many threads the cores can run; with 0 a process takes all cores."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // threads) if threads else 1


def run_side_by_side(work: Sequence[Work], at_once: int, processes: Processes, display: Display) -> None:
    """Run every command to its end, `at_once` at a time.

    Raises:
        ProcessError: one of them failed; with its last lines.
    """
    waiting, running = deque(work), dict[str, tuple[Work, Child, Log]]()
    while waiting or running:
        while waiting and len(running) < at_once:
            next_one = waiting.popleft()
            child = processes.start(next_one.name, next_one.command)
            running[next_one.name] = (next_one, child, Log(child.output))
            display.job(next_one.name, 0, 1, "started")
        for each, _, log in running.values():
            _show(each, log, display)
        time.sleep(POLL_SECONDS)
        for child in processes.ended():
            if child.code:
                raise ProcessError(child.last_words())
            del running[child.name]
            display.job(child.name, 1, 1, "done")


def _show(work: Work, log: Log, display: Display) -> None:
    for line in log.new():
        if line.keys() >= {"stage", "step", "steps", "loss"}:
            progress = JobProgress.model_validate(line)
            display.job(work.name, progress.step, progress.steps, f"{progress.stage}  loss {progress.loss:.2f}")


def _alone(name: str, site: SiteConfig, config: SimulationConfig, layout: Layout) -> Work:
    output = layout.alone(name)
    write_local_job(name, site, config.plan, layout.home / name / "state" / "cache", output)
    worker = site.worker.command or (sys.executable, "-m", "fedoap_node.worker")
    return Work(f"alone-{name}", (*worker, str(output / JOB)))


def _pictures(name: str, layout: Layout) -> Work:
    whose = ("--site", name, "--home", str(layout.home), "--split", "validation")
    return Work(f"pictures-{name}", _evaluate(name, whose, layout))


def _unseen(name: str, layout: Layout) -> Work:
    whose = ("--model", str(layout.model), "--config", str(layout.unseen_toml(name)), "--split", "test")
    return Work(f"unseen-{name}", _evaluate(name, whose, layout))


def _evaluate(name: str, whose: tuple[str, ...], layout: Layout) -> tuple[str, ...]:
    output = layout.evaluation(name)
    output.parent.mkdir(exist_ok=True)
    left = ("--json", str(output), "--pictures", str(layout.pictures(name)), "--threads", "1")
    return (sys.executable, "-m", "fedoap", "evaluate", *whose, *left)
