"""User classes: a callback, a logger and an optimizer from a module named as a plug-in."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import forks
import pytest
import torch
from command import SMALL, TEXT
from forked_jobs import FORK_THE_JOBS
from forks import Strike

PLUGIN = """
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger

Path("imported").touch()


class Note(Callback):
    def __init__(self, text: str = "hello") -> None:
        self.text = text

    def on_train_end(self, trainer, pl_module):
        Path(trainer.default_root_dir, "note.txt").write_text(f"{self.text} at step {trainer.global_step}")


class Lines(DummyLogger):
    save_dir = "."

    def __init__(self, name: str) -> None:
        super().__init__()
        self.lines = Path(name)

    def log_metrics(self, metrics, step=None):
        with self.lines.open("a") as file:
            file.write(f"{step}\\n")


class Sign(torch.optim.Optimizer):
    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.0, scale: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "scale": scale})

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter].setdefault("n_steps", 0)
                    self.state[parameter]["n_steps"] += 1
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"] * group["scale"])
        return loss


class Nothing:
    pass
"""

MINE = {
    "callbacks/note.yaml": "note:\n  _target_: mypkg.Note\n  text: hello\n",
    "logger/lines.yaml": "lines:\n  _target_: mypkg.Lines\n  name: lines.txt\n",
    "optim/sign.yaml": "_target_: mypkg.Sign\nlr: 1e-3\nweight_decay: 0.0\nscale: 2.0\nlr_scale: null\n",
}


@pytest.fixture
def plugin_folder(tmp_path, monkeypatch):
    """mypkg.py in a folder on Python's path, and mine/, the user's config folder."""
    (tmp_path / "lib" / "package").mkdir(parents=True)
    (tmp_path / "lib" / "mypkg.py").write_text(PLUGIN)
    (tmp_path / "lib" / "package" / "__init__.py").touch()
    (tmp_path / "lib" / "package" / "inner.py").write_text(PLUGIN)
    (tmp_path / "lib" / "broken.py").write_text("1 / 0\n")
    for name, text in MINE.items():
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.setenv("RWKV_PL_CONFIG", str(tmp_path / "user"))
    yield tmp_path
    for name in ("mypkg", "package", "package.inner", "broken"):
        sys.modules.pop(name, None)


NOTE = ("callbacks=[default,note]", "--config-dir", "mine")
ALL = ("optim=sign", "logger=[tensorboard,lines]", *NOTE)


def test_plugin_classes_work_at_start_and_resume(train, plugin_folder):
    quick = [text for text in SMALL if not text.startswith("optim=")]
    plugins = "plugins=[mypkg]"
    result = train(*quick, *ALL, plugins, "optim.scale=3.0", "trainer.max_steps=2", "hydra.run.dir=run")
    assert result.code == 0, result.err
    assert (plugin_folder / "run" / "note.txt").read_text() == "hello at step 2"
    assert {"1", "2"} <= set((plugin_folder / "lines.txt").read_text().split())
    checkpoint = torch.load(plugin_folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert {group["scale"] for group in checkpoint["optimizer_states"][0]["param_groups"]} == {3.0}

    before = (plugin_folder / "run" / "checkpoints" / "last.ckpt").read_bytes()
    result = train("resume=run", "trainer.max_steps=4")
    assert result.code == 2 and "plugins=[mypkg]" in result.err, result.err
    assert (plugin_folder / "run" / "checkpoints" / "last.ckpt").read_bytes() == before

    result = train("resume=run", "trainer.max_steps=4", "callbacks.note.text=bye", plugins)
    assert result.code == 0, result.err
    assert (plugin_folder / "run" / "note.txt").read_text() == "bye at step 4"
    assert train(*quick, *ALL, plugins, "optim.scale=3.0", "hydra.run.dir=whole").code == 0
    whole, parts = (
        torch.load(plugin_folder / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "run")
    )
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_readme_callback_runs(train, tmp_path, monkeypatch):
    readme = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
    module = re.search(r"```python\n# norms\.py\n(.*?)```", readme, flags=re.DOTALL)[1]
    settings = re.search(r"```yaml\n# mine/callbacks/norms\.yaml\n(.*?)```", readme, flags=re.DOTALL)[1]
    command = re.search(r"^PYTHONPATH=\. rwkv-train (.* 'plugins=\[norms\]')$", readme, flags=re.MULTILINE)[1]
    (tmp_path / "mine" / "callbacks").mkdir(parents=True)
    (tmp_path / "mine" / "callbacks" / "norms.yaml").write_text(settings)
    (tmp_path / "norms.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = [word for word in shlex.split(command) if word != "experiment=quickstart"]
    result = train(*SMALL, *arguments, "callbacks.norms.every=2", "hydra.run.dir=run")
    sys.modules.pop("norms", None)
    assert result.code == 0, result.err
    assert re.search(r"^2 \d+\.\d+$", result.out, flags=re.MULTILINE), result.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "is not a trusted class: add plugins=[mypkg] if you trust its code; trusted: lightning.pytorch.callbacks"),
        ((), "add plugins=[mypkg]"),
        (("plugins=[my-pkg]",), "plugins=my-pkg is not the name of a module"),
        (("plugins=[mypkg]", "callbacks.note._target_=mypkg.Nothing"), "mypkg.Nothing is not a lightning.pytorch.C"),
        (("plugins=[mypkg]", "callbacks.note._target_=mypkg.Noet"), "not a class of mypkg; did you mean Note?"),
        (("plugins=[mypkg]", "callbacks.note._target_=mypkg.Path.unlink"), "add plugins=[mypkg.Path]"),
        (("plugins=[mypkg]", "callbacks.note._target_=package.inner.Note"), "add plugins=[package.inner]"),
        (("plugins=[package]", "callbacks.note._target_=package.inner.Note"), "add plugins=[package.inner]"),
        (("plugins=[missing]", "callbacks.note._target_=missing.Note"), "no module missing: install it"),
        (("plugins=[broken]", "callbacks.note._target_=broken.Note"), "can't be imported: ZeroDivisionError"),
        (("plugins=[mypkg]", "callbacks.note.txt=x"), "callbacks.note.txt is not a setting"),
        (("plugins=[mypkg]", "callbacks.note.text=3"), "callbacks.note.text must be a string"),
    ],
)  # fmt: skip
def test_plugin_error_gives_one_line(train, plugin_folder, arguments, words):
    result = train(*SMALL, *NOTE, *arguments, "hydra.run.dir=run")
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert words in result.err
    assert not (plugin_folder / "run").exists()


def test_plugin_inside_a_package_needs_its_full_name(train, plugin_folder):
    result = train(
        *SMALL, *NOTE, "plugins=package.inner", "callbacks.note._target_=package.inner.Note", "hydra.run.dir=run"
    )
    assert result.code == 0, result.err


def test_plugins_file_of_the_user_names_modules(train, plugin_folder):
    (plugin_folder / "user").mkdir()
    (plugin_folder / "user" / "plugins").write_text("# mine\nmypkg  # callbacks\n")
    assert train(*SMALL, *NOTE, "trainer.max_steps=2", "hydra.run.dir=run").code == 0
    assert train("resume=run", "trainer.max_steps=3").code == 0
    assert (plugin_folder / "run" / "note.txt").read_text() == "hello at step 3"
    (plugin_folder / "user" / "plugins").write_text("my pkg\n")
    result = train("resume=run", "trainer.max_steps=4")
    assert result.code == 2 and "plugins: my pkg is not the name of a module" in result.err, result.err


def test_config_file_cannot_name_a_plugin(train, plugin_folder):
    (plugin_folder / "mine" / "experiment").mkdir()
    (plugin_folder / "mine" / "experiment" / "theirs.yaml").write_text("# @package _global_\nplugins: [mypkg]\n")
    result = train(*SMALL, *NOTE, "experiment=theirs", "hydra.run.dir=run")
    assert (result.code, "a config file cannot set plugins" in result.err) == (2, True), result.err
    (plugin_folder / "mine" / "experiment" / "theirs.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n      plugins: mypkg\n      seed: 1,2\n"
    )
    result = train("-m", *SMALL, *NOTE, "experiment=theirs", "hydra.sweep.dir=sweep")
    assert (result.code, "plugins" in result.err) == (2, True), result.err
    result = train("-m", *SMALL, *NOTE, "plugins=mypkg,package.inner", "hydra.sweep.dir=sweep")
    assert (result.code, "plugins=[mypkg,package.inner]" in result.err) == (2, True), result.err
    assert (
        not (plugin_folder / "run").exists()
        and not (plugin_folder / "sweep").exists()
        and not (plugin_folder / "imported").exists()
    )


def test_untrusted_run_cannot_import_a_plugin(train, plugin_folder):
    assert train(*SMALL, *NOTE, "plugins=[mypkg]", "trainer.max_steps=2", "hydra.run.dir=run").code == 0
    (plugin_folder / "imported").unlink()
    sys.modules.pop("mypkg")
    stored = plugin_folder / "run" / ".hydra"
    assert "mypkg" in (stored / "config.yaml").read_text() and "plugins" in (stored / "overrides.yaml").read_text()
    for arguments in ((), ("callbacks=[default,note]",), ("schedule=cosine",)):
        result = train("resume=run", "trainer.max_steps=4", *arguments)
        assert (result.code, "add plugins=[mypkg]" in result.err) == (2, True), result.err
    assert not (plugin_folder / "imported").exists()


def find_lib() -> None:
    sys.path.insert(0, str(Path("lib").absolute()))


def run_sweep(folder: Path, *arguments: str):
    strikes = [FORK_THE_JOBS, Strike("rwkv_pl.cli.train:main", 1, find_lib)]
    path = os.pathsep.join(filter(None, [str(folder / "lib"), os.environ.get("PYTHONPATH")]))  # of jobs that can't fork
    return forks.run(folder, "-m", *arguments, strikes=strikes, RWKV_PL_CONFIG=str(folder / "user"), PYTHONPATH=path)


def test_sweep_passes_plugins_to_its_jobs(plugin_folder):
    (plugin_folder / "corpus.txt").write_bytes(TEXT)
    arguments = (*SMALL, *NOTE, "trainer.max_steps=2", "seed=1,2", "hydra.sweep.dir=sweep")
    result = run_sweep(plugin_folder, *arguments)
    assert (result.code, "plugins=[mypkg]" in result.err) == (2, True), result.err
    assert not (plugin_folder / "sweep").exists()
    result = run_sweep(plugin_folder, *arguments, "plugins=[mypkg]")
    assert result.code == 0, result.out + result.err
    notes = [plugin_folder / "sweep" / name / "note.txt" for name in "01"]
    assert [note.read_text() for note in notes] == ["hello at step 2"] * 2

    # One job starts, the other resumes: both need the plug-ins, which are typed again.
    shutil.rmtree(plugin_folder / "sweep" / "0")
    shutil.rmtree(plugin_folder / "sweep" / "1" / "checkpoints")
    (plugin_folder / "sweep" / "1" / "result.json").unlink()
    notes[1].unlink()
    (plugin_folder / "imported").unlink()
    result = run_sweep(plugin_folder, "resume=sweep", "--config-dir", "mine")
    assert (result.code, "plugins=[mypkg]" in (result.out + result.err)) == (1, True), result.out + result.err
    assert not (plugin_folder / "imported").exists()
    result = run_sweep(plugin_folder, "resume=sweep", "--config-dir", "mine", "plugins=[mypkg]")
    assert result.code == 0, result.out + result.err
    assert [note.read_text() for note in notes] == ["hello at step 2"] * 2
