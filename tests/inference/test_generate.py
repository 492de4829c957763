"""Generation follows the model's distribution and leaves what is the caller's alone."""

from itertools import islice

import pytest
import torch

from rwkv_pl import RWKV4, RWKV4Config, generate


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = RWKV4(RWKV4Config(vocab_size=5, n_layer=2, n_embd=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def test_greedy_is_the_argmax_of_the_whole_text(model):
    text = torch.tensor([[1, 2, 3], [0, 0, 4]])
    for token in islice(generate(model, text.clone(), temperature=0), 6):
        assert torch.equal(token, model(text)[0][:, -1].argmax(-1))
        text = torch.cat([text, token[:, None]], dim=1)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_distribution(model, temperature):
    prompt = torch.tensor([[1, 2]]).expand(20_000, 2)
    generator = torch.Generator().manual_seed(0)
    drawn = next(generate(model, prompt, temperature=temperature, generator=generator))
    expected = torch.softmax(model(prompt[:1])[0][0, -1] / temperature, -1)
    # Five standard deviations of a share of 20,000 draws.
    assert torch.allclose(drawn.bincount(minlength=5) / 20_000, expected, atol=5 * 0.5 / 20_000**0.5)


def test_a_state_goes_on_and_stays_the_callers(model):
    _, state = model(torch.tensor([[1, 2]]))
    kept = [tuple(part.clone() for part in block) for block in state]
    whole = list(islice(generate(model, torch.tensor([[1, 2, 3]]), temperature=0), 4))
    assert list(islice(generate(model, torch.tensor([[3]]), state, temperature=0), 4)) == whole
    for block, before in zip(state, kept, strict=True):
        assert all(torch.equal(part, was) for part, was in zip(block, before, strict=True))


def test_the_callers_grad_mode_does_not_leak(model):
    for _ in islice(generate(model, torch.tensor([[1]])), 2):
        assert torch.is_grad_enabled()
