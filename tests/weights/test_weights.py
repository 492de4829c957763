"""Reading and writing weights: official files of every kind, conversions, the peers' readers, and one-line errors."""

import json
import os
import re
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_20b import small_20b

from rwkv_pl import RWKV4Config, RWKV7Config, load_weights
from rwkv_pl.config import ModelConfig
from rwkv_pl.data.vocabulary import Vocabulary, vocabulary_from_dict
from rwkv_pl.errors import CorruptFileError, UserError
from rwkv_pl.model import MODELS
from rwkv_pl.weights.layouts import LAYOUTS, layout_of
from rwkv_pl.weights.read import read_weights
from rwkv_pl.weights.tensors import Weights
from rwkv_pl.weights.write import write_weights

RWKV4_LAYOUT = layout_of("rwkv4")
SIZE = RWKV4Config(vocab_size=30, n_layer=2, n_embd=12)
# Ranks and widths that are not the official ones: they are read from the tensors.
SIZE7 = RWKV7Config(vocab_size=30, n_layer=2, n_embd=64, n_ffn=96, rank_w=8, rank_a=5, rank_v=3, rank_g=16)
SIZES = pytest.mark.parametrize("size", [SIZE, SIZE7], ids=["rwkv4", "rwkv7"])
FORMS = ("there.pth", "there.ckpt", "there")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_weights(config: ModelConfig = SIZE, seed: int = 3, dtype: torch.dtype = torch.float32) -> Weights:
    """Weights near the official initialisation, but all changed: otherwise a comparison would prove nothing."""
    torch.manual_seed(seed)
    version = next(version for version, (_, config_class) in MODELS.items() if type(config) is config_class)
    model = MODELS[version][0](config)
    tensors = {name: (v + 0.2 * torch.randn_like(v)).to(dtype) for name, v in model.state_dict().items()}
    return Weights(Path("random"), "random", version, config, tensors, None)


def assert_same_bits(one: Weights, other: Weights) -> None:
    assert one.config == other.config
    assert one.tensors.keys() == other.tensors.keys()
    for name, value in one.tensors.items():
        there = other.tensors[name]
        assert there.dtype == value.dtype, name
        assert there.shape == value.shape, name
        assert torch.equal(there.contiguous().view(torch.uint8), value.contiguous().view(torch.uint8)), name


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@torch.no_grad()
def compute_logits(weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
    return weights.model().eval()(tokens)[0]


@torch.no_grad()
def logits_in_transformers(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    peer, report = transformers.RwkvForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return peer.eval()(tokens).logits


def logits_in_rwkv(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    package = pytest.importorskip("rwkv.model")
    peer = package.RWKV(model=str(path.with_suffix("")), strategy="cpu fp32")
    return torch.stack([peer.forward(row.tolist(), None, full_output=True)[0] for row in tokens])


# Conversions


@SIZES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_format_round_trips_bit_for_bit(tmp_path, form, dtype, size):
    weights = random_weights(size, dtype=dtype)
    written = write_weights(weights, tmp_path / form)
    assert_same_bits(written, weights)
    assert written.path == tmp_path / form
    back = write_weights(read_weights(tmp_path / form), tmp_path / "back.pth")
    assert_same_bits(back, weights)
    assert back.digest == weights.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([form, "back.pth"])


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_half_to_float32_and_back_is_exact(tmp_path, form, half):
    weights = random_weights(dtype=half)
    write_weights(weights.cast(torch.float32), tmp_path / form)
    wide = read_weights(tmp_path / form)
    assert wide.dtype == torch.float32
    assert wide.digest == weights.digest
    assert_same_bits(write_weights(wide.cast(half), tmp_path / "half.pth"), weights)


@settings(max_examples=5, deadline=None)
@given(
    vocab_size=st.integers(1, 300),
    n_layer=st.integers(1, 4),
    n_embd=st.integers(1, 40),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3),
    route=st.lists(st.sampled_from(FORMS), min_size=1, max_size=3),
)
def test_any_size_converts_by_any_route(tmp_path_factory, vocab_size, n_layer, n_embd, dtypes, route):
    weights = random_weights(RWKV4Config(vocab_size, n_layer, n_embd))
    mixed = {name: v.to(dtypes[i % len(dtypes)]) for i, (name, v) in enumerate(weights.tensors.items())}
    weights = there = replace(weights, tensors=mixed)
    for form in route:
        folder = tmp_path_factory.mktemp("route")
        write_weights(there, folder / form)
        there = read_weights(folder / form)
    assert_same_bits(there, weights)


@pytest.mark.parametrize("vocabulary", [Vocabulary(), Vocabulary("char", "äöü\U0001f600")], ids=["byte", "char"])
def test_vocabulary_is_stored_with_the_weights(tmp_path, vocabulary):
    weights = replace(random_weights(RWKV4Config(vocabulary.size, 2, 12)), vocabulary=vocabulary)
    write_weights(weights, tmp_path / "folder")
    write_weights(read_weights(tmp_path / "folder"), tmp_path / "x.ckpt")
    model, there = load_weights(tmp_path / "x.ckpt")
    assert there == vocabulary
    assert model.config == weights.config
    assert not model.training
    assert write_weights(weights, tmp_path / "x.pth").vocabulary is None


def test_20b_folder_works_with_transformers_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    vocabulary = vocabulary_from_dict({"kind": "20b", "tokenizer": small_20b()})
    weights = random_weights(RWKV4Config(vocab_size=vocabulary.size, n_layer=1, n_embd=8))
    write_weights(replace(weights, vocabulary=vocabulary), tmp_path / "there")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "there" / "tokenizer.json"))
    text = "Licensed to  you,\n\tnaïvely"
    assert theirs(text)["input_ids"] == vocabulary.encode(text.encode()).tolist()
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "there")(text)["input_ids"] == theirs(text)["input_ids"]
    )
    # Like official folders, which contain only the tokenizer's file.
    (tmp_path / "there" / "vocabulary.json").unlink()
    assert read_weights(tmp_path / "there").vocabulary == vocabulary
    for other in ("{}", small_20b().replace('"id":1259', '"id":1260')):
        (tmp_path / "there" / "tokenizer.json").write_text(other, encoding="utf-8")
        assert read_weights(tmp_path / "there").vocabulary is None


