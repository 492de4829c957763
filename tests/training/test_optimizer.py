"""Parameter groups and learning rates, against tables a reader can check."""

import copy
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from versions import VERSIONS, small_model

from rwkv_pl import RWKV4, LitRWKV, Optim, RWKV4Config, Schedule
from rwkv_pl.config import OptimGroup, Train
from rwkv_pl.errors import UserError
from rwkv_pl.training.muon import MuonAdamW
from rwkv_pl.training.optimizer import build_optimizer, parameter_groups, set_hyperparameters
from rwkv_pl.training.schedule import check_schedule, learning_rate

CONF = Path(__file__).parents[2] / "conf"
MODEL = RWKV4(RWKV4Config(vocab_size=11, n_layer=2, n_embd=8))


def hyperparameters_by_name(optim, lr_scale, model=MODEL):
    optimizer = build_optimizer(torch.optim.AdamW, parameter_groups(model, lr_scale), optim)
    set_hyperparameters(optimizer, optim, lr_scale)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {name: group_of[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize("version", VERSIONS)
def test_weight_decay_applies_only_to_matrices(version):
    model = small_model(version)
    groups = hyperparameters_by_name(Optim(weight_decay=0.1), {}, model)
    decayed = {name for name, group in groups.items() if group["weight_decay"]}
    assert decayed == {name for name, p in model.named_parameters() if name.endswith(".weight") and p.dim() == 2}
    assert {"emb.weight", "head.weight", "blocks.1.ffn.key.weight"} <= decayed
    assert not any(re.search(r"ln|time_|[wavg][012]$|r_k$", name) for name in decayed)


OFFICIAL_FACTORS = {"rwkv4": {"time_decay": 2, "time_first": 3}, "rwkv7": {"w0": 2}}


@pytest.mark.parametrize("version", VERSIONS)
def test_official_learning_rate_factors(version):
    model = small_model(version)
    groups = hyperparameters_by_name(Optim(), model.lr_scale, model)
    factors = {name.rpartition(".")[2]: group["lr_scale"] for name, group in groups.items()}
    assert {name: factor for name, factor in factors.items() if factor != 1} == OFFICIAL_FACTORS[version]


def test_every_parameter_is_in_one_group():
    members = [id(p) for group in parameter_groups(MODEL, {}) for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in MODEL.parameters())


def test_hyperparameters_come_from_the_config_not_the_checkpoint():
    old, new = Optim(lr=1e-2, betas=[0.5, 0.6], eps=1e-3, weight_decay=0.5), Optim(betas=[0.9, 0.95], weight_decay=0.1)
    optimizer = build_optimizer(torch.optim.Adam, parameter_groups(MODEL, {}), new)
    stored = build_optimizer(torch.optim.Adam, parameter_groups(MODEL, {}), old)
    set_hyperparameters(stored, old, {})
    optimizer.load_state_dict(stored.state_dict())
    set_hyperparameters(optimizer, new, {"time_decay": 2.0})
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.95), 1e-8)
        assert group["weight_decay"] == (0.1 if group["decays"] else 0)
        assert group["lr_scale"] == (2 if group["name"] == "time_decay" else 1)


def test_optimizer_specific_arguments_come_from_the_config():
    old = Optim("torch.optim.SGD", lr=0.1, own={"momentum": 0.5, "nesterov": True})
    new = Optim("torch.optim.SGD", lr=0.1, own={"momentum": 0.8})
    optimizer = build_optimizer(torch.optim.SGD, parameter_groups(MODEL, {}), new)
    optimizer.load_state_dict(build_optimizer(torch.optim.SGD, parameter_groups(MODEL, {}), old).state_dict())
    assert optimizer.param_groups[0]["momentum"] == 0.5
    set_hyperparameters(optimizer, new, {})
    assert {(group["momentum"], group["nesterov"], group["fused"]) for group in optimizer.param_groups} == {
        (0.8, False, True)
    }
    assert all("betas" not in group and "eps" not in group for group in optimizer.param_groups)


