"""Sampling follows the requested distribution for any logits."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from rwkv_pl.inference.sampling import RowRandom, Sampling

LOGITS = torch.tensor([2.0, -1.0, 1.0, 0.5, 1.0])


def shares(logits, recent=(), n=100_000, **settings):
    """The frequency of each token, for numbers evenly spaced in [0, 1)."""
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    before = [torch.tensor(recent, dtype=torch.int64)] * n
    drawn = Sampling(**settings).choose(logits.expand(n, -1), before, uniform)
    return drawn.bincount(minlength=len(logits)).double() / n


# Evenly spaced numbers hit each probability to one part in n; rounding in float64 is far smaller.
EXACT = 2e-5


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_temperature_divides_the_logits(temperature):
    expected = torch.softmax(LOGITS.double() / temperature, -1)
    assert torch.allclose(shares(LOGITS, temperature=temperature), expected, atol=EXACT)


@pytest.mark.parametrize(("k", "kept"), [(1, [0]), (2, [0, 2]), (3, [0, 2, 4]), (5, range(5)), (99, range(5))])
def test_top_k_keeps_the_k_most_likely_tokens(k, kept):
    expected = torch.zeros(5, dtype=torch.float64)
    expected[list(kept)] = torch.softmax(LOGITS[list(kept)].double(), -1)
    assert torch.allclose(shares(LOGITS, top_k=k), expected, atol=EXACT)


@pytest.mark.parametrize(("p", "kept"), [(1e-300, [0]), (0.49, [0]), (0.6, [0, 2]), (0.8, [0, 2, 4]), (1.0, range(5))])
def test_top_p_keeps_the_most_likely_tokens_that_reach_p(p, kept):
    # The probabilities are 0.498, 0.183, 0.183, 0.111 and 0.025.
    expected = torch.zeros(5, dtype=torch.float64)
    expected[list(kept)] = torch.softmax(LOGITS[list(kept)].double(), -1)
    assert torch.allclose(shares(LOGITS, top_p=p), expected, atol=EXACT)


def test_top_p_applies_after_temperature_and_top_k():
    best = torch.softmax(2 * LOGITS.double()[[0, 2, 4]], -1)
    got = shares(LOGITS, temperature=0.5, top_k=3, top_p=float(best[0]) + 0.01)
    expected = torch.zeros(5, dtype=torch.float64)
    expected[[0, 2]] = best[:2] / best[:2].sum()
    assert torch.allclose(got, expected, atol=EXACT)


def test_repetition_divides_positive_logits_and_multiplies_negative_ones():
    # CTRL's rule: 2 -> 1, -1 -> -2; token 2 is before the window.
    expected = torch.softmax(torch.tensor([1.0, -2.0, 1.0, 0.5, 1.0], dtype=torch.float64), -1)
    got = shares(LOGITS, [2, 2, 0, 1, 0], n=10_000, repetition=2.0, window=3)
    assert torch.allclose(got, expected, atol=10 * EXACT)


def test_repetition_window_may_exceed_the_text():
    assert torch.equal(
        shares(LOGITS, [0], n=100, repetition=2.0, window=10**30), shares(LOGITS, [0], n=100, repetition=2.0)
    )


def test_repetition_does_not_change_the_logits_of_the_caller():
    logits = LOGITS.clone()[None].double()
    Sampling(repetition=2.0).choose(logits, [torch.tensor([0])], torch.zeros(1, dtype=torch.float64))
    assert torch.equal(logits, LOGITS[None].double())


def test_temperature_0_is_the_argmax_after_repetition():
    zero = torch.zeros(1, dtype=torch.float64)
    assert Sampling(temperature=0).choose(LOGITS[None], [torch.tensor([])], zero).tolist() == [0]
    assert Sampling(temperature=0, repetition=4).choose(LOGITS[None], [torch.tensor([0])], zero).tolist() == [2]


@given(
    logits=st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=9),
    temperature=st.floats(0, 1e308) | st.sampled_from([5e-324, 1e-300]),
    top_k=st.integers(0, 12),
    top_p=st.floats(0, 1, exclude_min=True),
    repetition=st.floats(1e-3, 1e3) | st.sampled_from([1e-320, 1e308]),
    uniform=st.floats(0, 1, exclude_max=True) | st.just(math.nextafter(1, 0)),
)
@example(logits=[1.0, 0.0, 1.0], temperature=1e308, top_k=2, top_p=1.0, repetition=1e-320, uniform=math.nextafter(1, 0))
def test_any_valid_settings_choose_a_token(logits, temperature, top_k, top_p, repetition, uniform):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition=repetition)
    recent = [torch.tensor([0])]
    row = torch.tensor([logits])
    token = int(sampling.choose(row, recent, torch.tensor([uniform], dtype=torch.float64)))
    assert 0 <= token < len(logits)
    penalised = row.double()
    penalised[0, 0] = penalised[0, 0] / repetition if penalised[0, 0] > 0 else penalised[0, 0] * repetition
    penalised = penalised.clamp(-1e300, 1e300)
    rank = int((penalised > penalised[0, token]).sum())
    assert not top_k or rank < top_k
    if temperature > 0:
        assert torch.softmax((penalised - penalised.amax()) / temperature, -1)[0, token] > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_logits_are_an_error(bad):
    with pytest.raises(FloatingPointError, match="not finite"):
        Sampling().choose(torch.tensor([[0.0, bad]]), [torch.tensor([])], torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_k", -1), ("top_p", -0.5),
        ("top_p", 0), ("top_p", 1.5),
        ("top_p", math.nan), ("repetition", 0.0), ("repetition", -1.0), ("repetition", math.inf), ("window", 0),
    ],
)  # fmt: skip
def test_setting_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        Sampling(**{name: value})


def test_random_numbers_of_a_row_do_not_depend_on_other_rows():
    alone, together = RowRandom(7, 1), RowRandom(7, 5)
    first = [alone.uniform()[0] for _ in range(4)]
    assert first == [together.uniform()[0] for _ in range(4)]
    assert len({float(x) for x in RowRandom(7, 5).uniform()}) == 5
    assert not torch.equal(RowRandom(7, 5).uniform(), RowRandom(8, 5).uniform())


def test_without_a_seed_torch_generator_decides():
    torch.manual_seed(3)
    first = RowRandom(None, 2).uniform()
    assert not torch.equal(first, RowRandom(None, 2).uniform())
    torch.manual_seed(3)
    assert torch.equal(first, RowRandom(None, 2).uniform())
