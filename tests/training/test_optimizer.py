"""Parameter groups and learning rates, against tables a reader can check."""

import pytest
import torch

from rwkv_pl import RWKV4, RWKV4Config
from rwkv_pl.config import Optim, Schedule
from rwkv_pl.errors import UserError
from rwkv_pl.training.optim import build_optimizer, check_schedule, learning_rate, parameter_groups, write_numbers

MODEL = RWKV4(RWKV4Config(vocab_size=11, n_layer=2, n_embd=8))


def numbers_by_name(optim, lr_scale):
    optimizer = build_optimizer(torch.optim.AdamW, parameter_groups(MODEL, lr_scale), optim)
    write_numbers(optimizer, optim, lr_scale)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {name: group_of[id(p)] for name, p in MODEL.named_parameters()}


def test_weight_decay_falls_on_two_dimensional_weights_alone():
    groups = numbers_by_name(Optim(weight_decay=0.1), {})
    decayed = {name for name, group in groups.items() if group["weight_decay"]}
    assert decayed == {name for name, p in MODEL.named_parameters() if name.endswith(".weight") and p.dim() == 2}
    assert {"emb.weight", "head.weight", "blocks.1.ffn.key.weight"} <= decayed
    assert not any("ln" in name or "time_" in name for name in decayed)


def test_the_official_learning_rate_factors():
    groups = numbers_by_name(Optim(), RWKV4.lr_scale)
    factors = {name.rpartition(".")[2]: group["lr_scale"] for name, group in groups.items()}
    assert factors.pop("time_decay") == 2
    assert factors.pop("time_first") == 3
    assert set(factors.values()) == {1}


def test_every_parameter_is_in_one_group():
    members = [id(p) for group in parameter_groups(MODEL, {}) for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in MODEL.parameters())


def test_numbers_come_from_the_config_not_from_the_checkpoint():
    old, new = Optim(lr=1e-2, betas=[0.5, 0.6], eps=1e-3, weight_decay=0.5), Optim(betas=[0.9, 0.95], weight_decay=0.1)
    optimizer = build_optimizer(torch.optim.Adam, parameter_groups(MODEL, {}), new)
    stored = build_optimizer(torch.optim.Adam, parameter_groups(MODEL, {}), old)
    write_numbers(stored, old, {})
    optimizer.load_state_dict(stored.state_dict())
    write_numbers(optimizer, new, {"time_decay": 2.0})
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.95), 1e-8)
        assert group["weight_decay"] == (0.1 if group["decays"] else 0)
        assert group["lr_scale"] == (2 if group["name"] == "time_decay" else 1)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (Schedule("constant"), [1, 1, 1, 1, 1, 1]),
        (Schedule("constant", warmup_steps=4), [0.25, 0.5, 0.75, 1, 1, 1]),
        (Schedule("cosine", final_lr=0.2), [0.9464, 0.8, 0.6, 0.4, 0.2536, 0.2]),
        (Schedule("cosine", warmup_steps=2, decay_steps=4), [0.5, 1, 0.5, 0, 0, 0]),
        (Schedule("exponential", warmup_steps=1, decay_steps=4, final_lr=1e-3), [1, 0.1, 0.01, 1e-3, 1e-3, 1e-3]),
    ],
    ids=["constant", "warm-up", "cosine", "cosine-warm-up", "exponential"],
)
def test_learning_rates_by_step(schedule, rates):
    found = [learning_rate(step, Optim(lr=1.0), schedule, max_steps=6) for step in range(6)]
    assert found == pytest.approx(rates, abs=1e-4)


def test_a_schedule_without_a_length_is_refused():
    with pytest.raises(UserError, match="needs a length"):
        check_schedule(Schedule("cosine"), max_steps=-1)
    check_schedule(Schedule("cosine", decay_steps=10), max_steps=-1)
    with pytest.raises(UserError, match="leaves no room"):
        check_schedule(Schedule("exponential", warmup_steps=5, final_lr=1e-3), max_steps=5)
