"""`fed.toml` and `site.toml`, parsed once into frozen models.

`FederationConfig` is what the coordinator's operator writes, `SiteConfig` what a hospital writes.
The part of the former that both sides must agree on is the `Plan`: the coordinator sends it to each
site at the handshake, and its hash is part of every task. Units stand in the names; every default
is visible in `fed.example.toml` and `site.example.toml`, which a test loads.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from fedoap.dataconfig import DataConfig as DataConfig  # noqa: PLC0414 - the other sections are imported from here
from fedoap.errors import ConfigError
from fedoap.fields import (
    LARGEST_PORT,
    PROXY_PATTERN,
    Dialled,
    Endpoint,
    Fraction,
    Frozen,
    MetricsAddress,
    Name,
    Positive,
)
from fedoap.strategyconfig import StrategyConfig as StrategyConfig  # noqa: PLC0414 - the name is found here too
from fedoap.toml import first_line, load_toml

MINUTES_PER_YEAR = 525_600
MOST_ROUNDS = 100_000
"""Both sides hold the course of a federation as a list."""
Attention = Literal["off", "projection", "joint", "gated"]
Modality = Literal["mr", "ct", "ultrasound", "photo"]


class NetworkConfig(Frozen):
    """The U-Net with decoupled cross-attention (arXiv 2511.18847).

    The authors' network is `width=64, depth=4, heads=1, attention="projection"`: its bottleneck and
    hence the attention has `width * 2**depth` = 1024 channels.
    """

    dimensions: Literal[2, 3] = 2
    in_channels: Annotated[int, Field(ge=1, le=16)] = 1
    width: Annotated[int, Field(ge=4, le=256)] = 16
    depth: Annotated[int, Field(ge=1, le=6)] = 4
    heads: Annotated[int, Field(ge=1, le=64)] = 1
    attention: Attention = "joint"
    adapter: bool = True

    @model_validator(mode="after")
    def _heads_divide_the_bottleneck(self) -> Self:
        if self.bottleneck % self.heads:
            raise ValueError(f"heads is {self.heads}, but must divide the bottleneck's {self.bottleneck} channels")
        return self

    @property
    def bottleneck(self) -> int:
        """The number of channels at the lowest resolution."""
        channels: int = self.width * 2**self.depth
        return channels

    @property
    def has_bank(self) -> bool:
        """Whether the attention reads the global bank of keys and values."""
        return self.attention in ("joint", "gated")


class BankConfig(Frozen):
    """The global bank of keys and values: a codebook made by federated k-means."""

    slots: Annotated[int, Field(ge=1, le=4096)] = 64
    min_patients: Annotated[int, Field(ge=1)] = 3
    """A site keeps a slot to itself while fewer of its patients than this contribute to it."""
    mass: Positive = 64.0
    """Total weight of the bank in the softmax, in tokens: log_weight = log(count / total * mass)."""
    cases_per_site: Annotated[int, Field(ge=1)] = 256
    """At most this many training cases of a site enter one exchange."""
    refresh_every: Annotated[int, Field(ge=1)] = 1
    """The bank is renewed each time this many rounds are done, and before the calibration."""


class TrainingConfig(Frozen):
    """One site's work in one round."""

    steps_per_round: Annotated[int, Field(ge=1)] = 50
    """Optimizer steps a round, the same at every site whatever the number of its cases."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    learning_rate: Positive = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    restart_rounds: Annotated[int, Field(ge=1)] = 10
    """T0 of cosine annealing with warm restarts, in rounds."""
    restart_factor: Annotated[int, Field(ge=1)] = 2
    """T_mult of cosine annealing with warm restarts."""
    gradient_clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest L2 norm of the gradient; 0 leaves it alone."""
    shared_path_fraction: Fraction = 0.2
    """Share of the steps that train the shared query, adapter and head instead of the personal ones."""
    validate_every: Annotated[int, Field(ge=1)] = 1
    """The validation cases are looked at each time this many rounds are done, and after the last."""


class CalibrationConfig(Frozen):
    """The personalisation stage after the last round: the perturbed boundary loss, or one to compare it with."""

    steps: Annotated[int, Field(ge=0)] = 200
    """Optimizer steps; 0 leaves the stage out."""
    learning_rate: Positive = 3e-4
    loss: Literal["pbl", "plain", "hausdorff_dt", "boundary"] = "pbl"
    distance_weight: Positive = 0.01
    """Weight of what `hausdorff_dt` or `boundary` adds to the plain loss."""
    region: Literal["error", "band", "both"] = "error"
    radius: Annotated[int, Field(ge=1, le=16)] = 1
    """Half-width of the boundary band in voxels."""
    sigma: Annotated[float, Field(ge=0)] = 0.1
    tau: Annotated[float, Field(gt=0, lt=1)] = 0.75
    lam: Fraction = 0.1
    evaluations: Annotated[int, Field(ge=1)] = 5
    """How often the validation cases are looked at; the best of these states is kept."""
    average: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the running mean of the weights, which is looked at and kept; 0 takes the weights themselves."""


class WireConfig(Frozen):
    """How tensors travel."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    updates: Literal["plain", "packed"] = "plain"
    """`packed`: as the compressed difference from the model that the round began with; nothing is lost by that."""


