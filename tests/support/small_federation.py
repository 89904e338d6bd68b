"""A federation of two easy sites through the product's jobs and merges, one after the other, without a network."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from easy_site import write_easy_site
from fedoap.aggregation import merge_models, published
from fedoap.bank import BankKind, merge_bank
from fedoap.config import BlobFiles, Plan, SiteData, WorkerConfig
from fedoap.manifests import BlobManifest, UploadManifest
from fedoap.tensors import read_blob
from fedoap_node.job import Job, JobKind, JobResult
from fedoap_node.workshop import Workshop

SITES = ("a", "b")
Weights = dict[str, NDArray[np.generic]]


@dataclass
class SmallFederation:
    """Two sites and what lies at their coordinator."""

    folder: Path
    plan: Plan
    model: Path | None = None
    kept: Path | None = None
    """What the coordinator keeps of the model: weights, and moments beside them."""
    bank: Path | None = None
    personal: dict[str, Path] = field(default_factory=dict)

    def run(self) -> Weights:
        """Return the shared weights after the last round and, under `SITE.`, each site's calibrated ones."""
        (first,) = self._exchange("init", 0, SITES[:1])
        self.model = self.kept = first[0]
        for number in range(1, self.plan.rounds + 1):
            if number > 1:
                self._refresh(number)
            updates = self._exchange("train", number)
            self.kept = self._merged(number, updates)
            self.model = self._published(number, self.kept)
        self._refresh(self.plan.rounds + 1)
        self._exchange("calibrate", self.plan.rounds + 1)
        return _read(self._known(self.model)) | {
            f"{site}.{name}": value for site in SITES for name, value in _personal(self.personal[site]).items()
        }

    def _refresh(self, number: int) -> None:
        if not self.plan.network.has_bank:
            return
        kind: BankKind = "seed" if self.bank is None else "bank"
        previous = None if self.bank is None else (self.bank, _manifest(self.bank))
        output = self.folder / f"bank{number}.blob"
        updates = self._exchange(kind, number)
        manifest = merge_bank(kind, updates, previous, self.plan, output)
        output.with_suffix(".manifest").write_bytes(manifest.pack())
        self.bank = output

    def _merged(self, number: int, updates: list[tuple[Path, UploadManifest]]) -> Path:
        base, output = self._known(self.kept), self.folder / f"kept{number}.blob"
        manifest = merge_models(updates, (base, _manifest(base)), self.plan.strategy, output)
        output.with_suffix(".manifest").write_bytes(manifest.pack())
        return output

    def _published(self, number: int, kept: Path) -> Path:
        output = self.folder / f"model{number}.blob"
        manifest = published(kept, _manifest(kept), output, "float32")
        output.with_suffix(".manifest").write_bytes(manifest.pack())
        return output

    def _exchange(
        self, kind: JobKind, number: int, sites: tuple[str, ...] = SITES
    ) -> list[tuple[Path, UploadManifest]]:
        return [self._do(kind, number, site) for site in sites]

    def _do(self, kind: JobKind, number: int, site: str) -> tuple[Path, UploadManifest]:
        output = self.folder / site / f"{kind}{number}"
        job = Job(
            kind=kind,
            site=site,
            round=number,
            plan=self.plan,
            data=self._data(site),
            worker=WorkerConfig(device="cpu", threads=1),
            model=_files(self.model),
            bank=_files(self.bank),
            personal=self.personal.get(site),
            cache=self.folder / site / "cache",
            output=output,
        )
        Workshop().carry_out(job, lambda _: None)
        if (output / "personal").exists():
            self.personal[site] = output / "personal"
        result = JobResult.model_validate_json((output / "result.json").read_bytes())
        blob = output / "update.blob"
        return blob, UploadManifest(b"t" * 32, site, result.cases, tuple(result.metrics.items()), _manifest(blob))

    def _data(self, site: str) -> SiteData:
        folder = self.folder / site / "data"
        if not folder.exists():
            write_easy_site(folder, seed=SITES.index(site))
        return SiteData(datalist=folder / "datalist.json", root=folder, modality="photo", window=(0, 255))

    @staticmethod
    def _known(path: Path | None) -> Path:
        assert path is not None
        return path


def _files(blob: Path | None) -> BlobFiles | None:
    return None if blob is None else BlobFiles(blob=blob, manifest=blob.with_suffix(".manifest"))


def _manifest(blob: Path) -> BlobManifest:
    return BlobManifest.unpack(blob.with_suffix(".manifest").read_bytes())


def _read(blob: Path) -> Weights:
    return dict(read_blob(blob, _manifest(blob)))


def _personal(folder: Path) -> Weights:
    return dict(load_file(folder / "personal.safetensors"))
