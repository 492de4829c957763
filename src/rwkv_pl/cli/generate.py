"""rwkv-generate: generates text with a model and prints it token by token."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from rwkv_pl.checks import suggest_flag
from rwkv_pl.cli.entry import cli_entry_point, default_sigint
from rwkv_pl.errors import RunError, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rwkv_pl.data.vocabulary import Vocabulary
    from rwkv_pl.inference.generate import Generation
    from rwkv_pl.inference.sampling import Sampling
    from rwkv_pl.inference.text import TextStream
    from rwkv_pl.model.state import State
    from rwkv_pl.weights.tensors import Weights

SECONDS_BEFORE_PROGRESS = 1

# Samples are generated together, and each has its own state in memory.
MAX_SAMPLES = 1000


def parse_arguments() -> argparse.Namespace:
    """Parse the command line. Raises UserError for values that make no sense."""
    parser = argparse.ArgumentParser(
        prog="rwkv-generate",
        usage="%(prog)s WEIGHTS [PROMPT or -] [options]",
        description="Generates the text that follows PROMPT.",
        epilog="A prompt that starts with - follows --:   rwkv-generate RUN --max-tokens 50 -- '- a list'\n"
        "A conversation in a file:   rwkv-generate RUN 'Hello.' --state-out memory\n"
        "                            rwkv-generate RUN ' And you?' --state-in memory --state-out memory",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def refuse(message: str) -> NoReturn:
        hint = suggest_flag(message, parser._option_string_actions)
        if not hint and "unrecognized" in message:
            hint = "quote a prompt of several words, and put -- before one that starts with -"
        raise UserError(f"{message}; {hint or 'see --help'}")

    parser.error = refuse  # type: ignore[method-assign]
    add = parser.add_argument
    add("weights", type=Path, metavar="WEIGHTS", help="a run folder, .ckpt, .pth or Hugging Face folder")
    add("prompt", nargs="?", default="", metavar="PROMPT", help="the text to continue; - reads all of standard input")
    add("--max-tokens", type=int, default=256, metavar="N", help="maximum number (256); -1: no limit; 0: only read")
    add(
        "--temperature", type=float, default=1.0, metavar="X",
        help="lower is safer: fewer mistakes, more repeats; 0 takes the likeliest token (1)",
    )  # fmt: skip
    add("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens; 0 is off (0)")
    add(
        "--top-p", type=float, default=1.0, metavar="P", help="only the likeliest tokens that together reach P (1: all)"
    )
    add("--repetition", type=float, default=1.0, metavar="X", help="above 1, recent tokens are less likely (1)")
    add("--window", type=int, default=256, metavar="N", help="--repetition counts the last N tokens (256)")
    add("--seed", type=int, metavar="N", help="the same seed gives the same text; if absent, a random one is printed")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends before this text; may be given several times")
    add("--samples", type=int, default=1, metavar="N", help="number of texts (1)")
    add("--state-in", type=Path, metavar="FILE", help="continues from this state; PROMPT follows the text so far")
    add("--state-out", type=Path, metavar="FILE", help="saves the state after the last token, --stop's text included")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the matrices; bfloat16 is faster")
    add(
        "--vocab",
        type=Path,
        metavar="FILE",
        help="20B_tokenizer.json or rwkv_vocab_v20230424.txt, for weights without a vocabulary",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one (auto)")
    # parse_args() does not accept options between WEIGHTS and PROMPT.
    arguments = parser.parse_intermixed_args()
    if arguments.max_tokens < -1:
        raise UserError(f"--max-tokens must be at least 0, or -1 for no limit, got {arguments.max_tokens}")
    if not 1 <= arguments.samples <= MAX_SAMPLES:
        raise UserError(f"--samples must be from 1 to {MAX_SAMPLES:,}, got {arguments.samples}")
    if arguments.samples > 1 and arguments.state_out:
        raise UserError("--state-out saves the state of one text: leave out --samples")
    if not all(arguments.stop):
        raise UserError("--stop is empty and would end every text at once: give at least one character")
    return arguments


@cli_entry_point
def main() -> None:
    arguments = parse_arguments()
    if sys.stdout is None or (arguments.prompt == "-" and sys.stdin is None):
        raise UserError("standard input or output is closed: redirect it to a file or /dev/null instead")
    text = sys.stdin.buffer.read() if arguments.prompt == "-" else os.fsencode(arguments.prompt)

    with default_sigint():
        import torch

        from rwkv_pl.inference.generate import Generation, select_rows
        from rwkv_pl.inference.sampling import RowRandom
        from rwkv_pl.inference.state_file import GenerationState, check_replaceable, load_state, save_state
        from rwkv_pl.inference.text import TextStream
        from rwkv_pl.limits import limit_threads
        from rwkv_pl.ops.huge_pages import move_to_huge_pages
        from rwkv_pl.ops.linear import cast_linear_weights
        from rwkv_pl.weights.read import read_weights

    limit_threads()
    sampling = _build_sampling(arguments)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU; leave it out")
    on_gpu = arguments.device != "cpu" and torch.cuda.is_available()
    if arguments.state_out:
        check_replaceable(arguments.state_out)
    weights = read_weights(arguments.weights)
    model = weights.model().to("cuda" if on_gpu else "cpu").eval().requires_grad_(False)
    cast_linear_weights(model, getattr(torch, arguments.dtype))
    move_to_huge_pages(model)
    vocabulary = _choose_vocabulary(weights, arguments.vocab)
    remembers = arguments.state_in or arguments.state_out
    digest = f"{weights.digest} {vocabulary.digest}" if remembers else ""
    del weights  # closes the file: Windows does not replace an open one, and its run may be training
    tokens = torch.from_numpy(vocabulary.encode(text).astype("int64"))
    before = load_state(arguments.state_in, model, digest) if arguments.state_in else None
    if not len(tokens) and not before:
        tokens = torch.tensor([vocabulary.document_end])
    recent = torch.cat([before.recent, tokens]) if before else tokens
    try:
        if len(tokens):
            logits, state = _read_prompt(model, tokens, before.state if before else None)
        elif before:
            logits, state = before.logits, before.state
        rows = torch.zeros(arguments.samples, dtype=torch.int64)
        seed = int.from_bytes(os.urandom(4), "big") if arguments.seed is None else arguments.seed
        random = RowRandom(seed, arguments.samples)
        generation = Generation(
            model, logits[rows], select_rows(state, rows), sampling, random, [recent] * arguments.samples
        )
        stops = [os.fsencode(stop) for stop in arguments.stop]
        if arguments.seed is None and sampling.temperature > 0 and arguments.max_tokens:
            print(f"seed {seed} (--seed {seed} repeats this text)", file=sys.stderr)
        streams = [TextStream(stops) for _ in range(arguments.samples)]
        unfinished = before.unfinished if before else b""
        # A prompt comes after an unfinished character, so the generated text can't complete it.
        begin = [unfinished.decode(errors="replace").encode() if text else s.feed(unfinished) for s in streams]
        interrupted = _print_texts(
            generation, vocabulary, streams, begin, arguments.max_tokens, keeps_unfinished=bool(arguments.state_out)
        )
        if arguments.state_out:
            generation.catch_up()
            last = GenerationState(generation.logits, generation.state, generation.recent[0], streams[0].unfinished)
            save_state(arguments.state_out, last, digest)
    except FloatingPointError as error:
        raise RunError(f"{arguments.weights}: {error}") from error
    if interrupted:
        sys.exit(130)


def _build_sampling(arguments: argparse.Namespace) -> "Sampling":
    from rwkv_pl.inference.sampling import Sampling

    names = ("temperature", "top_k", "top_p", "repetition", "window")
    try:
        return Sampling(**{name: getattr(arguments, name) for name in names})
    except ValueError as error:
        raise UserError("--" + str(error).replace("_", "-", 1)) from error


def _choose_vocabulary(weights: "Weights", json: Path | None) -> "Vocabulary":
    """Return the vocabulary of the weights, or else the given one, or bytes if there are 256 tokens.

    Raises UserError if none is known, or if the given one does not fit.
    """
    from rwkv_pl.data.vocabulary import Vocabulary, read_vocabulary

    known, size, source = weights.vocabulary, weights.config.vocab_size, weights.path
    given = read_vocabulary(json) if json else None
    if known and given and given != known:
        raise UserError(f"--vocab {json} differs from the vocabulary stored in {source}: leave it out")
    vocabulary = known or given or (Vocabulary("byte") if size == 256 else None)
    if not vocabulary:
        raise UserError(
            f"{source} has no vocabulary for its {size:,} tokens: give --vocab 20B_tokenizer.json or "
            "--vocab rwkv_vocab_v20230424.txt"
        )
    if vocabulary.size != size:
        raise UserError(f"--vocab {json} has {vocabulary.size:,} tokens, {source} has {size:,}: give its own tokenizer")
    return vocabulary


def _read_prompt(model: "nn.Module", tokens: "Tensor", state: "State | None") -> "tuple[Tensor, State]":
    """Return the logits after tokens (T,), and the state; show a progress bar after SECONDS_BEFORE_PROGRESS."""
    from rwkv_pl.inference.generate import CHUNK, read_tokens

    tokens = tokens.to(next(model.parameters()).device)
    if len(tokens) <= CHUNK:
        return read_tokens(model, tokens[None], state)

    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=True) as bar:
        task = bar.add_task("reading the prompt", total=len(tokens))
        started = time.perf_counter()

        def progress(done: int) -> None:
            if time.perf_counter() - started > SECONDS_BEFORE_PROGRESS and console.is_terminal and bar.disable:
                bar.disable = False
                bar.start()
            bar.advance(task, done)

        return read_tokens(model, tokens[None], state, progress)


class OrderedPrinter:
    """Prints texts one after the other while all are generated together; later ones wait in a buffer."""

    def __init__(self, out: IO[bytes], texts: int) -> None:
        self._out, self._texts = out, texts
        self._waiting = [b""] * texts
        self._turn = 0
        self.unfinished = set(range(texts))
        self._announce()

    def add(self, text: int, shown: bytes) -> None:
        self._waiting[text] += shown
        self._print()

    def end(self, text: int) -> None:
        self.unfinished.discard(text)
        self._print()

    def _print(self) -> None:
        while self._turn < self._texts:
            self._out.write(self._waiting[self._turn])
            self._waiting[self._turn] = b""
            if self._turn in self.unfinished:
                break
            self._out.write(b"\n")
            self._turn += 1
            self._announce()
        self._out.flush()

    def _announce(self) -> None:
        if self._texts > 1 and self._turn < self._texts:
            self._out.write(f"--- {self._turn + 1} of {self._texts} ---\n".encode())


def _print_texts(
    generation: "Generation",
    vocabulary: "Vocabulary",
    streams: Sequence["TextStream"],
    begin: Sequence[bytes],
    max_tokens: int,
    keeps_unfinished: bool,
) -> bool:
    """Print the texts, and the speed on stderr. Returns whether Ctrl-C ended them.

    begin: the first bytes of each text. keeps_unfinished: whether the bytes that a stream holds back at the token limit
    are not printed, because the next call begins with them.
    """
    interrupted = False

    def interrupt(*_: Any) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, previous_handler)

    printer = OrderedPrinter(sys.stdout.buffer, len(streams))
    for i, stream in enumerate(streams):
        printer.add(i, begin[i])
        if stream.stopped:
            printer.end(i)
    steps = written = 0
    started = time.perf_counter()
    previous_handler = signal.signal(signal.SIGINT, interrupt)
    try:
        while printer.unfinished and not interrupted and steps != max_tokens:
            tokens = next(generation).tolist()
            steps += 1
            written += len(printer.unfinished)
            for i in tuple(printer.unfinished):
                spelled = vocabulary.decode(tokens[i : i + 1])
                printer.add(i, streams[i].feed(spelled))
                # A token without any bytes is the end of a document.
                if streams[i].stopped or not spelled:
                    printer.add(i, streams[i].close())
                    printer.end(i)
    finally:
        signal.signal(signal.SIGINT, previous_handler)
    seconds = time.perf_counter() - started
    for i in tuple(printer.unfinished):
        if not keeps_unfinished:
            printer.add(i, streams[i].close())
        printer.end(i)
    if written:
        print(f"{written:,} tokens, {written / seconds:,.0f} tokens/s", file=sys.stderr)
    return interrupted


if __name__ == "__main__":
    main()
