"""The compiled operator of one step against its plain form in float64."""

import gc
import mmap

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from levels import run_at
from torch import Tensor

from rwkv_pl import RWKV4, RWKV4Config
from rwkv_pl.model.state import BlockState
from rwkv_pl.ops.backend import use_kernel, uses_compiled
from rwkv_pl.ops.build import LEVELS
from rwkv_pl.ops.huge_pages import move_to_huge_pages
from rwkv_pl.ops.linear import cast_linear_weights
from rwkv_pl.ops.rwkv4_step import rwkv4_step, supports_step

HALF = torch.bfloat16


@pytest.fixture(scope="module", autouse=True)
def loaded(compiled_kernel):
    assert uses_compiled("wkv4", "cpu")


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def draw_parameters(L: int, C: int, V: int, F: int, seed: int = 0, keys: float = 1.0) -> list[Tensor]:
    """The parameters of a model, in float32, in order. keys: a factor on the keys of the time mixing."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / (shape[1] ** 0.5 if len(shape) == 2 else 1)

    def norm() -> list[Tensor]:
        return [1 + 0.3 * normal(C), 0.3 * normal(C)]

    def mixes(count: int) -> list[Tensor]:
        return list(torch.rand(count, 1, 1, C, generator=generator).unbind())

    found = [normal(V, C), *norm()]
    for _ in range(L):
        att = [normal(C) - 1, normal(C), *mixes(3), keys * normal(C, C), *(normal(C, C) for _ in range(3))]
        ffn = [*mixes(2), normal(F, C), normal(C, C), normal(C, F)]
        found += [*norm(), *norm(), *att, *ffn]
    return [*found, *norm(), normal(V, C)]


def draw_state(L: int, B: int, C: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(L):
        num, den, max_exp, att, ffn = torch.randn(5, B, C, generator=generator)
        found += [att, torch.stack((num, den.abs() + 0.5, max_exp), dim=1), ffn]
    return found


def with_dtypes(parameters: list[Tensor], matrices: torch.dtype, vectors: torch.dtype) -> list[Tensor]:
    return [x.to(matrices if x.dim() == 2 else vectors) for x in parameters]


def flatten_results(results: tuple[Tensor, tuple[tuple[Tensor, Tensor, Tensor], ...]]) -> list[Tensor]:
    """Logits, shifts, and the ratio and magnitude of the WKV states, in float64."""
    logits, layers = results
    found = [logits]
    for att_shift, wkv, ffn_shift in layers:
        num, den, max_exp = wkv.double().unbind(1)
        found += [att_shift, num / den, max_exp + den.log(), ffn_shift]
    return [x.double() for x in found]


@torch.no_grad()
def plain_step(parameters: list[Tensor], tokens: Tensor, state: list[Tensor] | tuple[()] = ()) -> list[Tensor]:
    """The model's own modules in float64, on a text of one token."""
    V, C = parameters[0].shape
    model = RWKV4(RWKV4Config(V, (len(parameters) - 6) // 18, C))
    for parameter, x in zip(model.parameters(), parameters, strict=True):
        parameter.data = x.double()  # of any shape: the inner width of the channel mixing is not always 4 C
    blocks = [BlockState(*(x.double() for x in state[i : i + 3])) for i in range(0, len(state), 3)]
    with use_kernel("recurrence"):
        logits, after = model(tokens[:, None], tuple(blocks) or None)
    return flatten_results((logits[:, 0], after))


def step(parameters: list[Tensor], tokens: Tensor, state: list[Tensor] | tuple[()] = ()) -> list[Tensor]:
    assert supports_step(parameters)
    return flatten_results(rwkv4_step(parameters, tokens, state))


def assert_near(got: list[Tensor], reference: list[Tensor], tolerance: float) -> None:
    for i, (x, expected) in enumerate(zip(got, reference, strict=True)):
        assert x.shape == expected.shape
        error, size = (x - expected).norm().item(), expected.norm().item()
        assert error <= tolerance * (size + 1e-30), f"result {i}: error {error / size:.1e} > {tolerance:.0e}"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    B=st.integers(0, 9),
    L=st.integers(1, 3),
    C=st.sampled_from([1, 3, 16, 31, 32, 40, 65]),
    F=st.sampled_from([1, 7, 64, 100]),
    V=st.sampled_from([1, 5, 33]),
    matrices=st.sampled_from([torch.float32, HALF]),
    vectors=st.sampled_from([torch.float32, HALF]),
    with_state=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
@example(
    B=9, L=2, C=192, F=768, V=257, matrices=torch.float32, vectors=torch.float32, with_state=True, threads=2
)  # large enough that threads share every phase
@example(B=3, L=2, C=200, F=801, V=257, matrices=HALF, vectors=HALF, with_state=False, threads=3)
def test_step_agrees_with_the_plain_form(B, L, C, F, V, matrices, vectors, with_state, threads):
    parameters = with_dtypes(draw_parameters(L, C, V, F), matrices, vectors)
    tokens, state = torch.randint(V, (B,)), draw_state(L, B, C) if with_state else ()
    reference = plain_step(parameters, tokens, state)
    torch.set_num_threads(threads)
    try:
        got = step(parameters, tokens, state)
    finally:
        torch.set_num_threads(2)
    # Weights in bfloat16 are exact in the reference, and nothing else is rounded to bfloat16. float32 rounds to 6e-8;
    # some tens of operations follow each other, and a norm over few channels can divide by a number near 0.
    assert_near(got, reference, 1e-5 if C >= 16 else 1e-3)


@pytest.mark.parametrize("keys", [30.0, 1e3, 1e6, 1e30])
def test_large_keys_lose_no_more_than_their_rounding(keys):
    """An exponent errs by 6e-8 of its key, and so does the result; of far larger keys only the largest counts."""
    parameters, tokens, state = draw_parameters(2, 40, 11, 160, keys=keys), torch.arange(5), draw_state(2, 5, 40)
    logits, layers = rwkv4_step(parameters, tokens, state)
    assert logits.isfinite().all() and all(x.isfinite().all() for layer in layers for x in layer)
    if keys <= 1e3:
        reference = plain_step(parameters, tokens, state)
        assert_near([logits.double()], [reference[0]], 2e-6 * keys)


def test_nan_stays_within_its_row():
    parameters = draw_parameters(2, 40, 11, 160)
    clean = rwkv4_step(parameters, torch.arange(4))
    parameters[0][2, 7] = torch.nan
    logits, layers = rwkv4_step(parameters, torch.arange(4))
    assert logits.isnan().all(dim=1).tolist() == [False, False, True, False]
    assert all(x[2].isnan().any() for layer in layers for x in layer)
    others = [0, 1, 3]
    assert torch.equal(logits[others], clean[0][others])


@pytest.mark.parametrize("place", [0, 1, 2, 3, 6, 8, 9, 12, 13, 14, 15, 16, 18, 19, 20, 21, 22, 23])
def test_nan_parameter_gives_nan_logits(place):
    parameters, state = draw_parameters(1, 40, 11, 160), draw_state(1, 2, 40)
    parameters[place].view(-1)[-1] = torch.nan
    logits, _ = rwkv4_step(parameters, torch.tensor([10, 10]), state)
    reference, *_ = plain_step(parameters, torch.tensor([10, 10]), state)
    assert torch.equal(logits.isnan(), reference.isnan()) and logits.isnan().any()


def test_row_results_do_not_depend_on_other_rows_or_threads():
    parameters, tokens, state = draw_parameters(2, 200, 65, 800), torch.randint(65, (13,)), draw_state(2, 13, 200)
    for matrices in (torch.float32, HALF):
        parameters = with_dtypes(parameters, matrices, torch.float32)
        whole = step(parameters, tokens, state)
        for threads in (1, 3, 7):
            torch.set_num_threads(threads)
            again = step(parameters, tokens, state)
            torch.set_num_threads(2)
            assert all(torch.equal(x, y) for x, y in zip(again, whole, strict=True)), f"{threads} threads"
        for rows in ([0], [12], [3, 4, 5], list(range(8)), list(range(2, 9))):
            part = step(parameters, tokens[rows], [x[rows] for x in state])
            assert all(torch.equal(x, y[rows]) for x, y in zip(part, whole, strict=True)), f"rows {rows}"


def test_strided_inputs():
    parameters, tokens, state = draw_parameters(2, 40, 11, 160), torch.arange(6), draw_state(2, 6, 40)
    expected = step(parameters, tokens, state)

    def strided(x: Tensor) -> Tensor:
        return x.T.contiguous().T if x.dim() == 2 else x.repeat_interleave(2, dim=-1)[..., ::2]

    got = step([strided(x) for x in parameters], tokens.repeat_interleave(2)[::2], [strided(x) for x in state])
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_step_logits_do_not_require_grad():
    """If they did, torch would only warn in backward(), and return incomplete gradients."""
    parameters = [x.requires_grad_() for x in draw_parameters(1, 4, 5, 8)]
    logits, state = rwkv4_step(parameters, torch.zeros(2, dtype=torch.int64))
    assert not any(x.requires_grad for x in (logits, *state[0]))


def test_step_does_not_modify_its_arguments():
    parameters, tokens, state = draw_parameters(2, 40, 11, 160), torch.arange(6), draw_state(2, 6, 40)
    before = [x.clone() for x in (*parameters, tokens, *state)]
    logits, layers = rwkv4_step(parameters, tokens, state)
    assert all(torch.equal(x, y) for x, y in zip((*parameters, tokens, *state), before, strict=True))
    assert logits.dtype == torch.float32 and all(x.dtype == torch.float32 for layer in layers for x in layer)


@pytest.mark.parametrize("tokens", [[-1], [0, 11], [2**40]], ids=str)
def test_token_outside_the_vocabulary_is_an_error(tokens):
    parameters = draw_parameters(1, 8, 11, 32)
    assert supports_step(parameters)
    with pytest.raises(IndexError, match=r"tokens must be from 0 to 10, got"):
        rwkv4_step(parameters, torch.tensor(tokens))
    with pytest.raises(RuntimeError, match=r"rwkv4_step: token .* of a vocabulary of 11"):
        torch.ops.rwkv_pl.rwkv4_step(parameters, torch.tensor(tokens), [])


def replace_at(tensors: list[Tensor], place: int, by: Tensor) -> list[Tensor]:
    return [by if i == place % len(tensors) else x for i, x in enumerate(tensors)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p, t, s: (p[:-1], t, s), "rwkv4_step: 23 parameters are not those of an RWKV-4 model"),
        (lambda p, t, s: (replace_at(p, 0, p[0][0]), t, s), "parameter 0 has not the shape of its place"),
        (lambda p, t, s: (replace_at(p, 1, p[1][1:]), t, s), "parameter 1 has not 8 numbers"),
        (lambda p, t, s: (replace_at(p, 12, p[12][1:]), t, s), "parameter 12 has not the shape of its place"),
        (lambda p, t, s: (replace_at(p, 20, p[20].T), t, s), "parameter 20 has not the shape of its place"),
        (lambda p, t, s: (replace_at(p, -1, p[-1].double()), t, s), "parameter 23 is neither float32 nor bfloat16"),
        (lambda p, t, s: (p, t[None], s), "tokens must be"),
        (lambda p, t, s: (p, t.int(), s), "tokens must be"),
        (lambda p, t, s: (p, t, s[1:]), "a state of 2 tensors for 1 layers"),
        (lambda p, t, s: (p, t[1:], s), "tensor 0 of the state"),
        (lambda p, t, s: (p, t, replace_at(s, 1, s[1][:, 1:])), "tensor 1 of the state"),
        (lambda p, t, s: (p, t, replace_at(s, 2, s[2].double())), "tensor 2 of the state"),
    ],
)
def test_invalid_arguments_are_an_error(change, words):
    parameters = draw_parameters(1, 8, 11, 32)
    assert supports_step(parameters)
    with pytest.raises(RuntimeError, match=words):
        torch.ops.rwkv_pl.rwkv4_step(*change(parameters, torch.arange(3), draw_state(1, 3, 8)))


