"""rwkv-generate: its output, byte for byte, and its exit codes."""

import io
import os
import signal
import subprocess
import sys
from itertools import islice

import pytest
import torch
from command import Result, call
from small_20b import small_20b
from systems import WINDOWS
from versions import FEWEST_CHANNELS, VERSIONS, small_model

from rwkv_pl import RWKV4, RWKV4Config
from rwkv_pl import generate as api
from rwkv_pl.cli import generate
from rwkv_pl.data.tokenizer_20b import Vocabulary20B


@pytest.fixture(scope="module")
def model(request):
    """An indirect parameter is its version."""
    version = getattr(request, "param", "rwkv4")
    model = small_model(version, vocab_size=256, n_layer=2, n_embd=FEWEST_CHANNELS[version]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture(autouse=True)
def weights(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(model.state_dict(), "model.pth")


needs_bytes = pytest.mark.skipif(WINDOWS, reason="an argument can't hold any bytes on Windows")


@pytest.fixture
def run(monkeypatch, capfdbinary):
    def run(*arguments: str, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        result = call(generate.main, ["rwkv-generate", *arguments], monkeypatch, capfdbinary)
        return Result(result.code, result.out.decode(), result.err.decode())  # strict: all output is UTF-8

    return run


def generate_expected(model, prompt: bytes, n: int, **sampling: object) -> str:
    """The Python API's text for the prompt, then a newline."""
    tokens = api(model, torch.tensor([list(prompt)]), **sampling)
    return bytes(int(token) for token in islice(tokens, n)).decode(errors="replace") + "\n"


@pytest.mark.parametrize("model", VERSIONS, indirect=True)
def test_output_is_the_continuation_of_the_prompt(model, run):
    result = run("model.pth", "def f", "--seed", "3", "--max-tokens", "50")
    assert (result.code, result.out) == (0, generate_expected(model, b"def f", 50, seed=3))
    assert result.err.startswith("50 tokens, ") and result.err.count("\n") == 1


def test_options_match_the_python_api(model, run):
    given = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "repetition": 1.2, "window": 9}
    options = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    result = run("model.pth", "abc", "--seed", "1", "--max-tokens", "60", *options)
    assert result.out == generate_expected(model, b"abc", 60, seed=1, **given)


@pytest.mark.parametrize(
    "prompt", ["a, b", "'q' \"r\"", "{x: [y]}", "null", "12", "a=b", "", "π€", "two\nlines", "x\0y"]
)
def test_prompt_is_used_unchanged(model, run, prompt):
    result = run("model.pth", prompt, "--temperature", "0", "--max-tokens", "8")
    assert result.out == generate_expected(model, prompt.encode() or b"\n", 8, temperature=0)


@needs_bytes
def test_prompt_of_binary_bytes(model, run):
    prompt = b"\xff\xfe\x80ok"
    result = run("model.pth", os.fsdecode(prompt), "--temperature", "0", "--max-tokens", "8")
    assert result.out == generate_expected(model, prompt, 8, temperature=0)


def test_prompt_starting_with_a_dash_needs_a_double_dash(model, run):
    result = run("model.pth", "--temperature", "0", "--max-tokens", "8", "--", "-5 --x")
    assert result.out == generate_expected(model, b"-5 --x", 8, temperature=0)
    refused = run("model.pth", "--x")
    assert refused.code == 2 and "put -- before one that starts with -" in refused.err and refused.err.count("\n") == 1


def test_prompt_of_a_megabyte_on_stdin(run):
    model = RWKV4(RWKV4Config(vocab_size=256, n_layer=1, n_embd=8)).eval()
    torch.save(model.state_dict(), "model.pth")
    prompt = bytes(range(256)) * 4096
    result = run("model.pth", "-", "--temperature", "0", "--max-tokens", "4", stdin=prompt)
    state = None
    with torch.no_grad():
        for piece in torch.tensor(list(prompt))[None].split(1 << 16, dim=1):
            logits, state = model(piece, state)
    assert result.code == 0
    assert result.out.encode()[:1] == bytes([int(logits[0, -1].argmax())]).decode(errors="replace").encode()[:1]


@needs_bytes
def test_stop_string_is_not_printed(model, run):
    whole = bytes(map(int, islice(api(model, torch.tensor([list(b"abc")]), seed=1), 60)))
    stop = whole[20:23]
    stops = ("--stop", "never there", "--stop", os.fsdecode(stop))
    result = run("model.pth", "abc", "--seed", "1", "--max-tokens", "60", *stops)
    assert result.out == whole[: whole.index(stop)].decode(errors="replace") + "\n"


def test_samples_are_printed_in_order_with_separate_seeds(model, run):
    tokens = api(model, torch.tensor([list(b"abc")] * 3), seed=4)
    rows = torch.stack(list(islice(tokens, 30)), 1)
    texts = [bytes(row.tolist()).decode(errors="replace") for row in rows]
    result = run("model.pth", "abc", "--seed", "4", "--max-tokens", "30", "--samples", "3")
    assert result.out == "".join(f"--- {i} of 3 ---\n{text}\n" for i, text in enumerate(texts, 1))
    alone = run("model.pth", "abc", "--seed", "4", "--max-tokens", "30")
    assert alone.out == texts[0] + "\n"


@needs_bytes
def test_later_sample_is_printed_after_earlier_ones(model, run):
    rows = torch.stack(list(islice(api(model, torch.tensor([list(b"a")] * 2), seed=4), 30)), 1)
    first, second = (bytes(row.tolist()) for row in rows)
    stop = second[3:5]
    assert stop not in first
    result = run("model.pth", "a", "--seed", "4", "--max-tokens", "30", "--samples", "2", "--stop", os.fsdecode(stop))
    shown = (text.decode(errors="replace") for text in (first, second[: second.index(stop)]))
    assert result.out == "--- 1 of 2 ---\n{}\n--- 2 of 2 ---\n{}\n".format(*shown)


@pytest.mark.parametrize("model", VERSIONS, indirect=True)
def test_saved_state_continues_exactly(model, run):
    whole = generate_expected(model, b"abc", 40, temperature=0)
    first = run("model.pth", "abc", "--temperature", "0", "--max-tokens", "15", "--state-out", "memory")
    second = run("model.pth", "--temperature", "0", "--max-tokens", "25", "--state-in", "memory")
    # Split where no multi-byte character is cut.
    assert whole.isascii() or "\ufffd" in whole
    assert first.out[:-1] + second.out == whole
    said = run("model.pth", "d", "--temperature", "0", "--max-tokens", "9", "--state-in", "memory")
    written = list(islice(api(model, torch.tensor([list(b"abc")]), temperature=0), 15))
    heard = b"abc" + bytes(map(int, written)) + b"d"
    assert said.out == generate_expected(model, heard, 9, temperature=0)


@pytest.fixture
def continue_text(run):
    """continue_text((3, "prompt", ...), (5,), ...) -> the text of each call, which continues from the one before.

    Each call has its number of tokens and further arguments. The model repeats the bytes of a text without end.
    """
    text = "中文😀".encode()
    model = RWKV4(RWKV4Config(vocab_size=256, n_layer=1, n_embd=16)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("output.weight", "value.weight", "emb.weight", "head.weight")):
                parameter.zero_()
        for i, token in enumerate(text):
            model.emb.weight[token, i] = model.head.weight[text[(i + 1) % len(text)], i] = 1
    torch.save(model.state_dict(), "chinese.pth")

    if WINDOWS:
        pytest.skip("an argument can't hold any bytes on Windows")

    def texts(*calls: tuple) -> list[str]:
        shown = []
        for tokens, *arguments in calls:
            state = ["--state-in", "memory"] if shown else []
            where = ("--temperature", "0", "--max-tokens", str(tokens), *state, "--state-out", "memory")
            result = run("chinese.pth", *arguments, *where)
            assert result.code == 0, result.err
            shown.append(result.out.removesuffix("\n"))
        return shown

    return texts


LAST = "\udc80"  # the last byte of the text, as an argument of a command


def test_character_cut_by_the_token_limit_is_completed_by_the_next_call(continue_text):
    assert continue_text((23, LAST), (23,)) == ["中文😀中文😀中", "文😀中文😀中文"]
    for cut in range(1, 10):
        assert "".join(continue_text((cut, LAST), (1,), (0,), (19 - cut,))) == "中文😀中文😀"


def test_stop_is_found_across_two_calls(continue_text):
    stop = ("--stop", "文😀")
    assert continue_text((7, LAST, *stop), (50, *stop)) == ["中", ""]
    assert continue_text((7, LAST, *stop), (4, "--stop", "x")) == ["中", "文😀"]
    assert continue_text((7, LAST, *stop), (50, "--stop", "文")) == ["中", ""]


def test_prompt_after_an_unfinished_character_starts_anew(continue_text):
    assert continue_text((2, LAST), (6, LAST)) == ["", "\ufffd中文"]
    assert continue_text((6, LAST, "--stop", "文中"), (10, LAST, "--stop", "文中")) == ["中", "文中文😀"]


def test_every_sample_begins_with_the_unfinished_character(continue_text, run):
    continue_text((2, LAST))
    result = run("chinese.pth", "--temperature", "0", "--max-tokens", "4", "--state-in", "memory", "--samples", "2")
    assert result.out == "--- 1 of 2 ---\n中文\n--- 2 of 2 ---\n中文\n"


def test_state_can_be_overwritten_and_saved_without_new_text(run):
    for _ in range(2):
        kept = run("model.pth", "abc", "--max-tokens", "0", "--state-out", "memory", "--seed", "1")
        assert (kept.code, kept.out, kept.err) == (0, "\n", "")
    assert run("model.pth", "d", "--max-tokens", "3", "--state-in", "memory", "--state-out", "memory").code == 0


def test_state_of_other_weights_is_refused(model, run):
    run("model.pth", "abc", "--max-tokens", "0", "--state-out", "memory")
    state = model.state_dict()
    torch.save({name: value + 1 if name == "ln_out.bias" else value for name, value in state.items()}, "other.pth")
    refused = run("other.pth", "--state-in", "memory")
    assert refused.code == 2 and "other weights" in refused.err and refused.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "WEIGHTS"),
        (["nowhere"], "no weights at nowhere"),
        (["empty.pth"], "empty.pth"),
        (["model.pth", "a", "b"], "unrecognized arguments: b; quote a prompt of several words"),
        (["model.pth", "a", "--tokens", "5"], "unrecognized arguments: --tokens 5; did you mean --max-tokens?"),
        (["model.pth", "--top-p", "90"], "--top-p must be above 0 and at most 1, got 90"),
        (["model.pth", "--temperature", "-1"], "--temperature must be at least 0"),
        (["model.pth", "--temperature", "nan"], "--temperature"),
        (["model.pth", "--top-k", "-2"], "--top-k must be at least 0"),
        (["model.pth", "--top-p", "much"], "--top-p"),
        (["model.pth", "--repetition", "0"], "--repetition must be a number above 0"),
        (["model.pth", "--window", "0"], "--window must be at least 1"),
        (["model.pth", "--max-tokens", "-2"], "--max-tokens must be at least 0"),
        (["model.pth", "--max-tokens", "2.5"], "--max-tokens"),
        (["model.pth", "--samples", "0"], "--samples must be from 1 to 1,000"),
        (["model.pth", "--samples", "1" + 30 * "0"], "--samples must be from 1 to 1,000"),
        (["model.pth", "--state-out", "killed"], "killed.partial exists"),
        (["model.pth", "--stop", ""], "--stop is empty and would end every text at once"),
        (["model.pth", "--state-in", "nowhere"], "nowhere is missing: --state-out writes a state"),
        (["model.pth", "--state-in", "model.pth"], "not a state file of rwkv-generate"),
        (["model.pth", "--state-out", "model.pth"], "it was not changed"),
        (["model.pth", "--state-out", "no/where"], "no folder no"),
        (["model.pth", "--samples", "2", "--state-out", "x"], "one text"),
        (["odd.pth"], "has no vocabulary for its 7 tokens"),
    ],
)
def test_bad_input_gives_one_line_error(run, tmp_path, arguments, message):
    (tmp_path / "empty.pth").touch()
    (tmp_path / "killed.partial").touch()
    torch.save(RWKV4(RWKV4Config(vocab_size=7, n_layer=1, n_embd=8)).state_dict(), "odd.pth")
    before = sorted(path.name for path in tmp_path.iterdir())
    result = run(*arguments)
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("rwkv-generate: ") and result.err.count("\n") == 1
    assert message in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_diverged_model_gives_one_line_error(model, run):
    # Finite weights that give non-finite logits.
    state = {
        name: 1e30 * value if name in ("head.weight", "ln_out.weight") else value
        for name, value in model.state_dict().items()
    }
    torch.save(state, "diverged.pth")
    result = run("diverged.pth", "abc", "--seed", "1")
    assert (result.code, result.out) == (1, "")
    assert "not finite" in result.err and result.err.count("\n") == 1


