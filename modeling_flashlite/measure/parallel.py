"""Time and traffic of training steps of a small model on several gloo processes."""

import multiprocessing
import os
import re
import socket
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..configuration_flashlite import FlashLiteConfig
from ..modeling_flashlite import FlashLiteForCausalLM
from .scaling import communication

__all__ = ["BytesSent", "measure_parallel"]

KINDS = ("ddp", "fsdp", "tp")


class BytesSent(TorchDispatchMode):
    """Counts the bytes that a device sends by ring algorithms in all collectives inside the context."""

    def __init__(self, devices: int):
        super().__init__()
        self.share, self.bytes = (devices - 1) / devices, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        space, _, name = func.name().partition("::")
        if "c10d" in space and ("reduce" in name or "gather" in name):
            sizes = [
                sum(x.numel() * x.element_size() for x in tree_leaves(part) if isinstance(x, torch.Tensor))
                for part in (*args[:2], out)
            ]
            # the larger of input and output; an all-reduce sends it twice
            twice = 2 if "reduce" in name and "scatter" not in name else 1
            self.bytes += twice * self.share * max(sizes)
        return out


def loopback_bytes() -> int | None:
    """Bytes sent by the loopback device so far; `None` where the system does not report it."""
    table = Path("/proc/net/dev")
    line = re.search(r"^\s*lo:(.*)$", table.read_text(), re.MULTILINE) if table.is_file() else None
    return int(line[1].split()[8]) if line else None


def measure_parallel(
    kind: str, folder: str | Path, *, world: int = 2, batch: int = 4, length: int = 128, steps: int = 5
):
    """Time and traffic of a training step of the model in `folder`, on `world` processes of one thread each.

    Args:
        kind (`str`): "ddp", "fsdp" (FSDP2, one unit per layer) or "tp" (the model's tensor-parallel plan).
        folder (`str` or `Path`): a `FlashLiteForCausalLM` in float32.
        world (`int`): processes.
        batch, length (`int`): rows of a step over all processes, and tokens per row.
        steps (`int`): measured steps, after two warm-up steps.

    Returns:
        `dict`: `ms` and `spread_ms` of a step; per process and step `sent_MB` (counted at the collectives), `wire_MB`
        (what the loopback device sent) and `theory_MB`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    settings = kind, str(folder), batch, length, steps
    processes = [context.Process(target=_work, args=(sender, rank, world, port, *settings)) for rank in range(world)]
    for process in processes:
        process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"the {world} processes of {kind!r} ended without a result.") from None
    finally:
        for process in processes:
            process.join()


def _work(
    sender, rank: int, world: int, port: int, kind: str, folder: str, batch: int, length: int, steps: int
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    dist.init_process_group("gloo")
    model = _distribute(kind, folder, world)
    rows = batch if kind == "tp" else batch // world
    config = FlashLiteConfig.from_pretrained(folder)
    ids = torch.randint(4, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    times, counter = [], BytesSent(world)
    for step in range(-2, steps):
        if step == 0:
            wire = loopback_bytes()
            counter.bytes = 0.0
        dist.barrier()
        begin = time.perf_counter()
        with counter:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        times.append(time.perf_counter() - begin)
        model.zero_grad()
    dist.barrier()
    times = [1e3 * seconds for seconds in times[2:]]
    if rank == 0:
        result: dict = {
            "ms": round(statistics.median(times), 1),
            "spread_ms": [round(min(times), 1), round(max(times), 1)],
        }
        result["sent_MB"] = round(counter.bytes / steps / 1e6, 3)
        if wire is not None and (wired := loopback_bytes()) is not None:
            result["wire_MB"] = round((wired - wire) / world / steps / 1e6, 3)
        result["theory_MB"] = round(_theory(kind, folder, world, ids.numel()) / 1e6, 3)
        sender.send({**result, "sent_over_theory": round(result["sent_MB"] / result["theory_MB"], 3)})
    dist.destroy_process_group()


def _distribute(kind: str, folder: str, world: int) -> torch.nn.Module:
    """The model in `folder`, distributed over the processes."""
    if kind == "tp":
        from transformers import DistributedConfig

        plan = DistributedConfig(tp_size=world)
        return FlashLiteForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=plan).train()
    model = FlashLiteForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _theory(kind: str, folder: str, world: int, tokens: int) -> float:
    """Bytes that a process sends in a step, in float32, by [`communication`]."""
    config = FlashLiteConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = FlashLiteForCausalLM(config)
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    layers = 4 * sum(parameter.numel() for parameter in model.get_decoder().layers.parameters())
    return communication(
        size,
        world,
        kind,
        kept=size - layers,
        layers=config.num_hidden_layers,
        states=4 * tokens * config.hidden_size,
        logits=4 * tokens * config.vocab_size,
    )
