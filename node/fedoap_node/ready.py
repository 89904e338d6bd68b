"""Whether a site could train if asked to: a fault that only its worker found would cost the federation attempts."""

import importlib.util
import os

from fedoap.config import SiteConfig
from fedoap.errors import ConfigError
from fedoap.sitefolder import SiteFolder

KERNELS_VARIABLE = "FEDOAP_KERNELS"
BACKENDS = ("auto", "eager", "triton")
"""What it may name. `fedoap.kernels.backend` holds the same list, but cannot be imported without torch."""


def check_data(config: SiteConfig, folder: SiteFolder) -> None:
    """Return if the datalist is there and without faults, and what training needs is installed.

    Raises:
        ConfigError: a setting is missing or wrong, or a package is missing.
        DataError: the datalist is wrong.
    """
    if config.data is None:
        raise ConfigError(f"{folder.config}: section [data] is missing; name the site's datalist there")
    if not config.data.datalist.is_file():
        raise ConfigError(f"{folder.config}: data.datalist is {config.data.datalist}, but there is no such file")
    if config.worker.command is not None:
        return
    check_kernels_setting()
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("torch is not installed, but training needs it: pip install 'fedoap[node]'")
    from fedoap.segmentation.datalist import SPLITS, load_datalist  # noqa: PLC0415 - after the check above

    for split in SPLITS:
        load_datalist(config.data, split)


def check_kernels_setting() -> None:
    """Return if the environment variable FEDOAP_KERNELS is unset or names a backend.

    Raises:
        ConfigError: it names no backend.
    """
    asked = os.environ.get(KERNELS_VARIABLE) or "auto"
    if asked not in BACKENDS:
        raise ConfigError(f"{KERNELS_VARIABLE} is {asked!r}, but must be one of {', '.join(BACKENDS)}")
