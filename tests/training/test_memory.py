"""The estimates of memory and arithmetic before a training starts."""

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from versions import VERSIONS, small_model

from rwkv_pl import RWKV4, RWKV4Config, use_kernel
from rwkv_pl.training import memory as f
from rwkv_pl.training.module import LitRWKV


@pytest.fixture
def module():
    return LitRWKV(RWKV4(RWKV4Config(vocab_size=256, n_layer=3, n_embd=32)))


def count_kept_bytes(module, rows, n_tokens):
    """The bytes that autograd stores for a micro-batch, counted independently from the storages in its graph."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = module.training_step(torch.randint(256, (rows, n_tokens + 1)), 0)["loss"]
    assert loss.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


@pytest.mark.usefixtures("compiled_kernel")  # the scan stores more
def test_arithmetic_is_six_operations_per_matrix_weight(module):
    C = 32
    weights = 3 * (4 * C * C + 2 * 4 * C * C + C * C) + 256 * C  # time mix, channel mix, head
    cost = f.estimate_memory(module, Precision())
    assert cost.flops == 6 * weights
    assert cost.parameters == sum(p.numel() for p in module.parameters())
    heap = f.count_heap(list(module.parameters()))
    assert heap == f.HEAP + 6 * cost.parameters
    assert cost.fixed - heap == pytest.approx(16 * cost.parameters, rel=0.05)


@pytest.mark.parametrize(("version", "n_embd"), [("rwkv4", 32), ("rwkv7", 64)])
def test_memory_estimate_matches_a_micro_batch(version, n_embd):
    module = LitRWKV(small_model(version, vocab_size=256, n_embd=n_embd))
    cost = f.estimate_memory(module, Precision())
    working = 2 * (4 * max(4, module.model.backward_tensors) + 2 * 4) * n_embd
    for rows, n_tokens in ((1, 256), (4, 512)):
        tokens = rows * n_tokens
        # Dropout masks, and the states between the kernel's tiles, do not grow exactly with the tokens.
        assert (cost.per_token - working) * tokens == pytest.approx(count_kept_bytes(module, rows, n_tokens), rel=0.05)


def test_estimate_of_the_scan_is_the_same_each_time(module):
    """The memory of unused results is freed during the forward pass and used again."""
    with use_kernel("scan"):
        assert len({f.estimate_memory(module, Precision()).bytes(1024) for _ in range(4)}) == 1


def test_memory_estimate_does_not_change_the_model(module):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    f.estimate_memory(module, Precision())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_bfloat16_stores_less_for_the_backward_pass(module):
    mixed = f.estimate_memory(module, MixedPrecision("bf16-mixed", "cpu"))
    assert mixed.per_token < 0.8 * f.estimate_memory(module, Precision()).per_token


def test_checkpointing_stores_all_block_inputs_and_two_blocks_at_a_time():
    module = LitRWKV(RWKV4(RWKV4Config(vocab_size=4, n_layer=8, n_embd=32)))
    plain, working = f.estimate_memory(module, Precision()).per_token, 2 * (4 * 4 + 2 * 4) * 32
    module.model.activation_checkpointing = True
    per_token = f.estimate_memory(module, Precision()).per_token
    whole = plain - working
    assert per_token - working == pytest.approx(2 * whole / 8 + 8 * 4 * 32, rel=0.2)
    assert module.model.activation_checkpointing


@pytest.mark.usefixtures("compiled_kernel")  # the scan stores more
def test_long_micro_batch_stores_no_mixed_inputs(module, monkeypatch):
    monkeypatch.setattr(module.model, "recompute_from", 256)
    cost = f.estimate_memory(module, Precision())
    assert module.model.recompute_from == 256
    assert cost.bytes(256) < cost.bytes(255)
    working, logits, fixed = 48 * 32, 4 * 256, cost.fixed
    assert cost.bytes(512) - fixed - 512 * (working + logits) == pytest.approx(
        count_kept_bytes(module, 1, 512), rel=0.05
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_stream_needs_the_states_before_and_after_a_step(version):
    module = LitRWKV(small_model(version))
    plain, stream = (f.estimate_memory(module, Precision(), rows).bytes(100) for rows in (0, 3))
    assert stream - plain == 2 * sum(x.nbytes for block in module.model.empty_state(3) for x in block)


def test_logits_in_chunks_do_not_grow_with_the_tokens():
    module = LitRWKV(RWKV4(RWKV4Config(vocab_size=5000, n_layer=1, n_embd=16)))
    plain = f.estimate_memory(module, Precision())
    module.loss_chunk_len = 100
    cost = f.estimate_memory(module, Precision())
    assert plain.bytes(1000) - cost.bytes(1000) == pytest.approx(900 * 5000 * 8, rel=0.01)
    module.loss_chunk_len = 10**8
    assert f.estimate_memory(module, Precision()).bytes(1000) == pytest.approx(plain.bytes(1000), rel=1e-6)
    assert module.loss_chunk_len == 10**8


@pytest.mark.parametrize(("free_rows", "accumulate"), [(100, 1), (12, 1), (11, 2), (6, 2), (4, 3), (1, 12), (0, None)])
def test_auto_accumulation_uses_the_fewest_micro_batches_that_fit(module, monkeypatch, free_rows, accumulate):
    cost = f.estimate_memory(module, Precision())
    free = cost.bytes(free_rows * 64) if free_rows else cost.fixed
    monkeypatch.setattr(f, "free_memory", lambda device: free / f.SHARE_OF_FREE_MEMORY)
    assert f.find_accumulation(module, cost, 12, 64, Precision()) == accumulate


def test_out_of_memory_on_the_device_is_respected(module, monkeypatch):
    def refuse(*_, **__):
        raise torch.OutOfMemoryError("no")

    assert f.fits_in_memory(module, 2, 16, Precision())
    assert all(parameter.grad is None for parameter in module.parameters())
    monkeypatch.setattr(LitRWKV, "loss", refuse)
    assert not f.fits_in_memory(module, 2, 16, Precision())


def test_free_memory_matches_the_machine():
    assert 10**7 < f.free_memory(torch.device("cpu")) < 10**14


@pytest.mark.parametrize(
    ("amount", "expected"), [(999, "999 B"), (1234, "1.23 kB"), (6.1e9, "6.1 GB"), (2e15, "2e+03 TB"), (0, "0 B")]
)
def test_format_si_units(amount, expected):
    assert f.format_si(amount) == expected
