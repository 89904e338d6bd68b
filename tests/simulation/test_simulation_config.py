"""The file of a simulation: one federation and all its sites."""

import re
import tomllib
from pathlib import Path

import pytest

from fedoap.config import FederationConfig
from fedoap.errors import ConfigError
from fedoap.simulation.config import SimulationConfig, load_simulation
from fedoap.simulation.layout import make_layout, write_federation
from fedoap.toml import to_toml

GOOD = """
[federation]
federation = "f"
[sites.a.data]
datalist = "a.json"
[sites.b.data]
datalist = "b.json"
modality = "ct"
[sites.b.worker]
threads = 2
[unseen.c.data]
datalist = "c.json"
"""


def test_the_sites_follow_from_their_tables(tmp_path: Path) -> None:
    config = load_simulation(_write(tmp_path, GOOD))

    assert config.federation.sites == ("a", "b")
    assert config.sites["a"].data is not None
    assert config.sites["a"].data.datalist == tmp_path / "a.json"
    assert (config.sites["a"].worker.threads, config.sites["b"].worker.threads) == (1, 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD + "[other]\n", "unknown key other"),
        (
            GOOD.replace('"f"', '"f"\nsites = ["a"]'),
            "federation.sites is ['a'], but the sites described are ['a', 'b']",
        ),
        (GOOD + '[unseen.a.data]\ndatalist = "a.json"', "a is both a site and unseen"),
        (GOOD + '[federation.coordinator]\nbind = "tcp://*:1"', "federation.coordinator.bind is given"),
        (GOOD + "[sites.d]\n", "d: data is missing"),
        (GOOD.replace("b.json", "x.json"), "x.json, but there is no such file"),
        (GOOD + "[federation.rounds]\nquorum = 3", "federation: rounds.quorum is 3, but only 2 sites are listed"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_simulation(_write(tmp_path, text))

    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_toml_survives_a_round_trip() -> None:
    values = {"a": 1, "b": 0.5, "c": True, "d": ['x"\\y'], "e": {"f": "g", "h": {"i": [1, 2]}}}

    assert tomllib.loads(to_toml(values)) == values


def test_the_coordinator_gets_the_whole_configuration_on_loopback(tmp_path: Path) -> None:
    config = load_simulation(_write(tmp_path, GOOD))
    layout = make_layout(tmp_path / "out", overwrite=False)

    write_federation(layout, config)

    written = FederationConfig.model_validate(tomllib.loads(layout.fed_toml.read_text()))
    assert written.coordinator.bind == "tcp://127.0.0.1:*"
    assert written.plan == config.plan


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    """Planted bug: `overwrite` that deletes whatever it is given."""
    (tmp_path / "thesis.txt").write_text("years of work")

    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=str(tmp_path)):
            make_layout(tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").exists()


def test_an_earlier_simulation_is_deleted_only_when_that_is_wanted(tmp_path: Path) -> None:
    config, out = load_simulation(_write(tmp_path, GOOD)), tmp_path / "out"
    write_federation(make_layout(out, overwrite=False), config)

    with pytest.raises(ConfigError, match="--overwrite"):
        make_layout(out, overwrite=False)

    assert not make_layout(out, overwrite=True).fed_toml.exists()


def test_the_volumes_example_reads_what_its_page_draws() -> None:
    """Planted bugs: another folder; another size, which the example would resample to."""
    folder = Path(__file__).parents[2] / "examples" / "volumes"
    config = SimulationConfig.model_validate(tomllib.loads((folder / "volumes.toml").read_text(encoding="utf-8")))
    pattern = r"fedoap phantoms examples/volumes/(\S+) .*--size (\d+) (\d+) --slices (\d+)"
    drawn = re.findall(pattern, (folder / "README.md").read_text(encoding="utf-8"))

    read = [site.data.datalist.parent.as_posix() for site in config.sites.values() if site.data is not None]
    assert [place for place, *_ in drawn] == read
    assert {tuple(map(int, size)) for _, *size in drawn} == {config.plan.data.size}


def _write(folder: Path, text: str) -> Path:
    for name in "abc":
        (folder / f"{name}.json").write_text("{}")
    (folder / "simulate.toml").write_text(text)
    return folder / "simulate.toml"
