import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from easy_site import COUNTS, easy_plan, write_easy_site
from fedoap.bank import merge_bank
from fedoap.config import BlobFiles, CalibrationConfig, ModelRecord, Plan, SiteData, StrategyConfig, WorkerConfig
from fedoap.errors import ConfigError, DataError, StorageError
from fedoap.manifests import BlobManifest, UploadManifest
from fedoap.segmentation.descent import Progress
from fedoap.segmentation.modelfolder import load_model
from fedoap.tensors import read_blob
from fedoap_node.job import Job, JobKind, JobProgress, JobResult
from fedoap_node.trainer import Trainer
from fedoap_node.worker import Reporter, main
from fedoap_node.workshop import Workshop

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}


@dataclass
class Site:
    """One site's folder, in which jobs are done one after the other."""

    folder: Path
    plan: Plan = field(default_factory=easy_plan)
    personal: Path | None = None
    seen: list[Progress] = field(default_factory=list)

    def job(
        self, kind: JobKind, number: int = 0, *, model: Path | None = None, bank: Path | None = None, name: str = ""
    ) -> Job:
        data = SiteData(datalist=self.folder / "data" / "datalist.json", root=self.folder / "data", modality="photo")
        if not data.datalist.exists():
            write_easy_site(self.folder / "data")
        return Job(
            kind=kind,
            site="a",
            round=number,
            plan=self.plan,
            data=data,
            worker=WorkerConfig(device="cpu"),
            model=files(model) if model else None,
            bank=files(bank) if bank else None,
            personal=self.personal,
            cache=self.folder / "cache",
            output=self.folder / (name or f"{kind}{number}"),
        )

    def do(self, kind: JobKind, number: int = 0, *, model: Path | None = None, bank: Path | None = None) -> Path:
        job = self.job(kind, number, model=model, bank=bank)
        Workshop().carry_out(job, self.seen.append)
        if (job.output / "personal").exists():
            self.personal = job.output / "personal"
        return job.output


def files(output: Path) -> BlobFiles:
    return BlobFiles(blob=output / "update.blob", manifest=output / "update.manifest")


def manifest(output: Path) -> BlobManifest:
    return BlobManifest.unpack((output / "update.manifest").read_bytes())


def tensors(output: Path) -> dict[str, NDArray[np.generic]]:
    return read_blob(output / "update.blob", manifest(output))


def values(output: Path) -> NDArray[np.float64]:
    """All numbers of an update, one after the other."""
    return np.concatenate([array.astype(np.float64).ravel() for _, array in sorted(tensors(output).items())])


def result(output: Path) -> JobResult:
    return JobResult.model_validate_json((output / "result.json").read_text())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def merged(site: Site, kind: JobKind, output: Path) -> Path:
    """Leave the bank that one site's sums make where a job finds it."""
    upload = UploadManifest(b"t" * 32, "a", 1, (), manifest(output))
    target = site.folder / f"bank-of-{output.name}"
    target.mkdir()
    assert kind in ("seed", "bank")
    made = merge_bank(kind, [(output / "update.blob", upload)], None, site.plan, target / "update.blob")
    (target / "update.manifest").write_bytes(made.pack())
    return target


def run(job: Job, *launcher: str) -> subprocess.CompletedProcess[str]:
    job.output.mkdir(exist_ok=True)
    path = job.output / "job.json"
    path.write_text(job.model_dump_json())
    command = [sys.executable, *launcher, "-m", "fedoap_node.worker", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)


def test_a_site_goes_through_a_whole_federation(tmp_path: Path) -> None:
    """The course of two rounds at one site, each job as the daemon makes it out."""
    site = Site(tmp_path)
    start = site.do("init")
    first = site.do("train", 1, model=start)
    seed = merged(site, "seed", site.do("seed", 2, model=first))
    second = site.do("train", 2, model=first, bank=seed)
    bank = merged(site, "bank", site.do("bank", 3, model=second, bank=seed))
    last = site.do("calibrate", 3, model=second, bank=bank)

    assert manifest(first).tensors == manifest(start).tensors
    assert result(first).cases == COUNTS["training"]
    assert set(result(second).metrics) == {"loss", "dice_validation", "steps", "seconds"}
    assert tensors(last) == {}
    record = ModelRecord(plan=site.plan, round=2, shared=files(second), bank=files(bank), personal=site.personal)
    (tmp_path / "model.json").write_text(record.model_dump_json())
    predict = load_model(tmp_path / "model.json", shared=False, device="cpu")
    assert predict.bank is not None
    assert json.loads((last / "personal" / "state.json").read_text()) == {"stage": "calibrate", "round": 3, "step": 4}


