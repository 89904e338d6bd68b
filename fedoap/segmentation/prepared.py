"""A case as the network sees it, kept on disk between runs.

Preparing means reading, checking, resampling and scaling. The result is a safetensors file named by
a hash of everything it depends on: the files' paths, sizes and times, the settings, and the version
of this code. When one of them changes nothing has to be deleted, and a damaged entry is made again.
"""

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from fedoap.config import Plan, SiteData
from fedoap.errors import DataError, StorageError
from fedoap.segmentation.datalist import Case
from fedoap.segmentation.geometry import Floats, Geometry, Grid, resample, resample_mask, shown, whole
from fedoap.segmentation.intensity import scaled
from fedoap.segmentation.readers import read_image, read_label

VERSION = 4
"""Of what preparing does; with a higher number every cached case is prepared again."""

Arrays: TypeAlias = dict[str, Floats]


@dataclass(frozen=True, slots=True, eq=False)
class PreparedCase:
    """A case on the network's grid."""

    image: Tensor
    """float32 (C, *S)"""
    label: Tensor | None
    """float32 (1, *S), 0 or 1"""
    case: Case
    geometry: Geometry

    @property
    def nbytes(self) -> int:
        """Bytes of image and label."""
        return self.image.nbytes + (0 if self.label is None else self.label.nbytes)


def load_case(case: Case, data: SiteData, plan: Plan, cache: Path | None = None) -> PreparedCase:
    """Return a case read, checked, resampled and scaled, from the cache if it is there.

    Raises:
        DataError: the image or the mask is wrong; the text names case and file.
        StorageError: the cache cannot be written.
    """
    if cache is None:
        return _prepare(case, data, plan)
    entry = cache / f"{_key(case, data, plan)}.safetensors"
    found = _load(entry, case)
    if found is None:
        found = _prepare(case, data, plan)
        _save(entry, found)
    return found


def _prepare(case: Case, data: SiteData, plan: Plan) -> PreparedCase:
    dimensions, size = plan.network.dimensions, plan.data.size
    if data.spacing_mm is not None and len(data.spacing_mm) != dimensions:
        raise DataError(f"data.spacing_mm has {len(data.spacing_mm)} numbers, but network.dimensions is {dimensions}")
    volume = read_image(case, data.channels, plan.network.in_channels, dimensions)
    box = shown(volume.values) if data.crop else whole(volume.values)
    geometry = Geometry.fitted(volume.grid, size, data.spacing_mm, box)
    content = scaled(resample(geometry.cut(volume.values), geometry.content), data)
    image = geometry.pad(content, float(content.min()))
    label = None
    if case.label is not None:
        mask = read_label(case, volume.grid, dimensions).values
        label = torch.from_numpy(geometry.pad(resample_mask(geometry.cut(mask), geometry.content), 0.0))
    return PreparedCase(torch.from_numpy(image), label, case, geometry)


def _key(case: Case, data: SiteData, plan: Plan) -> str:
    settings = data.model_dump(mode="json", include={"modality", "spacing_mm", "crop", "window", "channels"})
    shape = [plan.data.size, plan.network.dimensions, plan.network.in_channels]
    files = [file_states(path) for path in case.images]
    label = file_states(case.label) if case.label is not None else None
    text = json.dumps([VERSION, settings, shape, files, label], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_states(path: Path) -> list[tuple[str, int, int]]:
    """Return path, size and time of a file, or of those in a folder, by which a later version is recognised.

    Raises:
        DataError: it cannot be looked at.
    """
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return [(str(file.absolute()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _save(entry: Path, prepared: PreparedCase) -> None:
    arrays: Arrays = {"image": prepared.image.numpy()}
    if prepared.label is not None:
        arrays["label"] = prepared.label.numpy()
    geometry = json.dumps(asdict(prepared.geometry))
    raw = save(arrays, {"geometry": geometry, "sha256": _digest(arrays)})
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        # another process may write the same entry: each writes its own file, and renaming is atomic
        with tempfile.NamedTemporaryFile(dir=entry.parent, suffix=".part", delete=False) as file:
            try:
                file.write(raw)
                file.flush()
                os.replace(file.name, entry)  # noqa: PTH105 - both are names, not paths
            except OSError:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise StorageError(f"{entry.parent}: prepared case cannot be kept: {error.strerror or error}") from None


def _load(entry: Path, case: Case) -> PreparedCase | None:
    """Return the case of a cache entry, or None if there is none or it is damaged."""
    try:
        with safe_open(entry, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if metadata.get("sha256") != _digest(arrays):
            return None
        geometry = _geometry(metadata["geometry"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    label = torch.from_numpy(arrays["label"]) if "label" in arrays else None
    return PreparedCase(torch.from_numpy(arrays["image"]), label, case, geometry)


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + str(arrays[name].shape).encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _geometry(text: str) -> Geometry:
    values = cast(dict[str, object], json.loads(text))
    grid = cast(dict[str, list[float] | None], values.pop("grid"))
    fields = {name: None if value is None else tuple(value) for name, value in grid.items()}
    rest = {name: tuple(cast(list[int], value)) for name, value in values.items()}
    return Geometry(grid=Grid(**fields), **rest)  # type: ignore[arg-type]
