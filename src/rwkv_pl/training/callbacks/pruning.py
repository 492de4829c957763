"""Reports the validations of an Optuna trial, and ends the trial if the pruner says so."""

import json
import warnings
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from rwkv_pl.training.curve import score_unit


class PruneTrial(Callback):
    """Prunes a run that is a trial: its folder contains trial.json, and the folder above it study.journal.

    hydra_plugins/rwkv_pl/study.py writes both. pruned: was the trial ended early?
    """

    def __init__(self, folder: Path) -> None:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        trial_info = json.loads((folder / "trial.json").read_text(encoding="utf-8"))
        journal = str(folder.parent / "study.journal")
        backend = JournalFileBackend(journal, JournalFileOpenLock(journal))
        pruners = {
            "median": optuna.pruners.MedianPruner(n_startup_trials=3),
            "halving": optuna.pruners.SuccessiveHalvingPruner(),
            "none": optuna.pruners.NopPruner(),
        }
        study = optuna.load_study(
            study_name="sweep", storage=optuna.storages.JournalStorage(backend), pruner=pruners[trial_info["pruner"]]
        )
        self._trial = optuna.trial.Trial(study, trial_info["id"])
        self.pruned = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        last = trainer.should_stop or trainer.global_step == trainer.max_steps
        if trainer.is_global_zero:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Optuna warns if a resumed run reports a step again
                figures = trainer.callback_metrics
                score = figures[f"val/bits_per_{score_unit([figures])}"]
                self._trial.report(float(score), trainer.global_step)
            self.pruned = not last and self._trial.should_prune()
        self.pruned = trainer.strategy.broadcast(self.pruned)
        if self.pruned:
            trainer.should_stop = True
