"""The compiled passes between the matrix products equal torch's own operations, outputs and gradients.

The judge is the plain form in float64, of the numbers as they were rounded for the operator. Relative errors are of
norms: float32 loses some 1e-7 at each of the sums over C, T and B; bfloat16 rounds each result once, by up to 2^-9.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from rwkv_pl.ops import cross_entropy as ce
from rwkv_pl.ops import gate as gt
from rwkv_pl.ops import norm_mix as nm
from rwkv_pl.ops import squared_relu as sr

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-8}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def close(got, judge, dtype):
    assert got.shape == judge.shape
    assert (got.double() - judge).norm() <= TOLERANCE[dtype] * judge.norm() + 1e-30


@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(0, 3),
    T=st.sampled_from([1, 2, 63, 64, 65, 130]),
    C=st.sampled_from([1, 3, 16, 33, 64]),
    n_mixes=st.integers(2, 3),
    has_last=st.booleans(),
    uses_last=st.booleans(),
    autocast=st.booleans(),
    transposed=st.booleans(),
    size=st.sampled_from([1e-3, 1.0, 1e4]),
    seed=st.integers(0, 999),
)
@example(2, 130, 33, 3, True, True, True, True, 1.0, 0)
def test_norm_mix(B, T, C, n_mixes, has_last, uses_last, autocast, transposed, size, seed):
    torch.manual_seed(seed)
    x = size * torch.randn(T, B, C).transpose(0, 1) if transposed else size * torch.randn(B, T, C)
    norm = nn.LayerNorm(C)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    mixes = [torch.randn(1, 1, C) for _ in range(n_mixes)]
    last = torch.randn(B, C) if has_last else None
    dtype = torch.bfloat16 if autocast else torch.float32
    # As a product's gradient may come, expanded from a sum.
    grads = [torch.randn(C).to(dtype).expand(B, T, C), *(torch.randn(B, T, C).to(dtype) for _ in mixes[1:])]
    of_last = torch.randn(B, C)

    def run(function, dtype):
        own = nn.LayerNorm(C).to(dtype)
        own.load_state_dict(norm.state_dict())
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, *mixes, *([last] if has_last else []))]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.float32):
            mixed, new_last = function(leaves[0], own, leaves[1 : n_mixes + 1], leaves[-1] if has_last else None)
        outputs = [*mixed, *([new_last] if uses_last else [])]
        given = [grad.to(y.dtype) for grad, y in zip([*grads, of_last], outputs, strict=False)]
        return outputs, torch.autograd.grad(outputs, [*leaves, own.weight, own.bias], given)

    assert nm._serves(x, norm, mixes)
    outputs, gradients = run(nm.norm_mix, torch.float32)
    judge, judge_gradients = run(nm.norm_mix_plain, torch.float64)
    assert all(y.dtype == dtype for y in outputs[:n_mixes])
    for y, of in zip(outputs, judge, strict=True):
        # Where the variance is but rounding, of one channel above all, nothing of x is left to compare.
        close(y, of, y.dtype) if C > 1 else torch.testing.assert_close(y.double(), of, atol=0.02, rtol=0.02)
    for g, of in zip(gradients, judge_gradients, strict=True):
        if C > 1 or g.shape != x.shape:
            assert (g.double() - of).norm() <= 2e-5 * (of.norm() + grads[0].float().norm() / size) + 1e-30


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(0, 40), min_size=1, max_size=3), dtype=DTYPES, seed=st.integers(0, 999))
def test_squared_relu(shape, dtype, seed):
    torch.manual_seed(seed)
    x = torch.randn(shape).to(dtype).requires_grad_()
    gradient = torch.randn(shape).to(dtype)
    y = sr.squared_relu(x.clone())
    judge = x.detach().double().requires_grad_()
    of_y = torch.relu(judge).square()
    close(y, of_y, dtype)
    close(torch.autograd.grad(y, x, gradient)[0], torch.autograd.grad(of_y, judge, gradient.double())[0], dtype)


def test_squared_relu_is_written_over_its_input_and_over_no_leaf():
    x = torch.tensor([-1.0, 2.0, float("nan"), -float("inf"), float("inf")], requires_grad=True)
    between = x * 1
    y = sr.squared_relu(between)
    assert y.data_ptr() == between.data_ptr()
    torch.testing.assert_close(y, torch.tensor([0, 4, float("nan"), 0, float("inf")]), equal_nan=True)
    torch.testing.assert_close(sr.squared_relu(x)[:2], torch.tensor([0.0, 4.0]))
    assert x[0] == -1


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    dtype=DTYPES,
    residual=st.booleans(),
    size=st.sampled_from([1.0, 100.0]),
    seed=st.integers(0, 999),
)
def test_gate(shape, dtype, residual, size, seed):
    torch.manual_seed(seed)
    r, x = (size * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    rest = torch.randn(shape) if residual else None
    y_dtype = torch.float32 if residual else dtype
    gradient = torch.randn(shape).to(y_dtype)

    def run(leaves, gradient):
        leaves = [leaf.requires_grad_() for leaf in leaves]
        y = gt.gate(*leaves)
        return y, torch.autograd.grad(y, leaves, gradient)

    leaves = [r, x, *([rest] if residual else [])]
    y, gradients = run(leaves, gradient)
    judge, judge_gradients = run([leaf.detach().double() for leaf in leaves], gradient.double())
    assert y.dtype == y_dtype
    close(y, judge, y_dtype)
    for g, of, leaf in zip(gradients, judge_gradients, leaves, strict=True):
        assert g.dtype == leaf.dtype
        # 1 - sigmoid is exact to 6e-8 of 1, so a gradient far out in the tail is 0.
        assert (g.double() - of).norm() <= TOLERANCE[dtype] * of.norm() + 1e-7 * x.float().norm()


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(0, 5),
    V=st.sampled_from([1, 2, 31, 32, 33, 256, 5000]),
    dtype=DTYPES,
    size=st.sampled_from([1e-3, 1.0, 50.0, 1e4]),
    ignored=st.booleans(),
    seed=st.integers(0, 999),
)
def test_cross_entropy(N, V, dtype, size, ignored, seed):
    torch.manual_seed(seed)
    logits = (size * torch.randn(N, V)).to(dtype)
    if seed % 3 == 0:
        logits = logits.round()  # of equal ones, the first is the largest
    targets = torch.randint(V, (N,))
    if ignored:
        targets[::2] = ce.IGNORED
    given = torch.randn(N), torch.randn(N)

    def run(logits, function):
        logits = logits.detach().requires_grad_()
        outputs = function(logits)
        gradient = torch.autograd.grad(outputs, logits, [g.to(y.dtype) for g, y in zip(given, outputs, strict=True)])
        return outputs, gradient[0]

    def plain(logits):
        nats = F.cross_entropy(logits, targets, ignore_index=ce.IGNORED, reduction="none")
        # Rows of equal largest logits: all of the gradient to the first, as the official L2Wrap has it.
        return nats, logits.gather(1, (logits == logits.amax(1, keepdim=True)).int().argmax(1, keepdim=True))[:, 0]

    (nats, largest), gradient = run(logits, lambda x: ce.cross_entropy(x, targets))
    (judge, judge_largest), judge_gradient = run(logits.double(), plain)
    assert nats.dtype == largest.dtype == torch.float32 and gradient.dtype == dtype
    # log_sum is a float32 of the logits' size.
    torch.testing.assert_close(nats.double(), judge, rtol=3e-6, atol=1e-6)
    assert torch.equal(largest.double(), judge_largest)
    assert (gradient.double() - judge_gradient).norm() <= (TOLERANCE[dtype] + 1e-7 * size) * judge_gradient.norm()


def test_cross_entropy_of_what_is_no_number_and_of_no_token():
    bad = torch.zeros(3, 40)
    bad[0, 3], bad[1, 3], bad[2] = float("nan"), float("inf"), -float("inf")
    nats, largest = ce.cross_entropy(bad, torch.tensor([5, 5, 5]))
    assert nats.isnan().all() and largest[0].isnan()
    nats, _ = ce.cross_entropy(torch.tensor([[0.0, -float("inf")]]), torch.tensor([0]))
    assert nats == 0
    with pytest.raises(RuntimeError, match=r"target 40 for a vocabulary of 40"):
        ce.cross_entropy(bad, torch.tensor([0, 40, 0]))


def test_the_bits_do_not_depend_on_the_threads():
    torch.manual_seed(0)
    x, norm, mix = torch.randn(2, 300, 70), nn.LayerNorm(70), torch.rand(70)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        leaf = x.clone().requires_grad_()
        (mixed, other), _ = nm.norm_mix(leaf, norm, [mix.requires_grad_(), 1 - mix], None)
        results.append(torch.autograd.grad((mixed * other).sum(), [leaf, mix, norm.weight, norm.bias]))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
