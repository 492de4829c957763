"""The carried state: that of the row's text since its last restart, whatever the hardware, and resumed exactly."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch._dynamo.utils import counters

from rwkv_pl import RWKV4, CorpusDataModule, LitRWKV, Optim, RWKV4Config, TokensDataModule
from rwkv_pl.errors import UserError
from rwkv_pl.model.state import BlockState
from rwkv_pl.training.compile import compile_blocks
from rwkv_pl.training.stream import STREAM_KEY, check_stored

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
STILL = Optim("torch.optim.SGD", lr=1e-30)  # leaves the weights as they are
GENERATOR = torch.Generator().manual_seed(0)
IDS = [torch.randint(40, (n,), generator=GENERATOR).tolist() for n in (31, 90, 7, 64, 150, 20, 60)]


@pytest.fixture
def data(tmp_path, monkeypatch):
    build().model(torch.zeros(1, 2, dtype=torch.int64))  # loads the kernel from the user's cache
    monkeypatch.setenv("RWKV_PL_CACHE", str(tmp_path / "cache"))
    return TokensDataModule(IDS, vocab_size=40, batch_size=6, ctx_len=8, split=(0.8, 0.1, 0.1), stream=True)


def build(optim=None, **settings):
    torch.manual_seed(0)
    model = RWKV4(RWKV4Config(40, 2, 16))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # so that its outputs depend on the state
    return LitRWKV(model, optim or Optim(lr=1e-2), **settings)


def fit(module, data, **arguments):
    trainer = Trainer(**QUIET | {"enable_checkpointing": False, "limit_val_batches": 1} | arguments)
    trainer.fit(module, data)
    return trainer


def carried(trainer, module):
    return tuple(BlockState(**block) for block in module.carried.gather(module.model, trainer))


def assert_same_state(model, found, expected, **tolerance):
    """Compared by their effect: numerator and denominator of WKV have a scale in common."""
    tokens = torch.arange(len(found[0].att_shift))[:, None]
    with torch.no_grad():
        for a, b in zip(model.hidden(tokens, found), model.hidden(tokens, expected), strict=True):
            if isinstance(a, torch.Tensor):
                torch.testing.assert_close(a, b, **tolerance)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.att_shift, b.att_shift, **tolerance)
        torch.testing.assert_close(a.ffn_shift, b.ffn_shift, **tolerance)


@pytest.mark.parametrize(("steps", "accumulate"), [(1, 1), (7, 1), (30, 3)])
def test_state_is_that_of_the_rows_text_since_its_last_restart(data, steps, accumulate):
    module = build(STILL)
    trainer = fit(module, data, max_steps=steps, accumulate_grad_batches=accumulate)
    batches = data.train_dataloader().dataset
    found = carried(trainer, module)
    for b in range(6):
        text = []
        for n in range(steps):
            part = batches[n * accumulate + b // (6 // accumulate)]
            row = b % (6 // accumulate)
            text = ([] if part.restarts[row] else text) + part.tokens[row, :-1].tolist()
        with torch.no_grad():
            _, expected = module.model.hidden(torch.tensor([text]))
        mine = tuple(BlockState(*(x[b : b + 1] for x in block)) for block in found)
        assert_same_state(module.model, mine, expected, rtol=1e-4, atol=1e-5)
    assert len(text) < 8 * steps or steps < 30  # a document ended in between


class Losses(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(float(outputs["nats"]))


def test_losses_are_those_of_the_text_before(data):
    """Of each window, with the state of its rows; a gradient ends at the window's start."""
    module, losses = build(STILL), Losses()
    model = copy.deepcopy(module.model)
    fit(module, data, max_steps=6, callbacks=[losses])
    state = None
    for n, nats in enumerate(losses.seen):
        tokens, restarts = data.train_dataloader().dataset[n]
        logits, state_after = model(tokens[:, :-1], state)
        fresh, fresh_after = model(tokens[:, :-1])
        logits = torch.where(restarts[:, None, None], fresh, logits)
        assert nats == pytest.approx(nn.functional.cross_entropy(logits.mT, tokens[:, 1:]).item(), rel=1e-5)
        state = tuple(
            BlockState(
                *(
                    torch.where(restarts.view(-1, *[1] * (a.dim() - 1)), b, a).detach()
                    for a, b in zip(x, y, strict=True)
                )
            )
            for x, y in zip(state_after, fresh_after, strict=True)
        )
    assert not any(tensor.requires_grad for block in carried_before(module) for tensor in block)


def carried_before(module):
    return [block for state in module.carried._before.values() for block in state]


