"""The report of an evaluation: a table, a JSON file and a picture of loss against position."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from filelock import FileLock

from rwkv_pl.files import as_user_error, atomic_write, cache_folder
from rwkv_pl.terminal import console
from rwkv_pl.training.curve import default_style


def _describe_protocol(name: str, protocol: dict[str, Any]) -> str:
    """Describe a protocol with its settings."""
    if name == "windows":
        return f"windows of {protocol['ctx_len']:,}, stride {protocol['stride']:,}"
    streams, warmup = protocol["streams"], protocol["warmup"]
    return "carried, 1 stream" if streams == 1 else f"carried, {streams:,} streams, warmup {warmup:,}"


def _unit(text: dict[str, Any]) -> str:
    """The unit of the scores: byte, or token if the bytes are not known."""
    return "token" if text["bytes"] is None else "byte"


def print_report(report: dict[str, Any]) -> None:
    from rich.table import Table

    from rwkv_pl.training.callbacks.progress import format_duration

    weights, text = report["weights"], report["text"]
    step = "" if weights["step"] is None else f", step {weights['step']:,}"
    print(f"weights {weights['file']}{step}")
    size = f"{weights['config']['n_layer']} x {weights['config']['n_embd']}"
    print(f"        {weights['form']}, {weights['model']} {size}, {weights['parameters']:,} parameters")
    vocabulary = text["vocabulary"]
    print(f"text    {text['corpus']} ({text['description']}, digest {text['digest'][:12]}), {text['split']} split,")
    n_bytes = "" if text["bytes"] is None else f"{text['bytes']:,} bytes, "
    print(f"        {text['share']:.0%} of the text: {n_bytes}{text['tokens']:,} tokens,", end=" ")
    print(f"each counted once, vocabulary {vocabulary['kind']} ({vocabulary['size']:,})")
    print(f"device  {report['device']}, precision={report['precision']}", flush=True)
    table, unit = Table(header_style="bold"), _unit(text)
    for title in ("protocol=", f"bits per {unit}", "perplexity per token", "nats per token", "tokens/s", "time"):
        table.add_column(title, justify="left" if title == "protocol=" else "right")
    for name, found in report["protocols"].items():
        table.add_row(
            _describe_protocol(name, found),
            f"{found[f'bits_per_{unit}']:.4f}",
            f"{found['perplexity_per_token']:,.4f}",
            f"{found['nats_per_token']:.4f}",
            f"{found['tokens_per_second']:,.0f}",
            format_duration(found["seconds"]),
        )
    console().print(table)


def print_total(reports: list[dict[str, Any]]) -> None:
    """Print the score over all corpora of a mix, from the report of each."""
    from rwkv_pl.inference.evaluate import bits_per_byte

    unit = _unit(reports[0]["text"])
    for name in reports[0]["protocols"]:
        found = [report["protocols"][name] for report in reports]
        bits = bits_per_byte(sum(each["nats"] for each in found), sum(each[f"{unit}s"] for each in found))
        print(f"all     {bits:.4f} bits per {unit}, {_describe_protocol(name, found[0])}")


def write_report(report: dict[str, Any], out: Path, name: str) -> None:
    """Write NAME.json, and NAME.png for windows, into the folder `out`; print their paths."""
    locks = cache_folder() / "locks"
    key = hashlib.sha256(str(out / name).encode()).hexdigest()[:16]
    with as_user_error(locks):
        lock = FileLock(locks / f"eval-{key}")
    with lock:
        for found in report["protocols"].values():
            if math.isinf(found["perplexity_per_token"]):
                found["perplexity_per_token"] = None  # JSON has no infinity
        with atomic_write(out / f"{name}.json", keep=True) as file:
            file.write(json.dumps(report, indent=1, allow_nan=False).encode())
        if "windows" in report["protocols"]:
            draw_loss_by_position(report, out / f"{name}.png")
    print(f"result  {out / name}.json")
    if "windows" in report["protocols"]:
        print(f"picture {out / name}.png")


@default_style()
def draw_loss_by_position(report: dict[str, Any], path: Path) -> None:
    """Draw loss against position in the context. The model uses its memory as far back as the curve still falls."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    text, protocols = report["text"], report["protocols"]
    found = protocols["windows"]
    loss = np.array(found["loss_by_position"], float) / math.log(2)  # None is NaN
    counts = np.array(found["tokens_by_position"])
    # If windows overlap, most positions count only in the first window, and a single loss is noise.
    context = 1 + np.flatnonzero(counts > counts.max() // 2)
    bits = loss[context - 1]
    whose = "/".join(Path(report["weights"]["source"]).parts[-3:])
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(context, bits, ".", color="tab:blue", alpha=0.2, markersize=4)
    # Means over stretches that grow by a quarter: single positions scatter too much to show the curve's slope.
    stretch = np.floor(np.log(context) / math.log(1.25)).astype(int)
    members = [stretch == each for each in np.unique(stretch)]
    axes.plot(
        [context[m].mean() for m in members],
        [bits[m].mean() for m in members],
        color="tab:blue",
        label=f"{_describe_protocol('windows', found)}: {found['bits_per_token']:.3f} on average",
    )
    if carried := protocols.get("carried"):
        mean = carried["bits_per_token"]
        axes.axhline(
            mean,
            color="gray",
            linestyle="--",
            linewidth=1,
            label=f"{_describe_protocol('carried', carried)}: {mean:.3f}",
        )
    axes.set(
        xscale="log",
        xlabel="position in the context, tokens",
        ylabel="bits per byte" if text["vocabulary"]["kind"] == "byte" else "bits per token",
        title=f"Does the model use its memory?\n{whose} on {text['corpus']}, {text['split']} split",
    )
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path, keep=True) as file:
        FigureCanvasAgg(figure).print_png(file)
