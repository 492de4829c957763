"""Runs on files of other programs: the official tokenizer's JSON, Megatron's token files, arrays of token ids."""

import csv
import gc
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from command import SMALL, TEXT, load_checkpoint
from small_20b import small_20b

from rwkv_pl import Run, load_weights
from rwkv_pl.data.tokenizer_20b import Vocabulary20B
from rwkv_pl.errors import UserError

VOCABULARY = Vocabulary20B(small_20b())
SMALL_20B = (*SMALL, "data.vocab=20b", "data.vocab_path=tokenizer.json")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    path.write_text(small_20b(), encoding="utf-8")
    return path


@pytest.fixture
def megatron(tmp_path: Path) -> Path:
    """Write corpus.bin and corpus.idx in uint16, with documents that end in token 0."""
    documents = [[*VOCABULARY.encode(line).tolist(), 0] for line in TEXT.splitlines(keepends=True)]
    lengths = np.array([len(document) for document in documents], "<i4")
    starts = (np.cumsum(lengths) - lengths).astype("<i8") * 2
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(documents), len(documents) + 1)
    index = header + lengths.tobytes() + starts.tobytes() + np.arange(len(documents) + 1, dtype="<i8").tobytes()
    (tmp_path / "corpus.idx").write_bytes(index)
    (tmp_path / "corpus.bin").write_bytes(np.concatenate(documents).astype("<u2").tobytes())
    return tmp_path / "corpus"


def load_weights_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_run_with_20b_tokenizer_needs_its_json_only_at_the_start(train, tokenizer, tmp_path):
    result = train(*SMALL_20B, "trainer.max_steps=6", "hydra.run.dir=uninterrupted")
    assert result.code == 0, result.err
    assert f"vocabulary 20b ({VOCABULARY.size})" in result.out
    for shown in (f"{len(TEXT):,} bytes", "gzip -9", "this model"):
        assert shown in result.out
    assert train(*SMALL_20B, "hydra.run.dir=run").code == 0
    tokenizer.unlink()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    result = train("resume=moved", "trainer.max_steps=6")
    assert result.code == 0, result.err
    ours, theirs = load_weights_of(tmp_path / "moved"), load_weights_of(tmp_path / "uninterrupted")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((tmp_path / "moved" / "vocab.json").read_text()) == VOCABULARY.to_dict()
    model, vocabulary = load_weights(tmp_path / "moved")
    assert vocabulary == VOCABULARY
    assert model.config.vocab_size == VOCABULARY.size
    # Weights come with their vocabulary; a vocabulary from another JSON does not match.
    result = train(*SMALL, "data.vocab=20b", "weights=moved", "hydra.run.dir=tuned")
    assert result.code == 0, result.err
    tokenizer.write_text(small_20b().replace('"dropout":null', '"dropout":0.0'), encoding="utf-8")
    result = train(*SMALL_20B, "weights=moved")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "data.vocab_path=tokenizer.json differs from the tokenizer stored in weights=moved" in result.err
    result = train("resume=moved", "trainer.max_steps=8", "data.vocab_path=other.json")
    assert "data.vocab_path=other.json contradicts the past" in result.err


def test_run_on_megatron_files_resumes_after_they_are_moved(train, tokenizer, megatron, tmp_path):
    settings = (*SMALL[2:], "data=binidx", "data.path=corpus", "data.vocab_path=tokenizer.json")
    result = train(*settings, "hydra.run.dir=uninterrupted", "trainer.max_steps=6")
    assert result.code == 0, result.err
    for shown in (f"{len(TEXT):,} bytes", f"vocabulary 20b ({VOCABULARY.size})", "gzip -9", "this model"):
        assert shown in result.out
    assert train(*settings, "hydra.run.dir=run").code == 0
    # The corpus is moved too: it is identified by its content.
    gc.collect()  # Windows moves no file that is mapped
    for ending in (".bin", ".idx"):
        shutil.move(f"{megatron}{ending}", tmp_path / f"elsewhere{ending}")
    result = train("resume=run", "trainer.max_steps=6")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "there is no" in result.err
    result = train("resume=run", "trainer.max_steps=6", "data.path=elsewhere")
    assert result.code == 0, result.err
    ours, theirs = load_weights_of(tmp_path / "run"), load_weights_of(tmp_path / "uninterrupted")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    content = (tmp_path / "elsewhere.bin").read_bytes()
    (tmp_path / "changed.bin").write_bytes(content[2:] + content[:2])
    shutil.copy(tmp_path / "elsewhere.idx", tmp_path / "changed.idx")
    result = train("resume=run", "trainer.max_steps=8", "data.path=changed")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "is not the text that" in result.err


