"""A saved generation state is restored exactly, and only with the weights and the vocabulary that produced it."""

import pytest
import torch
from versions import VERSIONS, small_model

from rwkv_pl import generate
from rwkv_pl.errors import UserError
from rwkv_pl.inference.state_file import GenerationState, check_replaceable, load_state, save_state


@pytest.fixture(params=VERSIONS)
def model(request):
    return small_model(request.param, vocab_size=7, n_layer=2, n_embd={"rwkv4": 16, "rwkv7": 64}[request.param])


@pytest.fixture
def saved_state(model, tmp_path):
    generation = generate(model, torch.tensor([[1, 2]]), seed=1)
    next(generation)
    generation.catch_up()
    memory = GenerationState(generation.logits, generation.state, generation.recent[0], b"\xe4\xb8")
    save_state(tmp_path / "m", memory, "digest")
    return tmp_path / "m", memory


def test_saved_state_is_loaded_unchanged(model, saved_state):
    path, memory = saved_state
    got = load_state(path, model, "digest")
    assert torch.equal(got.logits, memory.logits) and torch.equal(got.recent, memory.recent)
    assert got.unfinished == memory.unfinished
    for block, before in zip(got.state, memory.state, strict=True):
        assert all(torch.equal(part, was) for part, was in zip(block, before, strict=True))


def test_size_does_not_depend_on_the_prompt(model, tmp_path):
    for length in (2, 20000):
        generation = generate(model, torch.ones(1, length, dtype=torch.int64), seed=1)
        save_state(
            tmp_path / str(length), GenerationState(generation.logits, generation.state, generation.recent[0][-2:]), "d"
        )
    assert (tmp_path / "20000").stat().st_size == (tmp_path / "2").stat().st_size


def test_older_file_has_no_unfinished_text(model, saved_state):
    path, _ = saved_state
    content = torch.load(path, weights_only=True)
    del content["unfinished"]
    torch.save(content, path)
    assert load_state(path, model, "digest").unfinished == b""


def test_state_of_other_weights_is_refused(model, saved_state):
    with pytest.raises(UserError, match="other weights"):
        load_state(saved_state[0], model, "another")


CHANGES = {
    "a block less": lambda c: c["state"].pop(),
    "another size": lambda c: c["state"][0].update(wkv=torch.zeros(1, 3, 15)),
    "two rows": lambda c: c["state"][0].update(att_shift=torch.zeros(2, 16)),
    "no shift": lambda c: c["state"][1].pop("ffn_shift"),
    "no tensor": lambda c: c.update(logits=[1.0]),
    "a token too many": lambda c: c.update(recent=torch.tensor([7])),
    "tokens that are none": lambda c: c.update(recent=torch.tensor([0.5])),
    "whole numbers": lambda c: c["state"][0].update(wkv=c["state"][0]["wkv"].long()),
    "complex numbers": lambda c: c["state"][1].update(wkv=c["state"][1]["wkv"].to(torch.complex64)),
    "a NaN": lambda c: c["state"][0]["ffn_shift"].fill_(float("nan")),
    "sparse logits": lambda c: c.update(logits=c["logits"].to_sparse()),
    "text that is not bytes": lambda c: c.update(unfinished="\u4e2d"),
    "no state": lambda c: c.pop("state"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_corrupt_state_gives_one_line_error(model, saved_state, change):
    path, _ = saved_state
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    with pytest.raises(UserError, match="a corrupt generation state") as error:
        load_state(path, model, "digest")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_other_file_is_neither_read_nor_overwritten(model, tmp_path, content):
    path = tmp_path / "x"
    if content is None:
        torch.save({"emb.weight": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(UserError):
        load_state(path, model, "digest")
    with pytest.raises(UserError):
        check_replaceable(path)
    assert path.read_bytes() == before


def test_unwritable_path_is_reported_first(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        check_replaceable(tmp_path / "not" / "there")
    with pytest.raises(UserError, match="is a folder"):
        check_replaceable(tmp_path)
    check_replaceable(tmp_path / "new")
