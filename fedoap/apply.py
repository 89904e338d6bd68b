"""A trained model put to use: figures on labelled cases, a mask for one image."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from fedoap.config import Modality, SiteConfig, SiteData, load_site
from fedoap.errors import ConfigError, StorageError
from fedoap.report.pictures import spread, write_picture
from fedoap.segmentation.data import load_case, prepared_cases, restore, save_mask
from fedoap.segmentation.datalist import Split, case_of, load_datalist
from fedoap.segmentation.evaluation import Evaluation, evaluate, probabilities
from fedoap.segmentation.modelfolder import Predictor, load_model
from fedoap.segmentation.prepared import PreparedCase
from fedoap.sitefolder import find_site

PICTURES = 4


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from and how its images are read: of a site's folder, or given piece by piece."""

    site: str | None = None
    home: Path | None = None
    model: Path | None = None
    config: Path | None = None
    datalist: Path | None = None
    modality: Modality | None = None
    shared: bool = False
    threads: int = 0

    @property
    def name(self) -> str:
        """What the figures are filed under."""
        return self.site or (self.config.stem if self.config else "")

    def predictor(self) -> Predictor:
        """Return the model, ready to run.

        Raises:
            ConfigError: there is no such site or model.
        """
        if self.threads:
            torch.set_num_threads(self.threads)
        record = self.model / "model.json" if self.model else find_site(self.site or "", self.home).model_record
        if not record.is_file():
            raise ConfigError(f"{record}: no such file; a site has its model once it has taken part in a round")
        return load_model(record, shared=self.shared or self.model is not None, device=self._settings().worker.device)

    def data(self) -> SiteData:
        """Return how this model's images are read.

        Raises:
            ConfigError: neither the site nor the options say so.
        """
        given = {"datalist": self.datalist, "root": self.datalist.parent} if self.datalist else {}
        chosen = {"modality": self.modality} if self.modality else {}
        data = self._settings().data or SiteData(datalist=self.datalist or Path("datalist.json"))
        return data.model_copy(update=given | chosen)

    def _settings(self) -> SiteConfig:
        if self.config:
            return load_site(self.config)
        return load_site(find_site(self.site, self.home).config) if self.site else SiteConfig()


def evaluate_split(source: Source, split: Split, output: Path, pictures: Path | None) -> Evaluation:
    """Leave the figures of one split's cases as JSON and, if wanted, pictures of some, and return the figures.

    Raises:
        FedoapError: the model, the datalist or a case is wrong, or the disk refused.
    """
    _check_place(output)
    predictor, data = source.predictor(), source.data()
    cases = prepared_cases(load_datalist(data, split), data, predictor.plan)
    evaluation = evaluate(predictor, cases)
    path = "shared" if source.shared or source.model else "personal"
    values = {"site": source.name, "split": split, "path": path, **evaluation.to_json()}
    try:
        output.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{output}: figures cannot be written: {error.strerror}") from None
    if pictures:
        _write_pictures(predictor, cases, evaluation, pictures)
    return evaluation


def predict_mask(source: Source, image: Path, output: Path) -> int:
    """Leave the mask of one image on the image's own grid and return how many voxels it marks.

    Raises:
        FedoapError: the model or the image is wrong, or the disk refused.
    """
    predictor = source.predictor()
    prepared = load_case(case_of(image.absolute()), source.data(), predictor.plan)
    (probability,) = probabilities(predictor, [prepared])
    mask = restore(probability, prepared)
    save_mask(output, mask, prepared)
    return int(mask.sum())


def _check_place(output: Path) -> None:
    """Make the folder and a file in it before hours of measuring, not after."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if not output.exists():  # /dev/stdout stands in a folder that takes no files
            tempfile.TemporaryFile(dir=output.parent).close()
    except OSError as error:
        raise StorageError(f"{output}: figures cannot be written: {error.strerror}") from None


def _write_pictures(predictor: Predictor, cases: list[PreparedCase], evaluation: Evaluation, folder: Path) -> None:
    chosen = spread([case.scores.dice for case in evaluation.cases], PICTURES)
    shown = [cases[index] for index in chosen]
    for index, case, probability in zip(chosen, shown, probabilities(predictor, shown), strict=True):
        assert case.label is not None
        masks = [(case.label[0] > 0).numpy(), (probability >= 0.5).numpy()]
        write_picture(folder / f"{index:04d}.png", case.image.numpy(), masks)


def as_split(name: str) -> Split:
    """Return the split of this name, which the command line has checked."""
    return cast(Split, name)
