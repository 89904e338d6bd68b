"""Configuration: the examples show every default, and a mistake is one line that says where and what."""

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from fedoap.config import (
    FederationConfig,
    Plan,
    SiteConfig,
    SiteData,
    StrategyConfig,
    load_federation,
    load_site,
)
from fedoap.errors import ConfigError
from fedoap.fields import Frozen
from fedoap.toml import to_toml

ROOT = Path(__file__).parents[1]
REQUIRED = {"federation", "sites", "data.datalist"}


@pytest.mark.parametrize(("name", "model"), [("fed.example.toml", FederationConfig), ("site.example.toml", SiteConfig)])
def test_the_example_shows_every_key_with_its_default(name: str, model: type[Frozen]) -> None:
    """Planted bugs: a key left out of the example; a default changed in the model only."""
    text = (ROOT / name).read_text(encoding="utf-8")
    shown, commented = tomllib.loads(text), _commented_keys(text)

    for key, default in _defaults(model).items():
        if default is None:
            assert key in commented, f"{name}: {key} is not shown in a comment"
        elif key not in REQUIRED:
            assert _look_up(shown, key) == default, f"{name}: {key}"
        else:
            assert _look_up(shown, key), f"{name}: {key}"


def test_every_key_of_an_example_has_a_remark() -> None:
    for name in ("fed.example.toml", "site.example.toml"):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        keys = [line for line in lines if re.match(r"(# )?\w+ = ", line) and not line.startswith("sites")]

        assert [line for line in keys if "  #" not in line.removeprefix("# ")] == []


def test_the_commented_keys_of_an_example_are_accepted_too() -> None:
    text = (ROOT / "site.example.toml").read_text(encoding="utf-8")

    loaded = SiteConfig.model_validate(tomllib.loads(re.sub(r"(?m)^# (\w+ = )", r"\1", text)))

    assert loaded.data is not None
    assert loaded.data.window == (-100.0, 250.0)
    assert loaded.worker.command == ("python", "-m", "my_worker")


def test_a_full_file_is_loaded_and_its_paths_start_at_its_folder(tmp_path: Path) -> None:
    file = _write(tmp_path, 'federation = "f"\nsites = ["a", "b"]\n[coordinator]\nstate = "s"')

    config = load_federation(file)

    assert config.coordinator.state == tmp_path / "s"
    assert config.quorum == 2
    assert config.plan.rounds == 20