def test_default_optimizer_is_the_official_one():
    assert asdict(Optim()) == OmegaConf.to_container(OmegaConf.load(CONF / "optim" / "rwkv.yaml")) | {"own": {}}
    constant = OmegaConf.to_container(OmegaConf.load(CONF / "schedule" / "constant.yaml"))
    assert asdict(Schedule()) == {"decay_steps": None, "final_lr": 0.0, "decay_share": None} | constant
    changed = asdict(Optim(lr=1e-3))
    assert changed.pop("lr") == 1e-3
    assert changed == {key: value for key, value in asdict(Optim()).items() if key != "lr"}
    module = LitRWKV(copy.deepcopy(MODEL))
    optimizer = module.configure_optimizers()
    set_hyperparameters(optimizer, module.optim, module.lr_scale)
    assert type(optimizer) is torch.optim.AdamW
    assert {(g["lr"], g["betas"], g["eps"], g["weight_decay"]) for g in optimizer.param_groups} == {
        (6e-4, (0.9, 0.99), 1e-8, 0.0)
    }
    assert {g["name"]: g["lr_scale"] for g in optimizer.param_groups if g["lr_scale"] != 1} == RWKV4.lr_scale
    Optim().betas.clear()
    assert Optim().betas == [0.9, 0.99]


def test_another_class_has_its_own_defaults():
    optim = Optim("torch.optim.SGD", lr=0.3, own={"momentum": 0.9})
    assert optim.arguments == {"lr": 0.3, "weight_decay": 0.0, "momentum": 0.9}
    assert LitRWKV(MODEL, optim).lr_scale == {}
    optimizer = LitRWKV(MODEL, Optim("torch.optim.Adam", lr=0.1, betas=[0.5, 0.6])).configure_optimizers()
    assert {(g["lr"], g["betas"], g["eps"]) for g in optimizer.param_groups} == {(0.1, (0.5, 0.6), 1e-8)}
    mine = Optim(f"{__name__}.TakesAnything", lr=0.2)
    assert type(LitRWKV(MODEL, mine).configure_optimizers()) is TakesAnything
    for target in ("torch.optim.SGD", 1e-3):
        with pytest.raises(UserError, match=r"^Optim\(_target_=.*\) needs lr=: .* is for torch.optim.AdamW$"):
            Optim(target)


def test_commands_do_not_take_the_defaults_of_a_program():
    assert asdict(Train().optim) == {
        "_target_": "torch.optim.Adam",
        "lr": 1e-5,
        "betas": None,
        "eps": None,
        "weight_decay": 0.0,
        "lr_scale": None,
        "own": {},
    }
    assert asdict(OptimGroup("torch.optim.SGD", lr=0.3)) == asdict(Optim("torch.optim.SGD", lr=0.3))


class TakesAnything(torch.optim.SGD):
    def __init__(self, params, **arguments):
        super().__init__(params, **arguments)


