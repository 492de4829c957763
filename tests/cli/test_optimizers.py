"""Optimizers with their own arguments: chosen by a config file, validated, and resumed to the same bits."""

import pytest
import torch
import yaml
from command import SMALL
from test_train import load_checkpoint

PLAIN = tuple(setting for setting in SMALL if not setting.startswith(("optim=", "trainer.max_steps")))
WSD = ("schedule=wsd", "schedule.decay_steps=8", "schedule.decay_share=0.5", "schedule.final_lr=1e-4")


def assert_same_weights(run, other):
    weights, others = load_checkpoint(run)["state_dict"], load_checkpoint(other)["state_dict"]
    return all(torch.equal(value, others[name]) for name, value in weights.items())


@pytest.mark.parametrize(
    "optim",
    [
        ("optim=sgd", "optim.nesterov=true", "optim.lr_scale={time_decay:2}"),
        ("optim=sgd", "optim.momentum=0.0"),
        ("optim=muon", "optim.lr=1e-2", "optim.lr_scale=version"),
    ],
    ids=["sgd", "sgd-without-momentum", "muon"],
)
def test_optimizer_resumes_to_the_same_bits(train, tmp_path, optim):
    settings = (*PLAIN, *optim, *WSD, "trainer.accumulate_grad_batches=2", "callbacks=[default,ema]")
    assert train(*settings, "trainer.max_steps=8", "hydra.run.dir=whole").code == 0
    assert train(*settings, "trainer.max_steps=3", "hydra.run.dir=parts").code == 0
    result = train("resume=parts", "trainer.max_steps=8")
    assert result.code == 0, result.err
    assert assert_same_weights(tmp_path / "parts", tmp_path / "whole")


def test_changed_momentum_applies_on_resume(train, tmp_path):
    assert train(*PLAIN, "optim=sgd", "trainer.max_steps=4", "hydra.run.dir=run").code == 0
    result = train("resume=run", "optim.momentum=0.0", "trainer.max_steps=5")
    assert result.code == 0 and "changed optim.momentum = 0.0" in result.out, result.err
    assert {
        group["momentum"] for group in load_checkpoint(tmp_path / "run")["optimizer_states"][0]["param_groups"]
    } == {0.0}
    # State that is unused at momentum 0 is kept and used again with the next momentum.
    assert train("resume=run", "optim.momentum=0.5", "trainer.max_steps=6").code == 0
    for setting, message in {
        "optim.momentum=fast": "optim.momentum must be a number, got 'fast'",
        "optim.nesterov=1": "optim.nesterov must be true or false, got 1",
        "optim.momentun=0.5": "optim.momentun is not a setting; did you mean momentum?",
        "optim.momentum=-1.0": "optim refuses its settings: Invalid momentum value: -1.0",
        "optim.betas=[0.9,0.99]": "optim.betas is not a setting",
    }.items():
        result = train("resume=run", setting, "trainer.max_steps=7")
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
        assert message in result.err


