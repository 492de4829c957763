"""Token ids in memory give the batches of the same ids in files; a wrong id is reported with its position."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_20b import small_20b
from test_binidx import write

from rwkv_pl import TokensDataModule
from rwkv_pl.data.sources import ids as module
from rwkv_pl.data.tokenizer_20b import Vocabulary20B
from rwkv_pl.data.vocabulary import Vocabulary
from rwkv_pl.errors import UserError

RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(0, 200, n).tolist() for n in (90, 3, 0, 200, 41, 1, 300, 77, 55, 130)]
FLAT = [i for document in DOCUMENTS for i in document]
SETTINGS: dict[str, Any] = {"ctx_len": 8, "batch_size": 4, "eval_batch_size": 3, "seed": 5, "split": (0.6, 0.2, 0.2)}


class Column:
    """Like a column of a Hugging Face dataset: rows are read when asked for."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        return self.rows[i]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def opened(ids: Any, **settings: Any) -> TokensDataModule:
    data = TokensDataModule(ids, **SETTINGS | settings)
    data.prepare_data()
    data.setup()
    return data


def batches(data: TokensDataModule) -> list[torch.Tensor]:
    train = iter(data.train_dataloader())
    return [*(next(train) for _ in range(9)), *data.val_dataloader(), *data.test_dataloader()]


def as_memmap(folder: Path) -> Any:
    path = folder / "ids"
    path.write_bytes(np.array(FLAT, np.uint16).tobytes())
    return np.memmap(path, np.uint16, mode="r")


