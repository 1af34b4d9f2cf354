"""Parameters that no cast of the model makes narrower than fp32."""

from __future__ import annotations

import pytest
import torch

from megacpp_stp.model.precision import KeepsFp32


class Inner(KeepsFp32):
    fp32_parameters = ("kept",)

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.nn.Parameter(torch.tensor([1 / 3, 1e-7]))
        self.cast = torch.nn.Parameter(torch.tensor([1 / 3]))
        self.linear = torch.nn.Linear(2, 2)
        self.register_buffer("buffer", torch.ones(1))


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(2, 2), Inner())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["method", "to"])
def test_a_cast_of_the_whole_model_leaves_them_as_they_are(dtype, how):
    whole = model()
    inner = whole[1]
    before, parameter = inner.kept.detach().clone(), inner.kept
    if how == "to":
        whole.to(dtype)
    else:
        whole.half() if dtype == torch.float16 else whole.bfloat16()
    assert inner.kept is parameter
    assert inner.kept.dtype == torch.float32
    assert torch.equal(inner.kept, before)
    others = [tensor for name, tensor in whole.state_dict().items() if name != "1.kept"]
    assert {tensor.dtype for tensor in others} == {dtype}
    assert len(others) == 6


def test_a_gradient_stays_with_its_parameter():
    whole = model()
    inner = whole[1]
    inner.kept.grad = torch.tensor([1 / 7, 2.0])
    inner.cast.grad = torch.tensor([1 / 7])
    whole.bfloat16()
    assert torch.equal(inner.kept.grad, torch.tensor([1 / 7, 2.0]))
    assert inner.cast.grad.dtype == torch.bfloat16


def test_a_cast_to_more_bits_goes_through():
    assert model().double()[1].kept.dtype == torch.float64


def test_a_move_goes_through():
    inner = model().to("meta")[1]
    assert (inner.kept.device.type, inner.kept.dtype) == ("meta", torch.float32)
    both = model().to(device="meta", dtype=torch.bfloat16)[1]
    assert (both.kept.device.type, both.kept.dtype) == ("meta", torch.float32)
    assert both.cast.dtype == torch.bfloat16


def test_a_name_that_is_no_parameter_is_a_mistake():
    class Wrong(KeepsFp32):
        fp32_parameters = ("gone",)

    with pytest.raises(AttributeError, match="gone"):
        Wrong().bfloat16()