def test_kept_state_is_not_a_view_of_a_whole_window(data):
    module = build()
    fit(module, data, max_steps=2, precision="64-true")  # as on a GPU, without the fused operators
    for block in carried_before(module):
        for tensor in block:
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_micro_batches_do_not_change_the_training(data, checkpointing):
    weights = []
    for accumulate in (1, 3):
        module = build()
        module.model.activation_checkpointing = checkpointing and accumulate > 1
        trainer = fit(module, data, max_steps=8, accumulate_grad_batches=accumulate)
        weights.append((module.model.state_dict(), carried(trainer, module)))
    for found, state in weights[1:]:
        for name, tensor in weights[0][0].items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
        assert_same_state(module.model, state, weights[0][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("saved", [pytest.param(4, marks=pytest.mark.slow), 5])  # 5: inside an accumulation window
def test_resumed_fit_gives_the_same_bits(data, tmp_path, saved):
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx + 1 == saved:
                trainer.save_checkpoint(tmp_path / "last.ckpt")

    def run(steps, callbacks, resume_from=None):
        arguments = {"max_steps": steps, "accumulate_grad_batches": 2, "callbacks": callbacks}
        trainer = Trainer(**QUIET | arguments | {"enable_checkpointing": False, "limit_val_batches": 1})
        module = build()
        trainer.fit(module, data, ckpt_path=resume_from, weights_only=True)
        return module.model.state_dict(), carried(trainer, module)

    weights, state = run(5, [Save()])
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert [block.keys() for block in stored[STREAM_KEY]] == [{"att_shift", "wkv", "ffn_shift"}] * 2
    assert {len(tensor) for block in stored[STREAM_KEY] for tensor in block.values()} == {6}
    found, found_state = run(5, [], tmp_path / "last.ckpt")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    assert all(torch.equal(a, b) for x, y in zip(found_state, state, strict=True) for a, b in zip(x, y, strict=True))


def test_checkpoint_before_the_first_new_step_keeps_the_state(data, tmp_path):
    module = build()
    trainer = fit(module, data, max_steps=3)
    trainer.save_checkpoint(tmp_path / "first.ckpt")

    class Save(Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "second.ckpt")

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 9:  # the first of three micro-batches
                trainer.save_checkpoint(tmp_path / "third.ckpt")

    arguments = {"max_steps": 4, "accumulate_grad_batches": 3, "callbacks": [Save()], "limit_val_batches": 1}
    arguments["enable_checkpointing"] = False
    Trainer(**QUIET, **arguments).fit(build(), data, ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    first, *others = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("first", "second", "third"))
    for other in others:
        for a, b in zip(first[STREAM_KEY], other[STREAM_KEY], strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


class SkipFourth(LitRWKV):
    """The loss of batch 3 is not finite. late: a fused optimizer decides it, as on a GPU."""

    late = False

    def training_step(self, batch, batch_idx):
        parts = super().training_step(batch, batch_idx)
        if batch_idx == 3:
            parts["loss"] = parts["loss"] * torch.nan
            self._loss = self._loss * torch.nan
        return parts

    def skips_nonfinite_on_device(self, optimizer):
        return self.late and optimizer.defaults["fused"]


@pytest.mark.parametrize("late", [False, True])
def test_skipped_step_keeps_the_state_before(data, late):
    states = []
    for steps in (3, 4):
        torch.manual_seed(0)
        module = SkipFourth(RWKV4(RWKV4Config(40, 2, 16)), skip_nonfinite=1)
        module.late = late
        states.append(carried(fit(module, data, max_steps=steps), module))
    assert all(torch.equal(a, b) for x, y in zip(*states, strict=True) for a, b in zip(x, y, strict=True))


def test_validation_starts_from_nothing(data):
    module = build(STILL)
    before = Trainer(**QUIET).validate(module, data, verbose=False)
    trainer = fit(module, data, max_steps=5, limit_val_batches=1.0)
    assert float(trainer.callback_metrics["val/loss"]) == before[0]["val/loss"]
    assert Trainer(**QUIET).validate(module, data, verbose=False) == before


def test_another_fit_starts_from_nothing(data):
    module, losses = build(STILL), Losses()
    for _ in range(2):
        fit(module, data, max_steps=3, callbacks=[losses])
    assert losses.seen[:3] == losses.seen[3:]


def test_epochs_carry_the_state_on(data):
    """The rows read on over the end of an epoch, one pass or shorter, and through it."""
    seen = []
    for arguments in ({"max_steps": 12}, {"max_epochs": 4, "limit_train_batches": 3}):
        module, losses = build(), Losses()
        fit(module, data, callbacks=[losses], **arguments)
        seen.append(losses.seen)
    assert seen[0] == seen[1]


def test_learning_rate_finder_leaves_no_state(data, tmp_path):
    module, losses = build(), Losses()
    trainer = Trainer(max_steps=3, default_root_dir=tmp_path, **QUIET, callbacks=[losses], enable_checkpointing=False)
    Tuner(trainer).lr_find(module, data, num_training=5, update_attr=False)
    del losses.seen[:]
    trainer.fit(module, data)
    found = losses.seen
    module, losses = build(), Losses()
    fit(module, data, max_steps=3, callbacks=[losses])
    assert found == losses.seen


def test_batch_size_finder_leaves_no_state(data, tmp_path):
    trainer = Trainer(max_steps=3, default_root_dir=tmp_path, **QUIET, enable_checkpointing=False)
    module = build()
    first = module.training_step
    calls = []

    def fail_at_first(batch, batch_idx):
        calls.append(len(batch.tokens))
        loss = first(batch, batch_idx)
        if len(calls) == 3:
            raise RuntimeError("CUDA out of memory.")
        return loss

    module.training_step = fail_at_first
    Tuner(trainer).scale_batch_size(module, datamodule=data, init_val=2, max_trials=3, steps_per_trial=1)
    trainer.fit(module, data)
    assert trainer.global_step == 3 and len(set(calls)) > 1


def test_unsuitable_uses_are_refused(data):
    with pytest.raises(UserError, match="overfit_batches repeats its batches, and a stream reads on"):
        fit(build(), data, max_steps=2, overfit_batches=2)

    class Plain(nn.Linear):
        config, lr_scale = RWKV4Config(40, 1, 8), {}

    with pytest.raises(UserError, match=r"a stream needs a model with empty_state\(rows\), Plain has none"):
        fit(LitRWKV(Plain(8, 40)), data, max_steps=1, limit_val_batches=0)

    class OwnLoss(LitRWKV):
        def loss(self, inputs, targets):
            hidden, _ = self.model.hidden(inputs)
            return (hidden.sum(),) * 3

    with pytest.raises(UserError, match="a stream needs the loss of LitRWKV"):
        fit(OwnLoss(RWKV4(RWKV4Config(40, 1, 8))), data, max_steps=1, limit_val_batches=0)
    module = build()
    with pytest.raises(UserError, match="a stream needs Lightning's Trainer"):
        module.training_step(data.train_dataloader().dataset[0], 0)
    with pytest.raises(UserError, match="stream must be true or false, got 'yes'"):
        CorpusDataModule("x", stream="yes")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: None,
        lambda state: state[:1],
        lambda state: [{name: tensor[:5] for name, tensor in block.items()} for block in state],
        lambda state: [{name: tensor.long() for name, tensor in block.items()} for block in state],
        lambda state: [{name: tensor * torch.nan for name, tensor in block.items()} for block in state],
        lambda state: [{"wkv": block["wkv"]} for block in state],
    ],
)
def test_damaged_state_is_an_error(change):
    model = RWKV4(RWKV4Config(40, 2, 16))
    state = [block._asdict() for block in model.empty_state(6)]
    check_stored(state, model, 6)
    with pytest.raises((ValueError, KeyError)):
        check_stored(change(state), model, 6)


@pytest.mark.slow
def test_compiled_blocks_carry_the_state(data, monkeypatch):
    """Traced as usual, but executed by torch itself: two graphs, since the first block has one more norm."""
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **rest: original(*args, backend="eager", **rest))
    expected, losses = Losses(), Losses()
    fit(build(), data, max_steps=4, callbacks=[expected])
    torch._dynamo.reset()
    counters.clear()
    module = build()
    assert compile_blocks(module, 6, 8, Precision(), stream=True).startswith("compile 2 blocks, in ")
    fit(module, data, max_steps=4, callbacks=[losses], limit_val_batches=0)
    assert losses.seen == pytest.approx(expected.seen, rel=1e-5)
    assert (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())) == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_empty_state_is_the_same_as_none(dtype):
    model = build().model.to(dtype)
    tokens = torch.arange(10).view(2, 5)
    with torch.no_grad():
        for a, b in zip(model(tokens), model(tokens, model.empty_state(2)), strict=True):
            if isinstance(a, torch.Tensor):
                assert torch.equal(a, b)
                continue
            pairs = [pair for blocks in zip(a, b, strict=True) for pair in zip(*blocks, strict=True)]
            assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in pairs)
