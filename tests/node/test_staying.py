"""A worker that stays after its job, for the next one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from easy_site import easy_plan
from fedoap.config import Plan, SiteData, StrategyConfig, WorkerConfig
from fedoap.segmentation import data as data_module
from fedoap.segmentation.datalist import Case
from fedoap.segmentation.network import FedOAPNet
from fedoap.segmentation.prepared import PreparedCase, load_case
from fedoap_node import standby as standby_module
from fedoap_node.job import Job, JobDone
from fedoap_node.standby import Standby, standby_command
from fedoap_node.trainer import Trainer
from fedoap_node.workshop import Workshop
from tests.node.test_trainer import exit_code, is_gone
from tests.node.test_worker import ENVIRONMENT, Site, files, result, snapshot, tensors

WORKER = """
import os, sys
from pathlib import Path
while line := sys.stdin.readline():
    job = Path(line.strip())
    with (job.parent / "pids").open("a") as file:
        file.write(f"{os.getpid()}\\n")
    print('{"done": true}', flush=True)
"""


@pytest.fixture
def standby(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Standby]:
    """A standby whose worker is a stand-in for fedoap's own."""
    monkeypatch.setattr(standby_module, "standby_command", lambda _: [sys.executable, "-c", WORKER])
    standby = Standby(WorkerConfig(stay_seconds=30), tmp_path / "worker.log")
    yield standby
    standby.close()


def done(trainer: Trainer) -> None:
    deadline = time.monotonic() + 20
    while not trainer.has_done():
        assert time.monotonic() < deadline
        trainer.progress()
        time.sleep(0.01)


def pids(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "pids").read_text().split()]


def test_one_process_does_job_after_job(standby: Standby, tmp_path: Path) -> None:
    """Planted bugs: its input closed behind the first job; the first job's end taken for the second's."""
    standby.prepare()
    for count in (1, 2, 3):
        trainer = standby.take(tmp_path / "job.json")
        assert not trainer.has_done()
        done(trainer)
        assert len(pids(tmp_path)) == count
        standby.keep(trainer)
        standby.prepare()

    assert len(set(pids(tmp_path))) == 1


def test_one_that_nobody_needs_for_a_while_ends_and_a_fresh_one_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, standby: Standby
) -> None:
    """Planted bug: a fresh worker ended by the clock too."""
    standby.prepare()
    trainer = standby.take(tmp_path / "job.json")
    done(trainer)
    standby.keep(trainer)
    (stayed,) = pids(tmp_path)
    now = time.monotonic()

    monkeypatch.setattr(time, "monotonic", lambda: now + 29)
    standby.prepare()
    assert trainer.exit_code() is None
    monkeypatch.setattr(time, "monotonic", lambda: now + 32)
    standby.prepare()
    fresh = standby._waiting
    monkeypatch.setattr(time, "monotonic", lambda: now + 1000)
    standby.prepare()
    monkeypatch.undo()

    assert is_gone(stayed)
    assert fresh is not None
    assert standby._waiting is fresh


