"""Corrupt files give a one-line error or a correct run, never a traceback or a wrong result."""

import io
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from command import SMALL, TEXT, Result, call

from rwkv_pl.cli.train import main
from rwkv_pl.data.sources.text import Text
from rwkv_pl.data.token_file import open_tokens
from rwkv_pl.data.vocabulary import build_vocabulary
from rwkv_pl.errors import UserError
from rwkv_pl.weights.checkpoint import read_checkpoint
from rwkv_pl.weights.read import load_weights

RUN = (*SMALL, "trainer.max_steps=4", "callbacks.last.every_n_train_steps=2", "hydra.run.dir=run")
# Changing these would start other processes or a longer run.
HELD = ("trainer.devices=1", "trainer.num_nodes=1", "trainer.strategy=auto", "trainer.accelerator=cpu")
HELD += ("trainer.max_steps=6", "trainer.max_epochs=null", "trainer.max_time=null", "data.num_workers=0")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of four steps, in a folder with its corpus.txt."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "corpus.txt").write_bytes(TEXT)
    assert forks.run(folder, *RUN).code == 0
    return folder / "run"


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """command(*overrides) -> Result, in this process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_bytes(TEXT)

    return lambda *arguments: call(main, ["rwkv-train", *arguments], monkeypatch, capfd)


def is_clean(result: Result) -> bool:
    lines = result.err.splitlines()
    return "Traceback" not in result.err + result.out and (
        result.code == 0 or (result.code in (1, 2) and lines[-1].startswith("rwkv-train: "))
    )


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Corrupt data in one of the ways in which disks, networks and people do."""
    content, kind = bytearray(data), draw.randrange(6)
    at, length = draw.randrange(len(content)), draw.randrange(1, 600)
    if kind <= 1:
        content[at] ^= 1 << draw.randrange(8)
    elif kind == 2:
        del content[at:]
    elif kind == 3:
        content[at : at + length] = bytes(len(content[at : at + length]))
    elif kind == 4:
        del content[at : at + length]
    else:
        content[at:at] = draw.randbytes(length)
    return bytes(content)


def are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(are_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(are_equal, one, other))
    return one == other


def test_mutated_checkpoint_never_loads_with_other_content(run, tmp_path):
    """No mutated checkpoint is read with different content. Half are read as a run's checkpoint, half as weights."""
    whole = (run / "checkpoints" / "last.ckpt").read_bytes()
    content = read_checkpoint(run / "checkpoints" / "last.ckpt")
    weights = load_weights(run / "checkpoints" / "last.ckpt")[0].state_dict()
    draw, path, refused = random.Random(1), tmp_path / "x.ckpt", 0
    for number in range(400):
        path.write_bytes(mutate(whole, draw))
        try:
            if number % 2:
                assert are_equal(content, read_checkpoint(path))
            else:
                assert are_equal(weights, load_weights(path)[0].state_dict())
        except UserError as error:
            assert "\n" not in str(error)
            assert str(path) in str(error)
            refused += 1
    assert refused > 350  # the others changed unused bytes between the archive's records


def walk_places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(content, dict):
        for key in content:
            yield from walk_places(content[key], (*path, key))
    elif isinstance(content, list):
        for index in range(min(len(content), 2)):
            yield from walk_places(content[index], (*path, index))


