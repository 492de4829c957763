"""The compiled operators between the matrix products equal torch's own operations, outputs and gradients.

The reference is the plain form in float64, on the inputs rounded to the operator's dtype. Relative errors are of norms:
float32 loses some 1e-7 at each of the sums over C, T and B; bfloat16 rounds each result once, by up to 2^-9.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rwkv_pl.ops import cross_entropy as ce
from rwkv_pl.ops.backend import uses_compiled

ops = torch.ops.rwkv_pl


@pytest.fixture(scope="module", autouse=True)
def loaded(compiled_kernel):
    assert uses_compiled("elementwise", "cpu")


TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-8}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def assert_close(got, reference, dtype, slack=1, least=1e-30):
    assert got.shape == reference.shape
    assert (got.double() - reference).norm() <= slack * TOLERANCE[dtype] * reference.norm() + least


def gradients_of(function, tensors, gradients):
    """Outputs of function, and the gradients of all tensors."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    outputs = function(*leaves)
    given = [g.to(y.dtype) for g, y in zip(gradients, outputs, strict=True)]
    return outputs, torch.autograd.grad(outputs, leaves, given)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.integers(0, 40), min_size=1, max_size=2), dtype=DTYPES, seed=st.integers(0, 999))
def test_squared_relu_matches_torch(rows, dtype, seed):
    torch.manual_seed(seed)
    x, gradient = torch.randn(*rows, 12).to(dtype), torch.randn(*rows, 12).to(dtype)
    (reference,), (reference_gradient,) = gradients_of(lambda x: [torch.relu(x).square()], [x.double()], [gradient])
    ops.squared_relu_(x)
    ops.squared_relu_backward_(gradient, x)
    assert_close(x, reference, dtype)
    assert_close(gradient, reference_gradient, dtype, slack=2)


def test_squared_relu_of_nan_is_nan():
    odd = torch.tensor([[float("nan"), -float("inf"), float("inf")]])
    ops.squared_relu_(odd)
    torch.testing.assert_close(odd, torch.tensor([[float("nan"), 0, float("inf")]]), equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(0, 40), min_size=1, max_size=2),
    dtype=DTYPES,
    has_residual=st.booleans(),
    size=st.sampled_from([1.0, 100.0]),
    seed=st.integers(0, 999),
)
def test_gate_matches_torch(rows, dtype, has_residual, size, seed):
    torch.manual_seed(seed)
    r, x = (size * torch.randn(*rows, 12)).to(dtype), torch.randn(*rows, 12).to(dtype)
    residual = torch.randn(*rows, 12) if has_residual else None
    gradient = torch.randn(*rows, 12).to(torch.float32 if has_residual else dtype)
    rest = residual.double() if has_residual else 0
    (reference,), reference_gradients = gradients_of(
        lambda r, x: [rest + torch.sigmoid(r) * x], [r.double(), x.double()], [gradient]
    )
    assert_close(ops.gate(r, x, residual), reference, torch.float32 if has_residual else dtype, slack=4)
    for g, expected in zip(ops.gate_backward(gradient, r, x), reference_gradients, strict=True):
        assert g.dtype == dtype
        # 1 - sigmoid is exact to 6e-8 of 1, so a gradient far out in the tail is 0.
        assert_close(g, expected, dtype, slack=3, least=1e-6 * x.float().norm())


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(0, 5),
    V=st.sampled_from([1, 2, 31, 32, 33, 256, 5000]),
    dtype=DTYPES,
    size=st.sampled_from([1e-3, 1.0, 50.0, 1e4]),
    offset=st.sampled_from([0.0, 1e6]),
    ignored=st.booleans(),
    seed=st.integers(0, 999),
)
def test_cross_entropy_matches_torch(N, V, dtype, size, offset, ignored, seed):
    torch.manual_seed(seed)
    logits = (size * torch.randn(N, V) + offset).to(dtype)
    if seed % 3 == 0:
        logits = logits.round()  # of equal logits, the first counts as the largest
    targets = torch.randint(V, (N,))
    if ignored:
        targets[::2] = ce.IGNORE_INDEX
    given = torch.randn(N), torch.randn(N)

    def run(logits, function):
        logits = logits.detach().requires_grad_()
        outputs = function(logits)
        gradient = torch.autograd.grad(outputs, logits, [g.to(y.dtype) for g, y in zip(given, outputs, strict=True)])
        return outputs, gradient[0]

    def plain(logits):
        nats = F.cross_entropy(logits, targets, ignore_index=ce.IGNORE_INDEX, reduction="none")
        # If several logits of a row are the largest, the first gets all of the gradient, as in the official L2Wrap.
        return nats, logits.gather(1, (logits == logits.amax(1, keepdim=True)).int().argmax(1, keepdim=True))[:, 0]

    (nats, largest), gradient = run(logits, lambda x: ce.cross_entropy(x, targets))
    (reference, reference_largest), reference_gradient = run(logits.double(), plain)
    assert nats.dtype == largest.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(nats.double(), reference, rtol=3e-6, atol=1e-6)
    assert torch.equal(largest.double(), reference_largest)
    assert (gradient.double() - reference_gradient).norm() <= 2 * TOLERANCE[dtype] * reference_gradient.norm()