def test_run_on_token_ids_is_scored_in_bits_per_token(train, evaluate, tmp_path):
    ids = np.cumsum(np.random.default_rng(0).integers(0, 3, 20_000)) % 300
    np.save(tmp_path / "ids.npy", ids.astype("u2"))
    settings = (*SMALL[2:], "data=tokens", "data.path=ids.npy", "data.vocab_size=300", "trainer.val_check_interval=2")
    result = train(*settings, "hydra.run.dir=run")
    assert result.code == 0, result.err
    for shown in ("18,000 / 1,000 / 1,000 tokens", "vocabulary unknown (300)", "bits per token of ids.npy"):
        assert shown in result.out
    assert "per byte" not in result.out and "gzip" not in result.out
    with (tmp_path / "run" / "metrics.csv").open() as file:
        scores = [float(row["val/bits_per_token"]) for row in csv.DictReader(file) if row["val/loss"]]
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (len(scores), found["unit"], found["objective"]) == (2, "token", pytest.approx(min(scores)))
    assert 5 < min(scores) < 9
    assert load_checkpoint(tmp_path / "run", "best.ckpt")["global_step"] in (2, 4)
    assert all(word.isdigit() for word in (tmp_path / "run" / "sample.txt").read_text().split())
    # The run is resumed after the file was moved, evaluated, and continues ids; another number of ids is refused.
    gc.collect()  # Windows moves no file that is mapped
    shutil.move(tmp_path / "ids.npy", tmp_path / "moved.npy")
    result = train("resume=run", "trainer.max_steps=6", "data.path=moved.npy")
    assert result.code == 0, result.err
    result = train("resume=run", "trainer.max_steps=8", "data.vocab_size=301")
    assert "data.vocab_size=301 contradicts the past" in result.err
    result = train(*settings, "data.path=moved.npy", "data.vocab_size=301", "weights=run")
    assert "was trained with data.vocab_size=300, the config has 301: give data.vocab_size=300 too" in result.err
    result = evaluate("weights=run", "protocol=windows")
    assert result.code == 0, result.err
    assert "bits per token" in result.out and "nan" not in result.out
    found = json.loads((tmp_path / "run" / "eval-val.json").read_text())
    assert (found["text"]["bytes"], found["text"]["tokens"]) == (None, 1000)
    assert "bits_per_byte" not in found["protocols"]["windows"]
    words = Run(tmp_path / "run").generate("1 2 3", 4, seed=1).split()
    assert words[:3] == ["1", "2", "3"] and len(words) == 7 and all(int(word) < 300 for word in words)
    with pytest.raises(UserError, match="'300' is not a token id from 0 to 299"):
        Run(tmp_path / "run").generate("1 300")


BAD = {
    "data.vocab_path=null": "data.vocab=20b needs the tokenizer's JSON file: set data.vocab_path=20B_tokenizer.json",
    "data.vocab_path=nosuch.json": "nosuch.json: No such file",
    "data.vocab_path=corpus.txt": "corpus.txt is not the JSON file of the 20B tokenizer",
    "data.vocab=byte": "data.vocab_path is only for data.vocab=20b and world, the config has byte: leave it out",
    "data.path=noise.txt": "byte 7,000 of",
    "data=binidx data.path=null": "data.path is missing: data=binidx reads PREFIX.bin and PREFIX.idx",
    "data=binidx data.path=nosuch": "there is no",
    "data=binidx data.path=corpus.txt": "there is no",
    "data=binidx data.path=page": "page.idx is not a binidx index",
    "data=binidx data.path=corpus data.vocab=char data.vocab_path=null": "takes data.vocab=byte or 20b or world",
    "data=binidx data.path=corpus data.vocab=byte data.vocab_path=null": "vocabulary byte has 256",
    "data=binidx data.path=corpus data.ctx_len=100000": "one window of data.ctx_len=100000",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_gives_one_line_exit_2_and_no_folder(train, tokenizer, megatron, tmp_path, arguments):
    (tmp_path / "noise.txt").write_bytes(TEXT[:7000] + b"\xff" + TEXT)
    (tmp_path / "page.idx").write_bytes(b"<!DOCTYPE html>" * 9)
    (tmp_path / "page.bin").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    result = train(*SMALL_20B, *arguments.split())
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert BAD[arguments] in result.err
    assert sorted(tmp_path.rglob("*")) == before