@pytest.mark.parametrize(
    ("target", "optim", "message"),
    [
        (
            torch.optim.SGD,
            Optim("SGD", lr=0.1, betas=[0.9, 0.99]),
            "optim.betas: SGD has no argument betas: set optim.betas=null",
        ),
        (
            torch.optim.SGD,
            Optim("SGD", lr=0.1, own={"momentun": 0.9}),
            "has no argument momentun; did you mean momentum?",
        ),
        (torch.optim.SGD, Optim("SGD", lr=0.1, own={"params": 3}), "optim.params: SGD has no argument params"),
        (torch.optim.SGD, Optim("SGD", lr=0.1, own={"momentum": -1.0}), "optim refuses its settings: Invalid momentum"),
        (
            torch.optim.SGD,
            Optim("SGD", lr=0.1, own={"momentum": "fast"}),
            "optim refuses its settings: '<' not supported",
        ),
        (torch.optim.AdamW, Optim(betas=[0.9]), "optim.betas must be 2 numbers for torch.optim.AdamW, got [0.9]"),
        (
            torch.optim.Rprop,
            Optim("Rprop", lr=0.1, weight_decay=0.1),
            "has no argument weight_decay: set optim.weight_decay=0",
        ),
        (torch.optim.LBFGS, Optim("LBFGS", lr=0.1), "optim refuses its settings: LBFGS doesn't support per-parameter"),
        (torch.optim.Muon, Optim("Muon", lr=0.1), "optim refuses its settings: Muon only supports 2D parameters"),
        (
            torch.optim.Optimizer,
            Optim("Optimizer", lr=0.1),
            "optim.lr: Optimizer has no argument lr; available: defaults",
        ),
        (TakesAnything, Optim("Mine", lr=0.1, own={"momentun": 0.9}), "optim refuses its settings: "),
        (
            MuonAdamW,
            Optim("MuonAdamW", lr=0.1, own={"adjust_lr_fn": "x"}),
            "optim refuses its settings: Adjust learning rate",
        ),
    ],
)
def test_invalid_optimizer_argument_gives_one_line_error(target, optim, message):
    with pytest.raises(UserError) as raised:
        build_optimizer(target, parameter_groups(MODEL, {}), optim)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("builtins.dict", "optim._target_=builtins.dict is not a torch.optim.Optimizer: name a class derived from it"),
        ("torch.optim.Adm", "optim._target_=torch.optim.Adm is not a class of torch.optim; did you mean Adam?"),
    ],
)
def test_target_that_is_not_an_optimizer_gives_one_line_error(target, message):
    with pytest.raises(UserError) as raised:
        LitRWKV(MODEL, Optim(target, lr=0.1)).configure_optimizers()
    assert str(raised.value) == message