def test_world_vocabulary_of_a_folder_is_recognised(tmp_path):
    write_weights(random_weights(RWKV4Config(vocab_size=1 << 16, n_layer=1, n_embd=1)), tmp_path / "there")
    assert read_weights(tmp_path / "there").vocabulary is None
    lines = "".join(f"{i + 1} {bytes([i])!r} 1\n" for i in range(256))
    (tmp_path / "there" / "rwkv_vocab_v20230424.txt").write_text(lines, encoding="utf-8")
    vocabulary = read_weights(tmp_path / "there").vocabulary
    assert vocabulary and vocabulary.kind == "world" and vocabulary.encode(b"\0a").tolist() == [1, 98]
    write_weights(read_weights(tmp_path / "there"), tmp_path / "x.ckpt")
    assert read_weights(tmp_path / "x.ckpt").vocabulary == vocabulary


def test_byte_folder_works_with_transformers_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    weights = random_weights(RWKV4Config(vocab_size=256, n_layer=1, n_embd=8))
    write_weights(replace(weights, vocabulary=Vocabulary()), tmp_path / "there")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "there")
    text = " A naïve\n\n  text, isn't it? <|endoftext|>\t€ \0 e\u0301\x7f"
    assert theirs(text)["input_ids"] == list(text.encode())
    assert theirs.decode(list(text.encode())) == text


def test_every_parameter_has_a_name_in_transformers():
    transformers = pytest.importorskip("transformers")
    config = RWKV4_LAYOUT.config_of(SIZE, torch.float32)
    peer = transformers.RwkvForCausalLM(transformers.RwkvConfig.from_dict(config))
    shapes = {name: value.shape for name, value in random_weights().tensors.items()}
    assert {RWKV4_LAYOUT.their_name(name): shape for name, shape in shapes.items()} == {
        name: value.shape for name, value in peer.state_dict().items()
    }
    assert {name: RWKV4_LAYOUT.official_name(RWKV4_LAYOUT.their_name(name)) for name in shapes} == {
        n: n for n in shapes
    }


def test_views_and_strided_tensors_are_written_compactly(tmp_path):
    weights = random_weights()
    large = torch.zeros(1000, 12)
    large[7:37] = weights.tensors["emb.weight"]
    across = weights.tensors["blocks.0.att.key.weight"].T.contiguous().T
    tensors = weights.tensors | {"emb.weight": large[7:37], "blocks.0.att.key.weight": across}
    tensors |= {"head.weight": tensors["emb.weight"]}
    for form in FORMS:
        written = write_weights(replace(weights, tensors=tensors), tmp_path / form)
        assert torch.equal(written.tensors["blocks.0.att.key.weight"], across)
        assert torch.equal(written.tensors["head.weight"], written.tensors["emb.weight"])
    assert (tmp_path / "there.pth").stat().st_size < large.nbytes


