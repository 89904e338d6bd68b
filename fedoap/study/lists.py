"""The datalists of a study's runs: one for each site and fold, written below the study's folder.

They give cases and patients numbers instead of names, so that nothing that a run writes can name one.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedoap.config import SiteConfig, SiteData, with_absolute_data
from fedoap.errors import ConfigError, DataError
from fedoap.segmentation.datalist import Split
from fedoap.study.config import Study
from fedoap.study.folds import Member, split_by_fold, union
from fedoap.study.partition import shared_out, written


@dataclass(frozen=True, slots=True)
class SiteList:
    """A site's datalist of one fold."""

    path: Path
    digest: str
    """Of what it lists, independent of where the images lie."""
    training: int
    """Cases to train on."""


@dataclass(frozen=True, slots=True)
class Lists:
    """The datalists of a study by fold and site, and those of unseen sites, which have no folds."""

    sites: Mapping[tuple[int, str], SiteList]
    unseen: Mapping[str, SiteList]

    def of(self, fold: int, site: str) -> SiteList:
        """Return a site's datalist in a fold; an unseen site has the same one in every fold."""
        return self.unseen[site] if site in self.unseen else self.sites[fold, site]


def write_lists(study: Study, folder: Path) -> Lists:
    """Write all datalists, and the images of a partition, to a folder and return where they are.

    Raises:
        ConfigError: a datalist does not exist.
        DataError: a datalist is wrong, or a site has too few patients for the folds.
        StorageError: the disk refused.
    """
    config = study.config
    roots = {name: _placed(study, name, site) for name, site in (study.base.sites | study.base.unseen).items()}
    cases = {name: _members(study, name, roots, folder) for name in study.base.sites}
    sites = {}
    for fold in range(max(1, config.folds)):
        for name, members in cases.items():
            try:
                split = split_by_fold(members, config.folds, fold, seed=config.split_seed, validation=config.validation)
            except DataError as error:
                raise DataError(f"{study.path}: site {name}: {error}") from None
            for missing in (key for key, listed in split.items() if not listed):
                raise DataError(f"{study.path}: site {name}: {missing} is empty, but must list at least one case")
            sites[fold, name] = _write(folder / f"fold{fold}" / f"{name}.json", split, _about(study, name))
    unseen = {
        name: _write(
            folder / "unseen" / f"{name}.json", split_by_fold(union(roots[name]), 0, 0, seed=0, validation=0.5)
        )
        for name in study.base.unseen
    }
    return Lists(sites, unseen)


def _placed(study: Study, name: str, site: SiteConfig) -> SiteData:
    data = with_absolute_data(site, study.base_path.parent).data
    assert data is not None
    if not data.datalist.is_file():
        raise ConfigError(f"{study.base_path}: {name}.data.datalist is {data.datalist}, but there is no such file")
    return data


def _members(study: Study, name: str, roots: Mapping[str, SiteData], folder: Path) -> tuple[Member, ...]:
    members, hospital = union(roots[name]), study.hospital(name)
    if hospital is None:
        return members
    config = study.config
    shared = shared_out(members, config.partition[study.organ(name)], seed=config.split_seed, by_list=not config.folds)
    images = folder / "images" / f"{name}-{_digest(_about(study, name))[:8]}"
    return written(shared[name], hospital, images, config.split_seed)


def _about(study: Study, name: str) -> object:
    """Return what a site's images depend on besides the originals."""
    hospital = study.hospital(name)
    return hospital and [study.config.split_seed, hospital.model_dump(mode="json")]


def _write(path: Path, split: Mapping[Split, list[Member]], about: object = None) -> SiteList:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: [_row(member) for member in members] for name, members in split.items()}, indent=1)
    part = path.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)
    numbers = {name: [member.number for member in members] for name, members in split.items()}
    names = {member.number: [file.name for file in member.case.files] for each in split.values() for member in each}
    return SiteList(path.absolute(), _digest([numbers, sorted(names.items()), about]), len(split["training"]))


def _row(member: Member) -> dict[str, object]:
    case = member.case
    images = [os.path.abspath(file) for file in case.images]  # noqa: PTH100 - a link stays a link
    return {
        "image": images if len(images) > 1 else images[0],
        "label": case.label and os.path.abspath(case.label),  # noqa: PTH100
        "patient": str(member.patient),
        "name": str(member.number),
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
