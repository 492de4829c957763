"""Generation follows the model's distribution and does not change the caller's tensors or modes."""

from itertools import islice

import pytest
import torch

from rwkv_pl import RWKV4, RWKV4Config, generate
from rwkv_pl.inference import generate as module
from rwkv_pl.inference.generate import read_tokens


@pytest.fixture(scope="module")
def model():
    return make_perturbed_model(RWKV4Config(vocab_size=5, n_layer=2, n_embd=16, dropout=0.5)).eval()


def make_perturbed_model(config):
    torch.manual_seed(0)
    model = RWKV4(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def assert_same_state(state, other, tolerance):
    """Compare states by their values, independent of max_exp."""
    for block, before in zip(state, other, strict=True):
        num, den, max_exp = (block.wkv.double()[:, i] for i in range(3))
        num_, den_, max_exp_ = (before.wkv.double()[:, i] for i in range(3))
        pairs = [
            (num / den, num_ / den_),
            (max_exp + den.log(), max_exp_ + den_.log()),
            (block.att_shift, before.att_shift),
            (block.ffn_shift, before.ffn_shift),
        ]
        if not all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in pairs):
            return False
    return True


def test_greedy_tokens_are_the_argmax_of_the_full_text(model):
    text = torch.tensor([[1, 2, 3], [0, 0, 4]])
    for token in islice(generate(model, text.clone(), temperature=0), 6):
        assert torch.equal(token, model(text)[0][:, -1].argmax(-1))
        text = torch.cat([text, token[:, None]], dim=1)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_distribution(model, temperature):
    prompt = torch.tensor([[1, 2]]).expand(4_000, 2)
    drawn = next(generate(model, prompt, temperature=temperature, seed=0))
    expected = torch.softmax(model(prompt[:1])[0][0, -1] / temperature, -1)
    # Five standard deviations of a frequency in 4,000 draws.
    assert torch.allclose(drawn.bincount(minlength=5) / 4_000, expected, atol=5 * 0.5 / 4_000**0.5)


def test_generation_from_a_state_does_not_change_it(model):
    _, state = model(torch.tensor([[1, 2]]))
    kept = [tuple(part.clone() for part in block) for block in state]
    whole = list(islice(generate(model, torch.tensor([[1, 2, 3]]), temperature=0), 4))
    assert list(islice(generate(model, torch.tensor([[3]]), state, temperature=0), 4)) == whole
    for block, before in zip(state, kept, strict=True):
        assert all(torch.equal(part, was) for part, was in zip(block, before, strict=True))


def test_grad_mode_of_the_caller_is_unchanged(model):
    for _ in islice(generate(model, torch.tensor([[1]])), 2):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_prompts_of_unequal_lengths_match_single_prompts(model):
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([0, 1])]
    _, state = model(torch.tensor([[1, 2], [3, 4], [0, 0]]))
    for before in (None, state):
        together = list(islice(generate(model, prompts, before, seed=5, repetition=1.3), 8))
        for i, prompt in enumerate(prompts):
            row = None if before is None else module.select_rows(before, slice(i, i + 1))
            alone = generate(model, prompt[None], row, seed=5, repetition=1.3)
            # A sample depends on its row number and the seed: row 0 alone is row 0 of the batch.
            if i == 0:
                assert [int(t[0]) for t in together] == [int(t) for t in islice(alone, 8)]
            logits, _ = module.read_prompts(model, prompts, before)
            assert torch.allclose(logits[i], read_tokens(model, prompt[None], row)[0][0], atol=1e-6)


def test_sample_does_not_depend_on_the_batch_size(model):
    prompt = torch.tensor([[1, 2]])
    few = torch.stack(list(islice(generate(model, prompt.expand(2, 2), seed=9), 20)))
    many = torch.stack(list(islice(generate(model, prompt.expand(7, 2), seed=9), 20)))
    assert torch.equal(few, many[:, :2])
    assert not torch.equal(many[:, 0], many[:, 1])


def test_catch_up_reads_every_yielded_token(model):
    generation = generate(model, torch.tensor([[1, 2]]), seed=1)
    written = [int(token) for token in islice(generation, 5)]
    generation.catch_up()
    logits, state = read_tokens(model, torch.tensor([[1, 2, *written]]))
    assert torch.allclose(generation.logits, logits, atol=1e-5)
    assert assert_same_state(generation.state, state, 1e-5)
    assert generation.recent[0].tolist() == [1, 2, *written]


def test_generation_disables_dropout_and_restores_training_mode(model):
    expected = list(islice(generate(model, torch.tensor([[1]]), seed=2), 10))
    model.train()
    try:
        assert list(islice(generate(model, torch.tensor([[1]]), seed=2), 10)) == expected
        assert model.training and model.blocks[0].dropout.training
    finally:
        model.eval()


@pytest.mark.parametrize("prompt", [torch.zeros(1, 0, dtype=torch.int64), [], [torch.tensor([1]), torch.tensor([])]])
def test_empty_prompt_is_refused(model, prompt):
    with pytest.raises(ValueError, match="prompt"):
        generate(model, prompt)


@pytest.mark.parametrize("prompt", ["text", [[1, 2]], [1, 2]], ids=repr)
def test_prompt_that_is_not_a_tensor_is_refused(model, prompt):
    with pytest.raises(TypeError, match="the prompts must be a tensor, or a list of tensors, not"):
        generate(model, prompt)


def test_recurrent_parallel_and_chunked_logits_agree_over_4096_tokens(monkeypatch):
    model = make_perturbed_model(RWKV4Config(vocab_size=256, n_layer=3, n_embd=64)).eval()
    tokens = torch.randint(256, (1, 4096), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        parallel, after = model(tokens)
        state, recurrent, chunked, position = None, [], [], 0
        for length in (1, 999, 1024, 7, 2065):
            part, state = model(tokens[:, position : position + length], state)
            chunked.append(part)
            position += length
        chunked_state, state = state, None
        for token in tokens[0]:
            logits, state = model.step(token[None], state)
            recurrent.append(logits)
    # The three sum in different orders in float32: a few rounding errors of the logits' size, over all tokens.
    norm = parallel.norm()
    assert (torch.cat(chunked, 1) - parallel).norm() / norm < 1e-5
    assert (torch.stack(recurrent, 1) - parallel).norm() / norm < 1e-5
    assert (torch.stack(recurrent, 1) - parallel).abs().max() < 1e-5 * parallel.abs().max()
    assert assert_same_state(state, after, 1e-4) and assert_same_state(chunked_state, after, 1e-4)
    monkeypatch.setattr(module, "CHUNK", 100)
    assert torch.allclose(read_tokens(model, tokens)[0], parallel[:, -1], atol=1e-5 * float(parallel.abs().max()))
