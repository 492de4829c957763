"""The faster matrix product matches torch's own, with its gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rwkv_pl.ops import linear as ours
from rwkv_pl.ops.linear import MIN_ROWS, Linear, linear


@pytest.fixture(scope="module", autouse=True)
def on_any_processor():
    """Use oneDNN's product, whether or not it is the faster one here."""
    if not ours._has_onednn:
        pytest.skip("this torch has no oneDNN product")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "_is_onednn_faster", True)
        yield


@settings(max_examples=30, deadline=None)
@given(
    leading=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    rows=st.sampled_from([1, MIN_ROWS - 1, MIN_ROWS, 100]),
    into=st.integers(1, 70),
    out=st.integers(1, 70),
    transposed=st.booleans(),
)
def test_products_and_gradients_match_torch(leading, rows, into, out, transposed):
    x = torch.randn(*leading, rows, into)
    if transposed:
        x = x.transpose(0, -2).contiguous().transpose(0, -2)
    weight, gradient = torch.randn(out, into), torch.randn(*x.shape[:-1], out)
    results = []
    for function, dtype in ((linear, torch.float32), (F.linear, torch.float64)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, weight)]
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, gradient.to(dtype))])
    for mine, expected in zip(*results, strict=True):
        assert mine.shape == expected.shape
        # float32 rounds each term of a sum to 6e-8; the terms are products of numbers around 1.
        summands = x.numel() // into + into + out
        torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-7 * summands + 1e-6)


@torch.no_grad()
def test_onednn_is_used_only_where_it_is_supported(monkeypatch):
    calls = []
    onednn = ours._onednn_product
    monkeypatch.setattr(ours, "_onednn_product", lambda a, b: calls.append(1) or onednn(a, b))
    layer, x = Linear(8, 4), torch.randn(2, 40, 8)
    layer(x)
    assert len(calls) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer(x[:, :1])
    layer.double()(x.double())
    assert len(calls) == 1


def test_torch_func_transforms_work():
    x, weight = torch.randn(40, 3), torch.randn(2, 3)
    grad = torch.func.grad(lambda x: linear(x, weight).square().sum())
    torch.testing.assert_close(grad(x), 2 * (x @ weight.T) @ weight)
    each = torch.func.vmap(lambda x: linear(x, weight))(x.expand(5, 40, 3))
    torch.testing.assert_close(each, (x @ weight.T).expand(5, 40, 2))


def test_weight_of_another_dtype_is_cast_to_the_input_dtype():
    layer, x = Linear(8, 4).bfloat16(), torch.randn(40, 8)
    expected = F.linear(x, layer.weight.float())
    y = layer(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