def test_cross_entropy_of_nan_and_of_zero_rows():
    bad = torch.zeros(3, 40)
    bad[0, 3], bad[1, 3], bad[2] = float("nan"), float("inf"), -float("inf")
    nats, largest = ce.cross_entropy(bad, torch.tensor([5, 5, 5]))
    assert nats.isnan().all() and largest[0].isnan()
    nats, _ = ce.cross_entropy(torch.tensor([[0.0, -float("inf")]]), torch.tensor([0]))
    assert nats == 0
    with pytest.raises(RuntimeError, match=r"target 40 for a vocabulary of 40"):
        ce.cross_entropy(bad, torch.tensor([0, 40, 0]))


def compute_nats(x):
    return ce.cross_entropy(x.flatten(0, 1), torch.zeros(6, dtype=torch.int64))[0]


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_backward_pass_ignores_a_surrounding_autocast(autocast):
    gradients = []
    for enabled in (False, True):
        x = torch.linspace(-1, 1, 48).view(2, 3, 8).requires_grad_()
        loss = compute_nats(x).square().sum()
        with torch.autocast("cpu", autocast, enabled=enabled):
            loss.backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_torch_func_transforms_use_the_plain_form():
    x = torch.linspace(-1, 1, 48).view(2, 3, 8).requires_grad_()
    (reference,) = torch.autograd.grad(compute_nats(x).square().sum(), x)
    got = torch.func.grad(lambda x: compute_nats(x).square().sum())(x.detach())
    torch.testing.assert_close(got, reference, rtol=1e-5, atol=1e-5)


def test_mismatched_shapes_are_an_error():
    x, w, mix = torch.randn(2, 3, 8), torch.ones(8), torch.linspace(0, 1, 8)
    targets = torch.zeros(6, dtype=torch.int64)
    for wrong in (
        lambda: ops.norm_token_shift(x, w, w, [mix, mix], torch.randn(1, 8), 1e-5, False),
        lambda: ops.norm_token_shift(x, w, w, [mix[:7], mix], None, 1e-5, False),
        lambda: ops.norm_token_shift(x, w[:7], w, [mix, mix], None, 1e-5, False),
        lambda: ops.norm_token_shift(x[0], w, w, [mix, mix], None, 1e-5, False),
        lambda: ops.gate(x[:1], x, x),
        lambda: ops.gate(x, x, x[:1]),
        lambda: ops.gate_backward(x[:1], x, x),
        lambda: ops.squared_relu_backward_(x, x.bfloat16()),
        lambda: ce.cross_entropy(x[0], targets),
        lambda: ce.cross_entropy(x.flatten(0, 1), targets.int()),
        lambda: ce.cross_entropy(x, targets),
        lambda: ce.cross_entropy(torch.empty(6, 0), targets),
    ):
        with pytest.raises((RuntimeError, IndexError)):
            wrong()
