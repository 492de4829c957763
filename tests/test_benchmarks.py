"""The benchmarks at tiny sizes."""

import json
import math
import random
import re
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks import __main__ as benchmarks
from benchmarks import common, learning, memory, plot, race, reversal, train_step, wkv
from benchmarks.train_step import SETTINGS, make_our_step, make_products
from systems import WINDOWS

TINY = SETTINGS["tiny"]
ROOT = Path(__file__).parents[1]


class Pipe(list):
    """A pipe that stores the messages sent and asks for a given number of turns."""

    def __init__(self, *asked):
        super().__init__()
        self.asked = list(asked)

    send = list.append

    def recv(self):
        if not self.asked:
            raise EOFError
        return self.asked.pop(0)


def test_benchmark_list_needs_no_torch():
    code = "import sys; sys.argv=['benchmarks']; import benchmarks.__main__ as b; b.main()"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "train_step  A training step" in done.stdout
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)


def test_contestant_is_timed_per_turn_after_warm_up():
    calls = []

    def maker():
        return lambda: calls.append(time.sleep(0.004))

    pipe = Pipe((), ())
    with pytest.raises(EOFError):
        common._timed(maker, 0.02, pipe)
    ready, first, second = pipe
    a_turn = (len(calls) - common.WARM_UP_CALLS) // 2
    assert ready == "ready" and 2 <= a_turn <= 5
    assert min(first, second) >= 0.004 and max(first, second) < 0.02


def test_slow_contestant_warms_up_with_two_calls(monkeypatch):
    calls = []
    monkeypatch.setattr(common, "SLOW_SECONDS", 0.0)
    with pytest.raises(EOFError):
        common._timed(lambda: lambda: calls.append(1), 0.0, Pipe())
    assert len(calls) == 2


def test_failing_contestant_reports_its_error():
    pipe = Pipe()
    common._process(lambda _: 1 / 0, pipe)
    assert isinstance(pipe[0], common.ContestantError) and str(pipe[0]) == "ZeroDivisionError: division by zero"


