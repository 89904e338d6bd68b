"""benchmarks/gpu.py, as far as it runs without a GPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.competitors import attention, boundary
from benchmarks.competitors.attention import Attention, AttentionShape
from benchmarks.competitors.boundary import Boundary, ImageShape
from benchmarks.gpu_bench.contest import Limits, Row, held
from benchmarks.gpu_bench.contests import attention_contest, boundary_contest
from benchmarks.gpu_bench.machine import Ceilings
from benchmarks.gpu_bench.report import table, verdict
from benchmarks.gpu_bench.suite import run_suite
from benchmarks.gpu_bench.timing import CpuStopwatch, Quantiles, limit
from benchmarks.pages import measured_text, replaced
from fedoap.kernels import perturbed_boundary_loss

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
JOINT = AttentionShape(1, 2, 8, 12, 16)
GATED = AttentionShape(1, 2, 8, 12, 16, gated=True)
CEILINGS = Ceilings(copy_tb_s=3.0, tflop_s=800.0)


def rows(**competitors: object) -> list[Row]:
    """What a contest with these competitors beside ours gives."""
    contest = attention_contest(JOINT, CPU, torch.float32)
    contest.competitors.update(competitors)  # type: ignore[attr-defined]
    limits = Limits(time.monotonic() + 60, prepare=1, timing=0.01)
    return list(held(contest, CpuStopwatch(), CEILINGS, limits))


def test_the_command_writes_and_prints_what_it_found(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--quick", "--no-tests", "--out", str(out)]

    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert {row["part"] for row in found["rows"]} == {"forward", "backward", "both"}
    assert "| DCA B1 H2 N16 M24 D16 gated | backward | fedoap" in " ".join(done.stdout.split())
    assert "failed parts: none" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("shape", [JOINT, GATED], ids=str)
@pytest.mark.parametrize("name", sorted(attention.CPU))
def test_every_attention_agrees(shape: AttentionShape, name: str) -> None:
    """Would fail with a gate applied before the softmax."""
    case = Attention.random(shape, CPU, torch.float32)

    torch.testing.assert_close(attention.CPU[name](case), attention.reference(case), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [ImageShape(2, (16, 24)), ImageShape(1, (16, 16, 16))], ids=str)
def test_the_formula_agrees_with_the_loss(shape: ImageShape) -> None:
    """Would fail with a band of one side only."""
    case = Boundary.random(shape, CPU, torch.float32).with_our_noise()

    torch.testing.assert_close(boundary.formula(case), boundary.reference(case), rtol=1e-5, atol=1e-6)


def test_the_images_have_voxels_in_the_region() -> None:
    """Would fail with logits that are never wrong by more than the threshold: noise would cost nothing."""
    case = Boundary.random(ImageShape(4, (128, 128)), CPU, torch.float32)

    _, parts = perturbed_boundary_loss(case.logits, case.target, seed=1, region="both", return_parts=True)

    assert int(parts.voxels.min()) > 10


def test_a_competitor_that_cannot_run_is_a_row_with_the_reason() -> None:
    def refuses(_: Attention) -> Tensor:
        raise RuntimeError("no kernel for this")

    row = next(row for row in rows(refuses=refuses) if row.competitor == "refuses")

    assert row.reason == "cannot: RuntimeError: no kernel for this"


def test_a_wrong_competitor_is_not_timed() -> None:
    def doubled(x: Attention) -> Tensor:
        return 2 * attention.reference(x)

    row = next(row for row in rows(doubled=doubled) if row.competitor == "doubled")

    assert row.reason.startswith("wrong: errors 1e+00")
    assert row.eager is None


def test_a_competitor_that_takes_too_long_is_stopped() -> None:
    def slow(x: Attention) -> Tensor:
        time.sleep(30)
        return attention.reference(x)

    row = next(row for row in rows(slow=slow) if row.competitor == "slow")

    assert row.reason == "cannot: TimeoutError: took longer than 1 s"


def test_what_begins_after_the_deadline_is_left_out() -> None:
    contest = boundary_contest(ImageShape(1, (16, 16)), CPU)

    found = list(held(contest, CpuStopwatch(), CEILINGS, Limits(time.monotonic() - 1)))

    assert {row.reason for row in found} == {"left out: no time left"}


def test_a_limit_that_is_kept_changes_nothing() -> None:
    with limit(0.05):
        pass

    time.sleep(0.1)


def test_the_ratio_is_to_the_best_other_competitor() -> None:
    """Would fail where our own second timing counts as a competitor."""
    times = {"fedoap": 10.0, "fedoap again": 9.0, "sdpa": 25.0, "flex": 40.0}
    found = [Row("c", "forward", name, eager=Quantiles(t, t, t), floor_us=5.0) for name, t in times.items()]

    assert verdict(found).splitlines()[-1] == "| c | forward | 10.0 |  | 50 % | sdpa 25.0 | 2.50 |  |  |"
    assert table(found).splitlines()[-1].endswith("| 4.00   |")


def test_the_suite_counts_what_passed_and_failed(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_a(): pass\ndef test_b(): assert False\n")

    found = run_suite(60, str(tmp_path))

    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 0)


def test_the_floor_is_the_slower_of_arithmetic_and_memory() -> None:
    assert CEILINGS.floor_us(800e12, 1.0) == pytest.approx(1e6)
    assert CEILINGS.floor_us(1.0, 3e12) == pytest.approx(1e6)


def test_the_floors_are_those_worked_by_hand() -> None:
    """8 images of 256 tokens, 512 slots, 1024 channels in 16 bits: 6.44 GFLOP and 18.9 MB forwards."""
    shape = AttentionShape(8, 1, 256, 512, 1024)

    assert shape.flops("forward") == pytest.approx(6.44e9, rel=1e-3)
    assert shape.bytes("forward", 2) == pytest.approx(18.9e6, rel=2e-3)
    assert ImageShape(64, (512, 512)).bytes("backward", 4) == pytest.approx(151e6, rel=1e-3)


def test_a_page_takes_a_table_between_its_marks() -> None:
    page = "before\n<!-- gate -->\nold\n<!-- /gate -->\nafter\n"

    assert replaced(page, "gate", "new") == "before\n<!-- gate -->\nnew\n<!-- /gate -->\nafter\n"
    with pytest.raises(ValueError, match="<!-- measured -->"):
        replaced(page, "measured", "new")


def test_the_measured_table_is_made_of_what_was_written() -> None:
    quantiles = {"p20": 9.0, "p50": 10.0, "p80": 11.0}
    row = {"contest": "c", "part": "forward", "reason": "", "floor_us": 5.0}
    rows = [
        row | {"competitor": "fedoap", "eager": quantiles, "graph": None},
        row | {"competitor": "flex", "eager": quantiles | {"p50": 30.0}, "graph": None},
    ]
    machine = {"device": "a card", "torch": "2", "triton": "3"}

    text = measured_text({"machine": machine, "ceilings": {"copy_tb_s": 3.0, "tflop_s": 700.0}, "rows": rows})  # type: ignore[typeddict-item]

    assert text.startswith("a card, 2, 3. Ceilings: 3.00 TB/s copying, 700 TFLOP/s")
    assert text.splitlines()[-1] == "| c | forward | 10.0 |  | 50 % | flex 30.0 | 3.00 |  |  |"
