"""Both protocols match plain computations: each target counts once, after exactly the right context."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from torch import nn

from rwkv_pl import RWKV4, CorpusDataModule, LitRWKV, RWKV4Config, use_kernel
from rwkv_pl.inference.evaluate import compute_metrics, evaluate_stream, evaluate_windows

# (N, lo, hi): a split with a target in a text of N tokens.
SPLITS = st.integers(2, 60).flatmap(
    lambda n: st.integers(0, n - 2).flatmap(
        lambda lo: st.integers(max(lo, 1) + 1, n).map(lambda hi: (n, lo, hi)),
    )
)


class ContextTrackingModel(nn.Module):
    """A recurrent model of N distinct tokens. Its loss on a token identifies the context.

    Its state is the first token since the state was empty. After token j of a text that began with token i, it predicts
    row (i, j) of a random table.
    """

    def __init__(self, n: int, seed: int) -> None:
        super().__init__()
        self.config = RWKV4Config(vocab_size=n, n_layer=1, n_embd=2)
        self.table = nn.Parameter(torch.randn(n, n, n, generator=torch.Generator().manual_seed(seed)).double())

    def hidden(self, tokens, state=None):
        state = tokens[:, 0] if state is None else state
        return torch.stack([state[:, None].expand_as(tokens), tokens], -1), state

    def head(self, hidden):
        return self.table[hidden[..., 0], hidden[..., 1]]

    def nats(self, start: int, target: int) -> float:
        return -float(self.table[start, target - 1].detach().log_softmax(-1)[target])


def check_counted_once(pairs, lo, hi):
    """The targets of (start, target) pairs are those of the split, each once."""
    seen = set()
    for _, target in pairs:
        assert target not in seen
        seen.add(target)
    assert seen == set(range(max(lo, 1), hi))


def carried_pairs(lo, hi, streams, warmup):
    """(the first token that a stream reads, target) for every target."""
    first = max(lo, 1)
    n, pairs, done = hi - first, [], first
    streams = min(streams, n)
    for i in range(streams):
        begin, done = done, first + (i + 1) * n // streams
        start = first - 1 if i == 0 else max(first - 1, begin - 1 - warmup)
        pairs += [(start, target) for target in range(begin, done)]
    check_counted_once(pairs, lo, hi)
    return pairs


def window_pairs(lo, hi, ctx_len, stride):
    """Like the loop in transformers' perplexity guide: begin, end and the end of the window before."""
    first, pairs, before = max(lo, 1), [], 0
    n = hi - first
    for begin in range(0, n, stride):
        end = min(begin + ctx_len, n)
        pairs += [(first - 1 + begin, first + i) for i in range(before, end)]
        before = end
        if end == n:
            break
    check_counted_once(pairs, lo, hi)
    return pairs


@settings(max_examples=150, deadline=None)
@given(SPLITS, st.integers(1, 9), st.integers(0, 20), st.integers(1, 70))
def test_stream_counts_each_target_once_in_its_context(split, streams, warmup, chunk_len):
    n, lo, hi = split
    model, heard = ContextTrackingModel(n, seed=n), []
    nats, count = evaluate_stream(
        model,
        np.arange(n, dtype=np.uint8),
        lo,
        hi,
        streams=streams,
        warmup=warmup,
        chunk_len=chunk_len,
        on_progress=lambda *each: heard.append(each),
    )
    pairs = carried_pairs(lo, hi, streams, warmup)
    assert count == len(pairs) == sum(each[0] for each in heard)
    # float64 on both sides, at most 60 sums.
    assert nats == pytest.approx(math.fsum(model.nats(*pair) for pair in pairs), rel=1e-12)
    assert nats == pytest.approx(math.fsum(each[1] for each in heard), rel=1e-12)


