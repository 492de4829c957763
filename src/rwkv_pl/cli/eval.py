"""rwkv-eval: evaluates weights on a text; writes a table, a JSON file and a picture of loss against position."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from rwkv_pl.cli.arguments import parse_arguments, print_hydra_info
from rwkv_pl.cli.entry import cli_entry_point, default_sigint
from rwkv_pl.cli.eval_report import print_report, print_total, write_report
from rwkv_pl.cli.explain import print_settings
from rwkv_pl.compose import compose, to_dataclass, to_plain_dict
from rwkv_pl.config import CORPORA, DATA_PATHS, Data, Eval, corpus_setting, errors_of_corpus
from rwkv_pl.errors import RunError, UserError, one_line
from rwkv_pl.files import as_user_error, remove_on_failure
from rwkv_pl.overrides import is_group_choice, parse_overrides, require_key, suggest_list
from rwkv_pl.runs.stored import StoredRun, make_absolute, require_no_download
from rwkv_pl.texts import take_as_typed

if TYPE_CHECKING:
    import torch
    from torch import nn

    from rwkv_pl.data.datamodule import DataModule
    from rwkv_pl.data.token_file import TokenFile
    from rwkv_pl.data.vocabulary import Vocabulary
    from rwkv_pl.weights.tensors import Weights

# Ids of a large file that are checked at once.
IDS_PER_BLOCK = 1 << 22


@cli_entry_point
def main() -> None:
    """The command. Exit codes: 0 evaluated, 1 failed while evaluating, 2 bad input."""
    argv = sys.argv[1:] = take_as_typed(sys.argv[1:])
    args = parse_arguments(argv)
    if args.multirun:
        raise UserError("rwkv-eval evaluates one model: leave out -m")
    for word in args.overrides:
        if "=" not in word and Path(word).exists():
            raise UserError(f"{word} is not a setting: to evaluate it, write weights={word}")
    overrides = parse_overrides(args.overrides, sweep=True)
    for override in overrides:
        if override.is_sweep_override():
            raise UserError(f"{override.input_line} has several values: give one{suggest_list(override)}")
        if override.key_or_group.startswith("hydra"):
            raise UserError(f"{override.input_line} is not used: out=FOLDER sets the folder of the result")
        if is_group_choice(override) and override.key_or_group != "data":
            raise UserError(f"{override.input_line} cannot be set: only data= is a choice, the weights fix the model")
    if args.explain is not None:
        print_settings(args.explain, [str(o.input_line) for o in overrides], args.config_dir, "eval")
        return
    if args.help or args.hydra_help or args.info or args.shell_completion or args.cfg in ("hydra", "all"):
        print_hydra_info(argv, [str(o.input_line) for o in overrides], args.config_dir, "eval")
        return
    settings, run = compose_settings(overrides, args.config_dir)
    if args.cfg:
        print(OmegaConf.to_yaml(OmegaConf.create(settings)), end="")
        return
    config = to_dataclass(settings, Eval)
    given = {o.key_or_group for o in overrides}
    if run is not None and "data" not in given:
        require_no_download(config.data, Path.cwd(), given)
    if run is None and "data" not in given and Path(str(config.weights)).exists():
        raise UserError(
            f"weights={config.weights} is not a run, so the text must be chosen: data=text data.path=FILE, data=enwik8 "
            "or data=stdlib"
        )
    out, stem = choose_output(config, run, given)
    with remove_on_failure(out):
        with as_user_error(out, ": give another folder with out=FOLDER"):
            if not os.access(out, os.W_OK):
                raise UserError(f"{out} is not writable: give another folder with out=FOLDER")
        if sys.stderr.isatty():
            print("loading torch ...", file=sys.stderr, flush=True)
        reports = []
        for corpus, data, report in _evaluate(config, run, given):
            print_report(report)
            is_users_text = not corpus and "data" in given and CORPORA[data.name].path
            if is_users_text and not given & {"split", "data.split", "data.val_path"}:
                print("note    data.split divides the text; to score all of it: data.split=[0,1,0]")
            write_report(report, out, f"{stem}{corpus}{'-' if corpus else ''}{config.split}")
            reports.append(report)
        if len(reports) > 1:
            print_total(reports)


def compose_settings(overrides: Sequence[Override], config_dir: str | None) -> tuple[dict[str, Any], Path | None]:
    """Return all settings in plain types, and the run folder that `weights` is or belongs to, if any.

    For a run without another choice of data, the data settings are the run's, with the overrides on top. Raises
    UserError.
    """
    weights = next((o.value() for o in overrides if o.key_or_group == "weights"), None)
    run = find_run(Path(str(weights))) if weights else None
    texts = [o.input_line or "" for o in overrides]
    if run is None or any(o.key_or_group == "data" for o in overrides):
        return to_plain_dict(compose(texts, config_dir, "eval")), run
    stored = StoredRun(run)
    config, of_corpora = stored.config(), [o for o in overrides if o.key_or_group.startswith("data.corpora.")]
    for override in of_corpora:  # the file of data=mix has no corpora, so Hydra would refuse these
        require_key(override.key_or_group, config)
        value = make_absolute(override.key_or_group, override.value())
        OmegaConf.update(config, override.key_or_group, value, merge=False)
    own = to_plain_dict(config)["data"]
    for settings in (own, *(own.get("corpora") or {}).values()):
        settings.update({key: str(stored.cwd / settings[key]) for key in DATA_PATHS if settings.get(key)})
    others = [o for o in overrides if o not in of_corpora]
    texts = [f"data={to_dataclass(own, Data).name}", *(o.input_line or "" for o in others)]
    settings = to_plain_dict(compose(texts, config_dir, "eval"))
    given = {o.key_or_group.split(".")[1] for o in others if o.key_or_group.startswith("data.")}
    settings["data"] |= {key: value for key, value in own.items() if key not in given}
    return settings, run


def find_run(source: Path) -> Path | None:
    """Return the run folder that `source` is, or whose checkpoints/ contains it."""
    folder = source.absolute().parent.parent if source.absolute().parent.name == "checkpoints" else source.absolute()
    return folder if (folder / ".hydra" / "config.yaml").is_file() else None


def choose_output(config: Eval, run: Path | None, given: set[str]) -> tuple[Path, str]:
    """Return the folder of the result and the start of its files' names.

    The stem names the weights unless they are the output folder itself, and the text if it is not the run's own.
    """
    source = Path(str(config.weights)).absolute()
    out = Path(config.out).absolute() if config.out else run or Path.cwd()
    whose = "" if source == out else f"{source.name if source.is_dir() else source.stem}-"
    data = config.data
    text = f"{Path(data.path).stem if data.path and CORPORA[data.name].path else data.name}-"
    other = run is not None and given & {"data", "data.path", "data.val_path", "data.corpora"}
    return out, f"eval-{whose}{text if other else ''}"


def _evaluate(config: Eval, run: Path | None, given: set[str]) -> Iterator[tuple[str, Data, dict[str, Any]]]:
    """Yield the name, the settings and the report of each corpus. All corpora are opened before one is scored.

    run: the run folder of the weights. given: the keys that the user set.
    """
    with default_sigint():
        import torch

        from rwkv_pl.limits import limit_threads
        from rwkv_pl.ops.heap import tune_allocator
        from rwkv_pl.runs.device import choose_kernel
        from rwkv_pl.weights.read import read_weights

    tune_allocator()
    limit_threads()
    source = Path(str(config.weights))
    weights = read_weights(source)
    vocabulary = weights.vocabulary
    if vocabulary and "data.vocab" in given and vocabulary.kind != config.data.vocab:
        raise UserError(f"weights={source} was trained with data.vocab={vocabulary.kind}: leave out data.vocab")
    opened = {}
    for name, data in config.data.parts().items():
        digest = weights.trained_on.get(name) if run is not None and "data" not in given else None
        with errors_of_corpus(name):
            opened[name] = data, _open_text(replace(config, data=data), weights, digest)
    device = _choose_device(config.accelerator)
    choose_kernel(config.kernel, device, weights.version)
    about = {
        "source": str(source),
        "file": str(weights.path),
        "form": weights.form,
        "step": weights.step,
        "model": weights.version,
        "config": asdict(weights.config),
        "parameters": sum(value.numel() for value in weights.tensors.values()),
    }
    try:
        model = weights.model().to(device, torch.float64 if config.precision == "64-true" else torch.float32)
    except (MemoryError, RuntimeError) as error:
        raise _to_run_error(error) from error
    del weights  # closes the file: Windows does not replace an open one, and its run may be training
    for name, (data, text) in opened.items():
        yield name, data, {"weights": about, **_score(replace(config, data=data), model, text)}


def _open_text(config: Eval, weights: "Weights", digest: str | None) -> "DataModule":
    """Open one corpus, and check that the weights can be scored on it. digest: of the run's own corpus."""
    from rwkv_pl.data.datamodule import open_data

    data = open_data(config.data, 0, Path.cwd(), weights.vocabulary, {"": digest} if digest else None)
    data.prepare_data()
    data.setup({"val": "validate", "test": "test"}.get(config.split, "predict"))
    corpus, vocabulary, tokens = data.corpus, data.vocabulary, data.token_file
    if weights.config.vocab_size != vocabulary.size:
        raise UserError(
            f"weights={config.weights} has {weights.config.vocab_size:,} tokens, data.vocab={vocabulary.kind} has "
            f"{vocabulary.size:,}: give the vocabulary that it was trained with"
        )
    lo, hi = getattr(tokens.splits, config.split)
    if hi - max(lo, 1) < 1:
        raise UserError(
            f"the {config.split} split of {corpus.path} has {hi - lo} tokens, too few to predict any: "
            f"use a larger corpus or another {corpus_setting('split')}"
        )
    for at in range(lo, hi, IDS_PER_BLOCK):
        tokens.check_range(at, min(at + IDS_PER_BLOCK, hi))
    if digest not in (None, corpus.digest):
        print(f"warning: {corpus.description} is not the text that the run was trained on", file=sys.stderr)
    if warning := data.text_warning():
        print(f"warning: {warning}", file=sys.stderr)
    return data


