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
from rwkv_pl.training.checkpoint_io import DurableCheckpointIO
from rwkv_pl.weights.parts import StoredTensor, replace_values


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with all processes sharing one model.

    A checkpoint has the same keys as on one device, so a run continues under any strategy and number of devices.
    Lightning's own methods would number the optimizer's parameters by the order of the model instead of the groups,
    and would read past the CheckpointIO and before `on_load_checkpoint`.

    sharded_checkpoints: write folders, in which each process writes its part; needs a DurableCheckpointIO. If False,
    rank 0 gathers the whole tensors and writes one file. Both kinds can be loaded.
    """

    def __init__(self, sharded_checkpoints: bool = False) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False)
        self._sharded_checkpoints = sharded_checkpoints

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
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return (optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        path = self.broadcast(filepath)
        if self._sharded_checkpoints:
            rows: dict[str, tuple[int, Tensor]] = {}

            def take(name: str, value: DTensor) -> Tensor:
                rows[name] = local_rows(value)
                return torch.empty(value.shape, dtype=value.dtype, device="meta")

            outline = replace_values(checkpoint, DTensor, take)
            self.checkpoint_io.save_parts(outline, rows, path)  # type: ignore[attr-defined]
            return
        whole = gather(checkpoint, self.is_global_zero)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(whole, path, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        # Lightning does not pass on the weights_only of `fit` to a strategy that restores after its set-up.
        if isinstance(self.checkpoint_io, DurableCheckpointIO):
            return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=True, whole=False)
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
                    key: take_part(value, parameter if getattr(value, "shape", None) == parameter.shape else None)
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


def local_rows(tensor: DTensor) -> tuple[int, Tensor]:
    """Return the part of a sharded tensor that is in this process, and the number of its first row."""
    rows_each = -(-tensor.shape[0] // tensor.device_mesh.size())  # as torch.chunk divides them
    return min(rows_each * tensor.device_mesh.get_local_rank(), tensor.shape[0]), tensor.to_local()


def gather(content: Any, keep: bool) -> Any:
    """Return nested dicts and lists with whole tensors on the CPU for the sharded ones; with None for them without
    `keep`. All processes must call it.

    One after another, so that a device holds one whole tensor at a time.
    """

    def load(name: str, value: DTensor) -> Tensor | None:
        whole = value.full_tensor()
        return whole.cpu() if keep else None

    return replace_values(content, DTensor, load)


def take_part(value: Any, like: Any) -> Any:
    """Return this process's part of a whole or stored tensor, sharded as the DTensor `like`; else the whole tensor."""
    stored = isinstance(value, StoredTensor)
    if not isinstance(like, DTensor):
        return value.whole() if stored else value
    if stored:
        first, part = local_rows(like)
        return like_sharded(value.rows(first, first + len(part)).to(part.device), like)
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
