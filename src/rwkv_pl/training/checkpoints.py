"""best.ckpt and last.ckpt, and how checkpoints reach the disk."""

import contextlib
import functools
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from rwkv_pl.config import UserError
from rwkv_pl.files import PARTIAL, publish, replace
from rwkv_pl.weights.checkpoint import read_checkpoint

log = logging.getLogger(__name__)


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint so that its name is that of a whole file, whatever happens meanwhile.

    Lightning's own writes into the temporary folder and moves, which is not atomic across file systems, without fsync.
    The last.ckpt before stays as last.prev.ckpt. best and last of one step are one file under two names.

    Of a model on a GPU a copy is written by a thread, while the training goes on; an error of it is raised by `poll`,
    or by whatever waits for it next. On a CPU the thread would take from the training what it spares it.
    """

    def __init__(self) -> None:
        self._saved: tuple[Any, Path] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        self.wait()  # one at a time, so that there is never more than one copy
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = checkpoint["global_step"], checkpoint.get("rwkv_pl", {}).get("finished")
        saved, beside = self._saved or (None, path)
        same = beside if saved == content and beside != path and beside.exists() else None
        self._saved = None
        if same is None and in_background(checkpoint):
            checkpoint = apply_to_collection(checkpoint, Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))
            self._writing = self._thread.submit(_write, checkpoint, path, None)
        else:
            _write(checkpoint, path, same)
        self._saved = content, path

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Lightning's, without the names of other folders' files: ModelCheckpoint deletes those that it knows of."""
        checkpoint: dict[str, Any] = super().load_checkpoint(path, *arguments, **options)
        for state in checkpoint.get("callbacks", {}).values():
            if isinstance(state, dict) and "best_k_models" in state:
                folder = Path(str(state.get("dirpath"))).resolve()
                models = state["best_k_models"].items()
                state["best_k_models"] = {name: x for name, x in models if Path(name).resolve().parent == folder}
        return checkpoint

    def poll(self) -> None:
        """Raises the error of a write that has ended by one."""
        if self._writing and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until what was saved is on the disk; raises the write's error."""
        writing, self._writing = self._writing, None
        if writing:
            try:
                writing.result()
            except BaseException:
                self._saved = None
                raise

    def teardown(self) -> None:
        self.wait()


def in_background(checkpoint: dict[str, Any]) -> bool:
    """Is there a GPU that works on while the CPU writes?"""
    return any(isinstance(value, Tensor) and value.is_cuda for value in checkpoint.get("state_dict", {}).values())


def _write(checkpoint: dict[str, Any], path: Path, same: Path | None) -> None:
    if same:
        _keep_before(path)
        _link(same, path)
        return
    with publish(path) as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
        _keep_before(path)  # only now, when nothing can fail any more


def _keep_before(path: Path) -> None:
    if path.name == "last.ckpt" and path.exists():
        _link(path, path.with_name("last.prev.ckpt"))


def _link(source: Path, target: Path) -> None:
    """`target` becomes another name of the file `source`, at once."""
    beside = target.with_name(target.name + PARTIAL)
    beside.unlink(missing_ok=True)
    try:
        os.link(source, beside)
    except OSError:  # a file system without hard links
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
        with publish(target) as file:
            file.write(source.read_bytes())
        return
    replace(beside, target)


def validation_is_due(trainer: Trainer) -> bool:
    """At a micro-batch's end: does Lightning validate next?"""
    data_fetcher = trainer.fit_loop._data_fetcher
    return data_fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(data_fetcher)


class BestCheckpoint(ModelCheckpoint):
    """Lightning's, whose score to beat is that of the file, wherever the run folder lies now.

    What last.ckpt says of it may be older than the file, where a run was killed between the two, or speak of a file
    that is damaged or gone.
    """

    @functools.cached_property
    def state_key(self) -> str:
        # Lightning asks for it at each of its hooks, and would write out the settings each time.
        return super().state_key

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return str(Path(str(self.dirpath), Path(path).name)) if path else path

        moved = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path")}
        models = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **moved, "best_k_models": models, "dirpath": self.dirpath})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.save_top_k != 1 or not self.filename or "{" in self.filename:
            return
        path = Path(str(self.dirpath), f"{self.filename}{self.FILE_EXTENSION}")
        score = None
        if os.path.lexists(path) and not path.is_file():
            raise UserError(f"{path} is no file, or a link to none: move it away")
        if path.is_file():
            try:
                score = read_checkpoint(path)["callbacks"][self.state_key]["best_model_score"]
            except (UserError, LookupError, TypeError):
                log.warning(f"{path} is damaged, or of another monitor: the next validation writes it anew")
        self.best_model_score = score if isinstance(score, Tensor) and score.numel() == 1 else None
        self.best_k_models = {} if self.best_model_score is None else {str(path): self.best_model_score}
        self.best_model_path = self.kth_best_model_path = next(iter(self.best_k_models), "")


class LastCheckpoint(ModelCheckpoint):
    """Writes last.ckpt every N optimizer steps and at the end of training, however it ends in order.

    Where a validation is due on the same step it is written after it, so that it knows the score: a run killed during
    the validation goes on from before it, and validates again. Must come after the checkpoint that keeps the best.
    """

    def __init__(self, dirpath: str, every_n_train_steps: int = 1000) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps must be at least 1, got {every_n_train_steps}")
        super().__init__(
            dirpath=dirpath,
            save_top_k=0,
            save_last=True,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )
        self._after_validation = False
        self._saved: tuple[int, bool] | None = None

    @property
    def state_key(self) -> str:
        # Lightning's names the interval, so a run resumed with another one would not find its state.
        return type(self).__qualname__

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass  # it has none, and Lightning's warns where the folder was moved

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = not trainer.fit_loop.epoch_loop._should_accumulate()
        if trainer.should_stop or (stepped and trainer.global_step % self._every_n_train_steps == 0):
            if validation_is_due(trainer):
                self._after_validation = True
            else:
                self.save_now(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # At the end too: weight averaging puts its average in place of the trained weights when training has ended.
        if self._after_validation or trainer.should_stop:
            self._after_validation = False
            self.save_now(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass

    def save_now(self, trainer: Trainer) -> None:
        """Writes last.ckpt, unless this step's is there already and knows as well whether the run has ended."""
        if self._saved != (trainer.global_step, trainer.should_stop):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._saved = trainer.global_step, trainer.should_stop
