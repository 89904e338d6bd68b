"""Volumes through a site's whole work, patch by patch: a round, the bank's sums, calibration, a mask on disk."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from fedoap.apply import Source, evaluate_split, predict_mask
from fedoap.config import (
    BankConfig,
    BlobFiles,
    CalibrationConfig,
    DataConfig,
    ModelRecord,
    NetworkConfig,
    Plan,
    SiteData,
    TrainingConfig,
)
from fedoap.errors import StorageError
from fedoap.segmentation.banksums import TokenSource, seed_sums
from fedoap.segmentation.calibration import calibrate
from fedoap.segmentation.descent import Workplace
from fedoap.segmentation.phantoms import write_phantoms
from fedoap.segmentation.sitemodel import SiteModel
from fedoap.segmentation.training import site_optimizer, train_round
from fedoap.tensors import write_blob

CPU = torch.device("cpu")
PLAN = Plan(
    federation="f",
    rounds=1,
    network=NetworkConfig(dimensions=3, width=4, depth=2),
    bank=BankConfig(slots=4, min_patients=1),
    data=DataConfig(size=(32, 40, 32), patch=(16, 16, 16), overlap=0.25),
    training=TrainingConfig(steps_per_round=8, batch_size=2, learning_rate=5e-3),
    calibration=CalibrationConfig(steps=4, evaluations=2),
)


def test_a_site_works_on_patches_of_volumes_and_marks_a_whole_one(tmp_path: Path) -> None:
    """A case has 2 x 3 x 2 windows of 4**3 tokens. Planted bug: the last window left out."""
    datalist = write_phantoms(tmp_path / "d", "brain-mr", {"training": 3, "validation": 1, "test": 1}, (40, 32, 36), 0)
    data = SiteData(datalist=datalist, root=datalist.parent)
    place = Workplace.open("a", PLAN, data, cache=None, device=CPU, report=lambda _: None)
    model = SiteModel(PLAN)

    trained = train_round(model, site_optimizer(model, place), None, 1, place)
    sums = seed_sums(TokenSource(model.shared, place.training, data, PLAN, None, CPU), seed=1)
    _, calibrated = calibrate(model, None, place)

    assert trained["loss"] > 0
    assert sums["counts"].sum() == 3 * 12 * 4**3
    assert 0 <= calibrated["dice_test"] <= 1

    blob = tmp_path / "model.blob"
    manifest = tmp_path / "model.manifest"
    manifest.write_bytes(write_blob(blob, dict(model.shared_state())).pack())
    record = ModelRecord(plan=PLAN, round=1, shared=BlobFiles(blob=blob, manifest=manifest))
    (tmp_path / "model.json").write_text(record.model_dump_json())
    image = datalist.parent / json.loads(datalist.read_text())["test"][0]["image"]
    marked = predict_mask(Source(model=tmp_path, modality="mr"), image, tmp_path / "mask.nii.gz")

    mask = nibabel.load(tmp_path / "mask.nii.gz")
    assert mask.shape == nibabel.load(image).shape
    assert int(np.asarray(mask.dataobj).sum()) == marked


def test_a_place_that_takes_no_figures_is_told_before_the_model_is_read(tmp_path: Path) -> None:
    """Planted bug: made when all cases had been measured, whose figures then were lost."""
    (tmp_path / "file").touch()

    with pytest.raises(StorageError, match=r"file/x.json: figures cannot be written: File exists"):
        evaluate_split(Source(model=tmp_path / "none"), "test", tmp_path / "file" / "x.json", None)
