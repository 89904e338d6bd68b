from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor

from easy_site import SIZE, easy_plan
from fedoap.config import BlobFiles, ModelRecord, StrategyConfig
from fedoap.errors import ConfigError, TensorsError
from fedoap.params import PERSONAL_PREFIX
from fedoap.segmentation.modelfolder import choose_device, load_model, read_intact
from fedoap.segmentation.network import Bank
from fedoap.segmentation.sitemodel import ModelPath, SiteModel
from fedoap.tensors import write_blob


@dataclass(frozen=True)
class Folder:
    """A model folder, and the model and bank that were put into it."""

    record: Path
    model: SiteModel
    bank: Bank


def blob(path: Path, tensors: dict[str, NDArray[np.generic]]) -> BlobFiles:
    manifest = path.with_suffix(".manifest")
    manifest.write_bytes(write_blob(path, tensors).pack())
    return BlobFiles(blob=path, manifest=manifest)


def model_folder(folder: Path, *, personal: bool = True, calibrated: bool = False) -> Folder:
    """Write a model whose personal path differs from the shared one; a calibrated one differs everywhere."""
    model = SiteModel(easy_plan())
    keys = np.random.default_rng(1).normal(size=(2, 4, 8)).astype(np.float32)
    arrays: dict[str, NDArray[np.generic]] = {"keys": keys, "values": 2 * keys, "log_weights": np.zeros(4, np.float32)}
    mine = {name: value + 0.1 for name, value in model.personal_state().items()}
    model.load_personal(mine)
    if calibrated:
        mine = {
            PERSONAL_PREFIX + name: value.detach().numpy() + np.float32(0.1)
            for name, value in model.personal.named_parameters()
        }
    if personal:
        (folder / "personal").mkdir()
        save_file(mine, folder / "personal" / "personal.safetensors")
    record = ModelRecord(
        plan=easy_plan(),
        round=2,
        shared=blob(folder / "model.blob", dict(model.shared_state())),
        bank=blob(folder / "bank.blob", arrays),
        personal=folder / "personal" if personal else None,
    )
    (folder / "model.json").write_text(record.model_dump_json())
    return Folder(folder / "model.json", model, Bank.from_arrays(arrays))


def image() -> Tensor:
    return torch.randn(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def answer(folder: Folder, bank: Bank | None, path: ModelPath) -> Tensor:
    """Return the logits as prediction makes them, which on a CPU is not to the bit what training does."""
    with torch.no_grad():
        logits: Tensor = folder.model(image(), bank, path=path)
    return logits


def test_the_sites_own_model_runs_with_its_bank(tmp_path: Path) -> None:
    """Planted bugs: the bank left out; the personal weights left out."""
    folder = model_folder(tmp_path)

    logits = load_model(folder.record, shared=False, device="cpu")(image())

    assert torch.equal(logits, answer(folder, folder.bank, "personal"))
    assert not torch.equal(logits, answer(folder, None, "personal"))


def test_the_shared_model_runs_without_personal_weights(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, personal=False)

    logits = load_model(folder.record, shared=True, device="cpu")(image())

    assert torch.equal(logits, answer(folder, folder.bank, "shared"))


def test_a_calibrated_model_takes_nothing_from_the_shared_one(tmp_path: Path) -> None:
    """Planted bug: only the personal parts of a calibrated network loaded."""
    folder = model_folder(tmp_path, calibrated=True)

    personal = load_model(folder.record, shared=False, device="cpu")(image())
    shared = load_model(folder.record, shared=True, device="cpu")(image())

    with torch.no_grad():
        for parameter in folder.model.personal.parameters():
            parameter.add_(0.1)
    assert torch.equal(personal, answer(folder, folder.bank, "personal"))
    assert not torch.equal(shared, answer(folder, folder.bank, "shared"))


@pytest.mark.parametrize("name", ["apfl", "scaffold", "ditto"])
def test_a_model_after_a_round_predicts_as_it_did_at_its_site(tmp_path: Path, name: str) -> None:
    """Planted bug: own weights without the shared share of the mixture."""
    plan = easy_plan(strategy=StrategyConfig(name=name))
    model = SiteModel(plan)
    (tmp_path / "personal").mkdir()
    mine = {name: value + np.float32(0.3) for name, value in model.personal_state().items()}
    save_file(mine, tmp_path / "personal" / "personal.safetensors")
    files = blob(tmp_path / "model.blob", dict(model.shared_state()))
    record = ModelRecord(plan=plan, round=1, shared=files, personal=tmp_path / "personal")
    (tmp_path / "model.json").write_text(record.model_dump_json())
    model.load_personal(mine)

    logits = load_model(tmp_path / "model.json", shared=False, device="cpu")(image())

    with torch.no_grad():
        assert torch.equal(logits, model(image()))


def test_what_is_missing_or_damaged_is_said(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    weights = tmp_path / "personal" / "personal.safetensors"

    with pytest.raises(ConfigError, match=r"none\.json: cannot be read: No such file"):
        load_model(tmp_path / "none.json", shared=True, device="cpu")
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(TensorsError, match=r"personal\.safetensors: cannot be read"):
        load_model(folder.record, shared=False, device="cpu")
    (tmp_path / "bank.blob").unlink()
    with pytest.raises(TensorsError, match=r"bank\.blob: cannot be read: No such file"):
        load_model(folder.record, shared=True, device="cpu")
    folder.record.write_text("{}")
    with pytest.raises(ConfigError, match=r"model\.json: plan: Field required; it is not the record of a model"):
        load_model(folder.record, shared=True, device="cpu")


def test_a_model_without_personal_part_cannot_run_as_one(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, personal=False)

    with pytest.raises(ConfigError, match="has no personal part"):
        load_model(folder.record, shared=False, device="cpu")


def test_personal_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    weights = tmp_path / "personal" / "personal.safetensors"

    save_file({"personal.head.weight": np.zeros((7, 7), np.float32)}, weights)
    with pytest.raises(TensorsError, match=r"personal\.head\.weight of shape \(7, 7\)"):
        load_model(folder.record, shared=False, device="cpu")
    save_file({}, weights)
    with pytest.raises(TensorsError, match="is missing"):
        load_model(folder.record, shared=False, device="cpu")


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be auto, cpu, cuda or cuda:N"):
        choose_device("gpu7")
    with pytest.raises(ConfigError, match="PyTorch sees"):
        choose_device("cuda:99")
    assert choose_device("cpu").type == "cpu"


def test_a_model_with_patches_answers_for_images_of_any_size_window_by_window(tmp_path: Path) -> None:
    """Planted bug: the whole image given to the network."""
    predictor = load_model(model_folder(tmp_path).record, shared=True, device="cpu")
    data = predictor.plan.data.model_copy(update={"patch": (SIZE // 2, SIZE), "overlap": 0.0})
    windows = replace(predictor, plan=predictor.plan.model_copy(update={"data": data}))

    upper, lower = image()[:, :, : SIZE // 2], image()[:, :, SIZE // 2 :]
    logits = windows(image())

    torch.testing.assert_close(logits, torch.cat([predictor(upper), predictor(lower)], dim=2))
    assert not torch.allclose(logits, predictor(image()))


def test_a_blob_with_a_changed_byte_is_refused(tmp_path: Path) -> None:
    """Planted bug: only its length looked at; four bad bytes had every voxel marked."""
    files = blob(tmp_path / "model", {"w": np.zeros(8, dtype=np.float32)})
    files.blob.write_bytes(b"XXXX" + files.blob.read_bytes()[4:])

    with pytest.raises(TensorsError, match="is damaged from byte 0 on"):
        read_intact(files)