def set_at(content: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        content = content[key]
    if value is KeyError:
        del content[path[-1]]
    else:
        content[path[-1]] = value


WRONG = (KeyError, None, "text", -3, 10**12, [], {}, {"x": 1}, torch.ones(3), float("nan"))


def wrong_checkpoints(run: Path, number: int, seed: int) -> Iterator[tuple[bytes, str]]:
    """Intact archives with wrong content: a part is missing or has another type."""
    whole = (run / "checkpoints" / "last.ckpt").read_bytes()
    draw = random.Random(seed)
    spots = list(walk_places(torch.load(io.BytesIO(whole), weights_only=True)))
    outer = [spot for spot in spots if len(spot) <= 2]
    for _ in range(number):
        content = torch.load(io.BytesIO(whole), weights_only=True)
        spot, value = draw.choice(draw.choice([spots, outer])), draw.choice(WRONG)
        set_at(content, spot, value)
        file = io.BytesIO()
        torch.save(content, file)
        yield file.getvalue(), f"{spot} = {value}"


SAMPLE_SIZES = pytest.mark.parametrize("n", [8, pytest.param(120, marks=pytest.mark.slow)])


@SAMPLE_SIZES
def test_checkpoint_with_wrong_content_gives_an_error_or_a_run(run, tmp_path, command, n):
    """Like checkpoints written by somebody else: if one is accepted, the run must end normally."""
    for file, what in wrong_checkpoints(run, n, seed=2):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(run, tmp_path / "run")
        (tmp_path / "run" / "checkpoints" / "last.prev.ckpt").unlink()
        for name in ("last.ckpt", "best.ckpt"):
            (tmp_path / "run" / "checkpoints" / name).unlink()
            (tmp_path / "run" / "checkpoints" / name).write_bytes(file)
        result = command("resume=run", *HELD)
        assert is_clean(result), (what, result)


VALUES = ("null", "abc", "-1", "0", "1e400", ".nan", "[1, 2]", "{a: 1}", "true", "7")


def mutate_config(text: str, draw: random.Random) -> str:
    lines = text.splitlines(keepends=True)
    at, kind = draw.randrange(len(lines)), draw.randrange(6)
    key = lines[at].partition(":")[0]
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines[at] = (
            f"{key}: {draw.choice(['null', 'abc', '-1', '0', '1e400', '.nan', '[1, 2]', '{a: 1}', 'true', '7'])}\n"
        )
    elif kind == 2:
        lines[at] = lines[at].replace(key.strip(), key.strip()[:-1], 1)
    elif kind == 3:
        lines.insert(at, lines[draw.randrange(len(lines))])
    else:
        return mutate(text.encode(), draw).decode(errors=draw.choice(["replace", "ignore", "surrogateescape"]))
    return "".join(lines)


@SAMPLE_SIZES
def test_mutated_config_gives_an_error_or_a_run(run, tmp_path, command, n):
    text = (run / ".hydra" / "config.yaml").read_text()
    draw = random.Random(8)
    outcomes = {0: 0, 1: 0, 2: 0}
    for _ in range(n):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(run, tmp_path / "run")
        config = mutate_config(text, draw)
        (tmp_path / "run" / ".hydra" / "config.yaml").write_text(config, errors="surrogateescape")
        result = command("resume=run", *HELD)
        assert is_clean(result), (config, result)
        outcomes[result.code] += 1
    assert outcomes[2] > 0.3 * n and outcomes[0] > 0.1 * n, outcomes


def test_mutated_token_file_is_rebuilt_or_detected(tmp_path, monkeypatch):
    """A corrupt token file in the cache is rebuilt; a corrupt corpus is detected by its digest."""
    monkeypatch.setenv("RWKV_PL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text"
    path.write_bytes("Fünf größere Bären äßen Öl. ".encode() * 200)
    corpus = Text(path).open()
    vocabulary = build_vocabulary("char", [corpus])
    tokens = open_tokens(corpus, vocabulary)
    expected, splits = tokens.tokens.copy(), tokens.splits
    del tokens  # Windows can't overwrite a mapped file
    draw = random.Random(4)
    files = [file for file in (tmp_path / "cache" / "tokens").iterdir() if file.suffix != ".lock"]
    assert len(files) == 3
    for _ in range(150):
        file = draw.choice(files)
        file.write_bytes(mutate(file.read_bytes(), draw))
        assert build_vocabulary("char", [corpus]) == vocabulary
        again = open_tokens(corpus, vocabulary)
        assert again.splits == splits
        assert (again.tokens == expected).all()
        del again
    whole, digest = path.read_bytes(), corpus.digest
    del corpus
    for _ in range(50):
        path.write_bytes(corrupted := mutate(whole, draw))
        if corrupted:
            assert (Text(path).open().digest == digest) == (corrupted == whole)


@pytest.mark.slow
def test_mutated_run_folder_gives_an_error_or_a_run_in_a_process(run, tmp_path):
    draw = random.Random(5)
    checkpoint = (run / "checkpoints" / "last.ckpt").read_bytes()
    config = (run / ".hydra" / "config.yaml").read_text()
    wrong = wrong_checkpoints(run, 10, seed=6)
    for number in range(30):
        folder = tmp_path / str(number)
        shutil.copytree(run.parent, folder)
        if number % 3 == 0:
            (folder / "run" / ".hydra" / "config.yaml").write_text(
                mutate_config(config, draw), errors="surrogateescape"
            )
        else:
            corrupted = mutate(checkpoint, draw) if number % 3 == 1 else next(wrong)[0]
            (folder / "run" / "checkpoints" / "last.ckpt").unlink()
            (folder / "run" / "checkpoints" / "last.ckpt").write_bytes(corrupted)
        result = forks.run(folder, "resume=run", *HELD)
        assert is_clean(result), (number, result)
