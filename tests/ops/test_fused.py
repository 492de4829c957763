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
from rwkv_pl.ops import norm_mix as nm
from rwkv_pl.ops.fused import fused_serves
from rwkv_pl.ops.gate import gate, gated_product
from rwkv_pl.ops.linear import Linear
from rwkv_pl.ops.squared_relu import squared_relu_product
from rwkv_pl.ops.wkv4 import compiled_serves, use_kernel


@pytest.fixture(scope="module", autouse=True)
def loaded():
    assert compiled_serves("cpu")


TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-8}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def close(got, judge, dtype, slack=1, least=1e-30):
    assert got.shape == judge.shape
    assert (got.double() - judge).norm() <= slack * TOLERANCE[dtype] * judge.norm() + least


def gradients_of(function, tensors, gradients, autocast=False):
    """Outputs of function, and the gradients in all tensors."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = function(*leaves)
    given = [g.to(y.dtype) for g, y in zip(gradients, outputs, strict=True)]
    return outputs, torch.autograd.grad(outputs, leaves, given)


def of(linear, weight):
    """The layer with another weight, which may be a leaf of any dtype."""
    del linear._parameters["weight"]
    linear.weight = weight
    return linear


@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(0, 3),
    T=st.sampled_from([1, 2, 63, 64, 65, 130]),
    C=st.sampled_from([3, 16, 33, 64]),
    n_mixes=st.integers(2, 3),
    has_last=st.booleans(),
    autocast=st.booleans(),
    transposed=st.booleans(),
    remade=st.booleans(),
    size=st.sampled_from([0.1, 1.0, 1e4]),
    seed=st.integers(0, 999),
)
@example(2, 130, 33, 3, True, True, True, True, 1.0, 0)
def test_mixed_products(B, T, C, n_mixes, has_last, autocast, transposed, remade, size, seed):
    torch.manual_seed(seed)
    x = size * torch.randn(T, B, C).transpose(0, 1) if transposed else size * torch.randn(B, T, C)
    x = x + size * torch.arange(C)  # so that no token's variance is but rounding
    mixes = [torch.randn(1, 1, C) for _ in range(n_mixes)]
    # By numbers that bfloat16 holds; the last layer's gradient comes expanded, as from a sum.
    outs = [5, C, 7][:n_mixes]
    weights = [torch.randn(out, C).bfloat16().float() for out in outs]
    gradients = [torch.randn(B, T, out).bfloat16().float() for out in outs[:-1]]
    gradients += [torch.randn(outs[-1]).bfloat16().float().expand(B, T, outs[-1])]
    gradients += [torch.randn(C).expand(B, T, C), torch.randn(B, C)]  # of the residual, and of the last y
    tensors = [x, torch.randn(C), torch.randn(C), *mixes, *weights, *([torch.randn(B, C)] if has_last else [])]

    def run(function, x, weight, bias, *others):
        norm = nn.LayerNorm(C)
        del norm._parameters["weight"], norm._parameters["bias"]
        norm.weight, norm.bias = weight, bias
        layers = [of(Linear(C, out), w) for out, w in zip(outs, others[n_mixes : 2 * n_mixes], strict=True)]
        products, x, last = function(x, norm, others[-1] if has_last else None, *zip(others, layers, strict=False))
        return *products, x, last

    assert fused_serves(*tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nm, "REMADE_FROM", 0 if remade else 10**9)
        got, got_gradients = gradients_of(lambda *t: run(nm.mixed_products, *t), tensors, gradients, autocast)
    with use_kernel("recurrence"):
        doubles = [tensor.double() for tensor in tensors]
        judge, judge_gradients = gradients_of(lambda *t: run(nm.mixed_products, *t), doubles, gradients)
    dtype = torch.bfloat16 if autocast else torch.float32
    assert [y.dtype for y in got] == [dtype] * n_mixes + [torch.float32] * 2
    for y, expected in zip(got, judge, strict=True):
        close(y, expected, dtype, slack=4)  # what a product reads is rounded as well, and its terms partly cancel
    for g, expected, tensor in zip(got_gradients, judge_gradients, tensors, strict=True):
        assert g.shape == tensor.shape and g.dtype == tensor.dtype
        # Terms that partly cancel, in x (of few channels nearly all): against what they were.
        terms = sum(grad.norm() * w.norm() for grad, w in zip(gradients, weights, strict=False))
        close(g, expected, dtype, slack=20, least=TOLERANCE[dtype] * terms * (10 / size if tensor is x else 1))


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.integers(0, 40), min_size=1, max_size=2), dtype=DTYPES, seed=st.integers(0, 999))
def test_squared_relu_product(rows, dtype, seed):
    torch.manual_seed(seed)
    x, weight = torch.randn(*rows, 12).to(dtype), torch.randn(5, 12).bfloat16().float()
    gradient = torch.randn(*rows, 5).to(dtype)

    def run(x, weight):
        return [squared_relu_product(x * 1, of(Linear(12, 5), weight))]

    got, got_gradients = gradients_of(run, [x, weight], [gradient])
    judge, judge_gradients = gradients_of(run, [x.double(), weight.double()], [gradient])
    close(got[0], judge[0], dtype, slack=4)
    for g, expected, dtype_of in zip(got_gradients, judge_gradients, (dtype, torch.float32), strict=True):
        assert g.dtype == dtype_of
        close(g, expected, dtype, slack=4)


def test_the_square_is_written_over_its_input_and_over_no_leaf():
    one = of(Linear(5, 5), torch.eye(5))
    x = torch.tensor([[-1.0, 2.0, 3.0, -4.0, 0.5]], requires_grad=True)
    squares = torch.tensor([[0, 4, 9, 0, 0.25]])
    between = x * 1
    torch.testing.assert_close(squared_relu_product(between, one), squares)
    torch.testing.assert_close(between, squares)
    # What was written over is known to autograd: as the square it has its own gradient.
    torch.testing.assert_close(torch.autograd.grad(between.sum(), x)[0], torch.tensor([[0, 4, 6, 0, 1.0]]))
    torch.testing.assert_close(squared_relu_product(x, one), squares)
    assert x[0, 0] == -1
    odd = torch.tensor([[float("nan"), -float("inf"), float("inf")]])
    torch.ops.rwkv_pl.squared_relu_(odd)
    torch.testing.assert_close(odd, torch.tensor([[float("nan"), 0, float("inf")]]), equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(0, 40), min_size=1, max_size=2),
    dtype=DTYPES,
    size=st.sampled_from([1.0, 100.0]),
    seed=st.integers(0, 999),
)
def test_gates(rows, dtype, size, seed):
    torch.manual_seed(seed)
    r, x, weight = (size * torch.randn(*rows, 12)).to(dtype), torch.randn(*rows, 12).to(dtype), torch.randn(5, 12)
    weight, rest = weight.bfloat16().float(), torch.randn(*rows, 12)

    def run(r, x, weight, rest):
        return [gate(r, x, rest), gated_product(r, x, of(Linear(12, 5), weight))]

    gradients = [torch.randn(*rows, 12), torch.randn(*rows, 5).to(dtype)]
    got, got_gradients = gradients_of(run, [r, x, weight, rest], gradients)
    judge, judge_gradients = gradients_of(run, [t.double() for t in (r, x, weight, rest)], gradients)
    assert [y.dtype for y in got] == [torch.float32, dtype]
    for y, expected in zip(got, judge, strict=True):
        close(y, expected, dtype, slack=4)
    for g, expected, dtype_of in zip(got_gradients, judge_gradients, (dtype, dtype, *[torch.float32] * 2), strict=True):
        assert g.dtype == dtype_of
        # 1 - sigmoid is exact to 6e-8 of 1, so a gradient far out in the tail is 0.
        close(g, expected, dtype, slack=3, least=1e-6 * x.float().norm())


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
def test_cross_entropy(N, V, dtype, size, offset, ignored, seed):
    torch.manual_seed(seed)
    logits = (size * torch.randn(N, V) + offset).to(dtype)
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
    torch.testing.assert_close(nats.double(), judge, rtol=3e-6, atol=1e-6)
    assert torch.equal(largest.double(), judge_largest)
    assert (gradient.double() - judge_gradient).norm() <= 2 * TOLERANCE[dtype] * judge_gradient.norm()


def test_cross_entropy_of_what_is_no_number_and_of_no_token():
    bad = torch.zeros(3, 40)
    bad[0, 3], bad[1, 3], bad[2] = float("nan"), float("inf"), -float("inf")
    nats, largest = ce.cross_entropy(bad, torch.tensor([5, 5, 5]))
    assert nats.isnan().all() and largest[0].isnan()
    nats, _ = ce.cross_entropy(torch.tensor([[0.0, -float("inf")]]), torch.tensor([0]))
    assert nats == 0
    with pytest.raises(RuntimeError, match=r"target 40 for a vocabulary of 40"):
        ce.cross_entropy(bad, torch.tensor([0, 40, 0]))


def test_a_norm_beyond_float32_is_no_number():
    mix = torch.rand(4)
    pairs = (mix, Linear(4, 4)), (mix, Linear(4, 4))
    for x in (torch.tensor([1e20, 2e20, 0, 0]), torch.tensor([float("inf"), 0, 0, 0])):
        products, _, last = nm.mixed_products(x.expand(1, 2, 4), nn.LayerNorm(4), None, *pairs)
        assert last.isnan().all() and all(y.isnan().all() for y in products)


OPERATORS = {
    "mixed_products": lambda x: nm.mixed_products(x, NORM, None, (MIX, SQUARE), (MIX, SQUARE))[0][1],
    "squared_relu_product": lambda x: squared_relu_product(x * 1, SQUARE),
    "gate": lambda x: gate(x, x, x),
    "gated_product": lambda x: gated_product(x, x, SQUARE),
    "cross_entropy": lambda x: ce.cross_entropy(x.flatten(0, 1), torch.zeros(6, dtype=torch.int64))[0],
}
NORM, SQUARE, MIX = nn.LayerNorm(8), Linear(8, 8), torch.linspace(0, 1, 8)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_a_backward_pass_under_autocast_is_that_of_its_forward_pass(name, autocast):
    gradients = []
    for enabled in (False, True):
        x = torch.linspace(-1, 1, 48).view(2, 3, 8).requires_grad_()
        loss = OPERATORS[name](x).square().sum()
        with torch.autocast("cpu", autocast, enabled=enabled):
            loss.backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_transforms_of_torch_func_use_the_plain_form(name):
    x = torch.linspace(-1, 1, 48).view(2, 3, 8).requires_grad_()
    (judge,) = torch.autograd.grad(OPERATORS[name](x).square().sum(), x)
    got = torch.func.grad(lambda x: OPERATORS[name](x).square().sum())(x.detach())
    torch.testing.assert_close(got, judge, rtol=1e-5, atol=1e-5)
    each = torch.func.vmap(lambda x: OPERATORS[name](x[None]).sum() if name != "cross_entropy" else x.sum())(x.detach())
    assert each.shape == (2,)


def test_shapes_that_do_not_fit():
    x, ops = torch.randn(2, 3, 8), torch.ops.rwkv_pl
    torch.testing.assert_close(gate(x[:1], x, x), x + torch.sigmoid(x[:1]) * x)
    torch.testing.assert_close(gated_product(x[:, :1], x, SQUARE), SQUARE(torch.sigmoid(x[:, :1]) * x))
    targets = torch.zeros(6, dtype=torch.int64)
    for wrong in (
        lambda: nm.mixed_products(x, NORM, torch.randn(1, 8), (MIX, SQUARE), (MIX, SQUARE)),
        lambda: nm.mixed_products(x, NORM, None, (MIX[:7], SQUARE), (MIX, SQUARE)),
        lambda: nm.mixed_products(x, nn.LayerNorm(7), None, (MIX, SQUARE), (MIX, SQUARE)),
        lambda: nm.mixed_products(x[0], NORM, None, (MIX, SQUARE), (MIX, SQUARE)),
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


def test_the_bits_do_not_depend_on_the_threads():
    torch.manual_seed(0)
    norm, layer = nn.LayerNorm(70), Linear(70, 70)
    tensors = [torch.randn(2, 300, 70), torch.rand(70), torch.rand(70)]

    def run(x, first, second):
        products, x, last = nm.mixed_products(x, norm, None, (first, layer), (second, layer))
        return *products, x, last

    gradients = [*torch.randn(3, 2, 300, 70), torch.randn(2, 70)]
    threads = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        outputs, found = gradients_of(run, tensors, gradients)
        results.append([*outputs, *found])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