class Plan(Frozen):
    """What every member of a federation must agree on; sent to each site at the handshake."""

    federation: Name
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    rounds: Annotated[int, Field(ge=1, le=MOST_ROUNDS)] = 20
    network: NetworkConfig = NetworkConfig()
    bank: BankConfig = BankConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    strategy: StrategyConfig = StrategyConfig()
    wire: WireConfig = WireConfig()

    @model_validator(mode="after")
    def _size_suits_the_network(self) -> Self:
        self.data.check(self.network.dimensions, self.network.depth)
        return self

    def to_bytes(self) -> bytes:
        """Return the canonical JSON of this plan."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Return the plan that `to_bytes` wrote.

        Raises:
            ConfigError: the bytes are no plan of this version.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise ConfigError(f"plan from the coordinator: {first_line(error, cls)}") from None

    @property
    def digest(self) -> bytes:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_bytes()).digest()


class CoordinatorConfig(Frozen):
    """Where the coordinator listens and keeps its state."""

    bind: Endpoint = "tcp://0.0.0.0:7470"
    advertise: Dialled | None = None
    """Address that invitations name: what the sites can reach; `bind`, or this machine, where not given."""
    state: Path = Path("state")
    """Folder for keys, ledger and blobs; relative paths start at the file's folder."""
    uploads_at_once: Annotated[int, Field(ge=1)] = 8
    """Sites that may upload at the same time; bounds the coordinator's memory."""
    metrics: MetricsAddress | None = None
    """`host:port`, or a port on 127.0.0.1, to serve figures for Prometheus at; not served where not given."""

    @model_validator(mode="after")
    def _invitations_name_a_port(self) -> Self:
        if self.advertise is not None and self.advertise.endswith(":*") and not self.bind.endswith(":*"):
            raise ValueError(f"advertise is {self.advertise}, but must name a port, as bind does")
        return self


class RoundsConfig(Frozen):
    """When a round starts and ends."""

    count: Annotated[int, Field(ge=1, le=MOST_ROUNDS)] = 20
    quorum: Annotated[int, Field(ge=1)] | None = None
    """Fewest sites whose updates make a round; all sites where not given."""
    deadline_minutes: Annotated[float, Field(gt=0, le=MINUTES_PER_YEAR)] = 240.0
    """A round with quorum closes then, without those that are late; one without it starts anew."""
    silence_seconds: Annotated[float, Field(gt=5)] = 60.0
    """A site not heard from for this long is not waited for, once there is a quorum; each speaks every 5 s."""
    attempts: Annotated[int, Field(ge=1)] = 5
    """This many failed attempts at one round end the run; one that ended because sites were silent does not count."""


class RetentionConfig(Frozen):
    """How long the coordinator keeps what rounds were made from, and what they made."""

    upload_rounds: Annotated[int, Field(ge=0)] = 0
    """This many of the last models, and banks, keep the uploads they were made from, for `verify` to make them anew.

    None by default: a site's own weights are the most telling thing that the coordinator ever holds, and a
    hundred rounds of three sites with 200 MB are 60 GB.
    """
    results: Annotated[int, Field(ge=2)] = 2
    """This many models, and as many banks, are kept: the current one, and one that a site may still be fetching."""


class FederationConfig(Frozen):
    """The whole of `fed.toml`."""

    federation: Name
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    sites: Annotated[tuple[Name, ...], Field(min_length=1)]
    coordinator: CoordinatorConfig = CoordinatorConfig()
    rounds: RoundsConfig = RoundsConfig()
    retention: RetentionConfig = RetentionConfig()
    network: NetworkConfig = NetworkConfig()
    bank: BankConfig = BankConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    strategy: StrategyConfig = StrategyConfig()
    wire: WireConfig = WireConfig()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if len(set(self.sites)) != len(self.sites):
            raise ValueError(f"sites is {list(self.sites)}, but each name may occur once")
        if self.quorum > len(self.sites):
            raise ValueError(f"rounds.quorum is {self.quorum}, but only {len(self.sites)} sites are listed")
        if self.quorum < self.strategy.fewest:
            needed = f"strategy.rule = {self.strategy.rule} needs {self.strategy.fewest}"
            raise ValueError(f"rounds.quorum is {self.quorum}, but {needed}, or one bad update has its way")
        if self.strategy.max_norm_ratio is not None and len(self.sites) < 3:
            raise ValueError(f"strategy.max_norm_ratio needs 3 sites: of {len(self.sites)}, none stands out")
        _ = self.plan
        return self

    @property
    def quorum(self) -> int:
        """The fewest sites whose updates make a round."""
        return self.rounds.quorum or len(self.sites)

    @property
    def plan(self) -> Plan:
        """What the sites are told."""
        shared = {name: getattr(self, name) for name in Plan.model_fields if name != "rounds"}
        return Plan(rounds=self.rounds.count, **shared)