def test_supported_parameters():
    parameters = draw_parameters(1, 8, 11, 32)
    assert supports_step(parameters) and supports_step(with_dtypes(parameters, HALF, torch.float32))
    assert not supports_step(parameters[:-1]) and not supports_step([])
    assert not supports_step([x.double() for x in parameters])
    assert not supports_step([x.to("meta") for x in parameters])
    for kernel, serves in {"auto": True, "compiled": True, "scan": False, "recurrence": False}.items():
        with use_kernel(kernel):
            assert supports_step(parameters) == serves


def test_opcheck():
    parameters = draw_parameters(2, 8, 11, 32)
    assert supports_step(parameters)
    for state in ([], draw_state(2, 3, 8)):
        torch.library.opcheck(torch.ops.rwkv_pl.rwkv4_step, (parameters, torch.arange(3), state))


@pytest.mark.parametrize(
    "level", [pytest.param(level, marks=[pytest.mark.slow] * (level != "x86-64-v3")) for level in LEVELS]
)
def test_every_cpu_level_agrees(level):
    code = (
        "from test_rwkv4_step import *\n"
        "test_step_agrees_with_the_plain_form.hypothesis.inner_test(7, 2, 200, 801, 33, HALF, torch.float32, True, 2)\n"
        "test_step_agrees_with_the_plain_form.hypothesis.inner_test(9, 2, 65, 64, 33, torch.float32, HALF, True, 1)\n"
        "test_row_results_do_not_depend_on_other_rows_or_threads()\n"
        "import test_fused\n"
        "from test_rwkv4_fused import test_fused_half_matches_the_plain_half as halves\n"
        "for half in ('att', 'ffn'):\n"
        "    halves.hypothesis.inner_test(half, 2, 130, 33, 0.5, True, True, True, True, 1.0, 0)\n"
        "    halves.hypothesis.inner_test(half, 1, 70, 64, 0.0, False, False, False, False, 1.0, 0)\n"
        "for dtype in (torch.float32, HALF):\n"
        "    test_fused.test_squared_relu_matches_torch.hypothesis.inner_test([3, 70], dtype, 0)\n"
        "    test_fused.test_gate_matches_torch.hypothesis.inner_test([3, 70], dtype, True, 1.0, 0)\n"
        "    test_fused.test_cross_entropy_matches_torch.hypothesis.inner_test(5, 5000, dtype, 50.0, 1e6, True, 0)\n"
        "from test_wkv4 import assert_same, draw, results\n"
        "torch.set_num_threads(2)\n"
        "for shape in [(1, 100, 130), (2, 33, 5)]:\n"
        "    for dtype, tolerance in [(torch.float32, 5e-6), (torch.float64, 1e-12)]:\n"
        "        arguments = draw(*shape)\n"
        "        reference = results('recurrence', arguments, torch.float64)\n"
        "        assert_same(results('compiled', arguments, dtype), reference, tolerance)\n"
    )
    run_at(level, code)


@pytest.mark.parametrize("large_pages", [True, False])
def test_huge_pages_do_not_change_the_model(monkeypatch, large_pages):
    if not large_pages:
        monkeypatch.delattr("mmap.MADV_HUGEPAGE", raising=False)
    torch.manual_seed(0)
    model = RWKV4(RWKV4Config(vocab_size=11, n_layer=2, n_embd=9)).requires_grad_(False)
    cast_linear_weights(model, HALF)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits, _ = model.step(torch.tensor([3]))
    move_to_huge_pages(model)
    gc.collect()  # a parameter keeps its memory block alive
    after = model.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype and torch.equal(after[name], value)
    assert torch.equal(model.step(torch.tensor([3]))[0], logits)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    assert (places == sorted(places) and max(places) - min(places) < 1 << 20) or not hasattr(mmap, "MADV_HUGEPAGE")
