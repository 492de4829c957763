"""The activation against its plain form."""

import pytest
import torch

from rwkv_pl.ops.squared_relu import squared_relu


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_value_and_gradient(dtype):
    x = torch.tensor([-2.0, -0.0, 0.0, 0.5, 3.0, float("inf"), float("nan")], dtype=dtype, requires_grad=True)
    y = squared_relu(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, torch.relu(x).square(), equal_nan=True)
    (gradient,) = torch.autograd.grad(y[:-1].sum(), x)
    assert gradient.tolist()[:-1] == [0, 0, 0, 1, 6, float("inf")]
    assert gradient.dtype == dtype


def test_gradcheck():
    torch.manual_seed(0)
    torch.autograd.gradcheck(squared_relu, torch.randn(3, 4, dtype=torch.float64, requires_grad=True))