def test_no_personal_parameter_is_uploaded(tmp_path: Path) -> None:
    """Planted bug: the personal weights sent beside the shared ones."""
    site = Site(tmp_path)
    start = site.do("init")
    first = site.do("train", 1, model=start)

    names = set(tensors(first))
    assert not [name for name in names if name.startswith(("personal", "bottleneck_q", "attention.gate.personal"))]
    assert names == set(tensors(start))


def test_the_same_job_gives_the_same_bytes_and_leaves_the_old_state_alone(tmp_path: Path) -> None:
    """Planted bugs: the new state written over `job.personal`; a time in the state."""
    site = Site(tmp_path)
    start = site.do("init")
    kept = site.do("train", 1, model=start) / "personal"
    before = snapshot(kept)

    outputs = []
    for name in ("one", "two"):
        job = site.job("train", 2, model=start, name=name)
        Workshop().carry_out(job, site.seen.append)
        outputs.append(snapshot(job.output / "personal") | {"blob": (job.output / "update.blob").read_bytes()})

    assert outputs[0] == outputs[1]
    assert snapshot(kept) == before


def test_the_site_goes_on_from_its_personal_weights_and_their_moments(tmp_path: Path) -> None:
    """Planted bugs: moments of the last round not taken up; nor its weights."""
    site = Site(tmp_path)
    first = site.do("train", 1, model=site.do("init"))
    kept = first / "personal"
    other, forgetful = (shutil.copytree(kept, tmp_path / name) for name in ("other", "forgetful"))
    weights = load_file(kept / "personal.safetensors")
    save_file({name: value + np.float32(0.1) for name, value in weights.items()}, other / "personal.safetensors")
    (forgetful / "optimizer.safetensors").unlink()

    jobs = [
        site.job("train", 2, model=first, name=f"from-{place.name}").model_copy(update={"personal": place})
        for place in (kept, other, forgetful)
    ]
    for job in jobs:
        Workshop().carry_out(job, site.seen.append)

    assert len({manifest(job.output).id for job in jobs}) == 3


def test_weights_travel_in_the_plans_dtype_and_bank_sums_in_float32(tmp_path: Path) -> None:
    plan = easy_plan()
    site = Site(tmp_path, plan.model_copy(update={"wire": plan.wire.model_copy(update={"dtype": "bfloat16"})}))
    start = site.do("init")
    seed = site.do("seed", 2, model=start)

    assert {spec.dtype for spec in manifest(start).tensors} == {"bfloat16"}
    assert {spec.dtype for spec in manifest(seed).tensors} == {"float32", "int64"}


def test_the_first_weights_follow_from_the_seed_alone(tmp_path: Path) -> None:
    one, two = Site(tmp_path / "one").do("init"), Site(tmp_path / "two").do("init")

    assert manifest(one).id == manifest(two).id


def test_averaging_everything_leaves_nothing_personal(tmp_path: Path) -> None:
    """Planted bug: `fedavg` with a personal head."""
    site = Site(tmp_path, easy_plan(strategy=StrategyConfig(name="fedavg")))
    start = site.do("init")
    site.do("train", 1, model=start)
    site.do("train", 2, model=start)

    last = site.do("calibrate", 3, model=start)

    assert load_file(tmp_path / "train2" / "personal" / "personal.safetensors") == {}
    assert result(last).metrics["dice_test_before"] == result(last).metrics["dice_test_shared"]


def test_training_alone_needs_no_model(tmp_path: Path) -> None:
    calibration = CalibrationConfig(steps=2, evaluations=2)
    output = Site(tmp_path, easy_plan(rounds=1, steps=3, calibration=calibration)).do("local")

    metrics = result(output).metrics
    assert metrics["steps"] == 5
    assert {"dice_validation", "dice_test", "iou_test", "hd95_test", "nsd_test", "seconds"} <= set(metrics)
    assert tensors(output) == {}


def test_a_job_that_lacks_its_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="job train: names no model"):
        Site(tmp_path).do("train", 1)


def test_a_mistake_in_the_test_list_shows_in_the_first_round(tmp_path: Path) -> None:
    site = Site(tmp_path)
    start = site.do("init")
    (tmp_path / "data" / "test0.png").unlink()

    with pytest.raises(DataError, match=r"case test0: image .*test0\.png does not exist"):
        site.do("train", 1, model=start)


def test_a_full_disk_is_said_and_leaves_no_result(tmp_path: Path) -> None:
    """Planted bug: `result.json` written before the tensors."""
    site = Site(tmp_path)
    job = site.job("init")
    job.output.mkdir()
    (job.output / "update.blob").symlink_to("/dev/full")

    with pytest.raises(StorageError, match=r"init0: result cannot be written: .*No space left on device"):
        Workshop().carry_out(job, site.seen.append)
    assert not (job.output / "result.json").exists()


