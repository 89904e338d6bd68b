"""The smallest federation that has everything: two sites and an unseen one, a bank, two rounds, calibration."""

import hashlib
from pathlib import Path

from fedoap.segmentation.descent import Progress
from fedoap.segmentation.phantoms import write_phantoms
from fedoap.simulation.config import SimulationConfig, load_simulation

SIMULATE = """
threads = 1
local_only = false
[federation]
federation = "tiny"
seed = 5
rounds.count = 2
network = { width = 4, depth = 2, attention = "joint" }
bank = { slots = 4, min_patients = 1 }
data = { size = [32, 32] }
training = { steps_per_round = 3, batch_size = 2, learning_rate = 0.01 }
calibration = { steps = 3 }
[sites]
a = { data = { datalist = "liver-ct/datalist.json", modality = "ct" } }
b = { data = { datalist = "breast-us/datalist.json", modality = "ultrasound" } }
[unseen]
c = { data = { datalist = "lung-ct/datalist.json", modality = "ct" } }
"""


def tiny_study(folder: Path) -> SimulationConfig:
    """Draw the sites' phantoms and return the configuration, which lies beside them as `simulate.toml`."""
    for organ in ("liver-ct", "breast-us", "lung-ct"):
        write_phantoms(folder / organ, organ, {"training": 4, "validation": 3, "test": 2}, (32, 32), seed=0)
    (folder / "simulate.toml").write_text(SIMULATE)
    return load_simulation(folder / "simulate.toml")


def no_report(site: str, number: int, progress: Progress) -> None:
    """Take no notice."""


def left(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of weights that a federation left, by what it is."""
    files = {name: folder / "model" / name for name in ("model.blob", "model.manifest", "bank.blob", "bank.manifest")}
    for site in ("a", "b"):
        home = folder / "home" / site
        (files[f"{site} personal"],) = home.glob("state/personal/*/personal.safetensors")
        files |= {f"{site} {path.name}": path for path in home.glob("model/*") if path.name != "model.json"}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
