"""Token files: written once, in pieces, with memory independent of their size."""

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from rwkv_pl.data import byte_vocabulary
from rwkv_pl.data.corpus import Corpus, Splits, file_digest
from rwkv_pl.data.sources.text import Text
from rwkv_pl.data.token_file import TokenFile, open_tokens
from rwkv_pl.data.vocabulary import Vocabulary, build_vocabulary
from rwkv_pl.errors import UserError

TEXT = ("Zwölf Boxkämpfer jagen Viktor 😀 " * 20 + "über den großen Sylter Deich: 漢字").encode() + b"\xff\xe6\xbc\n"


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 64, 1 << 20])
def test_token_file_is_independent_of_the_piece_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    corpus = Text(path).open()
    monkeypatch.setattr(byte_vocabulary, "CHUNK", chunk)
    vocabulary = build_vocabulary("char", [corpus])
    lo, hi = corpus.splits.train
    assert vocabulary.characters == "".join(sorted({c for c in TEXT[lo:hi].decode() if c > "\x7f"}))
    file = open_tokens(corpus, vocabulary)
    assert file.tokens.dtype == vocabulary.dtype
    for name in ("train", "val", "test"):
        lo, hi = getattr(corpus.splits, name)
        assert file.split(name).tolist() == vocabulary.encode(TEXT[lo:hi]).tolist()
        assert vocabulary.decode(file.split(name)) == TEXT[lo:hi]


def test_split_inside_a_character_moves_to_its_start(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("é".encode() * 10)
    corpus = Corpus("x", path, Splits((0, 15), (15, 17), (17, 20)), file_digest(path), "")
    file = open_tokens(corpus, build_vocabulary("char", [corpus]))
    assert file.splits == Splits((0, 7), (7, 8), (8, 10))
    assert set(file.tokens.tolist()) == {256}
    assert open_tokens(corpus, Vocabulary()).splits == corpus.splits


def test_invalid_utf8_adds_no_character(tmp_path: Path) -> None:
    path = tmp_path / "text"
    noise = b"\xed\xa0\x80 \xf4\x90\x80\x80 \xe0\x82\x80 \xf8\x90\x80\x80 \xc1\x81 \xf0\x80\x82\x80 \x80 \xff"
    path.write_bytes((noise + "é".encode()) * 50)
    vocabulary = build_vocabulary("char", [Text(path).open()])
    assert vocabulary.characters == "é"


def test_text_change_that_the_digest_misses_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    corpus = Text(path).open()
    vocabulary = build_vocabulary("char", [corpus])
    open_tokens(corpus, vocabulary)
    path.write_bytes(TEXT[::-1])
    os.utime(path, ns=(0, 0))
    assert vocabulary.decode(open_tokens(corpus, vocabulary).tokens) == TEXT[::-1]


def test_tokens_are_cached_until_the_text_changes(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    corpus = Text(path).open()

    def snapshot() -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in (cache / "tokens").iterdir() if file.suffix != ".lock"}

    results: list[TokenFile] = []
    threads = [
        threading.Thread(target=lambda: results.append(open_tokens(corpus, build_vocabulary("char", [corpus]))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({(file.path, file.splits, file.digest) for file in results}) == 1
    first = snapshot()
    assert len(first) == 3
    open_tokens(corpus, build_vocabulary("char", [corpus]))
    assert snapshot() == first
    path.write_bytes(TEXT.replace(b"Z", b"z"))
    changed = Text(path).open()
    assert open_tokens(changed, build_vocabulary("char", [changed])).path != results[0].path


def test_interrupted_encoding_leaves_no_files(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    corpus = Text(path).open()
    vocabulary = build_vocabulary("char", [corpus])
    with monkeypatch.context() as patched:
        patched.setattr(Vocabulary, "encode_documents", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            open_tokens(corpus, vocabulary)
    assert [file for file in (cache / "tokens").iterdir() if "char-" not in file.name and file.suffix != ".lock"] == []
    assert vocabulary.decode(open_tokens(corpus, vocabulary).tokens) == TEXT


def test_unwritable_cache_gives_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    monkeypatch.setenv("RWKV_PL_CACHE", str(path))
    with pytest.raises(UserError, match=r"cannot write in .*tokens.*: set RWKV_PL_CACHE to another folder"):
        build_vocabulary("char", [Text(path).open()])


def test_token_file_is_pickled_by_name(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(TEXT * 100)
    file = open_tokens(Text(path).open(), Vocabulary())
    assert len(file.tokens) == len(TEXT) * 100
    sent = pickle.dumps(file)
    assert len(sent) < 2000
    assert np.array_equal(pickle.loads(sent).tokens, file.tokens)


BIG = """
import resource, sys, time
from pathlib import Path
import numpy as np
from rwkv_pl.config import Data
from rwkv_pl.data.datamodule import open_data
import torch
path, settings = sys.argv[1], eval(sys.argv[2])
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
data = open_data(Data(path=path, batch_size=64, **settings), 0, Path(), None)
data.prepare_data()
data.setup()
opened = time.process_time() - started
batches = iter(data.train_dataloader())
for _ in range(3):
    batch = next(batches)
    assert batch.shape == (64, 1025)
next(iter(data.val_dataloader()))
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
places = np.concatenate([data.train_dataloader().dataset._place_block(k)[1].ravel() for k in range(20)])
counts = np.bincount(places * 100 // len(data.train_tokens), minlength=100)
chi2 = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
print(len(data.train_tokens), memory, len(places), len(np.unique(places)), chi2, opened)
"""

TERABYTE = 10**12
CORPORA = {
    "text": ({"name": "text"}, TERABYTE * 9 // 10),
    "tokens": (
        {"name": "tokens", "vocab": "unknown", "vocab_size": 50_277, "dtype": "uint16"},
        TERABYTE * 9 // 20,
    ),
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sparse files and ru_maxrss in KiB")
@pytest.mark.slow
@pytest.mark.parametrize("name", CORPORA)
def test_terabyte_opens_at_once_uses_no_memory_and_is_sampled_evenly(tmp_path: Path, name: str) -> None:
    settings, n_train = CORPORA[name]
    path = tmp_path / "big"
    try:
        with path.open("wb") as file:
            file.truncate(TERABYTE)
    except OSError:
        pytest.skip("this file system has no sparse files of 1 TB")
    if path.stat().st_blocks > 2048:
        pytest.skip("this file system has no sparse files")
    command = [sys.executable, "-c", BIG, str(path), repr(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    n_tokens, kib, n_places, n_different, chi2, cpu_seconds = map(float, done.stdout.split())
    assert n_tokens == n_train
    assert kib < 64 * 1024
    assert cpu_seconds < 5
    # No place twice in one pass; 20,480 places in 100 equal parts: chi-square has the mean 99 and the deviation 14.
    assert n_different == n_places == 20 * 1024
    assert 40 < chi2 < 170