@settings(max_examples=150, deadline=None)
@given(SPLITS, st.integers(1, 20).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, t))), st.integers(1, 5))
def test_windows_count_each_target_once_in_its_context(split, lengths, rows):
    (n, lo, hi), (ctx_len, stride) = split, lengths
    model, heard = ContextTrackingModel(n, seed=n), []
    nats, count = evaluate_windows(
        model,
        np.arange(n, dtype=np.uint8),
        lo,
        hi,
        ctx_len=ctx_len,
        stride=stride,
        rows=rows,
        on_progress=lambda *each: heard.append(each),
    )
    expected, n_expected = np.zeros(ctx_len), np.zeros(ctx_len, int)
    for start, target in window_pairs(lo, hi, ctx_len, stride):
        expected[target - 1 - start] += model.nats(start, target)
        n_expected[target - 1 - start] += 1
    assert np.array_equal(count, n_expected)
    np.testing.assert_allclose(nats, expected, rtol=1e-12)
    assert sum(each[0] for each in heard) == n_expected.sum()
    assert math.fsum(each[1] for each in heard) == pytest.approx(expected.sum(), rel=1e-12)


def make_perturbed_model(vocab_size: int = 7, dropout: float = 0.5) -> RWKV4:
    """In training mode, with dropout, which an evaluation must turn off."""
    torch.manual_seed(0)
    model = RWKV4(RWKV4Config(vocab_size, n_layer=2, n_embd=8, dropout=dropout))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def reference_losses():
    """A model, a text, and nats[start][i] of token start + 1 + i, from the recurrence in float64, token by token."""
    model, text = make_perturbed_model(), np.random.default_rng(0).integers(0, 7, 40).astype(np.uint8)
    reference = make_perturbed_model(dropout=0).double().eval()
    nats: dict[int, list[float]] = {}
    with use_kernel("recurrence"), torch.no_grad():
        for start in range(len(text) - 1):
            state, nats[start] = None, []
            for token, target in zip(text[start:-1], text[start + 1 :], strict=True):
                logits, state = reference(torch.tensor([[int(token)]]), state)
                nats[start].append(-float(logits[0, 0].log_softmax(-1)[int(target)]))
    return model, text, nats


@pytest.mark.parametrize("lo, hi", [(0, 40), (1, 40), (13, 38), (20, 21)])
@pytest.mark.parametrize("streams, warmup, chunk_len", [(1, 9, 7), (1, 0, 1), (3, 5, 4), (4, 0, 100), (50, 2, 3)])
def test_stream_matches_the_recurrence(reference_losses, lo, hi, streams, warmup, chunk_len):
    model, text, reference = reference_losses
    nats, count = evaluate_stream(model, text, lo, hi, streams=streams, warmup=warmup, chunk_len=chunk_len)
    pairs = carried_pairs(lo, hi, streams, warmup)
    assert count == len(pairs)
    # Some hundred float32 operations in a row, each with a rounding error of 6e-8.
    assert nats == pytest.approx(sum(reference[start][target - 1 - start] for start, target in pairs), rel=1e-5)
    assert model.training


@pytest.mark.parametrize("lo, hi", [(0, 40), (1, 40), (13, 38), (20, 21)])
@pytest.mark.parametrize("ctx_len, stride, rows", [(8, None, 3), (8, 3, 2), (5, 1, 4), (64, 64, 1), (1, 1, 8)])
def test_windows_match_the_recurrence(reference_losses, lo, hi, ctx_len, stride, rows):
    model, text, reference = reference_losses
    nats, count = evaluate_windows(model, text, lo, hi, ctx_len=ctx_len, stride=stride, rows=rows)
    pairs = window_pairs(lo, hi, ctx_len, stride or ctx_len)
    assert count.sum() == len(pairs)
    assert nats.sum() == pytest.approx(sum(reference[start][target - 1 - start] for start, target in pairs), rel=1e-5)


def test_float64_models_are_evaluated_in_float64(reference_losses):
    model, text, reference = reference_losses
    model = make_perturbed_model().double()
    nats, _ = evaluate_stream(model, text, 0, len(text), chunk_len=16)
    assert nats == pytest.approx(sum(reference[0]), rel=1e-12)