@pytest.mark.parametrize("name", ["Adagrad", "Adadelta", "RMSprop", "Rprop", "NAdam", "Adafactor", "ASGD"])
def test_any_torch_optimizer_works(name):
    model = copy.deepcopy(MODEL)
    module = LitRWKV(model, Optim(f"torch.optim.{name}", lr=1e-3))
    optimizer = module.configure_optimizers()
    set_hyperparameters(optimizer, module.optim, {})
    before = [p.clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not any(torch.equal(old, p) for old, p in zip(before, model.parameters(), strict=True))


def test_recorded_hyperparameters_match_the_config():
    optim = Optim("torch.optim.SGD", lr=0.1, own={"momentum": 0.9})
    recorded = Train(optim=optim, schedule=Schedule("wsd", decay_share=0.2)).hyperparameters()
    assert recorded["optim"] == {
        "_target_": "torch.optim.SGD",
        "lr": 0.1,
        "weight_decay": 0.0,
        "lr_scale": None,
        "momentum": 0.9,
    }
    assert recorded["schedule"]["decay_share"] == 0.2
    assert "decay_share" not in Train().hyperparameters()["schedule"]


def test_muon_updates_block_matrices_and_adamw_the_rest():
    """The same bits as with torch's two optimizers side by side, in parameters, gradients and three steps."""
    optim = Optim("rwkv_pl.training.muon.MuonAdamW", lr=0.01, betas=[0.8, 0.9], weight_decay=0.1,
                  lr_scale={"time_decay": 2.0}, own={"momentum": 0.7})  # fmt: skip
    ours, theirs = copy.deepcopy(MODEL), copy.deepcopy(MODEL)
    module = LitRWKV(ours, optim)
    optimizer = module.configure_optimizers()
    set_hyperparameters(optimizer, optim, module.lr_scale)
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group["lr_scale"]
    named = dict(theirs.named_parameters())
    matrices = {name for name, p in named.items() if name.startswith("blocks.") and p.dim() == 2}
    decayed = {"emb.weight", "head.weight"}
    fast = {name for name in named if name.endswith("time_decay")}
    rest = named.keys() - matrices - decayed - fast
    numbers = {"lr": 0.01, "weight_decay": 0.1}
    muon = torch.optim.Muon([named[n] for n in sorted(matrices)], momentum=0.7, eps=1e-8,
                            adjust_lr_fn="match_rms_adamw", **numbers)  # fmt: skip
    groups = [
        {"params": [named[name] for name in sorted(names)], **changes}
        for names, changes in ((decayed, {}), (fast, {"lr": 0.02, "weight_decay": 0.0}), (rest, {"weight_decay": 0.0}))
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.9), fused=True, **numbers)
    torch.manual_seed(0)
    for _ in range(3):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        optimizer.step()
        muon.step()
        adamw.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # like a resume
    assert {tuple(sorted(optimizer.state[p])) for n, p in ours.named_parameters() if n in matrices} == {
        ("momentum_buffer",)
    }
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other), name


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (Schedule("constant"), [1, 1, 1, 1, 1, 1]),
        (Schedule("constant", warmup_steps=4), [0.25, 0.5, 0.75, 1, 1, 1]),
        (Schedule("cosine", final_lr=0.2), [0.9464, 0.8, 0.6, 0.4, 0.2536, 0.2]),
        (Schedule("cosine", warmup_steps=2, decay_steps=4), [0.5, 1, 0.5, 0, 0, 0]),
        (Schedule("exponential", warmup_steps=1, decay_steps=4, final_lr=1e-3), [1, 0.1, 0.01, 1e-3, 1e-3, 1e-3]),
        (Schedule("linear", final_lr=0.4), [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]),
        (Schedule("linear", warmup_steps=2, decay_steps=4), [0.5, 1, 0.5, 0, 0, 0]),
        (Schedule("wsd", decay_share=0.5), [1, 1, 1, 2 / 3, 1 / 3, 0]),
        (Schedule("wsd", warmup_steps=2, decay_steps=5, decay_share=0.4, final_lr=0.2), [0.5, 1, 1, 0.6, 0.2, 0.2]),
        (Schedule("wsd", decay_share=0.01), [1, 1, 1, 1, 1, 0]),
    ],
    ids=[
        "constant",
        "warm-up",
        "cosine",
        "cosine-warm-up",
        "exponential",
        "linear",
        "linear-warm-up",
        "wsd",
        "wsd-warm-up",
        "wsd-one-step",
    ],
)
def test_learning_rate_by_step(schedule, rates):
    found = [learning_rate(step, Optim(lr=1.0), schedule, max_steps=6) for step in range(6)]
    assert found == pytest.approx(rates, abs=1e-4)


def test_schedule_with_an_invalid_length_is_refused():
    with pytest.raises(UserError, match="needs a length"):
        check_schedule(Schedule("cosine"), max_steps=-1)
    check_schedule(Schedule("cosine", decay_steps=10), max_steps=-1)
    with pytest.raises(
        UserError, match=r"warmup_steps=5 must be below the run's 5 steps: set schedule\.warmup_steps=0"
    ):
        check_schedule(Schedule("exponential", warmup_steps=5, final_lr=1e-3), max_steps=5)
    with pytest.raises(UserError, match="starts before the end of schedule"):
        check_schedule(Schedule("wsd", warmup_steps=5, decay_share=0.6), max_steps=10)
    check_schedule(Schedule("wsd", warmup_steps=5, decay_share=0.5), max_steps=10)


def test_decay_share_is_a_setting_of_wsd_only():
    with pytest.raises(UserError, match="decay_share is not a setting of schedule=cosine; it belongs to schedule=wsd"):
        Schedule("cosine", decay_share=0.1)
    with pytest.raises(UserError, match="decay_share is missing"):
        Schedule("wsd")
    with pytest.raises(UserError, match="must be above 0 and at most 1, got 1"):
        Schedule("wsd", decay_share=1.5)
