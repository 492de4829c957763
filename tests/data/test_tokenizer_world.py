"""The World vocabulary: exact on any bytes, equal to the tokenizer of the package rwkv, and cut where no token goes."""

import itertools
import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from rwkv_pl.data import tokenizer_world
from rwkv_pl.data.byte_vocabulary import Vocabulary
from rwkv_pl.data.tokenizer_world import VocabularyWorld, find_installed
from rwkv_pl.data.vocabulary import read_vocabulary, vocabulary_from_dict
from rwkv_pl.errors import UserError

LONGER = [b"\n\n", b"th", b"the", b"ther", b"here", b" the", "é".encode(), "中文".encode(), b"aaaaaaaa"]


def as_file(tokens: list[bytes]) -> str:
    def literal(token: bytes) -> str:
        try:
            return repr(token.decode())
        except UnicodeDecodeError:
            return repr(token)

    return "".join(f"{i} {literal(token)} {len(token)}\n" for i, token in enumerate(tokens, 1))


@pytest.fixture
def small(tmp_path: Path) -> VocabularyWorld:
    """All bytes and nine longer tokens."""
    (tmp_path / "small.txt").write_text(as_file([bytes([i]) for i in range(256)] + LONGER), encoding="utf-8")
    return VocabularyWorld.read(tmp_path / "small.txt")


def encode_greedily(text: bytes) -> list[int]:
    """The definition: at each position the longest token that fits."""
    ids, at = [], 0
    while at < len(text):
        longest = max((token for token in LONGER if text.startswith(token, at)), key=len, default=text[at : at + 1])
        ids.append(257 + LONGER.index(longest) if len(longest) > 1 else 1 + longest[0])
        at += len(longest)
    return ids


def random_text(n: int, seed: int = 0) -> bytes:
    rng = random.Random(seed)
    parts = [*LONGER, b"t", b"h", b"e", b"\n", b" ", b"\xe4\xb8", b"\xff", b"a"]
    return b"".join(rng.choices(parts, k=n))


def test_the_longest_token_that_fits_is_next(small):
    text = random_text(3000)
    ids = small.encode(text)
    assert ids.dtype == np.uint16 and ids.tolist() == encode_greedily(text)
    assert small.decode(ids) == text
    assert small.bytes_per_token[ids].sum() == len(text)
    assert small.encode(b"").tolist() == [] and small.decode([0, 65535]) == b""


def test_any_bytes_are_encoded(small):
    text = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)
    assert small.decode(small.encode(text)) == text.tobytes()


def test_pieces_between_split_points_encode_as_the_whole(small, monkeypatch):
    monkeypatch.setattr("rwkv_pl.data.byte_vocabulary.CHUNK", 100)
    data = np.frombuffer(random_text(3000), np.uint8)
    chunks = small.chunks(data, 7, len(data) - 5)
    assert len(chunks) > 50
    parts = [small.encode(data[lo:hi]) for lo, hi in chunks]
    assert np.concatenate(parts).tolist() == small.encode(data[7 : len(data) - 5]).tolist()
    alike = np.frombuffer(b"a" * 300, np.uint8)  # a token may go across everywhere
    assert small.split_point(alike, 3, 200) == 3


def test_documents_end_with_token_0(small):
    text = b"the\nhere\n\nthere"
    ids = small.encode_documents(text, [3, 8])
    expected = [*small.encode(b"the"), 0, *small.encode(b"here"), 0, *small.encode(b"\nthere")]
    assert ids.tolist() == expected


def test_vocabulary_is_restored_from_plain_types(small):
    there = vocabulary_from_dict(small.to_dict())
    assert (there, there.digest) == (small, small.digest) and there != Vocabulary()
    text = random_text(100)
    assert there.encode(text).tolist() == small.encode(text).tolist()
    with pytest.raises(UserError, match="the stored vocabulary is corrupt"):
        vocabulary_from_dict({"kind": "world", "tokens": "a b a"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda lines: lines[:5] + lines[6:], "line 6 is not token 6"),
        (lambda lines: [*lines[:-1], "265 'aaaaaaaa' 7"], "line 265 is not token 265"),
        (lambda lines: [*lines[:-1], "265 __import__('os') 7"], "malformed node or string"),
        (lambda lines: [*lines[:-1], "265 'the' 3"], "a token is empty, or there twice"),
        (lambda lines: ["1 'th\\n' 3", *lines[1:]], "it has no token for some byte"),
        (lambda lines: ["{"], "invalid syntax"),
    ],
)
def test_another_file_gives_one_line_error(tmp_path, change, reason):
    lines = as_file([bytes([i]) for i in range(256)] + LONGER).splitlines()
    (tmp_path / "x.txt").write_text("\n".join(change(lines)), encoding="utf-8")
    with pytest.raises(UserError, match=f"x.txt is not the World vocabulary .*{reason}") as error:
        read_vocabulary(tmp_path / "x.txt")
    assert "\n" not in str(error.value)


def test_missing_file_names_the_package(monkeypatch):
    monkeypatch.setattr(tokenizer_world, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"set data.vocab_path=rwkv_vocab_v20230424.txt, or run `pip install rwkv`"):
        read_vocabulary(None, "world")


@pytest.fixture(scope="module")
def world() -> VocabularyWorld:
    path = find_installed()
    if path is None:
        pytest.skip("needs the package rwkv")
    return VocabularyWorld.read(path)


def test_official_vocabulary(world):
    assert (world.size, world.document_end) == (65536, 0)
    assert sum(world.bytes_per_token > 0) == 65529 and world.bytes_per_token.max() == 128
    assert world.encode(b"\0\n~").tolist() == [1, 11, 127]


def mixed_languages(world: VocabularyWorld) -> bytes:
    """The messages of Sphinx in all its languages, random tokens of the vocabulary, and bytes that are not UTF-8."""
    sphinx = find_spec("sphinx")
    folder = Path(sphinx.submodule_search_locations[0]) if sphinx and sphinx.submodule_search_locations else None
    pages = [path.read_bytes()[:20_000] for path in sorted(folder.glob("locale/*/*/sphinx.po"))] if folder else []
    rng = random.Random(0)
    tokens = [token for token in world._token_bytes if token]
    pages += [b"".join(rng.choices(tokens, k=200)) + rng.randbytes(200) for _ in range(200)]
    return b"".join(pages)


@pytest.mark.slow
def test_ids_equal_those_of_the_rwkv_package(world):
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    text, n = mixed_languages(world), 1_000_000
    text = b"".join(text[at : at + n // 10] for at in range(0, len(text), len(text) // 10))[:n]
    assert len(text) == n
    expected = TRIE_TOKENIZER(str(find_installed())).encodeBytes(text)
    assert world.encode(text).tolist() == expected
    data = np.frombuffer(text, np.uint8)
    edges = [0, *(world.split_point(data, 0, at) for at in range(5000, n, 5000)), n]
    parts = [world.encode(text[lo:hi]) for lo, hi in itertools.pairwise(edges)]
    assert np.concatenate(parts).tolist() == expected