def test_user_optimizer_file(train, tmp_path):
    folder = tmp_path / "mine" / "optim"
    folder.mkdir(parents=True)
    (folder / "rms.yaml").write_text("_target_: torch.optim.RMSprop\nlr: 1e-3\nalpha: 0.9\nmomentum: 0.5\n")
    (folder / "typo.yaml").write_text("_target_: torch.optim.RMSprop\nlr: 1e-3\nalfa: 0.9\n")
    command = ("--config-dir", "mine", *PLAIN, "trainer.max_steps=2", "hydra.run.dir=run")
    for settings, message in {
        ("optim=typo",): "optim.alfa: torch.optim.RMSprop has no argument alfa; did you mean alpha?",
        ("optim=rms", "optim.alpha=low"): "optim.alpha must be a number, got 'low'",
        ("optim=rms", "optim.alfa=0.5"): "optim.alfa is not a setting; did you mean alpha?",
        ("optim=rms", "optim.betas=[0.9,0.9]"): "optim.betas is not a setting",
    }.items():
        result = train(*command, *settings)
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
        assert message in result.err
    assert not (tmp_path / "run").exists()
    assert train(*command, "optim=rms", "optim.alpha=0.8").code == 0
    recorded = yaml.unsafe_load((tmp_path / "run" / "hparams.yaml").read_text())["optim"]
    assert recorded == {"_target_": "torch.optim.RMSprop", "lr": 1e-3, "weight_decay": 0.0, "lr_scale": None,
                        "alpha": 0.8, "momentum": 0.5}  # fmt: skip
    result = train("resume=run", "trainer.max_steps=4")
    assert result.code == 0, result.err
    groups = load_checkpoint(tmp_path / "run")["optimizer_states"][0]["param_groups"]
    assert {(group["alpha"], group["momentum"], group["eps"]) for group in groups} == {(0.8, 0.5, 1e-8)}


@pytest.mark.parametrize("optim", ["sgd", "muon", "adamw"])
def test_misfitting_optimizer_state_is_corruption(train, tmp_path, optim):
    assert train(*PLAIN, f"optim={optim}", "trainer.max_steps=3", "hydra.run.dir=run").code == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    content = torch.load(checkpoints / "last.ckpt", weights_only=True)
    for name in ("last.prev.ckpt", "best.ckpt"):
        (checkpoints / name).unlink(missing_ok=True)
    state = content["optimizer_states"][0]["state"]
    name, value = next((name, value) for name, value in state[3].items() if value.dim())

    def resumed():
        (checkpoints / "last.ckpt").unlink()
        torch.save(content, checkpoints / "last.ckpt")
        result = train("resume=run", "trainer.max_steps=4")
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
        return result.err

    state[3][name] = value[:1]
    assert f"{name} of " in resumed()
    state[3][name] = 3
    assert "does not fit this run" in resumed()
    del state[3][name]
    assert "its optimizer knows only some of the parameters" in resumed()
    state.clear()
    assert "its optimizer knows only some of the parameters" in resumed()


def test_optimizer_settings_that_cannot_change_on_resume_are_refused(train, tmp_path):
    folder = tmp_path / "mine" / "optim"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("_target_: torch.optim.Adam\nlr: 1e-3\namsgrad: false\n")
    command = ("--config-dir", "mine", *PLAIN, "optim=mine", "trainer.max_steps=2", "hydra.run.dir=run")
    assert train(*command).code == 0
    result = train("resume=run", "optim.amsgrad=true", "trainer.max_steps=4")
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert "optim can't change to these settings in a resume (KeyError: 'max_exp_avg_sq')" in result.err
    assert train("resume=run", "trainer.max_steps=4").code == 0


def test_advice_for_a_missing_argument_works_when_typed(train, run, tmp_path):
    result = train(*SMALL, "optim.momentum=0.5")
    assert "mine/optim/NAME.yaml: --config-dir mine optim=NAME" in result.err
    (tmp_path / "mine" / "optim").mkdir(parents=True)
    (tmp_path / "mine" / "optim" / "own.yaml").write_text("defaults: [sgd]\ndampening: 0.1\n")
    mine = (*(text for text in SMALL if not text.startswith("optim=")), "--config-dir=mine", "optim=own")
    result = train(*mine, "optim.dampening=0.2", "trainer.max_steps=1", "hydra.run.dir=own")
    assert result.code == 0, result.err
    result = train("resume=run", "optim.momentum=0.5")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert result.err.endswith("; another argument of its class needs a new run\n")
    listed = "callbacks=[best,last,ema]"
    assert f"choose its file too: '{listed}'" in train("resume=run", "callbacks.ema.decay=0.5").err
    result = train("resume=run", listed, "callbacks.ema.decay=0.5", "trainer.max_steps=5")
    assert result.code == 0, result.err