def test_a_plan_survives_its_bytes_and_any_change_shows_in_its_digest() -> None:
    plan = FederationConfig(federation="f", sites=("a",)).plan

    assert Plan.from_bytes(plan.to_bytes()) == plan
    assert plan.model_copy(update={"seed": 1}).digest != plan.digest


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[rounds]\nquorom = 2", "unknown key rounds.quorom; did you mean rounds.quorum?"),
        ("[bnak]\nslots = 2", "unknown key bnak; did you mean bank?"),
        ("zzz = 2", "unknown key zzz"),
        ("[rounds]\nquorum = 3", "rounds.quorum is 3, but only 2 sites are listed"),
        ("[rounds]\nquorum = 0", "rounds.quorum is 0, but input should be greater than or equal to 1"),
        ('[rounds]\ncount = "many"', "rounds.count is 'many', but input should be a valid integer"),
        ("[rounds]\ncount = true", "rounds.count: is true, but must be a number"),
        ("[rounds]\nquorum = true", "rounds.quorum: is true, but must be a number"),
        ("[rounds]\ndeadline_minutes = 1e300", "rounds.deadline_minutes is 1e+300, but input should be less than or"),
        ("[rounds]\nsilence_seconds = 5", "rounds.silence_seconds is 5, but input should be greater than 5"),
        ("[training]\nlearning_rate = -1", "training.learning_rate is -1, but input should be greater than 0"),
        ("[training]\nlearning_rate = nan", "training.learning_rate is nan, but input should be a finite number"),
        ('[network]\nattention = "most"', "network.attention is 'most', but input should be 'off', 'projection'"),
        ("[network]\nheads = 3", "network: heads is 3, but must divide the bottleneck's 256 channels"),
        (
            '[strategy]\nrule = "median"',
            "rounds.quorum is 2, but strategy.rule = median needs 3, or one bad update has",
        ),
        ('[strategy]\nrule = "trimmed_mean"\ntrim_fraction = 0.2', "strategy.rule = trimmed_mean needs 5, or one"),
        (
            '[strategy]\nrule = "trimmed_mean"\ntrim_fraction = 0.5',
            "strategy.trim_fraction is 0.5, but input should be",
        ),
        (
            '[strategy]\nrule = "median"\nweighting = "cases"',
            "strategy: weighting is cases, but rule median counts all",
        ),
        ("[strategy]\nmax_norm_ratio = 3", "strategy.max_norm_ratio needs 3 sites: of 2, none stands out"),
        (
            "[strategy]\nmax_norm_ratio = 0.9",
            "strategy.max_norm_ratio is 0.9, but input should be greater than or equal",
        ),
        ("[data]\nsize = [128]", "data.size is (128,), but network.dimensions is 2"),
        ("[data]\nsize = [100, 128]", "each number must be a multiple of 2**network.depth = 16"),
        ("[data]\npatch = [64]", "data.patch is (64,), but network.dimensions is 2"),
        ("[data]\npatch = [64, 40]", "data.patch is (64, 40), but each number must be a multiple of 2**network.depth"),
        ("[data]\npatch = [64, 0]", "data.patch is (64, 0), but each number must be a multiple of"),
        ("[data]\npatch = [64, 144]", "data.patch is (64, 144), but must fit into data.size = (128, 128)"),
        ("[data]\noverlap = 1", "data.overlap is 1, but input should be less than 1"),
        ('[coordinator]\nbind = "0.0.0.0:7470"', "coordinator.bind: '0.0.0.0:7470' is not tcp://HOST:PORT"),
        ('[coordinator]\nbind = "tcp://127.0.0.1:99999"', "coordinator.bind: port is 99999, but must be 1 to 65535"),
        ('[coordinator]\nbind = "tcp://127.0.0.1:0"', "coordinator.bind: port is 0, but must be 1 to 65535, or *"),
        ('[coordinator]\nmetrics = "99999"', "coordinator.metrics: port is 99999, but must be at most 65535"),
        ('[coordinator]\nmetrics = "here"', "coordinator.metrics: 'here' is not HOST:PORT, or a port on"),
        ('[coordinator]\nadvertise = "tcp://*:7470"', "coordinator.advertise: host is *, which nobody can dial"),
        ('[coordinator]\nadvertise = "tcp://0.0.0.0:7470"', "coordinator.advertise: host is 0.0.0.0, which nobody can"),
        ('[coordinator]\nadvertise = "tcp://[::]:7470"', "coordinator.advertise: host is [::], which nobody can dial"),
        ('[coordinator]\nadvertise = "tcp://f.org:*"', "coordinator: advertise is tcp://f.org:*, but must name a port"),
        ("coordinator = 5", "coordinator is 5, but must be a table: [coordinator]"),
        ("data.size = 64", "data.size is 64, but must be a list"),
    ],
)
def test_a_mistake_is_one_line_with_file_key_and_expectation(tmp_path: Path, text: str, expected: str) -> None:
    """Planted bug: ports above 65535 were let through; libzmq listens at 34463 where 99999 is configured."""
    file = _write(tmp_path, f'federation = "f"\nsites = ["a", "b"]\n{text}\n')

    with pytest.raises(ConfigError) as caught:
        load_federation(file)

    assert str(caught.value).startswith(f"{file}: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('federation = "f"', "sites is missing"),
        ('federation = "f"\nsites = []', "sites is [], but must name 1 at least"),
        ('federation = "f"\nsites = ["a", "a"]', "sites is ['a', 'a'], but each name may occur once"),
        ('federation = "f"\nsites = ["A b"]', "sites.0: 'A b' is not 1 to 63 lower-case letters, digits"),
        ('federation = "../f"\nsites = ["a"]', "federation: '../f' is not 1 to 63 lower-case letters"),
        ('federation = "f\\n"\nsites = ["a"]', "federation: 'f\\n' is not 1 to 63"),
        ('federation = "f"\nsite = ["a"]', "unknown key site; did you mean sites?"),
        ('federation = "f"\nfederation = "g"', "Cannot overwrite a value"),
        ('federation = "f', "Unterminated string"),
    ],
)
def test_a_file_without_what_it_needs_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_federation(_write(tmp_path, text))

    assert expected in str(caught.value)


def test_a_text_survives_being_written_as_toml() -> None:
    """Planted bug: quotes and backslashes escaped alone; a line's end in a path ended the value."""
    text = 'C:\\scans "new"\n\ttümör\x01'

    assert tomllib.loads(to_toml({"root": text})) == {"root": text}