KINDS: dict[str, Callable[[Path], Any]] = {
    "list": lambda _: FLAT,
    "tuple": lambda _: tuple(FLAT),
    "array": lambda _: np.array(FLAT),
    "big endian": lambda _: np.array(FLAT, ">u2"),
    "strided": lambda _: np.repeat(np.array(FLAT, np.uint8), 2)[::2],
    "memmap": as_memmap,
    "tensor": lambda _: torch.tensor(FLAT, dtype=torch.int32),
    "bytes": lambda _: bytes(FLAT),
    "column of ids": lambda _: Column(FLAT),
    "list of lists": lambda _: DOCUMENTS,
    "list of arrays": lambda _: [np.array(document, np.int16) for document in DOCUMENTS],
    "list of tensors": lambda _: [torch.tensor(document, dtype=torch.int64) for document in DOCUMENTS],
    "array of lists": lambda _: np.array(DOCUMENTS, object),
    "column": lambda _: Column(DOCUMENTS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_in_memory_give_the_batches_of_the_same_ids_in_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(module, "BLOCK", 64)
    ids = KINDS[kind](tmp_path)
    of_documents = not isinstance(ids[0], int | np.integer | torch.Tensor) or kind == "list of tensors"
    prefix = write(tmp_path / "corpus", DOCUMENTS if of_documents else [FLAT])
    data, files = opened(ids, vocab_size=200), opened(prefix, vocab="byte")
    assert data.token_file.splits == files.token_file.splits
    assert data.token_file.tokens.dtype == np.uint8
    for ours, theirs in zip(batches(data), batches(files), strict=True):
        assert torch.equal(ours, theirs)
    documents = f" in {sum(map(bool, DOCUMENTS))} documents" if of_documents else ""
    assert data.description().startswith(f"ids ({len(FLAT)} tokens{documents}, digest ")
    assert data.description().endswith(" tokens to train / validate / test, vocabulary unknown (200)")
    assert data.vocabulary.size == 200 and not hasattr(data.vocabulary, "bytes_per_token")


def test_ids_are_written_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(FLAT, vocab_size=200)
    path = first.token_file.path
    assert path.parent == cache / "tokens" and path.stat().st_size == len(FLAT)
    with monkeypatch.context() as patched:
        patched.setattr(module, "atomic_write", lambda _: pytest.fail("written again"))
        assert opened(np.array(FLAT), vocab_size=256).token_file.path == path
        # Documents change the splits, not the file.
        assert opened(DOCUMENTS, vocab_size=200).token_file.path == path
    assert opened(FLAT, vocab_size=300).token_file.path != path
    path.write_bytes(bytes(len(FLAT)))
    assert opened(FLAT, vocab_size=200).token_file.tokens.tolist() == FLAT


def test_ids_of_a_vocabulary_are_scored_per_byte(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(small_20b(), encoding="utf-8")
    vocabulary = Vocabulary20B(small_20b())
    ids = vocabulary.encode(b"Some words, and so on.\n" * 40)
    data = opened(ids, vocab="20b", vocab_path=tmp_path / "tokenizer.json")
    assert data.vocabulary == vocabulary == opened(ids, vocabulary=vocabulary).vocabulary
    assert sum(data.token_file.n_bytes) == 23 * 40
    assert "920 bytes" in data.description() and "vocabulary 20b" in data.description()
    assert "vocabulary byte (256)" in opened(FLAT, vocab="byte").description()


@pytest.mark.parametrize("in_files", [False, True])
def test_ids_of_an_unknown_vocabulary_have_no_text(tmp_path: Path, in_files: bool) -> None:
    ids = write(tmp_path / "corpus", DOCUMENTS) if in_files else DOCUMENTS
    data = opened(ids, vocab_size=300)
    assert data.vocabulary.size == 300 and not hasattr(data.vocabulary, "bytes_per_token")
    assert data.token_file.n_bytes == (0, 0, 0)
    assert "bytes" not in data.description()
    assert data.vocabulary.decode([1, 299]) == b" 1 299"
    assert data.vocabulary.encode(b"1 299").tolist() == [1, 299]


RANGE = (
    r": token ids must be integers from 0 to 255; correct it, or give the vocab_size of the tokenizer that made them$"
)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2, 256], r"^ids\[2\] is 256" + RANGE),
        ([1] * 70 + [-1], r"^ids\[70\] is -1" + RANGE),
        (np.array([3, 300], np.uint16), r"^ids\[1\] is 300" + RANGE),
        (np.array([3, -4], np.int8), r"^ids\[1\] is -4" + RANGE),
        (torch.tensor([3, 1 << 40]), r"^ids\[1\] is 1099511627776" + RANGE),
        ([1, 1 << 80], r"^ids\[1\] is 1208925819614629174706176" + RANGE),
        ([[1], [2, 3], [4, 999]], r"^ids\[2\]\[1\] is 999" + RANGE),
        (Column([[1], [2, -5]]), r"^ids\[1\]\[1\] is -5" + RANGE),
        (np.array([0.5, 1]), r"^ids\[0\] is 0.5 \(float64\), not an integer: token ids"),
        (torch.tensor([2.0]), r"^ids\[0\] is 2.0 \(float32\), not an integer"),
        (
            torch.tensor([2.0], dtype=torch.bfloat16),
            r"^ids cannot be converted to integers: Got unsupported ScalarType",
        ),
        ([1, 2.5], r"^ids\[1\] is 2.5 \(float\), not an integer"),
        ([1, None], r"^ids\[1\] is None \(NoneType\), not an integer"),
        ([None], r"^ids\[0\] is None"),
        (["a text"], r"^ids\[0\] is 'a text' \(str\), not an integer"),
        ([1, [2]], r"^ids\[1\] is \[2\] \(list\), not an integer"),
        ([[1], 2], r"^ids\[1\] is 2 \(int\), not a sequence of token ids"),
        ([[1], [[2]]], r"^ids\[1\]\[0\] is \[2\] \(list\), not an integer"),
        ([[1], [[2], [3, 4]]], r"^ids\[1\]\[0\] is \[2\] \(list\), not an integer"),
        ([np.ones((2, 3), int)], r"^ids\[0\] has shape \(2, 3\), but ids must have one dimension"),
        ([[1], None], r"^ids\[1\] is None \(NoneType\), not a sequence"),
        ([True, False], r"^ids\[0\] is True"),
        (
            Column([{"input_ids": [1]}]),
            r"^ids\[0\] is {'input_ids': \[1\]} \(dict\), .* such as dataset\['input_ids'\]$",
        ),
        ([], "^ids is empty: give at least one document with tokens$"),
        (np.empty(0), "^ids is empty"),
        ([[], []], "^ids is empty"),
        (None, r"^ids is None \(NoneType\), not a sequence of token ids: give a list, an array, a tensor"),
        (7, r"^ids is 7 \(int\), not a sequence"),
        (iter([1, 2]), r"^ids is .* \(list_iterator\), not a sequence"),
        ({1, 2}, r"^ids is {1, 2} \(set\), not a sequence"),
        ({"a": [1]}, r"^ids is {'a': \[1\]} \(dict\), not a sequence"),
        (
            np.ones((3, 4), int),
            r"^ids has shape \(3, 4\), .* ids.reshape\(-1\) for one sequence, or list\(ids\) if each",
        ),
        (torch.tensor(3), r"^ids has shape \(\), but ids must have one dimension"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else type(value).__name__,
)
def test_wrong_ids_give_one_line_error(monkeypatch: pytest.MonkeyPatch, cache: Path, ids: Any, message: str) -> None:
    monkeypatch.setattr(module, "BLOCK", 64)
    with pytest.raises(UserError, match=message) as caught:
        opened(ids, vocab_size=256)
    assert "\n" not in str(caught.value)
    assert not (cache / "tokens").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"token ids need vocab_size=, their number, or a vocabulary"),
        ({"vocab_size": 0}, "vocab_size must be a whole number of at least 1, got 0"),
        ({"vocab_size": 2.0}, r"vocab_size must be a whole number of at least 1, got 2\.0"),
        ({"vocab_size": 256, "vocab": "byte"}, "vocab_size, vocab and vocabulary exclude each other"),
        ({"vocab": "byte", "vocabulary": Vocabulary()}, "exclude each other"),
        ({"vocab": "char"}, "token ids take vocab=byte, 20b or world, got 'char'; for others, give vocab_size="),
        ({"vocab": "20b"}, "data.vocab=20b needs the tokenizer's JSON file"),
        ({"vocab_size": 256, "split": (0.9, 0.2, 0.1)}, r"must be three fractions \(train, val, test\) with the sum 1"),
        ({"vocab_size": 256, "ctx_len": 1000}, "the training split has 538 tokens"),
    ],
)
def test_wrong_settings_give_one_line_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        opened(FLAT, **settings)
    assert "\n" not in str(caught.value)