def _score(config: Eval, model: "nn.Module", data: "DataModule") -> dict[str, Any]:
    """Score the model on one corpus, in each protocol. Returns the content of the JSON file without the weights."""
    import torch

    from rwkv_pl.inference.evaluate import compute_metrics, evaluate_stream, evaluate_windows

    corpus, vocabulary, tokens = data.corpus, data.vocabulary, data.token_file
    lo, hi = getattr(tokens.splits, config.split)
    n_tokens = hi - max(lo, 1)
    n_bytes = count_scored_bytes(tokens, config.split, vocabulary) if data.unit == "byte" else None
    device = next(model.parameters()).device
    sizes = tokens.n_bytes if data.unit == "byte" else [hi - lo for lo, hi in tokens.splits]
    report: dict[str, Any] = {
        "text": {
            "corpus": corpus.name,
            "description": corpus.description,
            "digest": corpus.digest,
            "split": config.split,
            "vocabulary": {"kind": vocabulary.kind, "size": vocabulary.size, "digest": vocabulary.digest},
            "tokens": n_tokens,
            "bytes": n_bytes,
            "share": sizes[tokens.splits._fields.index(config.split)] / sum(sizes),
        },
        "protocols": {},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": config.precision,
        "kernel": config.kernel,
        "versions": {"rwkv_pl": version("rwkv_pl"), "torch": torch.__version__},
    }
    protocols: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
        "carried": (
            {"streams": min(config.streams, n_tokens), "warmup": config.warmup, "chunk_len": config.chunk_len},
            evaluate_stream,
        ),
        "windows": (
            {"ctx_len": config.data.ctx_len, "stride": config.stride or config.data.ctx_len},
            lambda *text, **how: evaluate_windows(*text, rows=config.data.eval_batch_size, **how),
        ),
    }
    autocast_dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(config.precision)
    try:
        for name, (how, protocol) in protocols.items():
            if config.protocol not in (name, "both"):
                continue
            started = time.perf_counter()
            with (
                torch.autocast(device.type, autocast_dtype) if autocast_dtype else nullcontext(),
                _Progress(name, n_tokens, n_bytes or n_tokens, data.unit) as progress,
            ):
                nats, count = protocol(model, tokens.tokens, lo, hi, **how, on_progress=progress.update)
            seconds = time.perf_counter() - started
            by_position = {}
            if name == "windows":
                means = [float(n) / int(c) if c else None for n, c in zip(nats, count, strict=True)]
                by_position = {"loss_by_position": means, "tokens_by_position": count.tolist()}
                nats, count = float(nats.sum()), int(count.sum())
            report["protocols"][name] = {
                **how,
                "tokens": count,
                "bytes": n_bytes,
                "nats": nats,
                **compute_metrics(nats, count, n_bytes),
                "seconds": seconds,
                "tokens_per_second": count / seconds,
                **by_position,
            }
    except FloatingPointError as error:
        raise RunError(f"weights={config.weights}: {error}") from error
    except (MemoryError, RuntimeError, TypeError) as error:
        raise _to_run_error(error) from error
    tokens.check_unchanged()
    return report


