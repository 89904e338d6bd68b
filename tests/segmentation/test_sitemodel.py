"""A site's model: what is shared, what is personal, and what each path trains."""

import numpy as np
import pytest
import torch

from fedoap.config import Attention, DataConfig, NetworkConfig, Plan, StrategyConfig
from fedoap.errors import ConfigError, TensorsError
from fedoap.segmentation.network import Bank
from fedoap.segmentation.sitemodel import ModelPath, SiteModel
from fedoap.strategies import STRATEGIES


def plan(strategy: str = "fedoap", attention: Attention = "joint", personal: tuple[str, ...] | None = None) -> Plan:
    """Return a plan with a small network."""
    return Plan(
        federation="trial",
        seed=4,
        network=NetworkConfig(width=4, depth=2, attention=attention),
        data=DataConfig(size=(16, 16)),
        strategy=StrategyConfig(name=strategy, personal=personal),
    )


def step(model: SiteModel, path: ModelPath) -> None:
    """Move each parameter along the gradient of one path."""
    image = torch.randn(2, 1, 16, 16)
    bank = Bank(torch.randn(1, 3, 16), torch.randn(1, 3, 16), torch.zeros(3))
    torch.autograd.backward([model(image, bank, path=path).square().sum()])
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def moved(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    """Return the names whose values changed."""
    return {name for name in before if not np.array_equal(before[name], after[name])}


def test_fedoaps_personal_parts_are_those_of_the_method() -> None:
    model = SiteModel(plan())

    parts = {name.split(".")[1] for name in model.personal_state()}

    assert parts == {"bottleneck_q", "attention", "adapter", "head"}
    assert {name for name in model.personal_state() if ".attention." in name} == {
        "personal.attention.gate",
        "personal.attention.query.weight",
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_blank_model_into_which_weights_are_loaded_is_like_another(strategy: str) -> None:
    """Planted bug: a personal parameter that no twin is copied into."""
    whole, blank = SiteModel(plan(strategy)), SiteModel(plan(strategy), blank=True)

    blank.load_shared(whole.shared_state())
    blank.reset_personal()

    for state, other in (
        (whole.shared_state(), blank.shared_state()),
        (whole.personal_state(), blank.personal_state()),
    ):
        assert state.keys() == other.keys()
        assert not moved(state, other)


def test_the_shared_set_is_complete_plain_and_sorted() -> None:
    """Planted bug: bottleneck_q registered first, so that the shared set calls bottleneck_kv by its name."""
    names = list(SiteModel(plan()).shared_state())

    assert names == sorted(names)
    assert not any(name.startswith(("personal.", "bottleneck_q.")) for name in names)
    assert {"attention.query.weight", "attention.gate", "adapter.conv1.weight", "head.weight"} <= set(names)


def test_the_shared_set_is_the_same_under_every_strategy() -> None:
    states = [SiteModel(plan(name)).shared_state() for name in STRATEGIES if name != "scaffold"]

    for state in states[1:]:
        assert list(state) == list(states[0])
        assert moved(states[0], state) == set()


def test_both_paths_agree_until_something_personal_was_trained() -> None:
    model = SiteModel(plan())
    image = torch.randn(2, 1, 16, 16)

    with torch.no_grad():
        torch.testing.assert_close(model(image), model(image, path="shared"), rtol=1e-5, atol=1e-6)


def test_a_personal_step_trains_common_and_personal_parameters_and_no_shared_twin() -> None:
    """Planted bug: a personal part left tied to its shared twin."""
    model = SiteModel(plan())
    shared, personal = model.shared_state(), model.personal_state()

    step(model, "personal")

    twins = {name for name in shared if name.startswith(("attention.query.", "attention.gate", "adapter.", "head."))}
    assert moved(shared, model.shared_state()) == set(shared) - twins
    assert moved(personal, model.personal_state()) == set(personal)


def test_a_shared_step_trains_the_shared_network_alone() -> None:
    model = SiteModel(plan())
    shared, personal = model.shared_state(), model.personal_state()

    step(model, "shared")

    assert moved(shared, model.shared_state()) == set(shared)
    assert moved(personal, model.personal_state()) == set()


@pytest.mark.parametrize("attention", ["off", "projection"])
def test_ablations_keep_a_bottleneck_of_their_own(attention: Attention) -> None:
    names = SiteModel(plan(attention=attention)).personal_state()

    assert any(name.startswith("personal.bottleneck_q.") for name in names)
    assert "personal.attention.gate" not in names


def test_with_fedavg_nothing_is_personal_and_both_paths_are_one() -> None:
    model = SiteModel(plan("fedavg"))

    step(model, "personal")

    image = torch.randn(2, 1, 16, 16)
    assert model.personal_state() == {}
    assert torch.equal(model(image), model(image, path="shared"))


def test_with_local_training_nothing_shared_moves() -> None:
    model = SiteModel(plan("local"))
    shared, personal = model.shared_state(), model.personal_state()

    step(model, "personal")

    assert moved(shared, model.shared_state()) == set()
    assert moved(personal, model.personal_state()) == set(personal)


def test_a_strategy_of_which_the_network_has_no_part_is_refused() -> None:
    """Else FedDP without attention would be FedAvg under another name. Planted bug: nothing is checked."""
    with pytest.raises(ConfigError, match=r"strategy\.name is feddp, which keeps query: this network has none of it"):
        SiteModel(plan("feddp", attention="off"))


def test_personal_norms_alone_leave_one_bottleneck() -> None:
    model = SiteModel(plan(personal=("norms",)))

    names = set(model.personal_state())

    assert "personal.bottleneck_kv.block.norm1.weight" in names
    assert not any("bottleneck_q" in name or "conv" in name for name in names)


def test_states_survive_a_round_trip() -> None:
    first, second = SiteModel(plan()), SiteModel(plan())
    step(first, "personal")
    step(first, "shared")

    second.load_shared(first.shared_state())
    second.load_personal(first.personal_state())

    image = torch.randn(2, 1, 16, 16)
    for path in ("personal", "shared"):
        assert torch.equal(first(image, path=path), second(image, path=path))


def test_loading_shared_weights_reaches_the_personal_path_but_no_personal_parameter() -> None:
    first, second = SiteModel(plan()), SiteModel(plan())
    step(first, "shared")
    personal = second.personal_state()

    second.load_shared(first.shared_state())

    assert moved(personal, second.personal_state()) == set()
    assert second.personal.get_parameter("encoder.0.conv1.weight") is second.shared.get_parameter(
        "encoder.0.conv1.weight"
    )


def test_a_new_site_starts_from_the_shared_twins() -> None:
    """The personal bottleneck_q from the shared bottleneck_kv. Planted bug: from its own first weights."""
    model = SiteModel(plan())
    step(model, "shared")

    model.reset_personal()

    shared = model.shared_state()
    for name, value in model.personal_state().items():
        twin = name.removeprefix("personal.").replace("bottleneck_q.", "bottleneck_kv.")
        assert np.array_equal(value, shared[twin]), name


def test_states_are_copies() -> None:
    model = SiteModel(plan())
    before = model.shared_state()

    before["head.bias"] += 1

    assert moved(before, model.shared_state()) == {"head.bias"}


def test_twins_pair_each_personal_parameter_with_another_of_its_shape() -> None:
    for name, own, twin in SiteModel(plan()).twins():
        assert own is not twin, name
        assert own.shape == twin.shape


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"head.bias": None}, "tensor head.bias is missing"),
        ({"hed.bias": np.zeros(1, np.float32)}, "unknown tensor hed.bias; did you mean head.bias?"),
        ({"head.bias": np.zeros(2, np.float32)}, r"tensor head.bias has shape \(2,\), but the network's has \(1,\)"),
        ({"head.bias": np.zeros(1, np.float64)}, "tensor head.bias is float64, but must be float32"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(change: dict[str, np.ndarray], text: str) -> None:
    model = SiteModel(plan())
    before = model.shared_state()
    wrong = {name: value + 1 for name, value in before.items()} | change

    with pytest.raises(TensorsError, match=text):
        model.load_shared({name: value for name, value in wrong.items() if value is not None})

    assert moved(before, model.shared_state()) == set()


def test_personal_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TensorsError, match=r"personal weights: tensor personal\.adapter"):
        SiteModel(plan()).load_personal({})


@pytest.mark.parametrize("personal", [("gate",), ("adapter", "gate")])
def test_a_part_that_the_network_lacks_is_refused_where_the_operator_named_it(personal: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"strategy\.personal names gate, but this network has no such parameter"):
        SiteModel(plan(attention="projection", personal=personal))


def test_an_input_that_leaves_one_voxel_at_the_bottleneck_is_refused() -> None:
    small = plan().model_copy(update={"data": DataConfig(size=(4, 4))})

    with pytest.raises(ConfigError, match="leaves one voxel"):
        SiteModel(small)


def test_a_patch_that_leaves_one_voxel_at_the_bottleneck_is_refused() -> None:
    small = plan().model_copy(update={"data": DataConfig(size=(8, 8), patch=(4, 4))})

    with pytest.raises(ConfigError, match=r"data\.patch is \(4, 4\), but network\.depth = 2 leaves one voxel"):
        SiteModel(small)