def test_progress_is_a_few_lines_a_second_but_every_dice_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    report = Reporter(sys.stdout)

    for step in range(1000):
        report(Progress("train", step, 1000, 0.5))
    report(Progress("train", 1000, 1000, 0.5, 0.75))

    lines = [JobProgress.model_validate_json(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) < 10
    assert lines[-1] == JobProgress(stage="train", step=1000, steps=1000, loss=0.5, dice=0.75)


@pytest.mark.slow
def test_the_process_prints_json_lines_and_exits_with_0(tmp_path: Path) -> None:
    site = Site(tmp_path)
    start = site.do("init")

    done = run(site.job("train", 1, model=start))

    assert (done.returncode, done.stderr) == (0, "")
    lines = [JobProgress.model_validate_json(line) for line in done.stdout.splitlines()]
    assert (lines[-1].step, lines[-1].steps) == (12, 12)
    assert lines[-1].dice >= 0
    assert {"job.json", "result.json", "update.blob", "update.manifest", "personal"} == {
        path.name for path in (tmp_path / "train1").iterdir()
    }


@pytest.mark.slow
def test_what_can_be_set_right_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    job = Site(tmp_path).job("init")
    (tmp_path / "data" / "datalist.json").write_text("[]")

    done = run(job)

    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "datalist.json" in done.stderr
    assert not (job.output / "result.json").exists()


@pytest.mark.slow
def test_a_job_that_is_no_job_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"kind": "guess"}')
    command = [sys.executable, "-X", "importtime", "-m", "fedoap_node.worker", str(tmp_path / "job.json")]

    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)

    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("it is no job")
    assert "torch" not in done.stderr


@pytest.mark.slow
def test_the_compiler_is_not_imported_to_train(tmp_path: Path) -> None:
    """Planted bug: an optimizer of torch.optim, which imports torch._dynamo: two seconds more."""
    site = Site(tmp_path)
    start = site.do("init")
    site.do("train", 1, model=start)

    done = run(site.job("train", 2, model=start), "-X", "importtime")

    assert done.returncode == 0
    assert "torch._dynamo" not in done.stderr
    assert "monai" not in done.stderr


@pytest.mark.slow
def test_a_job_that_is_asked_to_end_ends_at_once_and_leaves_no_result(tmp_path: Path) -> None:
    site = Site(tmp_path, easy_plan(steps=100_000))
    job = site.job("train", 1, model=site.do("init"))
    job.output.mkdir()
    (job.output / "job.json").write_text(job.model_dump_json())
    command = [sys.executable, "-m", "fedoap_node.worker", str(job.output / "job.json")]

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.terminate()
        code = process.wait(timeout=5)

    assert code == -signal.SIGTERM
    assert {path.name for path in job.output.iterdir()} == {"job.json"}


@pytest.mark.slow
def test_two_processes_that_share_each_batch_agree_with_one_to_rounding(tmp_path: Path) -> None:
    """Planted bugs: both see the same part of a batch; parts of 2 and 1 count alike."""
    plan = easy_plan()
    odd = plan.training.model_copy(update={"batch_size": 3})
    site = Site(tmp_path, plan.model_copy(update={"training": odd}))
    start = site.do("init")
    alone = site.job("train", 1, model=start, name="alone")
    together = site.job("train", 1, model=start, name="together")

    Workshop().carry_out(alone, site.seen.append)
    done = run(together, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")

    assert done.returncode == 0, done.stderr
    first, expected, found = values(start), values(alone.output), values(together.output)
    assert np.abs(expected - found).max() < 0.01 * np.abs(expected - first).max()
    dice = result(alone.output).metrics["dice_validation"]
    assert result(together.output).metrics["dice_validation"] == pytest.approx(dice, abs=0.01)


@pytest.mark.slow
def test_of_two_processes_that_fail_the_node_tells_the_one_line_that_a_single_one_writes(tmp_path: Path) -> None:
    """Planted bug: no `error.txt`, so that the last words are those of the launcher's traceback."""
    job = Site(tmp_path).job("train", 1)
    job.output.mkdir()
    (job.output / "job.json").write_text(job.model_dump_json())
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, "-m", "fedoap_node.worker", str(job.output / "job.json")]

    trainer = Trainer(command, job.output, tmp_path / "worker.log")
    deadline = time.monotonic() + 100
    while trainer.exit_code() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    trainer.kill()

    assert trainer.exit_code() != 0
    assert trainer.last_words() == "job train: names no model, but works on one"


def test_an_error_that_nobody_foresaw_leaves_its_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Planted bug: `error.txt` for a `FedoapError` alone."""
    path = tmp_path / "job.json"
    path.write_text(Site(tmp_path).job("init").model_dump_json())

    def fail(*_: object) -> None:
        raise RuntimeError("NCCL error:\nunhandled system error")

    monkeypatch.setattr(Workshop, "carry_out", fail)
    with pytest.raises(RuntimeError):
        main([str(path)])

    assert (tmp_path / "error.txt").read_text() == "RuntimeError: NCCL error: unhandled system error\n"
