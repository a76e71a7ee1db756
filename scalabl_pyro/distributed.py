"""Training on several devices: each has its share of a minibatch, all have the same draws of s."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

__all__ = [
    "average_gradients",
    "check_same",
    "copy_from_main",
    "is_main",
    "rank",
    "shard",
    "start",
    "wait",
    "world_size",
]


def start() -> None:
    """Join the process group that ``accelerate launch`` or ``torchrun`` describes, if there is one,
    and take this process's device of the machine as the current one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=not torch.cuda.is_available())
        atexit.register(_leave)


def _leave() -> None:
    """Leave the process group: threads of gloo's that still run abort a process that ends."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes files and shows progress."""
    return rank() == 0


def wait() -> None:
    """Wait until every process has come so far, for what one writes the others may read next."""
    if world_size() > 1:
        dist.barrier()


def check_same(number: int, message: str) -> None:
    """Compare a number over all processes.

    :raises RuntimeError: in every process, with that message and the numbers, if they differ.
    """
    numbers: list[int] = [number] * world_size()
    if world_size() > 1:
        dist.all_gather_object(numbers, number)
    if len(set(numbers)) > 1:
        raise RuntimeError(f"{message}: {numbers}")


@torch.no_grad()
def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by the first process's, in place."""
    for tensor in tensors if world_size() > 1 else ():
        whole = tensor.contiguous()  # NCCL takes no other
        dist.broadcast(whole, src=0)
        tensor.copy_(whole)


def shard(llm: nn.Module, keep: Iterable[nn.Parameter]) -> None:
    """Spread the weights of a frozen model over all processes (FSDP2), a block at a time.

    :param keep: parameters that every process holds whole, such as those that are trained; their
        gradients are averaged by :func:`average_gradients`.
    """
    whole = set(keep)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (world_size(),))
    lists = [module for module in llm.modules() if isinstance(module, nn.ModuleList)]
    blocks = max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))
    for module in (*blocks, llm):
        fully_shard(module, mesh=mesh, ignored_params=whole & set(module.parameters()))


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor], terms: Tensor) -> None:
    """Replace each gradient, and further numbers, by their means over all processes, in one
    message.

    Gradients of −ELBO/N on shares of a minibatch average to that on the whole of it, for each share
    is scaled to the data set. A parameter that a share does not reach, such as an expert's, has the
    gradient 0 there. The tensors are the adapter's and the guide's, a few megabytes: there is
    nothing to overlap with the backward pass.
    """
    if world_size() == 1:
        return
    reached = terms.new_tensor([float(p.grad is not None) for p in parameters])
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    tensors = [*gradients, reached, terms]
    flat = torch.cat([tensor.flatten().float() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    for tensor, mean in zip(
        tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True
    ):
        tensor.copy_(mean.view_as(tensor))
    for parameter, gradient, share in zip(parameters, gradients, reached.tolist(), strict=True):
        parameter.grad = gradient if share else None
