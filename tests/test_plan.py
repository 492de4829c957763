"""The plan for many GPUs: its guide has the script's output, and its formula is that of the estimate at the start."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from benchmarks import plan
from lightning.pytorch.plugins import MixedPrecision

from rwkv_pl import RWKV4, RWKV4Config
from rwkv_pl.training.memory import count_heap, estimate_memory
from rwkv_pl.training.module import LitRWKV

GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "scale.md"


def test_guide_has_the_tables_of_the_script() -> None:
    assert plan.table() in GUIDE.read_text(encoding="utf-8")


@pytest.mark.usefixtures("compiled_kernel")  # the scan stores more
@pytest.mark.parametrize("checkpointing", [False, True])
def test_plan_has_the_memory_of_the_estimate(monkeypatch: pytest.MonkeyPatch, checkpointing: bool) -> None:
    monkeypatch.setattr(plan, "VOCABULARY", 500)
    size = plan.Size("small", 6, 160)
    module = LitRWKV(RWKV4(RWKV4Config(vocab_size=500, n_layer=6, n_embd=160)))
    assert size.parameters == sum(p.numel() for p in module.parameters())
    for layer in module.model.modules():  # a GPU runs the plain blocks, and hooks make a CPU run them
        if type(layer).__name__ in ("TimeMix", "ChannelMix"):
            layer.register_forward_hook(lambda *_: None)
    module.model.activation_checkpointing = checkpointing
    cost = estimate_memory(module, MixedPrecision("bf16-mixed", "cpu"))
    assert size.flops_per_token == cost.flops
    for rows in (1, 16):
        planned = plan.memory(size, 1, rows, 1, "default", checkpointing)
        of_gpu = cost.bytes(rows * plan.CTX_LEN) - count_heap(list(module.parameters()))
        assert planned == pytest.approx(of_gpu, rel=0.05)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_plan_divides_what_the_estimate_divides(accumulate: int) -> None:
    """With FSDP, the estimate adds up the parts of the parameters, and the whole of those in use."""
    from rwkv_pl.training import memory

    size = plan.Size("small", 4, 32)
    model = RWKV4(RWKV4Config(vocab_size=plan.VOCABULARY, n_layer=4, n_embd=32))
    trainer = SimpleNamespace(accumulate_grad_batches=accumulate)
    module = SimpleNamespace(model=model, parameters=model.parameters, trainer=trainer)
    whole = memory._count_whole(module)
    copies = plan.COPY * (size.outside // 2 + 2 * size.block)
    activations = plan.memory(size, 1, 1, 1, "ddp", True) - copies - 16 * size.parameters
    planned = plan.memory(size, 1024, 1, accumulate, "fsdp", True)
    assert planned - activations == pytest.approx(16 * size.parameters / 1024 + whole + copies, rel=1e-3)
