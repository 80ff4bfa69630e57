"""The host and the device rung: what a killed worker, a checkpoint, a swap and a stream cost."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
from distributed import Client, LocalCluster

import dask_pcm as pcm
from benchmarks.table import Rows, median
from dask_pcm.context.context import Recipe
from dask_pcm.inference.checkpoint import Checkpoint
from dask_pcm.ladder.objects.host import ContextImages, Host, LocalKeeper
from dask_pcm.ladder.objects.live import Live, frozen
from dask_pcm.ladder.objects.shelf import Shelf
from dask_pcm.plugins.worker.plugin import CONTEXTS
from dask_pcm.plugins.worker.tuning import keep_freed_memory
from dask_pcm.tiers import Tier

GIB, MIB = 1 << 30, 1 << 20


def load(path: str) -> Any:
    """A causal model, as transformers loads it."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path)


def ask(number: int, context: pcm.Context) -> int:
    with pcm.acquire(context) as model:
        assert next(model.parameters()).numel()
        return os.getpid()


def llama(folder: Path, n_layers: int) -> None:
    """A Llama of random weights: 32 MiB, and 25 MiB a layer."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=n_layers,
        num_attention_heads=16,
        vocab_size=8192,
    )
    with torch.device("cpu"):
        model = transformers.LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder)


@contextmanager
def worker(**settings: Any) -> Iterator[Client]:
    with (
        dask.config.set(settings),
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        pcm.install(client)
        yield client


def restart(rows: Rows, scratch: Path) -> None:
    """SIGKILL of a worker to its context attached again, and to it loaded in a new process."""
    llama(scratch, n_layers=16)
    context = pcm.Context(load, str(scratch))

    def kills(client: Client, n: int) -> list[float]:
        seconds = []
        pid = client.submit(ask, 0, context, pure=False).result()
        time.sleep(8)  # the fork server imports
        for _ in range(n):
            start = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            pid = client.submit(ask, 0, context, pure=False).result()
            seconds.append(time.perf_counter() - start)
        return seconds

    with worker() as client:
        attached = kills(client, 5)
    with worker(**{"pcm.worker.imports": [], "pcm.ladder.host.budget": 0}) as client:
        loaded = kills(client, 3)
    rows.add(
        "SIGKILL to context attached again (median of 5), over spawn + load (of 3)",
        median(attached) / median(loaded),
        "<= 0.05",
    )
    rows.add("... seconds", median(attached), "<= 1")
    rows.add("... spawn + load, seconds", median(loaded))


def weights(rows: Rows, scratch: Path, device: str, n_gib: int) -> None:
    """A checkpoint in the page cache, placed on a device, over a raw read and copy of it."""
    import torch
    from safetensors.torch import save_file

    n = 16  # tensors a GiB
    tensors = {f"layer.{i}": torch.empty(GIB // n // 2, dtype=torch.float16) for i in range(n)}
    paths = [scratch / f"part-{number}.safetensors" for number in range(n_gib)]
    for number, path in enumerate(paths):
        save_file({f"{number}.{name}": t for name, t in tensors.items()}, path)
    for path in paths:
        path.read_bytes()

    def place() -> float:
        start = time.perf_counter()
        with Checkpoint(paths) as checkpoint:
            module = torch.nn.Module()
            for name, tensor in checkpoint.tensors.items():
                module.register_buffer(name.replace(".", "-"), tensor)
            checkpoint.place(module, device)
        if device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    def raw() -> float:
        """What one loop of read and copy takes."""
        start = time.perf_counter()
        buffer = torch.empty(16 * MIB, dtype=torch.uint8)
        memory = memoryview(buffer.numpy())
        for path in paths:
            fd, size = os.open(path, os.O_RDONLY), path.stat().st_size
            target = torch.empty(size, dtype=torch.uint8, device=device)
            for at in range(0, size, len(buffer)):
                n_read = os.preadv(fd, [memory], at)
                target[at : at + n_read].copy_(buffer[:n_read])
            os.close(fd)
        return time.perf_counter() - start

    place(), raw()
    pairs = [(place(), raw()) for _ in range(5)]
    rows.add(
        f"{n_gib} GiB of tensors placed on {device}, over the rate of a raw read and copy",
        median([other / ours for ours, other in pairs]),
        ">= 0.8",
    )
    is_asked = device != "cpu" and n_gib == 16
    rows.add("... seconds", median([ours for ours, _ in pairs]), "<= 0.7" if is_asked else "")


def alternating(rows: Rows, device: str) -> None:
    """Two contexts of which one fits: one goes down, the other comes up."""
    import torch

    keep_freed_memory()  # as on a worker
    recipe = Recipe(load, (), {})

    def module() -> Live:
        made = torch.nn.Sequential(*[torch.nn.Linear(2048, 2048) for _ in range(48)]).to(device)
        apart = frozen(made, recipe, "a model")
        host = Host(LocalKeeper(Shelf(sys.maxsize)))
        host.put("it", "a model", apart)
        live = Live(made, recipe, apart, ContextImages(host, "it"))
        live.apart = None
        live.offload()
        return live

    one, other = module(), module()
    one.restore()
    n_bytes = one.n_bytes
    source = torch.ones(n_bytes, dtype=torch.uint8)
    target = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    ratios, restores, lowers = [], [], []
    for _ in range(9):
        start = time.perf_counter()
        one.offload()
        lowers.append(time.perf_counter() - start)
        start = time.perf_counter()
        other.restore()
        restores.append(time.perf_counter() - start)
        start = time.perf_counter()
        target.copy_(source)
        if device != "cpu":
            torch.accelerator.synchronize()
        ratios.append(restores[-1] / (time.perf_counter() - start))
        one, other = other, one
    rows.add(
        f"two contexts of {n_bytes / GIB:.2g} GiB that alternate on {device}: restore over a copy",
        median(ratios),
        "<= 1.3",
    )
    rows.add("... restore, GB/s", n_bytes / 1e9 / median(restores))
    rows.add("... going down (held against the image first), GB/s", n_bytes / 1e9 / median(lowers))


def small(number: int, size_mib: int) -> Any:
    import torch

    return torch.nn.Linear(1, size_mib << 18, bias=False)


def use(number: int, context: pcm.Context) -> int:
    with pcm.acquire(context):
        time.sleep(0.02)
    return number


def stream(rows: Rows) -> None:
    """A random stream over three contexts of which two fit, a few tasks at a time."""
    three = [pcm.Context(small, i, 64, device_memory=64 * MIB, name=f"c{i}") for i in range(3)]
    rng = random.Random(0)
    order = [rng.randrange(3) for _ in range(600)]

    def count(dask_worker: Any = None) -> None:
        store = dask_worker.plugins[CONTEXTS].contexts.store
        tell, store.n_moves = store._residencies.report, 0

        def counted(change: Any) -> None:
            store.n_moves += change.tier is Tier.DEVICE
            tell(change)

        store._residencies.report = counted

    def counted(dask_worker: Any = None) -> int:
        return int(dask_worker.plugins[CONTEXTS].contexts.store.n_moves)

    best = belady(order, 2)
    for n_ahead in (16, 1):
        with worker(**{"pcm.ladder.device.budget": 140 * MIB}) as client:
            client.run(count)
            waiting: list[Any] = []
            for i, which in enumerate(order):
                waiting.append(client.submit(use, i, three[which], pure=False))
                if len(waiting) == n_ahead:
                    waiting.pop(0).result()
            client.gather(waiting)
            (n_moves,) = client.run(counted).values()
        told = f"{n_ahead} known ahead" if n_ahead > 1 else "each known when the last has ended"
        rows.add(
            f"600 tasks over three contexts of which two fit, {told}: loads and restores over"
            " Belady's",
            n_moves / best,
            "<= 1.5" if n_ahead > 1 else "",
        )
    rows.add("... Belady's loads and restores", best)


def belady(order: Sequence[int], n_places: int) -> int:
    """Loads and restores under Belady's optimal replacement, tasks in their order."""
    there: set[int] = set()
    n_moves = 0
    for i, context in enumerate(order):
        if context not in there:
            n_moves += 1
            if len(there) == n_places:
                there.discard(max(there, key=_next_use(order[i:])))
            there.add(context)
    return n_moves


def _next_use(rest: Sequence[int]) -> Callable[[int], int]:
    return lambda context: rest.index(context) if context in rest else len(rest)