def test_brackets_that_never_close_are_one_line(tmp_path: Path) -> None:
    """Planted bug: the parser's `RecursionError` let through, with three thousand lines."""
    file = _write(tmp_path, "x = " + "[" * 5000)

    with pytest.raises(ConfigError, match=r"fed.toml: is nested too deeply to be read"):
        load_federation(file)


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:-1", "CPU", "cuda:1x"])
def test_a_device_that_is_none_is_refused_before_the_site_dials(tmp_path: Path, device: str) -> None:
    """Planted bug: left to the worker, which would fail once an attempt."""
    (tmp_path / "site.toml").write_text(f'[worker]\ndevice = "{device}"\n')

    with pytest.raises(ConfigError, match=f"worker.device: '{device}' is not auto, cpu, cuda or cuda:N"):
        load_site(tmp_path / "site.toml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such file"):
        load_federation(tmp_path / "nowhere.toml")


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
        load_site(tmp_path)


def test_a_rule_works_from_the_fewest_updates_that_it_names() -> None:
    """Planted bug: the fewest rounded down."""
    fractions = (0.05, 0.1, 0.2, 0.25, 0.3, 0.34, 0.4, 0.49)
    strategies = [StrategyConfig(rule="trimmed_mean", trim_fraction=fraction) for fraction in fractions]

    assert [one.trimmed(one.fewest) for one in strategies] == [1] * len(fractions)
    assert [one.trimmed(one.fewest - 1) for one in strategies] == [0] * len(fractions)


def test_a_site_finds_its_images_beside_its_datalist(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text('[data]\ndatalist = "images/list.json"\n')

    data = load_site(tmp_path / "site.toml").data

    assert isinstance(data, SiteData)
    assert data.datalist == tmp_path / "images" / "list.json"
    assert data.root == tmp_path / "images"


def test_a_misspelt_key_of_a_site_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text('[data]\ndatalist = "l.json"\nmodalty = "ct"\n')

    with pytest.raises(ConfigError, match=r"unknown key data\.modalty; did you mean data\.modality\?"):
        load_site(tmp_path / "site.toml")


def test_a_plan_whose_course_fills_the_memory_is_refused() -> None:
    """A coordinator may send any plan. Planted bug: no bound, so that its first task ends the node."""
    plan = Plan(federation="f").to_bytes().replace(b'"rounds":20', b'"rounds":1000000000000')

    with pytest.raises(ConfigError, match="rounds is 1000000000000, but input should be less than or equal to 100000"):
        Plan.from_bytes(plan)


def test_a_proxys_port_is_one_and_its_password_stays_unsaid(tmp_path: Path) -> None:
    """Planted bug: port 99999 was dialled as 34463, and `connection refused` was all that anybody heard."""
    (tmp_path / "site.toml").write_text('network.proxy = "http://proxy.example.org:3128\\n"')
    with pytest.raises(ConfigError, match=r"network\.proxy: must be socks5"):
        load_site(tmp_path / "site.toml")
    (tmp_path / "site.toml").write_text('network.proxy = "http://user:secret@proxy.example.org:99999"')

    with pytest.raises(ConfigError, match=r"network\.proxy: has port 99999, but must have one of 1 to 65535") as caught:
        load_site(tmp_path / "site.toml")

    assert "secret" not in str(caught.value)


def _write(folder: Path, text: str) -> Path:
    file = folder / "fed.toml"
    file.write_text(text)
    return file


def _defaults(model: type[BaseModel], prefix: str = "") -> dict[str, object]:
    """Return the default of each key, nested ones with dots; a required key has its name as value."""
    found: dict[str, object] = {}
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            found |= _defaults(section, f"{prefix}{name}.")
        else:
            default = field.default if not field.is_required() else name
            found[prefix + name] = _as_toml(default)
    return found


def _section(annotation: object) -> type[BaseModel] | None:
    kinds = [annotation, *getattr(annotation, "__args__", ())]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _as_toml(value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _look_up(values: dict[str, object], key: str) -> object:
    found: object = values
    for part in key.split("."):
        assert isinstance(found, dict)
        assert part in found, f"{key} is not shown"
        found = found[part]
    return found


def _commented_keys(text: str) -> set[str]:
    keys, section = set(), ""
    for line in text.splitlines():
        if header := re.match(r"\[(\w+)\]", line):
            section = header[1] + "."
        elif key := re.match(r"# (\w+) = ", line):
            keys.add(section + key[1])
    return keys
