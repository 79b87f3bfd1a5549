"""What the loop asks of a process group, and the two ways to share a backbone's training; alone, everything stays as it is."""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from train.backbones.base import Backbone

T = TypeVar("T")


def rank_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def same_everywhere(value: float, device: torch.device) -> float:
    """Worker 0's value, on every worker: clocks differ, decisions must not."""
    if rank_world()[1] == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(shared, 0)
    return shared.item()


def add_up(x: Tensor) -> Tensor:
    """The sum over all workers, in place."""
    if rank_world()[1] > 1:
        dist.all_reduce(x)
    return x


def mean(value: float, device: torch.device) -> float:
    """The mean over all workers; not a number on all of them if it is none on one."""
    return add_up(torch.tensor([value], dtype=torch.float64, device=device)).item() / rank_world()[1]


def everyones(said: Any, device: torch.device) -> list[Any]:
    """What each worker says, in the order of their ranks, on all of them; anything JSON can hold."""
    world = rank_world()[1]
    if world == 1:
        return [said]
    data = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8, device=device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device))
    longest = max(int(size) for size in sizes)
    found = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in range(world)]
    dist.all_gather(found, torch.cat([data, data.new_zeros(longest - len(data))]))
    return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(found, sizes, strict=True)]


def by_worker_0(make: Callable[[], Any], device: torch.device) -> Any:
    """What `make` gives on worker 0, on every worker; anything JSON can hold. What goes wrong there is a ValueError on all of them alike:
    where one ended alone, the others would wait for it."""
    said, error = None, ""
    if rank_world()[0] == 0:
        try:
            said = make()
        except (ValueError, OSError) as found:
            error = str(found)
    said, error = everyones([said, error], device)[0]
    if error:
        raise ValueError(error)
    return said


def by_all(make: Callable[[], T], device: torch.device) -> T:
    """What `make` gives on this worker. What goes wrong on one is a ValueError on all of them alike, as `by_worker_0` has it."""
    made, error = None, ""
    try:
        made = make()
    except (ValueError, OSError) as found:
        error = str(found)
    if said := [each for each in everyones(error, device) if each]:
        raise ValueError(said[0])
    assert made is not None
    return made


def share_buffers(model: nn.Module) -> None:
    """Worker 0's running statistics on every worker, in place. Collective.

    Each worker's batch norm sees its own part of a batch: DDP shares buffers when a step begins, FSDP2 never. Buffers that no checkpoint
    holds are constants.
    """
    if rank_world()[1] == 1:
        return
    kept = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in kept:
            dist.broadcast(buffer, 0)


def share_training(model: Backbone, kind: str) -> nn.Module:
    """The module to call in training: data-parallel ("ddp"), its weights sharded as well ("fsdp2"), or the model itself when alone.

    fully_shard changes the model in place: its parameters become shards, and whoever calls it takes part in gathering them.
    """
    if rank_world()[1] == 1:
        return model
    if kind == "ddp":
        return DistributedDataParallel(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 takes no other layout, channels-last among them
    scalars = {parameter for parameter in model.parameters() if not parameter.ndim}  # nor those: their gradients are averaged here
    for parameter in scalars:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_average)
    for layer in model.layers():
        fully_shard(layer, reshard_after_forward=True)
    # Also the root: between an encoding and the next step its parameters would otherwise be whole, and no optimizer knows those.
    fully_shard(model, reshard_after_forward=True, ignored_params=scalars)
    return model


def _average(parameter: Tensor) -> None:
    assert parameter.grad is not None
    add_up(parameter.grad).div_(rank_world()[1])


def without_sync(net: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around a micro-batch: DDP need not average gradients before the last one. FSDP2 does every time, which is right as well."""
    return net.no_sync() if isinstance(net, DistributedDataParallel) and not last else nullcontext()


def whole(x: Tensor) -> Tensor:
    """On the CPU and contiguous, gathered from all workers (who must all ask) where it is sharded."""
    x = x.full_tensor() if isinstance(x, DTensor) else x
    return x.detach().cpu().contiguous()


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """`value`, whole on every worker, as the parameter is: on its device, and this worker's shard where that one is sharded."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer knows, whole, by the parameter's name and its own. Collective."""
    named = {id(p): name for name, p in model.named_parameters()}
    return {f"{named[id(p)]}/{key}": whole(value) for p, state in optimizer.state.items() for key, value in state.items()}


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Put `optimizer_state` back. ValueError for parameters that the model has not."""
    named = dict(model.named_parameters())
    if unknown := sorted({key.rpartition("/")[0] for key in state} - set(named)):
        raise ValueError(f"the checkpoint's optimizer knows {len(unknown)} parameters that the backbone has not, as {unknown[0]}")
    for key, value in state.items():
        name, _, slot = key.rpartition("/")
        optimizer.state[named[name]][slot] = value if slot == "step" else like(value, named[name])
