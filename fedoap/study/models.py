"""The models in a run's folder, and how well each does on each of a site's cases."""

from dataclasses import dataclass
from pathlib import Path

from fedoap.config import ModelRecord, Plan, SiteConfig
from fedoap.errors import TrainingError
from fedoap.segmentation.calibration import alone_plan
from fedoap.segmentation.data import prepared_cases
from fedoap.segmentation.datalist import Split, load_datalist
from fedoap.segmentation.evaluation import Scores, Unit, evaluate
from fedoap.segmentation.modelfolder import (
    PERSONAL_FILE,
    Predictor,
    choose_device,
    load_model,
    load_tensors,
    own_network,
)
from fedoap.segmentation.sitemodel import SiteModel
from fedoap.simulation.layout import Layout
from fedoap.sitefolder import SiteFolder
from fedoap.study.work import quiet_process
from fedoap_node.files import share
from fedoap_node.job import JOB, PERSONAL, Job

MODEL = "model.json"
BEFORE = "before"


@dataclass(frozen=True, slots=True)
class CaseMeasures:
    """One case's measures; `position` is its index in the split's list, from 0."""

    position: int
    name: str
    """As the datalist gives it, like `patient`."""
    patient: str
    scores: Scores
    unit: Unit
    """Of `scores.hd95`."""


@dataclass(frozen=True, slots=True)
class Models:
    """The models in a run's folder, loaded on a device."""

    folder: Path
    device: str = "auto"

    def shared(self) -> Predictor:
        """Return the model that all sites share, with the bank: what an unseen site gets."""
        return load_model(self._layout.model / MODEL, shared=True, device=self.device)

    def final(self, site: str) -> Predictor:
        """Return a site's own model, calibrated."""
        return load_model(SiteFolder(self._layout.home / site).model_record, shared=False, device=self.device)

    def before(self, site: str) -> Predictor:
        """Return a site's own model as it was before its calibration."""
        return load_model(before_folder(self._layout, site) / MODEL, shared=False, device=self.device)

    def alone(self, site: str) -> Predictor:
        """Return the network of a site that trained alone."""
        output = self._layout.alone(site)
        plan = alone_plan(Job.model_validate_json((output / JOB).read_bytes()).plan)
        network = own_network(SiteModel(plan), load_tensors(output / PERSONAL / PERSONAL_FILE))
        device = choose_device(self.device)
        return Predictor(plan, network.to(device).eval(), None, device)

    @property
    def _layout(self) -> Layout:
        return Layout(self.folder.absolute())


def before_folder(layout: Layout, site: str) -> Path:
    """Return the folder of a site's model as it was before its calibration."""
    return layout.home / site / BEFORE


def keep_before(personal: Path, folder: Path) -> None:
    """Keep a site's personal weights as they are before its calibration replaces them."""
    folder.mkdir()
    share(personal / PERSONAL_FILE, folder / PERSONAL_FILE)


def record_before(model: ModelRecord, folder: Path) -> None:
    """Write the record of a model whose personal weights are in the folder; the rest is the shared model's."""
    record = model.model_copy(update={"personal": folder})
    (folder / MODEL).write_text(record.model_dump_json(indent=1), encoding="utf-8")


def evaluate_cases(predict: Predictor, config: SiteConfig, split: Split, *, cache: Path) -> tuple[CaseMeasures, ...]:
    """Return how well a model does on each case of a site's list, on the files' own grids.

    Raises:
        DataError: the datalist or a case is wrong.
    """
    if config.data is None:
        raise TrainingError("evaluation: the site's section data is missing")
    with quiet_process(config.worker.threads):
        cases = prepared_cases(load_datalist(config.data, split), config.data, predict.plan, cache)
        found = evaluate(predict, cases)
    return tuple(
        CaseMeasures(position, one.name, one.patient, one.scores, found.unit)
        for position, one in enumerate(found.cases)
    )


def parameters(plan: Plan) -> int:
    """Return the number of parameters of one site's network."""
    return sum(parameter.numel() for parameter in SiteModel(plan).personal.parameters())
