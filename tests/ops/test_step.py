"""The compiled operators of one step against their plain forms in float64."""

import gc
import mmap
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from levels import run_at
from torch import Tensor
from versions import FEWEST_CHANNELS, VERSIONS, small_model

from rwkv_pl.model import MODELS
from rwkv_pl.model.language_model import LanguageModel
from rwkv_pl.model.state import BlockState
from rwkv_pl.ops.backend import use_kernel, uses_compiled
from rwkv_pl.ops.build import LEVELS
from rwkv_pl.ops.huge_pages import move_to_huge_pages
from rwkv_pl.ops.linear import cast_linear_weights
from rwkv_pl.ops.step import OPERATORS, run_step, supports_step

pytestmark = pytest.mark.usefixtures("two_threads")

HALF = torch.bfloat16
of_every_version = pytest.mark.parametrize("version", VERSIONS)


@pytest.fixture(scope="module", autouse=True)
def loaded(compiled_kernel):
    assert all(uses_compiled(library, "cpu") for library in OPERATORS)


def library(version: str) -> str:
    return MODELS[version][0].library


def operator(version: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return OPERATORS[library(version)]


def head_size(C: int) -> int:
    return next(N for N in (64, 40, 16, 13, C) if C % N == 0)


def outline(version: str, L: int, C: int, ranks: tuple[int, ...] = (8, 33, 5, 40)) -> LanguageModel:
    """A model without memory, for the names and shapes of its parameters. ranks: of RWKV-7's functions w, a, v, g."""
    sizes = dict(zip(("rank_w", "rank_a", "rank_v", "rank_g"), ranks, strict=True), head_size=head_size(C))
    model_class, config_class = MODELS[version]
    with torch.device("meta"):
        return model_class(config_class(2, L, C, **sizes if version == "rwkv7" else {}))


def draw_parameters(
    version: str, L: int, C: int, V: int, F: int, keys: float = 1.0, ranks: tuple[int, ...] = (8, 33, 5, 40)
) -> list[Tensor]:
    """The parameters of a model, in float32, in order. keys: a factor on the keys of the time mixing."""
    generator, found = torch.Generator().manual_seed(0), []
    sizes = {"emb.weight": (V, C), "head.weight": (V, C), "ffn.key.weight": (F, C), "ffn.value.weight": (C, F)}
    for name, parameter in outline(version, L, C, ranks).named_parameters():
        x = torch.randn(sizes.get(name.split(".", 2)[-1], sizes.get(name, parameter.shape)), generator=generator)
        *_, module, last = name.split(".")
        if module.startswith("ln"):
            x = 0.3 * x + (last == "weight")
        elif re.match("time_mix|x_", last):
            x = torch.rand(x.shape, generator=generator)
        elif x.dim() == 2:
            is_low_rank = re.fullmatch("[wavg][12]", last)
            x /= x.shape[0 if is_low_rank else 1] ** 0.5
            x *= keys if name.endswith("att.key.weight") else 1
        elif last == "time_decay":
            x -= 1
        found.append(x)
    return found


def draw_state(version: str, L: int, B: int, C: int) -> list[Tensor]:
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(L):
        num, den, max_exp, att, ffn = torch.randn(5, B, C, generator=generator)
        wkv = torch.stack((num, den.abs() + 0.5, max_exp), dim=1)
        if version == "rwkv7":
            N = head_size(C)
            wkv = torch.randn(B, C // N, N, N, generator=generator)
        found += [att, wkv, ffn]
    return found


def with_dtypes(parameters: list[Tensor], matrices: torch.dtype, vectors: torch.dtype) -> list[Tensor]:
    return [x.to(matrices if x.dim() == 2 else vectors) for x in parameters]


def flatten_results(results: tuple[Tensor, tuple[tuple[Tensor, Tensor, Tensor], ...]]) -> list[Tensor]:
    """Logits, shifts and WKV states, in float64; of RWKV-4's state, the ratio and magnitude."""
    logits, layers = results
    found = [logits]
    for att_shift, wkv, ffn_shift in layers:
        found += [att_shift, ffn_shift, wkv]
        if wkv.dim() == 3:
            num, den, max_exp = wkv.double().unbind(1)
            found[-1:] = [num / den, max_exp + den.log()]
    return [x.double() for x in found]


@torch.no_grad()
def plain_step(
    version: str, parameters: list[Tensor], tokens: Tensor, state: list[Tensor] | tuple[()] = ()
) -> list[Tensor]:
    """The model's own modules in float64, on a text of one token."""
    model = outline(version, operator(version).count_blocks(parameters), parameters[0].shape[1])
    for (name, _), x in zip(list(model.named_parameters()), parameters, strict=True):
        module, _, last = name.rpartition(".")
        model.get_submodule(module)._parameters[last] = x.double()  # of any width of the channel mixing, and any rank
    blocks = [BlockState(*(x.double() for x in state[i : i + 3])) for i in range(0, len(state), 3)]
    with use_kernel("recurrence"):
        logits, after = model(tokens[:, None], tuple(blocks) or None)
    return flatten_results((logits[:, 0], after))


def step(version: str, parameters: list[Tensor], tokens: Tensor, state: list[Tensor] | tuple[()] = ()) -> list[Tensor]:
    assert supports_step(library(version), parameters)
    return flatten_results(run_step(library(version), parameters, tokens, state))


def assert_near(got: list[Tensor], reference: list[Tensor], tolerance: float) -> None:
    for i, (x, expected) in enumerate(zip(got, reference, strict=True)):
        assert x.shape == expected.shape
        # The terms of a sum are near 1, but they can cancel.
        error, size = (x - expected).norm().item(), expected.norm().item() + 0.1 * x.numel() ** 0.5 + 1e-30
        assert error <= tolerance * size, f"result {i}: error {error / size:.1e} > {tolerance:.0e}"


@of_every_version
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    B=st.integers(0, 9),
    L=st.integers(1, 3),
    C=st.sampled_from([1, 3, 16, 31, 32, 40, 65]),
    F=st.sampled_from([1, 7, 64, 100]),
    V=st.sampled_from([1, 5, 33]),
    ranks=st.sampled_from([(1, 3, 2, 7), (32, 32, 32, 64), (40, 33, 8, 100)]),
    matrices=st.sampled_from([torch.float32, HALF]),
    vectors=st.sampled_from([torch.float32, HALF]),
    with_state=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
@example(
    B=9,
    L=2,
    C=192,
    F=768,
    V=257,
    ranks=(64, 64, 32, 128),
    matrices=torch.float32,
    vectors=torch.float32,
    with_state=True,
    threads=2,
)  # large enough that threads share every phase
@example(
    B=3, L=2, C=200, F=801, V=257, ranks=(40, 33, 8, 100), matrices=HALF, vectors=HALF, with_state=False, threads=3
)  # fmt: skip
def test_step_agrees_with_the_plain_form(version, B, L, C, F, V, ranks, matrices, vectors, with_state, threads):
    C += version == "rwkv7" and C == 1  # torch refuses a GroupNorm of one number
    parameters = with_dtypes(draw_parameters(version, L, C, V, F, ranks=ranks), matrices, vectors)
    tokens, state = torch.randint(V, (B,)), draw_state(version, L, B, C) if with_state else ()
    reference = plain_step(version, parameters, tokens, state)
    torch.set_num_threads(threads)
    try:
        got = step(version, parameters, tokens, state)
    finally:
        torch.set_num_threads(2)
    # Weights in bfloat16 are exact in the reference, and nothing else is rounded to bfloat16. float32 rounds to 6e-8;
    # some tens of operations follow each other, and a norm over few channels can divide by a number near 0.
    assert_near(got, reference, 1e-5 if C >= 16 else 1e-3)


@pytest.mark.parametrize("keys", [30.0, 1e3, 1e6, 1e30])
def test_large_keys_lose_no_more_than_their_rounding(keys):
    """An exponent of RWKV-4 errs by 6e-8 of its key, and so does the result; of far larger keys only the largest
    counts."""
    parameters, tokens = draw_parameters("rwkv4", 2, 40, 11, 160, keys), torch.arange(5)
    state = draw_state("rwkv4", 2, 5, 40)
    logits, layers = run_step("wkv4", parameters, tokens, state)
    assert logits.isfinite().all() and all(x.isfinite().all() for layer in layers for x in layer)
    if keys <= 1e3:
        reference = plain_step("rwkv4", parameters, tokens, state)
        assert_near([logits.double()], [reference[0]], 2e-6 * keys)


@of_every_version
def test_nan_stays_within_its_row(version):
    parameters = draw_parameters(version, 2, 40, 11, 160)
    clean = run_step(library(version), parameters, torch.arange(4))
    parameters[0][2, 7] = torch.nan
    logits, layers = run_step(library(version), parameters, torch.arange(4))
    assert logits.isnan().all(dim=1).tolist() == [False, False, True, False]
    assert all(x[2].isnan().any() for layer in layers for x in layer)
    others = [0, 1, 3]
    assert torch.equal(logits[others], clean[0][others])


@pytest.mark.parametrize(
    ("version", "place"),
    [("rwkv4", i) for i in (0, 1, 2, 3, 6, 8, 9, 12, 13, 14, 15, 16, 18, 19, 20, 21, 22, 23)]
    + [("rwkv7", i) for i in range(36)],
)
def test_nan_parameter_gives_nan_logits(version, place):
    parameters, state = draw_parameters(version, 1, 40, 11, 160), draw_state(version, 1, 2, 40)
    parameters[place].view(-1)[-1] = torch.nan
    logits, _ = run_step(library(version), parameters, torch.tensor([10, 10]), state)
    reference, *_ = plain_step(version, parameters, torch.tensor([10, 10]), state)
    assert torch.equal(logits.isnan(), reference.isnan()) and logits.isnan().any()


@of_every_version
def test_row_results_do_not_depend_on_other_rows_or_threads(version):
    parameters, tokens = draw_parameters(version, 2, 200, 65, 800), torch.randint(65, (13,))
    state = draw_state(version, 2, 13, 200)
    for matrices in (torch.float32, HALF):
        parameters = with_dtypes(parameters, matrices, torch.float32)
        whole = step(version, parameters, tokens, state)
        for threads in (1, 3, 7):
            torch.set_num_threads(threads)
            again = step(version, parameters, tokens, state)
            torch.set_num_threads(2)
            assert all(torch.equal(x, y) for x, y in zip(again, whole, strict=True)), f"{threads} threads"
        for rows in ([0], [12], [3, 4, 5], list(range(8)), list(range(2, 9))):
            part = step(version, parameters, tokens[rows], [x[rows] for x in state])
            assert all(torch.equal(x, y[rows]) for x, y in zip(part, whole, strict=True)), f"rows {rows}"


@of_every_version
def test_strided_inputs(version):
    parameters, tokens = draw_parameters(version, 2, 40, 11, 160), torch.arange(6)
    state = draw_state(version, 2, 6, 40)
    expected = step(version, parameters, tokens, state)

    def strided(x: Tensor) -> Tensor:
        return x.T.contiguous().T if x.dim() == 2 else x.repeat_interleave(2, dim=-1)[..., ::2]

    tokens = tokens.repeat_interleave(2)[::2]
    got = step(version, [strided(x) for x in parameters], tokens, [strided(x) for x in state])
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@of_every_version
def test_step_logits_do_not_require_grad(version):
    """If they did, torch would only warn in backward(), and return incomplete gradients."""
    parameters = [x.requires_grad_() for x in draw_parameters(version, 1, 4, 5, 8)]
    logits, state = run_step(library(version), parameters, torch.zeros(2, dtype=torch.int64))
    assert not any(x.requires_grad for x in (logits, *state[0]))


@of_every_version
def test_step_does_not_modify_its_arguments(version):
    parameters, tokens = draw_parameters(version, 2, 40, 11, 160), torch.arange(6)
    state = draw_state(version, 2, 6, 40)
    before = [x.clone() for x in (*parameters, tokens, *state)]
    logits, layers = run_step(library(version), parameters, tokens, state)
    assert all(torch.equal(x, y) for x, y in zip((*parameters, tokens, *state), before, strict=True))
    assert logits.dtype == torch.float32 and all(x.dtype == torch.float32 for layer in layers for x in layer)


@of_every_version
@pytest.mark.parametrize("tokens", [[-1], [0, 11], [2**40]], ids=str)
def test_token_outside_the_vocabulary_is_an_error(version, tokens):
    parameters = draw_parameters(version, 1, 8, 11, 32)
    assert supports_step(library(version), parameters)
    with pytest.raises(IndexError, match=r"tokens must be from 0 to 10, got"):
        run_step(library(version), parameters, torch.tensor(tokens))
    with pytest.raises(RuntimeError, match=rf"{version}_step: token .* of a vocabulary of 11"):
        operator(version)(parameters, torch.tensor(tokens), [])


def change_parameter(name: str, change: Callable[[Tensor], Tensor], words: str) -> tuple[Callable, str]:
    """Changes a parameter of a model of one layer; `{}` in words is its number."""

    def apply(p: list[Tensor], t: Tensor, s: list[Tensor]) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        version = next(v for v in VERSIONS if operator(v).count_blocks(p))
        names = [of for of, _ in outline(version, 1, 8).named_parameters()]
        return [change(x) if of == name else x for of, x in zip(names, p, strict=True)], t, s

    return apply, words


def change_state(place: int, change: Callable[[Tensor], Tensor]) -> tuple[Callable, str]:
    return (
        lambda p, t, s: (p, t, [change(x) if i == place else x for i, x in enumerate(s)]),
        f"tensor {place} of the state",
    )


WRONG_SHAPE = "has not the shape of its place"
BAD_ARGUMENTS = {
    "count": (lambda p, t, s: (p[:-1], t, s), "parameters are not those of an RWKV-"),
    "emb": change_parameter("emb.weight", lambda x: x[0], f"parameter 0 {WRONG_SHAPE}"),
    "ln0": change_parameter("blocks.0.ln0.weight", lambda x: x[1:], "parameter 1 has not 8 numbers"),
    "key": change_parameter("blocks.0.att.key.weight", lambda x: x[1:], WRONG_SHAPE),
    "value": change_parameter("blocks.0.ffn.value.weight", lambda x: x.T, WRONG_SHAPE),
    "head": change_parameter("head.weight", lambda x: x.double(), "is neither float32 nor bfloat16"),
    "tokens": (lambda p, t, s: (p, t[None], s), "tokens must be"),
    "int32": (lambda p, t, s: (p, t.int(), s), "tokens must be"),
    "two": (lambda p, t, s: (p, t, s[1:]), "a state of 2 tensors for 1 layers"),
    "rows": (lambda p, t, s: (p, t[1:], s), "tensor 0 of the state"),
    "wkv": change_state(1, lambda x: x[:, 1:]),
    "wkv-rows": change_state(1, lambda x: x[1:]),
    "ffn": change_state(2, lambda x: x.double()),
}
BAD_RWKV7 = {
    "rank": change_parameter("blocks.0.att.a2", lambda x: x[1:], f"parameter 18 {WRONG_SHAPE}"),
    "rank-0": change_parameter("blocks.0.att.a1", lambda x: x[:, :0], "a function has rank 0"),
    "heads": change_parameter("blocks.0.att.r_k", lambda x: x.view(2, 2, 2), "r_k is not"),
    "head": change_parameter("blocks.0.att.r_k", lambda x: x.flatten()[:6].view(2, 3), "r_k is not"),
}


@pytest.mark.parametrize(
    ("version", "change", "words"),
    [pytest.param(v, *bad, id=f"{v}-{name}") for v in VERSIONS for name, bad in BAD_ARGUMENTS.items()]
    + [pytest.param("rwkv7", *bad, id=f"rwkv7-{name}") for name, bad in BAD_RWKV7.items()],
)
def test_invalid_arguments_are_an_error(version, change, words):
    parameters = draw_parameters(version, 1, 8, 11, 32)
    assert supports_step(library(version), parameters)
    with pytest.raises(RuntimeError, match=f"{version}_step: .*{words}"):
        operator(version)(*change(parameters, torch.arange(3), draw_state(version, 1, 3, 8)))


@of_every_version
def test_supported_parameters(version):
    parameters = draw_parameters(version, 1, 8, 11, 32)

    def supports(parameters: list[Tensor]) -> bool:
        return supports_step(library(version), parameters)

    assert supports(parameters) and supports(with_dtypes(parameters, HALF, torch.float32))
    assert not supports(parameters[:-1]) and not supports([])
    assert not supports([x.double() for x in parameters])
    assert not supports([x.to("meta") for x in parameters])
    assert not supports_step("another", parameters)
    for kernel, serves in {"auto": True, "compiled": True, "scan": False, "recurrence": False}.items():
        with use_kernel(kernel):
            assert supports(parameters) == serves


@of_every_version
def test_opcheck(version):
    parameters = draw_parameters(version, 2, 16, 11, 32)
    assert supports_step(library(version), parameters)
    for state in ([], draw_state(version, 2, 3, 16)):
        compiled = getattr(torch.ops.rwkv_pl, f"{version}_step")
        torch.library.opcheck(compiled, (parameters, torch.arange(3), state))


@pytest.mark.parametrize(
    "level", [pytest.param(level, marks=[pytest.mark.slow] * (level != "x86-64-v3")) for level in LEVELS]
)
def test_every_cpu_level_agrees(level):
    code = (
        "from test_step import *\n"
        "agrees = test_step_agrees_with_the_plain_form.hypothesis.inner_test\n"
        "for version in VERSIONS:\n"
        "    agrees(version, 7, 2, 200, 801, 33, (40, 33, 8, 100), HALF, torch.float32, True, 2)\n"
        "    agrees(version, 9, 2, 65, 64, 33, (32, 32, 32, 64), torch.float32, HALF, True, 1)\n"
        "    test_row_results_do_not_depend_on_other_rows_or_threads(version)\n"
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


@of_every_version
@pytest.mark.parametrize("large_pages", [True, False])
def test_huge_pages_do_not_change_the_model(version, monkeypatch, large_pages):
    if not large_pages:
        monkeypatch.delattr("mmap.MADV_HUGEPAGE", raising=False)
    model = small_model(version, vocab_size=11, n_layer=2, n_embd=FEWEST_CHANNELS[version]).requires_grad_(False)
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