class SiteData(Frozen):
    """A hospital's images and how to read them."""

    datalist: Path
    """MONAI/Decathlon JSON with lists `training`, `validation` and `test`."""
    root: Path | None = None
    """Folder that the datalist's paths start at; the datalist's own folder where not given."""
    modality: Modality = "mr"
    """Chooses the defaults of intensity scaling and augmentation."""
    spacing_mm: tuple[Positive, ...] | None = None
    """Resample to this voxel spacing; images are only resized where not given."""
    crop: bool = False
    """Cut off the dark margin around what the image shows, before it is fitted into `data.size`."""
    window: tuple[float, float] | None = None
    """Intensities mapped to [0, 1], such as (-100, 250) Hounsfield units; per modality where not given."""
    channels: tuple[int, ...] | None = None
    """Channels of the image to use, for files that hold several."""
    max_training_cases: Annotated[int, Field(ge=1)] | None = None
    """Use only this many of the training cases, the first, for trials."""


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", name):
        raise ValueError(f"{name!r} is not auto, cpu, cuda or cuda:N")
    return name


class WorkerConfig(Frozen):
    """How the training process runs."""

    device: Annotated[str, AfterValidator(_device)] = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    gpus: Annotated[int, Field(ge=1, le=64)] = 1
    """GPUs to train on together, through torch.distributed.run."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads for PyTorch; 0 lets PyTorch choose."""
    command: tuple[str, ...] | None = None
    """Another program to run jobs with; it gets the job file's path as last argument."""
    keep_warm: bool | None = None
    """Let the next worker wait with its imports done. Where not given, fedoap's own on one GPU does; a command that is
    to wait gets `-` as last argument, and the path as a line of standard input."""
    stay_seconds: Annotated[float, Field(ge=0)] | None = None
    """How long a worker that waited for its job stays for another, with its images and GPU; 0 ends it with each job.
    Where not given, 60 for fedoap's own and 0 for a command, which otherwise prints `{"done": true}` after each job."""


class SiteNetwork(Frozen):
    """How the node gets out of the hospital."""

    proxy: str | None = None
    """`socks5://[user:password@]host:port`, or `http://...` for CONNECT; the node dials straight where not given."""

    @field_validator("proxy")
    @classmethod
    def _is_a_proxy(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(PROXY_PATTERN, url):  # never shown: it may hold a password
            raise ValueError("must be socks5://host:port or http://host:port, with user:password@ before the host")
        if url is not None and not 1 <= (port := int(url.rpartition(":")[2])) <= LARGEST_PORT:
            raise ValueError(f"has port {port}, but must have one of 1 to {LARGEST_PORT}")
        return url


class SiteConfig(Frozen):
    """The whole of `site.toml`; who the site is, and its keys, lie beside it."""

    data: SiteData | None = None
    worker: WorkerConfig = WorkerConfig()
    network: SiteNetwork = SiteNetwork()


class BlobFiles(Frozen):
    """A blob on disk: the raw bytes and, beside them, the packed `fedoap.manifests.BlobManifest`."""

    blob: Path
    manifest: Path


class ModelRecord(Frozen):
    """`model.json` of a model folder: what it takes to build a model and run it; paths are absolute.

    A site's folder has one with its personal state, the coordinator's `export` one without.
    """

    plan: Plan
    round: int
    shared: BlobFiles
    bank: BlobFiles | None = None
    personal: Path | None = None
    """Folder with the site's `personal.safetensors`; a model without it runs on the shared path."""


def load_federation(path: Path) -> FederationConfig:
    """Return the checked `fed.toml`, its state folder made absolute.

    Raises:
        ConfigError: naming file, key, value and expectation.
    """
    config = load_toml(path, FederationConfig)
    state = (path.parent / config.coordinator.state).absolute()
    return config.model_copy(update={"coordinator": config.coordinator.model_copy(update={"state": state})})


def load_site(path: Path) -> SiteConfig:
    """Return the checked `site.toml`, its data paths made absolute.

    Raises:
        ConfigError: naming file, key, value and expectation.
    """
    return with_absolute_data(load_toml(path, SiteConfig), path.parent)


def with_absolute_data(config: SiteConfig, folder: Path) -> SiteConfig:
    """Return the configuration with its data paths made absolute, relative ones starting at the folder."""
    if config.data is None:
        return config
    datalist = (folder / config.data.datalist).absolute()
    root = datalist.parent if config.data.root is None else (folder / config.data.root).absolute()
    return config.model_copy(update={"data": config.data.model_copy(update={"datalist": datalist, "root": root})})