def test_where_it_died_while_it_waited_a_fresh_one_does_the_job(
    tmp_path: Path, standby: Standby, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = [sys.executable, "-c", "print('fresh')"]
    monkeypatch.setattr(standby_module, "worker_command", lambda *_: fresh)
    standby.prepare()
    trainer = standby.take(tmp_path / "job.json")
    done(trainer)
    standby.keep(trainer)
    os.kill(pids(tmp_path)[0], signal.SIGKILL)
    exit_code(trainer)

    another = standby.take(tmp_path / "job.json")

    assert another is not trainer
    assert exit_code(another) == 0
    another.kill()


@pytest.mark.parametrize(("command", "seconds", "stays"), [(False, 0, False), (True, None, False), (True, 9, True)])
def test_which_worker_stays(tmp_path: Path, *, command: bool, seconds: float | None, stays: bool) -> None:
    """Planted bugs: a command that was promised the end of its input left without; 0 seconds taken for none given."""
    words = (sys.executable, "-c", WORKER)
    worker = WorkerConfig(command=words, keep_warm=True, stay_seconds=seconds)
    standby = Standby(worker if command else WorkerConfig(stay_seconds=seconds), tmp_path / "worker.log")
    standby._waiting = Trainer([*words, "-"], None, tmp_path / "worker.log")

    trainer = standby.take(tmp_path / "job.json")
    done(trainer)

    if stays:
        assert trainer.exit_code() is None
    else:
        assert exit_code(trainer) == 0
    trainer.kill()


def test_fedoap_s_own_worker_does_several_jobs_as_several_workers_do(tmp_path: Path) -> None:
    """Planted bugs: weights of the first job left in the second; no line that says a job is done."""
    command = standby_command(WorkerConfig())
    assert command is not None
    site = Site(tmp_path)
    start, model = site.job("init"), files(tmp_path / "init0")
    jobs = [start, *(site.job("train", number, name=name) for number, name in ((1, "one"), (2, "two"), (1, "again")))]
    jobs[1:] = [job.model_copy(update={"model": model}) for job in jobs[1:]]
    for job in jobs:
        job.output.mkdir()
        (job.output / "job.json").write_text(job.model_dump_json())

    lines = "".join(f"{job.output}/job.json\n" for job in jobs)
    ended = subprocess.run(
        command, input=lines, capture_output=True, text=True, timeout=120, check=True, env=ENVIRONMENT
    )

    said = [json.loads(line) for line in ended.stdout.splitlines()]
    assert sum(line == JobDone(done=True).model_dump() for line in said) == len(jobs)
    one, two, again = (tensors(job.output) for job in jobs[1:])
    alone = jobs[2].model_copy(update={"output": tmp_path / "alone"})
    Workshop().carry_out(alone, lambda _: None)
    assert all((one[name] == again[name]).all() for name in one)
    assert any((one[name] != two[name]).any() for name in one)
    assert all((two[name] == value).all() for name, value in tensors(alone.output).items())


@pytest.mark.parametrize("name", ["fedoap", "scaffold", "apfl", "ditto"])
def test_networks_that_did_other_jobs_do_the_next_as_new_ones_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Planted bugs: personal weights, or a site's control variates, left from the job before; gradients kept."""
    site, shop = Site(tmp_path, easy_plan(steps=4, strategy=StrategyConfig(name=name))), Workshop()
    start = site.do("init")
    shop.carry_out(site.job("train", 1, model=start, name="before"), site.seen.append)
    shop.carry_out(site.job("calibrate", 3, model=start), site.seen.append)
    first, new = (site.job("train", 2, model=start, name=name) for name in ("first", "new"))

    with monkeypatch.context() as patch:
        patch.setattr(FedOAPNet, "_build", None)  # no other network is built
        shop.carry_out(first, site.seen.append)
    kept = shop._networks.model
    Workshop().carry_out(new, site.seen.append)

    assert snapshot(first.output / "personal") == snapshot(new.output / "personal")
    assert files(first.output).blob.read_bytes() == files(new.output).blob.read_bytes()
    assert kept is not None
    assert all(one.grad is None for one in kept.parameters())


def counted(workshop: Workshop, job: Job, monkeypatch: pytest.MonkeyPatch) -> int:
    """Do the job and return how many cases were read from disk for it."""
    calls: list[Case] = []

    def load(case: Case, data: SiteData, plan: Plan, cache: Path | None = None) -> PreparedCase:
        calls.append(case)
        return load_case(case, data, plan, cache)

    with monkeypatch.context() as patch:
        patch.setattr(data_module, "load_case", load)
        workshop.carry_out(job, lambda _: None)
    return len(calls)


def test_cases_are_read_once_while_list_and_plan_stay_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bugs: cases kept when the list, or an image, was written anew; kept beyond what memory is allowed."""
    site, shop, small = Site(tmp_path), Workshop(), Workshop(keeps=1)
    start = site.do("init")
    first, second, third, fourth = (site.job("train", 1, model=start, name=name) for name in ("w", "x", "y", "z"))

    assert counted(shop, first, monkeypatch) > 0
    assert counted(shop, second, monkeypatch) == 0
    content = json.loads(second.data.datalist.read_text())
    content["training"] = content["training"][1:]
    second.data.datalist.write_text(json.dumps(content))
    assert counted(shop, third, monkeypatch) > 0
    assert result(third.output).cases == result(second.output).cases - 1
    (image,) = (second.data.root or tmp_path).glob(content["training"][0]["image"])
    os.utime(image, ns=(1, 1))
    assert counted(shop, fourth, monkeypatch) > 0
    assert counted(small, second, monkeypatch) > 0
    assert counted(small, third, monkeypatch) > 0
