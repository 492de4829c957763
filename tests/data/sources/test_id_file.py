"""Files of token ids: the arrays that numpy writes and plain numbers read alike, and wrong files give one line."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_pl.config import Data
from rwkv_pl.data.corpus import Splits
from rwkv_pl.data.datamodule import DataModule, open_data
from rwkv_pl.data.sources import id_file
from rwkv_pl.data.vocabulary import Vocabulary, vocabulary_from_dict
from rwkv_pl.errors import UserError

IDS = np.random.default_rng(0).integers(0, 300, 4000)


def opened(path: Path, dtype: str | None = None, vocab_size: int = 300, **settings: Any) -> DataModule:
    settings = {"ctx_len": 16, "batch_size": 4, "split": [0.5, 0.25, 0.25]} | settings
    data = Data(name="tokens", path=str(path), vocab="unknown", vocab_size=vocab_size, dtype=dtype, **settings)
    module = open_data(data, 0, Path(), None)
    module.prepare_data()
    module.setup()
    return module


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4", "<u8", "<i8"])
def test_npy_and_bin_of_any_integer_dtype_have_the_same_batches(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "ids.npy", IDS.astype(dtype))
    IDS.astype(dtype).astype(np.dtype(dtype).newbyteorder("<")).tofile(tmp_path / "ids.bin")
    npy, plain = opened(tmp_path / "ids.npy"), opened(tmp_path / "ids.bin", np.dtype(dtype).name)
    assert npy.token_file.splits == Splits((0, 2000), (2000, 3000), (3000, 4000))
    for file in (npy.token_file, pickle.loads(pickle.dumps(plain.token_file))):
        assert file.tokens.tolist() == IDS.tolist()
        assert isinstance(file.tokens.base, np.memmap)
        assert file.path.parent == tmp_path  # not copied
    for name in ("train_dataloader", "val_dataloader"):
        ours, theirs = next(iter(getattr(npy, name)())), next(iter(getattr(plain, name)()))
        assert ours.tolist() == theirs.tolist()
    assert (npy.unit, npy.vocabulary.size) == ("token", 300)


def test_ids_of_a_known_tokenizer_are_counted_in_bytes(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", IDS % 256)
    data = open_data(Data(name="tokens", path=str(tmp_path / "ids.npy"), ctx_len=16, vocab="byte"), 0, Path(), None)
    data.setup()
    assert (data.unit, sum(data.token_file.n_bytes)) == ("byte", 4000)


def test_ids_are_checked_once_per_version_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, IDS)
    opened(path)
    with monkeypatch.context() as patched:
        patched.setattr(id_file, "count_bytes", lambda *_: pytest.fail("checked again"))
        opened(path)
    np.save(path, np.where(np.arange(4000) == 3999, 300, IDS))
    with pytest.raises(UserError, match=r"ids.npy: token 3,999 is 300, but ids are below data.vocab_size=300: raise"):
        opened(path)
    assert opened(path, vocab_size=301).vocabulary.size == 301


@pytest.mark.parametrize("value", [-1, 300])
def test_large_file_is_checked_in_blocks_and_each_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: int
) -> None:
    monkeypatch.setattr(id_file, "FULL_CHECK_BELOW", 0)
    monkeypatch.setattr(id_file, "N_BLOCKS", 2)
    monkeypatch.setattr(id_file, "BLOCK", 1)
    for place, where in {1000: "train", 2500: "val"}.items():
        path = tmp_path / where / "ids.npy"  # Windows can't write a file that is mapped
        path.parent.mkdir()
        np.save(path, np.where(np.arange(4000) == place, value, IDS))
        data = opened(path)
        other = {"train": "val", "val": "train"}[where]
        batches = {"train": data.train_dataloader().dataset, "val": data.val_dataloader().dataset}
        counts = {"train": data.steps_per_pass, "val": len(batches["val"])}
        for _ in map(batches[other].__getitem__, range(counts[other])):
            pass
        with pytest.raises(UserError, match=f"ids.npy: token {place:,} is .*vocab_size=300"):
            for _ in map(batches[where].__getitem__, range(counts[where] + 1)):
                pass
    path = tmp_path / "ids.npy"
    np.save(path, np.where(np.arange(4000) == 3999, value, IDS))
    with pytest.raises(UserError, match="token 3,999 is"):
        opened(path)


WRONG = {
    "2-D": (lambda path: np.save(path, IDS.reshape(2, -1)), None, r"has shape \(2, 2000\): save one sequence"),
    "float": (lambda path: np.save(path, IDS / 2), None, "has dtype float64: token ids must be integers"),
    "object": (lambda path: np.save(path, np.array([[1], [2, 3]], object)), None, "not a .npy of numbers"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps([1, 2, 3])), None, "not a .npy of numbers"),
    "npz": (lambda path: np.savez(path.open("wb"), IDS), None, "not a .npy of numbers"),
    "no ids": (lambda path: np.save(path, IDS[:0]), None, "is empty"),
    "empty": (lambda path: path.touch(), None, "is empty"),
    "truncated": (lambda path: (np.save(path, IDS), os.truncate(path, 9000)), None, "or is truncated"),
    "a folder": (lambda path: path.mkdir(), None, "is a folder: give one file"),
    "nothing": (lambda path: None, None, "does not exist: give a .npy or .bin of token ids"),
    "another dtype": (lambda path: np.save(path, IDS.astype("u2")), "uint32", "has dtype uint16: leave out data.dtype"),
    "odd": (lambda path: path.write_bytes(bytes(7)), "uint32", "7 bytes, not a multiple of 4, the size of data.dtype"),
    "no dtype": (lambda path: IDS.tofile(path), None, "data.dtype is missing: .* has no header; give the type"),
    "wrong dtype": (
        lambda path: IDS.astype("u2").tofile(path),
        "uint32",
        "token 0 is .*vocab_size=300: raise it, or",
    ),
    "npy as bin": (lambda path: np.save(path.open("wb"), IDS), "uint16", "is a numpy array: rename it to ids.npy"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_file_gives_one_line_error(tmp_path: Path, case: str) -> None:
    make, dtype, message = WRONG[case]
    is_bin = case in ("odd", "no dtype", "wrong dtype", "npy as bin")
    path = tmp_path / ("ids.bin" if is_bin else "ids.npy")
    make(path)
    with pytest.raises(UserError, match=message) as raised:
        opened(path, dtype)
    assert "\n" not in str(raised.value)


SETTINGS = {
    "data.vocab_size is missing": {"vocab": "unknown"},
    "data.vocab_size must be at least 1": {"vocab": "unknown", "vocab_size": 0},
    "data.vocab_size is only for data.vocab=unknown": {"vocab": "byte", "vocab_size": 256},
    "data.dtype must be one of uint8, ": {"vocab": "unknown", "vocab_size": 300, "dtype": "float32"},
    "data=tokens takes data.vocab=unknown or byte or 20b or world, got char": {"vocab": "char"},
}


@pytest.mark.parametrize("message", SETTINGS)
def test_wrong_setting_is_named(message: str) -> None:
    with pytest.raises(UserError, match=message):
        Data(name="tokens", path="ids.npy", **SETTINGS[message])


def test_ids_without_a_text_are_spelled_in_decimal() -> None:
    vocabulary = vocabulary_from_dict({"kind": "unknown", "size": "300"})
    assert vocabulary.decode([7, 299]) == b" 7 299"
    assert vocabulary.encode(vocabulary.decode(IDS)).tolist() == IDS.tolist()
    assert vocabulary != Vocabulary()
    for text in (b"300", b"-1", b"7 a", b"1" * 5000, b"\xff"):
        with pytest.raises(UserError, match="is not a token id from 0 to 299"):
            vocabulary.encode(text)