def test_model_does_not_share_memory_with_the_weights():
    weights = random_weights()
    model = weights.model()
    assert model.training
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.requires_grad
            parameter.zero_()
    assert_same_bits(weights, random_weights())


# The peers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_agree_with_transformers_both_ways(tmp_path, dtype):
    transformers = pytest.importorskip("transformers")
    weights = random_weights(RWKV4Config(50, 7, 40), dtype=dtype)
    tokens = torch.randint(50, (2, 32))
    write_weights(weights, tmp_path / "ours")
    theirs = logits_in_transformers(tmp_path / "ours", tokens)
    # Some hundred float32 operations in a row, each with a rounding error of 6e-8.
    assert relative_error(compute_logits(weights, tokens), theirs) < 2e-5

    # Saved by transformers itself; its inference must not have changed the weights.
    peer = transformers.RwkvForCausalLM.from_pretrained(tmp_path / "ours", dtype=dtype)
    assert (peer.config.rescale_every, peer.config.eos_token_id, peer.config.bos_token_id) == (0, None, None)
    peer.eval()(tokens)
    for name, shards in (("theirs", "1GB"), ("sharded", "20KB")):
        peer.save_pretrained(tmp_path / name, max_shard_size=shards)
        # In float16, transformers stores time_decay and time_first in float32.
        assert_same_bits(read_weights(tmp_path / name).cast(dtype), weights)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_agree_with_rwkv7_hf_both_ways(tmp_path, dtype):
    package = pytest.importorskip("rwkv7_hf")
    weights = random_weights(SIZE7, dtype=dtype)
    write_weights(weights, tmp_path / "ours")
    peer, report = package.RWKV7ForCausalLM.from_pretrained(tmp_path / "ours", dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    peer.save_pretrained(tmp_path / "theirs")
    # They store w0 in float32.
    assert_same_bits(read_weights(tmp_path / "theirs").cast(dtype), weights)
    tokens = torch.randint(30, (2, 20))
    with torch.no_grad():
        theirs = peer.float().eval()(tokens).logits
    assert relative_error(compute_logits(weights, tokens), theirs) < 2e-5


def test_folder_of_official_names_below_a_base_model_is_read(tmp_path):
    """As the class of transformers' pending pull request writes it."""
    weights = random_weights(SIZE7)
    config = LAYOUTS[-1].config_of(SIZE7, torch.float32)
    assert config["architectures"] == ["Rwkv7ForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {name if name == "head.weight" else f"rwkv7.{name}": v for name, v in weights.tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_bits(read_weights(tmp_path), weights)


def test_rwkv7_with_another_head_size_is_refused(tmp_path):
    """rwkv7-hf's GroupNorm has the epsilon head_dim * norm_eps, so the same tensors would give other logits."""
    weights = random_weights(replace(SIZE7, head_size=32))
    torch.save(weights.tensors, tmp_path / "x.pth")
    layout = layout_of("rwkv7")
    config = layout.config_of(weights.config, torch.float32)
    assert config["head_dim"] == 32
    inferred = {key: value for key, value in config.items() if key != "head_dim"}
    for name, content in (("stated", config), ("inferred", inferred)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
        save_file(layout.from_official(weights.tensors), tmp_path / name / "model.safetensors")
    from_tensors = ": it has heads of 32 channels; only heads of 64 are supported"
    for name, message in (
        ("x.pth", from_tensors),
        ("inferred", from_tensors),
        ("stated", "has head_dim 32; rwkv7 has 64"),
    ):
        with pytest.raises(UserError) as error:
            read_weights(tmp_path / name)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    # A checkpoint of rwkv_pl has the epsilon of rwkv_pl.
    write_weights(weights, tmp_path / "ours.ckpt")
    assert_same_bits(read_weights(tmp_path / "ours.ckpt"), weights)


@pytest.mark.parametrize(
    "layout", [layout for layout in LAYOUTS if layout.version == "rwkv7"], ids=lambda l: l.architecture
)
def test_config_of_an_rwkv7_folder_is_checked(tmp_path, layout):
    weights, config = random_weights(SIZE7), layout.config_of(SIZE7, torch.float32)
    save_file(layout.from_official(weights.tensors), tmp_path / "model.safetensors")
    for change in ({"head_dim": 32}, {"head_size": 32}, {"group_norm_epsilon": 1e-5}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=f"config.json has {next(iter(change))} "):
            read_weights(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"head_dim": None, "group_norm_epsilon": 64 * 1e-5}))
    assert_same_bits(read_weights(tmp_path), weights)


def test_transformers_model_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    config = transformers.RwkvConfig(vocab_size=40, hidden_size=24, num_hidden_layers=7, context_length=64)
    peer = transformers.RwkvForCausalLM(config)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    peer.save_pretrained(tmp_path / "theirs")
    tokens = torch.randint(40, (2, 20))
    peer.config.rescale_every = 0
    with torch.no_grad():
        theirs = peer.eval()(tokens).logits
    assert relative_error(compute_logits(read_weights(tmp_path / "theirs"), tokens), theirs) < 2e-5


@pytest.mark.parametrize("form", ["there", "there.ckpt"])
def test_weights_agree_with_the_rwkv_package(tmp_path, form):
    weights = random_weights(RWKV4Config(50, 3, 64))
    tokens = torch.randint(50, (2, 20))
    write_weights(weights, tmp_path / form)
    write_weights(read_weights(tmp_path / form), tmp_path / "official.pth")
    assert relative_error(compute_logits(weights, tokens), logits_in_rwkv(tmp_path / "official.pth", tokens)) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_official_169m_shape_agrees_with_both_peers(tmp_path, dtype, capsys):
    config = RWKV4Config(vocab_size=50277, n_layer=12, n_embd=768)
    weights = random_weights(config, dtype=dtype)
    tokens = torch.randint(50277, (1, 64))
    torch.save(weights.tensors, tmp_path / "official.pth")
    official = read_weights(tmp_path / "official.pth")
    write_weights(official, tmp_path / "folder")
    write_weights(read_weights(tmp_path / "folder"), tmp_path / "ours.ckpt")
    assert_same_bits(write_weights(read_weights(tmp_path / "ours.ckpt"), tmp_path / "back.pth"), weights)
    ours = compute_logits(read_weights(tmp_path / "ours.ckpt"), tokens)
    # On a CPU both run the same operations in the same order, so all bits agree, which verifies both file formats.
    errors = {"transformers": relative_error(ours, logits_in_transformers(tmp_path / "folder", tokens))}
    if dtype == torch.float32:  # with a half file, `rwkv` computes the first layer norm in half
        errors["rwkv"] = relative_error(ours, logits_in_rwkv(tmp_path / "back.pth", tokens))
    with capsys.disabled():
        print(f"\n169M, {dtype}: relative errors {errors}")
    assert max(errors.values()) < 2e-5


# Files written by other programs


@SIZES
@pytest.mark.parametrize("squeezed", [False, True], ids=["as-is", "squeezed"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_official_file_is_read(tmp_path, dtype, squeezed, size):
    weights = random_weights(size, dtype=dtype)
    tensors = {n: v.squeeze() if squeezed and v.shape[0] == 1 else v for n, v in weights.tensors.items()}
    torch.save(tensors, tmp_path / "official.pth")
    assert_same_bits(read_weights(tmp_path / "official.pth"), weights)
    loaded, vocabulary = load_weights(tmp_path / "official.pth")
    assert vocabulary is None
    assert loaded.config == size
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, weights.tensors[name].float()), name


def test_parameters_that_nothing_reads_are_dropped_and_named(tmp_path):
    weights = random_weights(SIZE7)
    unread = {name: torch.randn_like(value) for name, value in weights.unread.items()}
    assert sorted(unread) == [f"blocks.0.att.v{i}" for i in range(3)]
    torch.save(weights.tensors | unread, tmp_path / "402.pth")
    read = read_weights(tmp_path / "402.pth")
    assert_same_bits(read, weights)
    assert read.form.endswith("without blocks.0.att.v0, blocks.0.att.v1, blocks.0.att.v2, which nothing reads")
    written = write_weights(read, tmp_path / "zeros.pth", with_unread=True)
    assert_same_bits(written, weights)
    there = torch.load(tmp_path / "zeros.pth", weights_only=True)
    assert {name: tuple(value.shape) for name, value in there.items() if name not in weights.tensors} == {
        "blocks.0.att.v0": (1, 1, 64), "blocks.0.att.v1": (64, 3), "blocks.0.att.v2": (3, 64)
    }  # fmt: skip
    assert not any(there[name].any() for name in unread)


def test_official_file_of_parameters_or_of_old_torch_is_read(tmp_path):
    weights = random_weights()
    torch.save({name: torch.nn.Parameter(v) for name, v in weights.tensors.items()}, tmp_path / "parameters.pth")
    torch.save(weights.tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("parameters.pth", "old.pth"):
        read = read_weights(tmp_path / name)
        assert_same_bits(read, weights)
        assert not any(value.requires_grad for value in read.tensors.values())


def their_tensors(weights: Weights) -> dict[str, torch.Tensor]:
    return {RWKV4_LAYOUT.their_name(name): value for name, value in weights.tensors.items()}


def write_config(folder: Path, **changes: object) -> None:
    folder.mkdir(exist_ok=True)
    config = RWKV4_LAYOUT.config_of(SIZE, torch.float32) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_folder_of_pickled_weights_is_read_whole_and_sharded(tmp_path):
    weights = random_weights()
    theirs = their_tensors(weights)
    write_config(tmp_path / "whole")
    torch.save(theirs, tmp_path / "whole" / "pytorch_model.bin")
    assert_same_bits(read_weights(tmp_path / "whole"), weights)
    write_config(tmp_path / "parts")
    shards = {name: f"pytorch_model-{i % 3}.bin" for i, name in enumerate(theirs)}
    for shard in set(shards.values()):
        torch.save({n: v for n, v in theirs.items() if shards[n] == shard}, tmp_path / "parts" / shard)
    (tmp_path / "parts" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    assert_same_bits(read_weights(tmp_path / "parts"), weights)


def test_tied_head_is_read_from_the_tensors(tmp_path):
    weights = random_weights()
    theirs = their_tensors(weights)
    write_config(tmp_path, tie_word_embeddings=True)
    # Both matrices are stored: neither is discarded because of the config.
    save_file(theirs, tmp_path / "model.safetensors")
    assert_same_bits(read_weights(tmp_path), weights)
    save_file({n: v for n, v in theirs.items() if n != "head.weight"}, tmp_path / "model.safetensors")
    tied = read_weights(tmp_path)
    assert torch.equal(tied.tensors["head.weight"], weights.tensors["emb.weight"])
    write_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"it lacks head\.weight"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("blocks.0.att.time_faaaa", "rwkv5"),
        ("blocks.0.att.time_maa_x", "rwkv6"),
    ],
)
def test_later_rwkv_version_is_named_in_the_error(tmp_path, name, version):
    torch.save(random_weights().tensors | {name: torch.zeros(2)}, tmp_path / "later.pth")
    with pytest.raises(UserError, match=f"holds a {version} model"):
        load_weights(tmp_path / "later.pth")


@pytest.mark.parametrize("name", ["w0", "k_k", "r_k"])
def test_rwkv7_file_without_one_parameter_is_recognised(tmp_path, name):
    tensors = {key: value for key, value in random_weights(SIZE7).tensors.items() if not key.endswith(f"att.{name}")}
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(UserError, match=rf"whole rwkv7 model of 2 x 64: it lacks blocks\.0\.att\.{name}, "):
        load_weights(tmp_path / "x.pth")


def test_later_checkpoint_format_is_named_in_the_error(tmp_path):
    torch.save({"rwkv_pl": {"format": 2, "model": "rwkv4"}, "state_dict": {}}, tmp_path / "new.ckpt")
    with pytest.raises(UserError, match="format 2, this rwkv_pl reads 1"):
        load_weights(tmp_path / "new.ckpt")


# Names and entries of other programs


def add_prefix(prefix):
    return lambda tensors: {prefix + name: value for name, value in tensors.items()}


WRAPPED = {
    "compiled": (add_prefix("_orig_mod."), ", names without _orig_mod."),
    "DDP": (add_prefix("module."), ", names without module."),
    "Lightning": (
        lambda tensors: {"state_dict": add_prefix("model.")(tensors), "epoch": 3, "loops": {}},
        ", its entry state_dict, names without model.",
    ),
    "nested": (
        lambda tensors: {"model": add_prefix("module._orig_mod.")(tensors), "optimizer": {"state": {}}},
        ", its entry model, names without _orig_mod., names without module.",
    ),
    "compiled blocks": (
        lambda tensors: {re.sub(r"(blocks.\d.)", r"\1_orig_mod.", name): value for name, value in tensors.items()},
        ", names without _orig_mod.",
    ),
    "plain": (lambda tensors: tensors, ""),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_names_and_entries_of_other_programs_are_read_and_named(tmp_path, case):
    change, note = WRAPPED[case]
    whole = random_weights()
    torch.save(change(whole.tensors), tmp_path / "x.pth")
    read = read_weights(tmp_path / "x.pth")
    assert_same_bits(read, whole)
    assert read.form == "official .pth" + note and str(read).startswith(read.form)


def test_prefix_is_removed_in_folders_and_in_own_checkpoints(tmp_path):
    whole = random_weights()
    write_weights(whole, tmp_path / "folder")
    tensors = load_file(tmp_path / "folder" / "model.safetensors")
    prefixed = {name: value.clone() for name, value in add_prefix("_orig_mod.")(tensors).items()}
    del tensors  # Windows replaces no mapped file
    save_file(prefixed, tmp_path / "folder" / "model.safetensors")
    write_weights(whole, tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    content["state_dict"] = add_prefix("model._orig_mod.")(whole.tensors)
    torch.save(content, tmp_path / "x.ckpt")
    for name in ("folder", "x.ckpt"):
        read = read_weights(tmp_path / name)
        assert_same_bits(read, whole)
        assert read.form.endswith(", names without _orig_mod.")


def test_names_that_differ_only_in_the_prefix_are_not_merged(tmp_path):
    tensors = random_weights().tensors
    torch.save(tensors | {"_orig_mod.emb.weight": torch.zeros(30, 12)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"rwkv4 has no _orig_mod\.emb\.weight"):
        load_weights(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "names",
    [
        ["blocks.0.att.key.lora_A", "blocks.0.att.key.lora_B", "blocks.0.att.time_first"],
        ["base_model.model.rwkv.blocks.0.attention.key.lora_A.weight"],
        ["module.blocks.0.att.key.lora_a"],
    ],
)
def test_file_of_lora_matrices_alone_is_named(tmp_path, names):
    torch.save({name: torch.zeros(2, 2) for name in names}, tmp_path / "lora.pth")
    with pytest.raises(UserError, match=r"lora\.pth holds only LoRA matrices, such as .*: merge them") as error:
        load_weights(tmp_path / "lora.pth")
    assert "\n" not in str(error.value)


# Mismatches


def without_tensors(*names: str):
    return lambda tensors: {name: value for name, value in tensors.items() if name not in names}


def with_tensors(**more: object):
    return lambda tensors: tensors | {name.replace("__", "."): value for name, value in more.items()}


def with_every_tensor(change):
    return lambda tensors: {name: change(value) for name, value in tensors.items()}


KEY = "blocks__1__att__key__weight"
MISFITS = {
    "missing": (
        without_tensors("ln_out.bias", "blocks.1.att.key.weight"),
        "it lacks blocks.1.att.key.weight, ln_out.bias",
    ),
    "many missing": (
        lambda tensors: {n: v for n, v in tensors.items() if ".att." not in n} | {"x.att.time_first": torch.ones(1)},
        "it lacks blocks.0.att.time_decay, blocks.0.att.time_first, blocks.0.att.time_mix_k and 15 more; "
        "rwkv4 has no x.att.time_first",
    ),
    "a gap in the layers": (
        lambda tensors: {n.replace("blocks.1.", "blocks.5."): v for n, v in tensors.items()},
        "rwkv4 has no blocks.5.",
    ),
    "another shape": (
        with_tensors(**{KEY: torch.zeros(3, 4)}),
        "blocks.1.att.key.weight is (3, 4) and should be (12, 12)",
    ),
    "another ffn": (
        with_tensors(
            blocks__0__ffn__key__weight=torch.zeros(40, 12), blocks__0__ffn__value__weight=torch.zeros(12, 40)
        ),
        "blocks.0.ffn.key.weight is (40, 12) and should be (48, 12), blocks.0.ffn.value.weight is (12, 40) and",
    ),
    "too many": (with_tensors(blocks__0__att__more=torch.zeros(2)), "rwkv4 has no blocks.0.att.more"),
    "an empty embedding": (
        with_tensors(emb__weight=torch.zeros(0, 12)),
        "it has no emb.weight of (vocabulary, channels)",
    ),
    "no layers": (
        lambda tensors: {n: v for n, v in tensors.items() if "blocks" not in n} | {"att.time_first": torch.ones(1)},
        "it has no blocks",
    ),
    "NaN": (
        with_tensors(**{KEY: torch.full((12, 12), torch.nan)}),
        "blocks.1.att.key.weight holds NaN or infinite values",
    ),
    "infinite": (
        with_tensors(**{KEY: torch.full((12, 12), torch.inf)}),
        "blocks.1.att.key.weight holds NaN or infinite",
    ),
    "integers": (
        with_every_tensor(torch.Tensor.int),
        "has dtype int32; supported: float32, bfloat16, float16, float64",
    ),
    "complex": (with_tensors(**{KEY: torch.zeros(12, 12, dtype=torch.complex64)}), "has dtype complex64"),
    "sparse": (with_tensors(**{KEY: torch.zeros(12, 12).to_sparse()}), "is not a plain dense CPU tensor"),
    "without memory": (with_tensors(**{KEY: torch.zeros(12, 12, device="meta")}), ""),
    # 4 bytes on disk that would expand to 4 TB.
    "repeated": (
        with_tensors(emb__weight=torch.zeros(1).expand(1_000_000, 1_000_000)),
        "emb.weight of (1000000, 1000000) has fewer values than that in the file",
    ),
    # 400 kB on disk with matrices that would expand to 40 GB each.
    "wide": (with_tensors(emb__weight=torch.zeros(1, 100_000)), "should be"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_mismatched_weights_give_one_line_error(tmp_path, case):
    change, message = MISFITS[case]
    tensors = change(random_weights().tensors)
    torch.save(tensors, tmp_path / "x.pth")
    about = {"format": 1, "model": "rwkv4", "config": vars(SIZE), "vocabulary": None, "finished": None}
    state_dict = {f"model.{name}": value for name, value in tensors.items()}
    torch.save({"rwkv_pl": about, "state_dict": state_dict}, tmp_path / "x.ckpt")
    for path in (tmp_path / "x.pth", tmp_path / "x.ckpt"):
        with pytest.raises(UserError) as error:
            load_weights(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500
        if path.suffix == ".pth":
            assert message in str(error.value)


def test_checkpoint_with_a_wrong_config_size_is_corrupt(tmp_path):
    write_weights(random_weights(), tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    content["rwkv_pl"]["config"]["n_layer"] = 10**12
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(CorruptFileError, match="n_layer=1000000000000 in its config, and 2 in its tensors"):
        read_weights(tmp_path / "x.ckpt")


# Hostile and corrupt files


class Hostile:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def broken_safetensors(whole: bytes) -> dict[str, bytes]:
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])

    def with_header(changed: dict | bytes) -> bytes:
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + length :]

    first, second = (name for name in header if name in ("rwkv.ln_out.weight", "rwkv.ln_out.bias"))
    return {
        "truncated": whole[:-10],
        "a header alone": whole[: 8 + length],
        "half a header": whole[: 8 + length // 2],
        "a header too long": struct.pack("<Q", 2**63) + whole[8:],
        "a header of all": struct.pack("<Q", len(whole)) + whole[8:],
        "overlapping": with_header(header | {first: header[second]}),
        "an offset past the end": with_header(header | {first: header[first] | {"data_offsets": [0, 10**12]}}),
        "an offset below 0": with_header(header | {first: header[first] | {"data_offsets": [-48, 0]}}),
        "a shape of another size": with_header(header | {first: header[first] | {"shape": [2**40, 2**40]}}),
        "another dtype": with_header(header | {first: header[first] | {"dtype": "F1"}}),
        "no JSON": with_header(b"{" * 100),
        "deep JSON": with_header(b'{"a":' * 100_000),
        "a list": with_header(b"[]"),
        "more at the end": whole + b"more",
    }


def make_non_weights(folder: Path, name: str) -> dict[str, bytes]:
    whole = folder / "whole.pth"
    torch.save(random_weights().tensors, whole)
    content = whole.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    found = {"flipped": bytes(flipped)}
    itself: dict[str, object] = {}
    itself["model"] = itself
    for about, value in {
        "a list": [torch.zeros(2)],
        "a tensor": torch.zeros(2),
        "words": {"emb.weight": "words"},
        "a module": torch.nn.Linear(2, 2),
        "numbers for names": dict(enumerate(random_weights().tensors.values())),
        "nothing": {},
        "words inside": {"state_dict": {"emb.weight": "words"}},
        "itself inside": itself,
    }.items():
        torch.save(value, whole)
        found[about] = whole.read_bytes()
    for number, protocol in enumerate((True, False)):
        torch.save({"emb.weight": Hostile(folder / "owned")}, whole, _use_new_zipfile_serialization=protocol)
        found[f"hostile {number}"] = whole.read_bytes()
    found |= {
        "empty": b"",
        "garbage": bytes(range(256)) * 40,
        "a dot": b".",
        "a web page": b"<!DOCTYPE html><html><body>404: Not Found</body></html>\n",
        "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n",
        "truncated": content[: len(content) // 2],
        "a zip's beginning": content[:30],
    }
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("a.txt", "another archive")
    found["another zip"] = whole.read_bytes()
    whole.unlink()
    return found


@pytest.mark.parametrize("name", ["x.pth", "x.ckpt", "x/pytorch_model.bin", "x/model.safetensors"])
def test_file_without_weights_gives_one_line_error(tmp_path, name):
    cases = make_non_weights(tmp_path, name)
    if name.endswith(".safetensors"):
        save_file(their_tensors(random_weights()), tmp_path / "whole")
        cases |= broken_safetensors((tmp_path / "whole").read_bytes())
    is_folder = (tmp_path / name).parent != tmp_path
    for number, (about, content) in enumerate(cases.items()):
        # In other places: an error keeps the file mapped, which Windows does not overwrite.
        path = tmp_path / str(number) / name
        path.parent.mkdir(parents=True)
        if is_folder:
            write_config(path.parent)
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            load_weights(path.parent if is_folder else path)
        assert "\n" not in str(error.value), about
        assert str(path.parent) in str(error.value), about
        assert len(str(error.value)) < 500, about
    assert not (tmp_path / "owned").exists()


BAD_FOLDERS = {
    "config.json is no JSON": ({"config.json": "{"}, "is not JSON"),
    "config.json is empty": ({"config.json": ""}, "is not JSON"),
    "config.json is deep": ({"config.json": "[" * 100_000}, "is not JSON"),
    "config.json is a list": ({"config.json": "[]"}, "is a list, not a JSON object"),
    "config.json of another model": (
        {"config.json": '{"model_type": "llama"}'},
        "a llama model, says its config",
    ),
    "config.json of nothing": ({"config.json": "{}"}, "holds a None model, says its config"),
    "config.json of another epsilon": (
        {"config.json": '{"model_type": "rwkv", "layer_norm_epsilon": 0.001}'},
        "has layer_norm_epsilon 0.001; rwkv4 has 1e-05",
    ),
    "no weights": ({"model.safetensors": None}, "no weights: model.safetensors or pytorch_model.bin is missing"),
    "an index of nothing": ({"model.safetensors": None, "model.safetensors.index.json": "{}"}, "it has no weight_map"),
    "an index that leads out": (
        {
            "model.safetensors": None,
            "model.safetensors.index.json": '{"weight_map": {"a": "../outside.safetensors"}}',
        },
        "lists '../outside.safetensors', which is not a tensor file in its folder",
    ),
    "a shard that is not there": (
        {"model.safetensors": None, "model.safetensors.index.json": '{"weight_map": {"a": "b.safetensors"}}'},
        "lists b.safetensors, which is missing",
    ),
    "a vocabulary that is none": ({"vocabulary.json": "{}"}, "vocabulary is corrupt"),
    "a vocabulary of another size": ({"vocabulary.json": '{"kind": "byte"}'}, "its vocabulary has 256 tokens"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_folder_without_weights_gives_one_line_error(tmp_path, case):
    files, message = BAD_FOLDERS[case]
    save_file(their_tensors(random_weights()), tmp_path / "outside.safetensors")
    folder = tmp_path / "folder"
    write_config(folder)
    save_file(their_tensors(random_weights()), folder / "model.safetensors")
    read_weights(folder)
    for name, content in files.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content)
    with pytest.raises(UserError) as error:
        load_weights(folder)
    assert message in str(error.value)
    assert str(folder) in str(error.value)


def test_unknown_transformers_names_are_reported(tmp_path):
    names = [
        "model.layers.0.weight",
        "rwkv.blocks.{}.ln1.weight",
        "rwkv.blocks.01.ln1.weight",
        "rwkv.blocks.0.ln3",
        "z",
    ]
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        write_config(folder)
        save_file(their_tensors(random_weights()) | {name: torch.zeros(12)}, folder / "model.safetensors")
        with pytest.raises(UserError) as error:
            load_weights(folder)
        assert name.removeprefix("rwkv.") in str(error.value)
    write_config(tmp_path)
    save_file({name: torch.zeros(12) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="and 1 more"):
        load_weights(tmp_path)


def test_value_too_large_for_float16_is_an_error(tmp_path):
    weights = random_weights()
    weights.tensors["ln_out.bias"][3] = -70_000.0
    with pytest.raises(UserError, match=r"ln_out\.bias contains 7e\+04, too large for float16 \(at most 6\.55e\+04\)"):
        weights.cast(torch.float16)
    assert weights.cast(torch.bfloat16).dtype == torch.bfloat16


def test_digest_depends_only_on_the_values(tmp_path):
    weights = random_weights(dtype=torch.bfloat16)
    assert weights.digest == weights.cast(torch.float32).digest
    weights.tensors["ln_out.bias"][3] += 1
    assert weights.digest != random_weights(dtype=torch.bfloat16).digest


def test_written_folder_is_readable_by_safetensors(tmp_path):
    write_weights(random_weights(), tmp_path / "x")
    assert {name.partition(".")[0] for name in load_file(tmp_path / "x" / "model.safetensors")} == {"rwkv", "head"}
    modes = {path.stat().st_mode for path in (tmp_path / "x").iterdir()}
    assert len(modes) == 1
