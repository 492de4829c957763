"""FSDP2, `trainer=fsdp`: each process holds a part of every parameter, gradient and optimizer state.

The root and each block are sharded, so a process has at most the whole of the block in use, besides the embedding and
the head. Inside a sharded block the parameters are plain tensors, so the fused operators serve as on one device.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from rwkv_pl.errors import UserError


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with all processes sharing one model.

    A checkpoint is one file with the same keys as on one device, so a run continues under any strategy and number of
    devices. Lightning's own methods would number the optimizer's parameters by the order of the model instead of the
    groups, and would read past the CheckpointIO and before `on_load_checkpoint`.
    """

    def __init__(self) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        if self.root_device.type == "cpu" and torch.__version__ < "2.13":  # gloo summed gradients, not averaged them
            raise UserError(f"trainer=fsdp on CPUs needs torch 2.13 or later, this is {torch.__version__}")
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self._gather(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        content = optimizer.state_dict()
        return content | {"state": {number: self._gather(state) for number, state in content["state"].items()}}

    def _gather(self, tensors: dict[str, Any]) -> dict[str, Any]:
        return gather(tensors, self.is_global_zero)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        # Lightning does not pass on the weights_only of `fit` to a strategy that restores after its set-up.
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        here = self.lightning_module.state_dict()
        parts = {name: take_part(value, here.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(parts, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, content in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = [number for group in content["param_groups"] for number in group["params"]]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: {
                    key: take_part(value, parameter) if getattr(value, "shape", None) == parameter.shape else value
                    for key, value in content["state"][number].items()
                }
                for number, parameter in zip(numbers, parameters, strict=True)
                if number in content["state"]
            }
            optimizer.load_state_dict(content | {"state": state})


def shard(model: nn.Module, mesh: Any) -> None:
    """Shard a model with `blocks` over the processes of a mesh, once. Every process has built the whole of it."""
    if isinstance(model, FSDPModule):
        return
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "hidden")


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that is in this process; else the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like_sharded(part: Tensor, like: Any) -> Tensor:
    """Return the sharded tensor of which `part` is in this process, sharded as `like`; else the part itself."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def reshard(module: nn.Module) -> None:
    """Divide all parameters again: after a validation, the embedding and the head are still whole."""
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


def local_parameters(module: nn.Module) -> nn.ParameterList:
    """Return the parts of the parameters that are in this process, in the order of `module.parameters()`.

    They share memory with the parameters.
    """
    reshard(module)
    parts = (local_part(parameter).detach() for parameter in module.parameters())
    return nn.ParameterList(nn.Parameter(part, requires_grad=False) for part in parts)


def gather(tensors: dict[str, Any], keep: bool) -> dict[str, Any]:
    """Return whole tensors on the CPU for the sharded ones; all None without `keep`. All processes must call it.

    One after another, so that a device holds one whole tensor at a time.
    """
    gathered = {}
    for name, value in tensors.items():
        is_sharded = isinstance(value, DTensor)
        whole = value.full_tensor() if is_sharded else value
        gathered[name] = (whole.cpu() if is_sharded else whole) if keep else None
    return gathered


def take_part(value: Tensor, like: Any) -> Tensor:
    """Return this process's part of a whole tensor, sharded as the DTensor `like`; else the tensor itself."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def gather_model(model: nn.Module, keep: bool) -> nn.Module | None:
    """Return a plain copy of a sharded model on the CPU, None without `keep`. All processes must call it."""
    tensors = gather(model.state_dict(), keep)
    if not keep:
        return None
    plain_class: Any = next(each for each in type(model).__mro__ if not issubclass(each, FSDPModule))
    with torch.device("meta"):
        plain = plain_class(model.config)
    plain.load_state_dict(tensors, assign=True)
    return plain
