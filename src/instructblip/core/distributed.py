"""Ranks, world size and reductions: the only file that uses ``torch.distributed``.

Every function works without a process group; there is then one rank, and reductions do nothing.
``torchrun --nproc-per-node N -m instructblip train RECIPE`` sets what `process_group` reads.

Training with several ranks does not wrap the model in torch's DistributedDataParallel: each rank
runs its micro batches, and `sum_gradients` sums the gradients once per step, after the last one.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

TIMEOUT = timedelta(days=1)
"""How long ranks wait for each other: the first one alone may check data, store features or write
an export for hours. `training.watchdog_seconds` ends a step that hangs."""

BUCKET_BYTES = 32 * 2**20
"""Gradients are summed in flat buckets of about this size: few calls, little extra memory."""


def is_initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process among all processes, from 0."""
    return dist.get_rank() if is_initialised() else 0


def world_size() -> int:
    return dist.get_world_size() if is_initialised() else 1


def local_rank() -> int:
    """The number of this process among those of the same machine, which is its GPU's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of that name; ``auto`` is this rank's GPU if there is one, else the CPU.

    On CUDA it turns cuDNN's attention off, the first choice of torch 2.11 on Hopper GPUs: it plans
    anew for every shape, which text of changing lengths brings all the time, and its backward pass
    may give NaN for a masked row (pytorch#196678).

    Raises ValueError for a device that torch does not find here.
    """
    if device == "auto":
        device = f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    count = torch.get_device_module(device).device_count()
    if (device.index or 0) >= count:
        raise ValueError(
            f"device {device}: torch finds {count} devices of type {device.type} here; "
            "take another, or auto"
        )
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


@contextmanager
def process_group(backend: str | None = None) -> Iterator[None]:
    """Join the process group if torchrun started this process; leave it at the end.

    Where there are GPUs, tensors on them go through NCCL, and those on the CPU through gloo:
    barriers and objects, and everything with ``training.device=cpu``.
    """
    started = "WORLD_SIZE" in os.environ and "RANK" in os.environ and not is_initialised()
    if started:
        gpus = torch.cuda.device_count() if backend is None else 0
        if local_rank() < gpus:
            torch.cuda.set_device(local_rank())
        backend = backend or ("cpu:gloo,cuda:nccl" if gpus else "gloo")
        dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield
    finally:
        if started:
            dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks, on the CPU: no GPU computes, and none has to be there."""
    if is_initialised():
        dist.all_reduce(torch.zeros(1))


@contextmanager
def main_first() -> Iterator[None]:
    """Let the first rank run the block before all others do, which then find its work done."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over the ranks, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is set on any rank; the same on all ranks. No device takes part."""
    return bool(all_reduce_sum(torch.tensor(float(flag))).item())


def broadcast_object(value: Any) -> Any:
    """Rank 0's ``value`` on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's ``value``, in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum the gradients over the ranks, in flat buckets; of sparse ones, the rows that they hold.

    A missing gradient counts as zeros, so that every rank calls the same collectives whatever its
    batch held; a parameter without a gradient on any rank stays without. The loss of each micro
    batch is divided by the tokens of the global step, so that the sum is the gradient of the mean
    over response tokens.
    """
    if world_size() == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    flags = [(p.grad is not None, p.grad is not None and p.grad.is_sparse) for p in trained]
    ranks = all_reduce_sum(torch.tensor(flags, dtype=torch.float)).tolist()  # on the CPU
    present = [(p, sparse) for p, (some, sparse) in zip(trained, ranks, strict=True) if some]
    for table in (p for p, sparse in present if sparse):
        _sum_rows(table)
    for bucket in _buckets([p for p, sparse in present if not sparse]):
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in bucket if p.grad is not None]
        flat = all_reduce_sum(torch.cat([g.reshape(-1) for g in gradients]))
        for gradient, part in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))


def _sum_rows(table: Tensor) -> None:
    """Sum a sparse gradient: first find the rows that any rank holds, then sum these."""
    held = table.new_zeros(len(table))
    gradient = None if table.grad is None else table.grad.coalesce()
    if gradient is not None:
        held[gradient.indices()[0]] = 1
    rows = all_reduce_sum(held).nonzero()[:, 0]
    values = table.new_zeros(len(rows), *table.shape[1:])
    if gradient is not None:
        values[torch.searchsorted(rows, gradient.indices()[0])] = gradient.values()
    table.grad = torch.sparse_coo_tensor(
        rows[None], all_reduce_sum(values), table.shape, is_coalesced=True, check_invariants=False
    )


def shard(stack: nn.Module, layers: list[nn.Module], device: torch.device) -> None:
    """Shard the frozen parameters of ``layers`` over the ranks (FSDP2).

    A layer's parameters are gathered while it runs, forward and backward, so that all ranks must
    call ``stack``, the module that owns the layers, equally often. Trainable parameters stay whole
    on every rank, and so do their optimiser state and the checkpoints: a run can resume with any
    number of ranks. Does nothing without a process group.
    """
    if world_size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    inside = {p for layer in layers for p in layer.parameters()}
    trained = {p for p in inside if p.requires_grad}
    outside = {p for p in stack.parameters() if p not in inside}
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    fully_shard(stack, mesh=mesh, ignored_params=trained | outside)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only a part of ``tensor``."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _buckets(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters in order, those of a bucket with one type on one device."""
    for _, alike in itertools.groupby(parameters, lambda p: (p.dtype, p.device)):
        bucket, size = [], 0
        for parameter in alike:
            if size >= BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(parameter)
            size += parameter.nbytes
        yield bucket
