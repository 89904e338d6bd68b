"""A model ready to predict: loaded from the files that `model.json` names, or the one being trained.

Shapes: B batch, C channels, *S spatial size.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor, nn

from fedoap.config import BlobFiles, ModelRecord, Plan
from fedoap.errors import ConfigError, TensorsError
from fedoap.manifests import BlobManifest
from fedoap.params import PERSONAL_PREFIX
from fedoap.segmentation.network import Bank, FedOAPNet
from fedoap.segmentation.patches import predict_by_windows
from fedoap.segmentation.sitemodel import SiteModel
from fedoap.tensors import read_blob, right_bytes

PERSONAL_FILE = "personal.safetensors"

Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Predictor:
    """A network with its bank, ready to run; on a GPU under bfloat16 autocast."""

    plan: Plan
    network: nn.Module
    bank: Bank | None
    device: torch.device

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        """Return the logits (B, 1, *S) of images (B, C, *S) on any device, float32.

        They are on the model's device or, if `data.patch` divides images into windows, on that of the images.
        """
        if self.plan.data.patch is None:
            return self._at_once(image)
        at_once = self.plan.training.batch_size
        return predict_by_windows(self._at_once, image, self.plan.data, at_once, self.device)

    def _at_once(self, image: Tensor) -> Tensor:
        with autocast(self.device):
            logits: Tensor = self.network(image.to(self.device), self.bank)
        return logits.float()


def load_model(model_json: Path, *, shared: bool, device: str = "auto") -> Predictor:
    """Return the model of a model folder: the site's own, or the one that all sites share.

    Raises:
        ConfigError: there is no such record, it has another form, or it has no personal part.
        TensorsError: the files do not fit the network.
    """
    record = read_record(model_json)
    if not shared and record.personal is None:
        raise ConfigError(f"{model_json}: has no personal part, so that only the shared path can run")
    chosen = choose_device(device)
    model = SiteModel(record.plan)
    model.load_shared(read_intact(record.shared))
    network = model.shared
    if not shared and record.personal is not None:
        network = own_network(model, load_tensors(record.personal / PERSONAL_FILE))
    bank = None if record.bank is None else Bank.from_arrays(read_intact(record.bank), chosen)
    return Predictor(record.plan, network.to(chosen).eval(), bank, chosen)


def own_network(model: SiteModel, personal: Arrays) -> FedOAPNet:
    """Return a copy of the personal network with these values, which shares nothing with the model.

    The values are those of the personal parameters alone, as after a round, or of all, as after calibration.

    Raises:
        TensorsError: a name is no parameter of the network, or its shape another.
    """
    if personal.keys() == model.personal_state().keys():
        model.load_personal(personal)
        return model.own_network()
    network = copy.deepcopy(model.personal)
    parameters = {PERSONAL_PREFIX + name: value for name, value in network.named_parameters()}
    for name, array in personal.items():
        if name not in parameters or array.shape != tuple(parameters[name].shape):
            raise TensorsError(f"personal weights: {name} of shape {array.shape} is not in the plan's network")
    for name in parameters:
        if name not in personal:
            raise TensorsError(f"personal weights: tensor {name} is missing")
    with torch.no_grad():
        for name, array in personal.items():
            parameters[name].copy_(torch.tensor(array))
    return network


def read_files(files: BlobFiles) -> Arrays:
    """Return the tensors of a blob on disk, whose bytes nobody has looked at again.

    Raises:
        TensorsError: a file is missing or does not match the other.
    """
    try:
        return read_blob(files.blob, BlobManifest.unpack(files.manifest.read_bytes()))
    except OSError as error:
        raise TensorsError(f"{files.blob}: cannot be read: {error.strerror}") from None


def read_intact(files: BlobFiles) -> Arrays:
    """Return the tensors of a blob that may have lain anywhere for years, byte for byte what was once written.

    Raises:
        TensorsError: they are not, or a file is missing.
    """
    arrays = read_files(files)
    manifest = BlobManifest.unpack(files.manifest.read_bytes())
    if (at := right_bytes(files.blob, manifest)) < manifest.size:
        raise TensorsError(f"{files.blob}: is damaged from byte {at} on: put it back from a backup, or export it again")
    return arrays


def load_tensors(path: Path) -> dict[str, NDArray[np.generic]]:
    """Return the tensors of a safetensors file.

    Raises:
        TensorsError: there is no such file, or it is damaged.
    """
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise TensorsError(f"{path}: cannot be read: {error}") from None


def choose_device(name: str) -> torch.device:
    """Return the device of this name; `auto` is a GPU where PyTorch has one.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"worker.device is {name}, but must be auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"worker.device is {name}, but PyTorch sees {torch.cuda.device_count()} GPUs")
    return device


def autocast(device: torch.device) -> torch.autocast:
    """Return the context in which a network runs: bfloat16 autocast on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def read_record(path: Path) -> ModelRecord:
    """Return the record of a model folder.

    Raises:
        ConfigError: there is none, or it has another form.
    """
    try:
        return ModelRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or json.dumps(first["type"])
        raise ConfigError(f"{path}: {place}: {first['msg']}; it is not the record of a model") from None