SMALL = Vocabulary20B(small_20b())


@pytest.fixture
def model_20b(tmp_path):
    """A model over the tokens of the small 20b, its weights without a vocabulary, and the tokenizer's JSON."""
    torch.manual_seed(1)
    model = RWKV4(RWKV4Config(vocab_size=SMALL.size, n_layer=1, n_embd=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    torch.save(model.state_dict(), "speaker.pth")
    (tmp_path / "20b.json").write_text(small_20b(), encoding="utf-8")
    return model


@pytest.mark.parametrize("prompt", ["Licensed to", ""])
def test_given_tokenizer_generates_multi_byte_tokens(model_20b, run, prompt):
    result = run("speaker.pth", prompt, "--vocab", "20b.json", "--temperature", "0", "--max-tokens", "30")
    tokens = SMALL.encode(prompt.encode()).tolist() or [0]
    written = [int(token) for token in islice(api(model_20b, torch.tensor([tokens]), temperature=0), 30)]
    written = written[: written.index(0)] if 0 in written else written
    assert result.out == SMALL.decode(written).decode(errors="replace") + "\n"


def test_end_of_document_token_ends_the_text(model_20b, run):
    state = model_20b.state_dict()
    # <|endoftext|> always comes next.
    state["ln_out.bias"] += 5
    state["head.weight"][0] = 9
    torch.save(state, "speaker.pth")
    result = run("speaker.pth", "Licensed", "--vocab", "20b.json", "--seed", "1", "--max-tokens", "-1")
    assert (result.code, result.out) == (0, "\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speaker.pth", "a"], "give --vocab"),
        (["speaker.pth", "a", "--vocab", "nowhere"], "nowhere"),
        (["speaker.pth", "a", "--vocab", "speaker.pth"], "speaker.pth"),
        (["speaker.pth", "ab\udcff", "--vocab", "20b.json"], "byte 2 of the text is not UTF-8"),
        (["model.pth", "a", "--vocab", "20b.json"], "1,281 tokens, model.pth has 256"),
    ],
)
def test_mismatched_vocabulary_gives_one_line_error(model_20b, run, arguments, message):
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err and result.err.count("\n") == 1


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "rwkv_pl.cli.generate", *arguments]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to one process")
def test_ctrl_c_ends_cleanly_and_saves_the_state(tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = subprocess.Popen(
        command("model.pth", "abc", "--max-tokens", "-1", "--state-out", "memory"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, env=environment,
    )  # fmt: skip
    first_bytes = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130
    (first_bytes + out).decode()
    assert out.endswith(b"\n") and b"Traceback" not in err and b"tokens/s" in err
    assert (tmp_path / "memory").is_file()
    saved = torch.load("memory", weights_only=True)
    written = bytes(saved["recent"][3:].tolist()).removesuffix(bytes(saved["unfinished"]))
    assert (first_bytes + out)[:-1] == written.decode(errors="replace").encode()[-len(first_bytes + out) + 1 :]


def test_closed_pipe_exits_quietly():
    process = subprocess.Popen(
        command("model.pth", "abc", "--max-tokens", "-1"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=600) == 1
    assert b"Traceback" not in err and b"Exception" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="no shell of this kind")
@pytest.mark.parametrize("closed", ["- <&-", "hi >&-"])
def test_closed_streams_give_one_line_error(closed):
    line = f"{sys.executable} -m rwkv_pl.cli.generate model.pth {closed}"
    ended = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2 and "is closed" in ended.stderr and ended.stderr.count("\n") == 1


def test_ctrl_c_while_importing_torch_exits_at_once():
    code = "import signal\nfrom rwkv_pl.cli.entry import default_sigint\nwith default_sigint():\n"
    code += "    try: signal.raise_signal(signal.SIGINT)\n    except BaseException: pass\nprint('still here')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode != 0 and ended.stdout == ended.stderr == ""


def test_help_imports_no_torch():
    asked = "import sys; sys.argv[1:] = ['--help']\nfrom rwkv_pl.cli.generate import main\ntry: main()\n"
    asked += "except SystemExit: assert 'torch' not in sys.modules"
    output = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout
    assert "starts with - follows --" in output
