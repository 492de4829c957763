"""The folder of a run, opened from Python: its metrics, loss curve, model and text."""

from __future__ import annotations

import html
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_pl.errors import RunError, UserError
from rwkv_pl.files import newest
from rwkv_pl.runs.folder import MULTIRUN, is_in_use, started_runs
from rwkv_pl.runs.outcome import read_baselines, read_result
from rwkv_pl.training.curve import columns_of, read_rows, score_unit

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.figure import Figure
    from torch import nn

    from rwkv_pl.data.vocabulary import Vocabulary

    Column = npt.NDArray[np.float64]

# Rows that a displayed table has: more are left out in the middle.
SHOWN_ROWS = 10

# The columns of a printed table, which fit into 100 characters.
PRINTED = ("step", "tokens", "seconds", "train/loss", "train/bits_per_byte", "val/bits_per_byte", "lr")


class Run:
    """A run folder: of `rwkv_pl.train`, of the command rwkv-train, or of a job of a sweep; also while it trains.

    folder: the run folder, or "latest" for the one below outputs/ that started last. Every method reads the files
    again. Raises UserError if the folder is not a run's.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = _find(folder)
        self._loaded: tuple[Any, nn.Module, Vocabulary] | None = None

    def __repr__(self) -> str:
        latest = {name: column[-1] for name, column in self.metrics.known_values().items()}
        step = f"step {latest['step']:,.0f}" if latest else "no metrics yet"
        unit = score_unit([latest])
        bits = latest.get(f"val/bits_per_{unit}")
        score = "" if bits is None else f", validation {bits:.4f} bits per {unit}"
        return f"Run({str(self.folder)!r}): {self._status()}, {step}{score}"

    def _status(self) -> str:
        """Of result.json; or, without one, whether a process uses the folder."""
        return str(read_result(self.folder).get("status") or ("running" if is_in_use(self.folder) else "interrupted"))

    @property
    def metrics(self) -> Metrics:
        """The columns of metrics.csv by name, each (rows,) float64; NaN where a row has no value."""
        import numpy as np

        rows = read_rows(self.folder / "metrics.csv", up_to=sys.maxsize)
        columns = dict.fromkeys([*columns_of(score_unit(rows)), *(name for row in rows for name in row)])
        return Metrics({name: np.array([row.get(name, np.nan) for row in rows], np.float64) for name in columns})

    def curve(self) -> Curve:
        """The loss curve, as in loss.png, up to the last logged step. A notebook displays it."""
        from rwkv_pl.training.curve import plot_curve

        rows = read_rows(self.folder / "metrics.csv", up_to=sys.maxsize)
        if not rows:
            raise UserError(f"{self.folder} has no metrics yet: its first step is not done")
        return Curve(plot_curve(rows, read_baselines(self.folder)), self.folder)

    def model(self) -> nn.Module:
        """The model of best.ckpt, or of last.ckpt if there is no best one, on the CPU in float32 and in eval mode."""
        from rwkv_pl.weights.read import load_weights

        return load_weights(self.folder)[0]

    def generate(
        self,
        prompt: str = "",
        max_tokens: int = 256,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition: float = 1.0,
        window: int = 256,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> str:
        """Return the prompt and its continuation by the model: the options are those of the command rwkv-generate.

        The model is that of `model`, on a GPU if there is one. The same seed gives the same text; None is a new one.
        Raises UserError for an option out of range.
        """
        if not isinstance(prompt, str):
            raise UserError(f"generate takes a prompt of type str, got {type(prompt).__name__}")
        from rwkv_pl.inference.text import continue_text

        model, vocabulary = self._load()
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition": repetition}
        seed = int.from_bytes(os.urandom(4), "big") if seed is None else seed
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, list | tuple) or not all(isinstance(text, str) for text in stops):
            raise UserError(f"generate takes texts to stop at, of type str, got stop={stop!r}")
        try:
            return prompt + continue_text(
                model, vocabulary, prompt, max_tokens, seed=seed, stops=stops, window=window, **sampling
            )
        except (ValueError, TypeError) as error:
            raise UserError(f"generate: {error}") from error
        except FloatingPointError as error:
            raise RunError(f"{self.folder}: {error}") from error

    def _load(self) -> tuple[nn.Module, Vocabulary]:
        """The model and its vocabulary, loaded again only if the checkpoint has changed."""
        import torch

        from rwkv_pl.data.vocabulary import Vocabulary
        from rwkv_pl.weights.read import load_weights, weights_path

        file = weights_path(self.folder)
        status = newest(file).stat()
        version = file, status.st_ino, status.st_mtime_ns
        if self._loaded is None or self._loaded[0] != version:
            model, vocabulary = load_weights(file)
            if vocabulary is None:
                size: int = model.config.vocab_size  # type: ignore[union-attr,assignment]
                if size != 256:
                    raise UserError(f"{file} has no vocabulary for its {size:,} tokens")
                vocabulary = Vocabulary("byte")
            model = model.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False)
            self._loaded = version, model, vocabulary
        return self._loaded[1:]


def _find(folder: str | Path) -> Path:
    """Return the absolute path of a run folder. Raises UserError if it is none."""
    if not isinstance(folder, str | Path):
        raise UserError(f"Run takes the path of a run folder, got {folder!r}")
    if folder == "latest":
        outputs = Path("outputs").absolute()
        if not (runs := started_runs(outputs)):
            raise UserError(f"there is no run below {outputs}: name one elsewhere, Run(FOLDER)")
        return runs[0]
    path = Path(folder).expanduser().absolute()
    if not path.is_dir():
        raise UserError(f"{path} is a file: give the run's folder" if path.exists() else f"{path} does not exist")
    if (path / MULTIRUN).is_file():
        raise UserError(f"{path} is a sweep: give the folder of one of its runs, such as {path / '0'}")
    if not (path / ".hydra" / "config.yaml").is_file():
        raise UserError(f"{path} is not a run folder: it has no .hydra/config.yaml")
    return path


class Metrics(dict[str, "Column"]):
    """Columns (rows,) float64 by name. Displayed as a table of the columns that have values."""

    def known_values(self) -> dict[str, Column]:
        """Each column without its NaNs, if any value is left."""
        import numpy as np

        known = {name: column[~np.isnan(column)] for name, column in self.items()}
        return {name: column for name, column in known.items() if len(column)}

    def __repr__(self) -> str:
        known = self.known_values()
        names = [name for name in PRINTED if name in known]
        cells = [names, *self._format_rows(names)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        others = ", ".join(name for name in known if name not in names)
        note = f"({self._count_rows()}{f'; more columns: {others}' if others else ''})"
        return "\n".join(line.rstrip() for line in [*lines, note] if line)

    def _repr_html_(self) -> str:
        names = list(self.known_values())
        head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
        rows = self._format_rows(names)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if names else ""
        return f"<div>{table}<p>{self._count_rows()}</p></div>"

    def _format_rows(self, names: Sequence[str]) -> list[list[str]]:
        """The first and the last rows of these columns as text."""
        n_rows, half = len(self["step"]), SHOWN_ROWS // 2
        shown = range(n_rows) if n_rows <= SHOWN_ROWS else [*range(half), *range(n_rows - half, n_rows)]
        rows = [[_format(name, self[name][i]) for name in names] for i in shown]
        if n_rows > SHOWN_ROWS:
            rows.insert(half, ["..."] * len(names))
        return rows

    def _count_rows(self) -> str:
        n_rows = len(self["step"])
        return f"{n_rows:,} row{'' if n_rows == 1 else 's'}" if n_rows else "no metrics yet"


def _format(name: str, value: float) -> str:
    if value != value:
        return ""
    return f"{value:,.0f}" if name in ("step", "tokens") or value >= 1000 else f"{value:.4g}"


@dataclass
class Curve:
    """A loss curve that a notebook displays. figure: matplotlib's, to change or to save."""

    figure: Figure
    folder: Path

    def _repr_png_(self) -> bytes:
        from rwkv_pl.training.curve import render_png

        return render_png(self.figure)

    def save(self, path: str | Path) -> None:
        """Write the picture as a PNG file."""
        Path(path).write_bytes(self._repr_png_())

    def __repr__(self) -> str:
        return f"the loss curve of {self.folder}: a notebook displays it, save(FILE) writes a PNG"