def test_logits_in_slices_give_the_same_result(reference_losses, monkeypatch):
    model, text, _ = reference_losses
    expected = evaluate_stream(model, text, 0, len(text))
    monkeypatch.setattr("rwkv_pl.inference.evaluate.MAX_LOGITS", 20)
    assert evaluate_stream(model, text, 0, len(text)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("lo, hi", [(5, 5), (0, 1), (0, 0), (7, 3)])
def test_split_without_a_target_is_an_error(reference_losses, lo, hi):
    model, text, _ = reference_losses
    with pytest.raises(ValueError, match="no target"):
        evaluate_stream(model, text, lo, hi)
    with pytest.raises(ValueError, match="no target"):
        evaluate_windows(model, text, lo, hi, ctx_len=4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_logits_are_an_error(value):
    model = make_perturbed_model()
    with torch.no_grad():
        model.head.weight[0, 0] = value
    text = np.ones(9, np.uint8)
    for protocol in (
        lambda: evaluate_stream(model, text, 0, 9),
        lambda: evaluate_windows(model, text, 0, 9, ctx_len=4),
    ):
        with pytest.raises(FloatingPointError, match="not finite"):
            protocol()
    assert model.training


def test_metrics_from_nats_and_bytes():
    found = compute_metrics(math.log(2) * 60, n_tokens=10, n_bytes=20)
    assert found == pytest.approx(
        {"bits_per_byte": 3, "perplexity_per_token": 64, "nats_per_token": 6 * math.log(2), "bits_per_token": 6}
    )
    assert compute_metrics(1e6, 1, 1)["perplexity_per_token"] == math.inf


SENTENCES = "The quick brown fox jumps over the lazy dog, naïvely: {} times. "


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny trained model, its data, and the validation score reported by training."""
    path = tmp_path_factory.mktemp("data") / "corpus.txt"
    path.write_text("".join(SENTENCES.format(i * i) for i in range(600)), encoding="utf-8")
    data = CorpusDataModule(path, batch_size=8, ctx_len=64, eval_batch_size=3, vocab="char", split=(0.6, 0.3, 0.1))
    data.setup("fit")
    torch.manual_seed(0)
    module = LitRWKV(
        RWKV4(RWKV4Config(data.vocabulary.size, 2, 32)),
        vocabulary=data.vocabulary.to_dict(),
        bytes_per_token=torch.from_numpy(data.vocabulary.bytes_per_token),
    )
    module.optim.lr = 1e-2
    trainer = Trainer(
        accelerator="cpu",
        max_steps=60,
        max_epochs=-1,
        val_check_interval=60,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return module.model, data, float(trainer.callback_metrics["val/bits_per_byte"])


def test_windows_match_the_validation_of_training(trained):
    model, data, reported = trained
    file = data.val_dataloader().dataset.file
    lo, hi = file.splits.val
    nats, count = evaluate_windows(model, file.tokens, lo, hi, ctx_len=64, rows=3)
    n_bytes = int(data.vocabulary.bytes_per_token[file.tokens[lo:hi]].sum())
    assert n_bytes == data.corpus.splits.val[1] - data.corpus.splits.val[0] > count.sum() == hi - lo
    # The same nats, but training adds those of one call in float32 (6e-8) and reports a float32.
    assert compute_metrics(nats.sum(), hi - lo, n_bytes)["bits_per_byte"] == pytest.approx(reported, rel=1e-6)


def test_warmed_up_streams_are_close_to_a_single_stream(trained):
    model, data, _ = trained
    file = data.val_dataloader().dataset.file
    lo, hi = file.splits.val
    streams = (hi - lo) // 256

    def bits(**how) -> float:
        nats, count = evaluate_stream(model, file.tokens, lo, hi, **how)
        assert count == hi - lo
        return nats / count / math.log(2)

    one, cold, warm = bits(), bits(streams=streams, warmup=0), bits(streams=streams)
    print(f"bits per token: one stream {one:.5f}, {streams} cold {cold - one:+.5f}, warmed {warm - one:+.5f}")
    assert cold - one > 1e-3 > 1e-4 > abs(warm - one)
