"""One process a device: what the processes of a run say to each other, and how a model is shared out over them.

`World` is all that the rest of training knows of them; with one process each of its deeds is free. A model is either
repeated in every process (DistributedDataParallel) or shared out, block by block (fully_shard). Checkpoints hold whole
tensors in both cases, so that a run may go on with any number of processes, in either way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from timm.utils import unwrap_model
from timm.utils.distributed import init_distributed_device_so, is_distributed_env, world_info_from_env
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils import _pytree as pytree

from vision_mamba.train.errors import Interrupted

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    Args:
        device: of this process. rank: its number, of `size`; the first one writes the files.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def primary(self) -> bool:
        return self.rank == 0

    def total(self, *figures: float) -> list[float]:
        """The sum over the processes of each figure; NaN where one of them has NaN."""
        if self.size == 1:
            return list(figures)
        sums = torch.tensor(figures, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def told(self, value: T) -> T:
        """What the first process has for `value`; the others' is not looked at."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def together(self, found: dict[int, str]) -> dict[int, str]:
        """The entries of all processes."""
        if self.size == 1:
            return found
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, found)
        return dict(sorted(pair for box in boxes for pair in box.items()))


def on_its_way(figures: Tensor) -> Callable[[], list[float]]:
    """A tensor's figures, which wait when they are asked for, and for nothing that the device is given after this."""
    if not figures.is_cuda:
        return figures.tolist
    here = torch.empty_like(figures, device="cpu", pin_memory=True).copy_(figures, non_blocking=True)
    copied = torch.cuda.current_stream(figures.device).record_event()

    def told() -> list[float]:
        copied.synchronize()
        return here.tolist()

    return told


def rank_by_environment() -> int:
    """The number of this process, before it has met the others."""
    return world_info_from_env()[1]


def local_rank() -> int | None:
    """The number of this process among those of its machine; None if it is alone."""
    return world_info_from_env()[0] if is_distributed_env() else None


def launcher() -> list[str]:
    """The words of a command that start a program as this one was started."""
    return ["python"] if local_rank() is None else ["torchrun", "--nproc-per-node", "N"]


@contextlib.contextmanager
def world_on(device: torch.device) -> Iterator[World]:
    """Meet the other processes that torchrun or SLURM started, and part from them at the end, or when all stop.

    After an error of one process there is no parting: NCCL would wait for the others, and they for the one that failed.
    """
    if not is_distributed_env():
        yield World(device)
        return
    joined = init_distributed_device_so(device.type)
    try:
        yield World(torch.device(joined["device"]), joined["global_rank"], joined["world_size"])
    except Interrupted:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def shard(model: nn.Module, world: World) -> int:
    """Share a model's parameters out over the processes: each child of a module called `blocks`, then the rest.

    Returns: how many blocks there are.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    containers = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "blocks"]
    blocks = [block for container in containers for block in container.children()]
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return len(blocks)


@contextlib.contextmanager
def local_gradients(module: nn.Module) -> Iterator[None]:
    """Inside, gradients add up in each process; the first backward pass outside exchanges their sum."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(False)
        yield
        module.set_requires_gradient_sync(True)
    elif isinstance(module, nn.parallel.DistributedDataParallel):
        with module.no_sync():
            yield
    else:
        yield


def whole(state: Any) -> Any:
    """A state with the shares of all processes put together, on the CPU; every process must ask for it."""

    def together(value: Any) -> Any:
        return value.full_tensor().cpu() if isinstance(value, DTensor) else value

    return pytree.tree_map(together, state)


def share(value: Tensor) -> Tensor:
    """This process's share of a tensor that may be shared out, in the same memory."""
    return value.to_local() if isinstance(value, DTensor) else value


def shared_like(own: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, cut into shares as `own` is."""
    if not isinstance(own, DTensor):
        return value
    return distribute_tensor(value.to(own.device, own.dtype), own.device_mesh, own.placements, src_data_rank=None)


def load_model(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Load whole tensors into a model that may be shared out."""
    model = unwrap_model(model)
    own = model.state_dict()
    model.load_state_dict({key: shared_like(own[key], value) for key, value in state_dict.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load whole tensors into an optimizer whose parameters may be shared out.

    Raises: ValueError if the state has other groups of parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    cut = {
        index: {
            key: shared_like(parameters[index], value)
            if isinstance(value, Tensor) and value.shape == parameters[index].shape and value.ndim
            else value
            for key, value in entries.items()
        }
        for index, entries in state["state"].items()
        if index < len(parameters)
    }
    optimizer.load_state_dict({**state, "state": cut})
