"""Which implementation runs, where there is no GPU."""

import subprocess
import sys
import warnings
from typing import get_args

import pytest
import torch

from fedoap.kernels import backend as backends
from fedoap.kernels.backend import VARIABLE, Backend, choose
from fedoap_node import ready

CPU, GPU = torch.device("cpu"), torch.device("cuda")
"""A tensor can lie on a GPU that is not there: a fake one, while shapes are traced."""

WITHOUT_TRITON = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import torch
from fedoap.kernels import decoupled_cross_attention
x, bank = torch.ones(1, 1, 2, 8), torch.ones(1, 3, 8)
print(decoupled_cross_attention(x, x, x, bank, bank).sum().item())
"""


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.parametrize(("device", "chosen"), [(CPU, "eager"), (GPU, "triton")])
def test_auto_takes_triton_on_a_gpu_and_plain_pytorch_elsewhere(device: torch.device, chosen: str) -> None:
    assert choose("auto", "op", device) == chosen


@pytest.mark.parametrize(
    ("asked", "variable", "chosen"),
    [("auto", "eager", "eager"), ("auto", "triton", "triton"), ("auto", "", "triton"), ("triton", "eager", "triton"),
     ("eager", "triton", "eager")],
)  # fmt: skip
def test_the_variable_stands_in_for_auto_alone(
    asked: Backend, variable: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: the variable read before the caller's argument."""
    monkeypatch.setenv(VARIABLE, variable)

    assert choose(asked, "op", GPU) == chosen


def test_unsupported_input_warns_and_takes_plain_pytorch() -> None:
    with pytest.warns(UserWarning, match="^op: q is odd; plain PyTorch runs in place of Triton$"):
        assert choose("auto", "op", GPU, "q is odd") == "eager"


def test_nobody_is_warned_where_triton_would_not_have_run() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("auto", "op", CPU, "q is odd") == "eager"


@pytest.mark.parametrize(
    ("device", "unsupported", "text"),
    [(GPU, "q is odd", "op: backend is 'triton', but q is odd"), (CPU, None, "tensors are on cpu, where kernels run"),
     (torch.device("meta"), None, "op: backend is 'triton', but tensors are on meta")],
)  # fmt: skip
def test_triton_is_refused_where_it_cannot_run(device: torch.device, unsupported: str | None, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        choose("triton", "op", device, unsupported)


def test_triton_asked_for_by_the_variable_is_refused_as_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "triton")

    with pytest.raises(ValueError, match=f"^op: {VARIABLE} is 'triton', but tensors are on cpu"):
        choose("auto", "op", CPU)


def test_an_unknown_value_of_the_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: anything unknown taken for `auto`."""
    monkeypatch.setenv(VARIABLE, "cuda")

    with pytest.raises(ValueError, match=f"^op: {VARIABLE} is 'cuda', but must be one of auto, eager, triton$"):
        choose("auto", "op", CPU)


def test_an_old_gpu_is_left_to_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))

    assert backends._capability_obstacle(0) == "compute capability of cuda:0 is 7.5, less than 8.0"


def test_without_triton_plain_pytorch_runs() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=True)

    assert done.stdout == "16.0\n"


def test_configuration_and_kernels_know_the_same_backends() -> None:
    """The node names the setting's fault before it dials, and must not load torch for that."""
    assert get_args(Backend) == ready.BACKENDS
    assert VARIABLE == ready.KERNELS_VARIABLE