def test_summary_spread_and_growth_exponent():
    assert common.summarize([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3, "low": 2, "high": 4, "min": 1, "max": 5}
    assert common.summarize([7.0])["high"] == 7
    assert common.relative_spread([0.95, 1.0, 1.02]) == pytest.approx(0.07)
    assert memory.growth_exponent([1.0, 2, 4, 8, 16, 32], [0, 0, 0, 5.0, 20, 80]) == pytest.approx(2)


def test_remainder_is_the_median_of_paired_differences():
    seconds = {
        "products, float32": [1.0, 3.0, 2.0],
        "rwkv_pl, float32": [1.2, 3.1, 2.3],  # a slow minute affects both
        "products, bf16-mixed": [0.5, 0.5, 0.5],
        "rwkv_pl, bf16-mixed": [0.75, 0.65, 0.75],
    }
    found = train_step.compute_remainders(seconds)
    assert found["float32"]["float32 products"]["median"] == pytest.approx(0.1)
    assert found["bf16-mixed"]["float32 products"]["median"] == pytest.approx(0.125)
    assert found["bf16-mixed"]["its own products"]["median"] == pytest.approx(0.5)


@pytest.mark.parametrize(("rounds", "n_rounds_of_all"), [(1, 3), (10, 5)])
def test_times_come_from_one_run_and_remainders_from_pairs(rounds, n_rounds_of_all, monkeypatch):
    runs = []

    def take_turns(makers, rounds, _):
        runs.append((list(makers), rounds))
        from_pairs = {"products, float32": 1.0, "products, bf16-mixed": 0.5}
        if len(runs) == 1:
            return {name: [from_pairs.get(name, 1.5)] * rounds for name in makers}
        return {name: [10.0 + place] * rounds for place, name in enumerate(makers)}

    monkeypatch.setattr(train_step, "take_turns", take_turns)
    found = train_step.measure_setting(TINY, rounds, profiled=False)
    (_, from_pairs), (names, from_all) = runs
    assert (from_pairs, from_all) == (rounds, n_rounds_of_all)
    who = ("products", "rwkv_pl", "rwkv_pl, full", "rwkv_pl, full, compiled", "transformers")
    assert {f"{each}, {precision}" for each in who for precision in train_step.PRECISIONS} == set(names)
    medians = {name: row["median"] for name, row in found["seconds"].items()}
    assert medians == {name: 10.0 + place for place, name in enumerate(names)}
    for name in names:
        assert found["times_ours"][name] == medians[name] / medians[f"rwkv_pl, {name.split(', ')[-1]}"]
    assert {name: row["median"] for name, row in found["pairs"].items()}["products, bf16-mixed"] == 0.5
    assert found["not_a_matrix_product"]["bf16-mixed"]["its own products"]["median"] == 2


@pytest.mark.parametrize("precision", train_step.PRECISIONS)
def test_products_run_every_matrix_product_of_a_step(precision):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        make_products(TINY, precision)()
    product_events = [e for e in profiler.events() if e.name in ("aten::mm", "mkldnn::_linear_pointwise")]
    assert len(product_events) == 3 * (7 * TINY.n_layer + 1)
    make_our_step(TINY, precision)()
    found = train_step.profile(TINY, precision, full=True, steps=1)["milliseconds"]
    assert set(train_step.PARTS) <= set(found)


def test_operator_belongs_to_the_part_of_its_nearest_caller():
    node = SimpleNamespace(name="autograd::engine::evaluate_function: LerpBackward1", cpu_parent=None)
    assert train_step.find_part(SimpleNamespace(name="aten::mul", cpu_parent=node)) == "LayerNorm, shift, mixes"
    assert train_step.find_part(SimpleNamespace(name="aten::mul", cpu_parent=None)) == "gates"
    assert train_step.find_part(SimpleNamespace(name="rwkv_pl::wkv4_backward", cpu_parent=None)) == "WKV"
    assert train_step.find_part(SimpleNamespace(name="aten::add", cpu_parent=None)) == "rest"


@pytest.mark.parametrize("name", ["rwkv_pl", "GPT of torch's layers"])
def test_race_contestant_learns(name, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"abcdefgh" * 2000)
    pipe = Pipe((0.0,), (0.3,))
    with pytest.raises(EOFError):
        race.run_contestant(name, race.TINY, 1e-2, 0.3, path, pipe)
    size, before, after = pipe
    assert size > 10_000
    assert before["steps"] == 0 and before["bits_per_byte"] == pytest.approx(8, abs=1)
    assert after["seconds"] >= 0.3 and after["steps"] > 1 and after["bits_per_byte"] < before["bits_per_byte"] - 0.3
    assert race.measure_compressors(race.open_text(race.TINY, path))["xz -9"] < 2


def test_gpt_is_causal():
    gpt = race.GPT(race.TINY)
    tokens = torch.zeros(1, race.TINY.steps, dtype=torch.int64)
    later = tokens.clone()
    later[:, 20:] = 7
    changed = (gpt(tokens) - gpt(later)).abs().amax(-1)[0]
    assert changed[:20].max() < 1e-5 and changed[20:].min() > 1e-4


@pytest.mark.skipif(WINDOWS or not memory.STATUS.exists(), reason="no /proc")  # wine shows the host's
def test_step_memory_includes_gradients():
    figures = memory.measure("rwkv_pl", TINY, "float32")
    assert figures["peak_mb"] > 0 and figures["seconds"] > 0
    assert figures["gradients_mb"] == pytest.approx(4 * 42_560 / 2**20, rel=0.1)


def make_run(version, steps, lr, seed, score):
    size = {"n_layer": 2, "n_embd": 64, "rows": 2, "ctx_len": 8, "steps": steps, "validated": 1.0}
    curve = [[steps // 2, 2 * score], [steps, score]]
    return size | {"version": version, "settings": {"lr": lr}, "seed": seed, "curve": curve}


def make_comparison(steps):
    runs = [make_run(version, steps, 1e-3, seed, 2.0) for version in ("rwkv4", "rwkv7") for seed in (1, 2)]
    (comparison,) = learning.compare(runs)
    return comparison


def test_learning_compares_the_best_repeated_settings_at_equal_tokens():
    runs = [
        make_run("rwkv4", 8, 1e-3, 1, 2.5), make_run("rwkv4", 8, 1e-3, 2, 2.7),
        make_run("rwkv4", 8, 2e-3, 1, 2.2), make_run("rwkv4", 8, 2e-3, 2, 2.4),
        make_run("rwkv4", 8, 4e-3, 1, 2.0),  # better, but with one seed
        make_run("rwkv7", 8, 1e-3, 1, 2.1),
        make_run("rwkv7", 16, 1e-3, 1, 1.9),  # more tokens, and no rwkv4 to compare with
    ]  # fmt: skip
    (found,) = learning.compare(runs)
    versions = found.pop("versions")
    assert found == {"n_layer": 2, "n_embd": 64, "rows": 2, "ctx_len": 8, "steps": 8, "validated": 1.0}
    assert versions["rwkv4"]["settings"] == {"lr": 2e-3} and versions["rwkv4"]["seeds"] == [1, 2]
    assert learning.format_score(versions["rwkv4"]) == "2.3000 ± 0.1414 (2)"
    assert learning.format_score(versions["rwkv7"]) == "2.1000 (1)"


def test_toy_and_its_transcription_train_alike():
    found = reversal.compare(3, rows=2)
    worst = {what: one["difference"] for what, one in found["worst"].items()}
    # float64 rounds to 1e-16; Adam divides the first, tiny gradients by their own size.
    assert worst.pop("loss") < 1e-12 and worst.pop("gradient") < 1e-9 and worst.pop("update") < 1e-8 and not worst
    assert found["steps"] == 3 and abs(found["first_loss"] - math.log(reversal.VOCAB)) < 0.3


def test_toy_scores_the_digits_after_a_comma():
    digits = [*"12,21#3,3#456,6"]
    row = [reversal.COMMA if each == "," else reversal.END if each == "#" else int(each) for each in digits]
    assert [(length, list(places)) for length, places in reversal.reversed_parts(row)] == [
        (2, [3, 4]),
        (1, [8]),
        (3, [14]),  # the row ends
    ]
    for row in reversal.draw_rows(20, random.Random(0)).tolist():
        for length, places in reversal.reversed_parts(row):
            comma = places.start - 1
            assert [row[place] for place in places] == row[comma - length : comma][::-1][: len(places)]


def write_results(folder):
    """Made-up results for every panel except the training step of the small setting."""
    about = {"title": "made up", "machine": common.describe_machine()}
    row = common.summarize([1.0, 2.0, 4.0])
    steps = dict.fromkeys(["products, float32", "rwkv_pl, float32", "transformers, float32"], row)
    step = {"setting": {"n_layer": 1, "n_embd": 2, "rows": 3, "steps": 4}, "seconds": steps}
    curve = [{"seconds": x, "steps": x, "bits_per_byte": 8 / (x + 1)} for x in range(4)]
    length = {"contestant": "rwkv_pl", "peak_mb": row, "gradients_mb": 0.5, "seconds": row}
    files = {
        "train_step": {"settings": {"classic": step | {"times_ours": dict.fromkeys(steps, 1.0)}}},
        "wkv": {"rows": {"scan": {"seconds": row}}, "copy_bytes_per_second": 1e10},
        "generate": {"tokens_per_second": {"reading the weights": row, "rwkv_pl": row}},
        "memory": {"by_length": [length | {"steps": 128}, length | {"steps": 256}]},
        "race": {"contestants": {"rwkv_pl": {"curve": curve}}, "compressors": {"gzip -9": 2.0}},
        "learning": {"comparisons": [make_comparison(steps) | {"step_ratio": row} for steps in (4, 8)]},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(about | content))
    return files


def test_plots_are_written(tmp_path):
    write_results(tmp_path)
    plot.draw_all(tmp_path, tmp_path)
    plot.draw_race(tmp_path, tmp_path)
    plot.draw_learning(tmp_path, tmp_path)
    for theme in ("light", "dark"):
        assert (tmp_path / f"learning_{theme}.png").stat().st_size > 10_000
    assert (tmp_path / "benchmarks.png").stat().st_size > 10_000
    assert (tmp_path / "race.png").stat().st_size > 10_000


def test_unreadable_results_are_left_out_of_the_plot(tmp_path, monkeypatch, capsys):
    figures = []
    monkeypatch.setattr(plot, "write_figure", lambda figure, _: figures.append(figure))
    step = write_results(tmp_path)["train_step"]["settings"]["classic"]
    # If the products come from another run than the bars, they have no ratio.
    old = step | {"times_ours": {"rwkv_pl, float32": 1.0}}
    content = {"machine": common.describe_machine(), "settings": {"classic": old}}
    (tmp_path / "train_step.json").write_text(json.dumps(content))
    (tmp_path / "wkv.json").write_text("{")
    content = {"machine": common.describe_machine(), "tokens_per_second": {"rwkv_pl": {"median": 1.0}}}
    (tmp_path / "generate.json").write_text(json.dumps(content))
    plot.draw_all(tmp_path, tmp_path)
    assert [axes.get_title().split()[0] for axes in figures[0].axes] == ["time", "memory"]
    (output,) = capsys.readouterr().out.splitlines()
    what, _, how = output.partition("; made by: ")
    reasons = ["classic (the result has no 'prod", "small (", "wkv (not readable)", "generate (the result"]
    assert all(reason in what for reason in reasons)
    assert how == ", ".join(f"python -m benchmarks {name}" for name in ("train_step", "wkv", "generate"))


def test_plot_without_results_writes_nothing(tmp_path, capsys):
    plot.draw_all(tmp_path, tmp_path)
    plot.draw_race(tmp_path, tmp_path)
    plot.draw_learning(tmp_path, tmp_path)
    assert not list(tmp_path.iterdir())
    output, of_race, of_learning = capsys.readouterr().out.splitlines()
    assert output.count("not measured") == len(plot.PANELS) and of_race.endswith("python -m benchmarks race")
    assert of_learning.endswith("python -m benchmarks learning")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("startup --threads 0", "--threads: 0 is not a whole number from 1"),
        ("loop --rounds -3", "--rounds: -3 is not a whole number from 1"),
        ("generate --rounds x", "--rounds: x is not"),
        ("memory --longest 1", "--longest: 1 is not a whole number from 128"),
        ("wkv --longest 127", "--longest: 127 is not"),
        ("race --data nosuch", "nosuch"),
        ("race --seconds nan", "--seconds: nan is not a number above 0"),
        ("checkpoint --results taken", "--results: taken cannot be made a folder"),
        ("plot --docs taken", "--docs: taken cannot be made a folder"),
        ("plot --results nosuch", "there is no folder nosuch"),
        ("plot --reslts x", "unrecognized arguments: --reslts x"),
        ("all --reslts x", "unrecognized arguments: --reslts x"),
        ("all --threads 0", "--threads: 0 is not"),
        ("gpu --parts nosuch", "nosuch"),
        ("learning", "name the folders of the runs"),
        ("learning nosuch", "there is no folder nosuch"),
        ("reversal --minutes 0", "--minutes: 0 is not a number above 0"),
        ("gpu --budget 0", "--budget: 0 is not a number above 0"),
    ],
)
def test_invalid_option_gives_one_line_error(line, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "taken").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks", *line.split()])
    with pytest.raises(SystemExit) as end:
        benchmarks.main()
    printed = capsys.readouterr()
    assert end.value.code == 2 and message in printed.err.splitlines()[-1] and not printed.out


def test_all_accepts_only_options_of_every_benchmark(tmp_path, monkeypatch, capsys):
    for name in (*benchmarks.NAMES, *benchmarks.OTHER_NAMES):
        monkeypatch.setattr(sys, "argv", ["benchmarks", "--help"])
        with pytest.raises(SystemExit):
            import_module(f"benchmarks.{name}").main()
        output = capsys.readouterr().out
        options = ("--results", "--docs") if name == "plot" else ("--results", "--rounds", "--threads")
        assert all(option in output for option in options)
    given = ["--rounds=1", f"--results={tmp_path}"]
    words = benchmarks.options_of_all(given)
    assert words.pop("plot") == given[1:] and all(each == given for each in words.values())


def test_wkv_floor_counts_bytes_moved():
    assert wkv.bytes_moved((2, 3, 5), torch.bfloat16) == 8 * 30 * 2
    assert math.isfinite(wkv.measure_worst_error("scan", (1, 5, 3)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "train_step --settings tiny --rounds 1",
        "versions --settings small --rounds 1",
        "loop --settings tiny --rounds 2",
        "processes --settings tiny --rounds 1",
        "memory --tiny --longest 256 --rounds 1",
        "race --tiny --seconds 1 --rounds 2",
        "wkv --longest 128 --rounds 1",
        "startup --rounds 1",
        "reversal --rounds 2 --minutes 0.01",
        "generate --rounds 1",
    ],
)
def test_benchmark_runs_end_to_end(line, tmp_path):
    name, *options = line.split()
    command = [sys.executable, "-m", "benchmarks", name, *options, "--threads=1", f"--results={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "left out" not in done.stdout.replace("left out: rwkv_pl, checkpointing", "")
    assert json.loads((tmp_path / f"{name}.json").read_text())["machine"]["threads"] == 1
