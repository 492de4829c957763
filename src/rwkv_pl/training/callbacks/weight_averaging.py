"""Lightning's weight averaging, for sharded models too. Names, arguments and checkpoints are the same."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import weight_averaging
from torch.optim.swa_utils import AveragedModel

from rwkv_pl.training.sharded import like_sharded, local_parameters, local_part, reshard, take_part


class AveragedParts(AveragedModel):
    """torch's AveragedModel of the parts of the parameters that are in this process."""

    def __init__(self, module: LightningModule, **options: Any) -> None:
        super().__init__(local_parameters(module), **options)

    def update_parameters(self, model: Any) -> None:
        super().update_parameters(local_parameters(model))


class WeightAveraging(weight_averaging.WeightAveraging):
    """Validates and saves an average of the weights, by default the plain one."""

    _average_model: AveragedParts | None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._average_model = None  # the parts are known only once the model is sharded

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = self._device or pl_module.device
        if self._average_model is None:
            self._average_model = AveragedParts(pl_module, device=device, use_buffers=self._use_buffers, **self._kwargs)
        self._average_model.to(device)

    def _swap_models(self, pl_module: Any) -> None:
        super()._swap_models(local_parameters(pl_module))  # type: ignore[arg-type]

    def _copy_average_to_current(self, pl_module: Any) -> None:
        super()._copy_average_to_current(local_parameters(pl_module))  # type: ignore[arg-type]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average_model is None:
            return
        reshard(pl_module)
        average = {
            name: like_sharded(part.detach(), parameter)
            for (name, parameter), part in zip(
                pl_module.named_parameters(), self._average_model.module.parameters(), strict=True
            )
        }
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        checkpoint["state_dict"] = checkpoint["state_dict"] | average
        checkpoint["averaging_state"] = {"n_averaged": self._average_model.n_averaged}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        self.on_fit_start(trainer, pl_module)  # a model that is not sharded is restored before
        assert self._average_model is not None
        for (name, parameter), part in zip(
            pl_module.named_parameters(), self._average_model.module.parameters(), strict=True
        ):
            part.data.copy_(local_part(take_part(checkpoint["state_dict"][name], parameter)))
        if "current_model_state" in checkpoint:
            self._average_model.n_averaged.copy_(checkpoint["averaging_state"]["n_averaged"])
            trainer.strategy.load_model_state_dict({"state_dict": checkpoint["current_model_state"]})


class EMAWeightAveraging(WeightAveraging, weight_averaging.EMAWeightAveraging):
    """Validates and saves an exponential moving average of the weights."""