def count_scored_bytes(file: "TokenFile", split: str, vocabulary: "Vocabulary") -> int:
    """Count the corpus file's bytes in a split, without those of token 0, which is never a target."""
    lo, _ = getattr(file.splits, split)
    return file.split_bytes(split) - (0 if lo else int(vocabulary.bytes_per_token[file.tokens[0]]))


def _choose_device(accelerator: str) -> "torch.device":
    import torch

    from rwkv_pl.runs.device import choose_accelerator

    name = choose_accelerator("accelerator", accelerator)
    if name == "gpu":
        name = "cuda" if torch.cuda.is_available() else "mps"
    return torch.device(name)


def _to_run_error(error: Exception) -> Exception:
    """Turn an error of the device into one line."""
    import torch

    reason = one_line(error).partition(". ")[0]
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in reason:
        return RunError(
            f"out of memory ({reason or 'the system refused an allocation'}): lower streams, chunk_len or "
            "data.eval_batch_size"
        )
    return RunError(f"{type(error).__name__}: {reason[:300]}")


class _Progress:
    """A progress bar on stderr if that is a terminal: tokens/s, the score so far, time left."""

    def __init__(self, name: str, n_tokens: int, n_units: int, unit: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=n_tokens, figures="")
        self._units_per_token, self._unit = n_units / n_tokens, unit
        self._count, self._nats = 0, 0.0
        self._started = time.perf_counter()

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, count: int, nats: float) -> None:
        from rwkv_pl.inference.evaluate import bits_per_byte

        self._count, self._nats = self._count + count, self._nats + nats
        if self._count:
            bits = bits_per_byte(self._nats, self._count * self._units_per_token)
            speed = self._count / (time.perf_counter() - self._started)
            self._bar.update(
                self._task, completed=self._count, figures=f"{bits:.4f} bits/{self._unit}  {speed:,.0f} tokens/s"
            )
