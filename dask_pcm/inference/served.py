"""The engine of a model on a device: how large its steps and its pages are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from distributed.system import MEMORY_LIMIT

from dask_pcm import user_cache
from dask_pcm.config import Config
from dask_pcm.inference.engine.attention import switch
from dask_pcm.inference.engine.capacity import Capacity
from dask_pcm.inference.engine.engine import Engine
from dask_pcm.inference.engine.forward import Forward
from dask_pcm.inference.engine.packs import Pack, Segment
from dask_pcm.inference.engine.pages import PAGE_TOKENS, KVShape, PagePool, n_pages_for
from dask_pcm.inference.engine.paging import Paging
from dask_pcm.inference.engine.probe import kv_shape
from dask_pcm.inference.engine.serving import Serving
from dask_pcm.inference.engine.timeslice import Kind, TimeSlices
from dask_pcm.inference.probe import cache_key
from dask_pcm.plugins.worker.task import settings

if TYPE_CHECKING:
    from dask_pcm.inference.language_model import LanguageModel
    from dask_pcm.inference.padded import PaddedModel

#: Where steps are remembered.
_KIND = "steps"
#: Tokens of a step to begin with, on a CPU; more make it faster only if the model is small.
_CPU_TOKENS = 512
#: Rows in flight: enough that the next step never waits for the next batch; a killed process loses
#: them.
_ROWS = 512
#: Pages hold a step and a row of the longest kind; on a GPU as many tokens at least, within this
#: share of it and half of what is free. On a CPU within these bytes.
_POOL_TOKENS, _POOL_SHARE, _POOL_BYTES = 65_536, 1 / 8, 256 << 20
#: Memory of the host for rows that make room, over that of the pages; as a share of all, at most.
_HOST_FACTOR, _HOST_SHARE = 8, 16
#: Tokens of the longest row, for models that do not say.
_LONGEST = 4096


def attendant_of(model: LanguageModel) -> Serving:
    """The engine of a model that is on its device; its pages are taken when it starts."""
    padded, config = model.padded, settings()
    budget = config.batch_tokens
    device = padded.model.device
    switch(padded.model)
    # Encoders keep nothing of a token; so they have a single page, of a number for each.
    shape = kv_shape(padded.model) if padded.is_causal else KVShape(1, 1, 1, 1)
    page_bytes = shape.page_bytes(padded.model.dtype.itemsize)
    n_pages = n_pages_for(budget + (padded.max_tokens or _LONGEST)) if padded.is_causal else 1
    if device.type == "cuda":
        import torch

        budget, forward_bytes = _step_of(padded, budget)
        free, total = torch.cuda.mem_get_info(device)
        most_bytes = min(int(total * _POOL_SHARE), free // 2)
        wanted = max(n_pages, n_pages_for(_POOL_TOKENS)) if padded.is_causal else n_pages
        n_pages = min(wanted, most_bytes // page_bytes)
        n_bytes, first = (n_pages + 1) * page_bytes + forward_bytes, budget
    else:
        n_bytes, first = 0, _CPU_TOKENS
        n_pages = min(n_pages, _POOL_BYTES // page_bytes)
    n_pages = max(n_pages, 1)
    first, remember = _remembered(model, first)
    host_bytes = config.host_pages_bytes
    if host_bytes is None:
        host_bytes = min(_HOST_FACTOR * n_pages * page_bytes, MEMORY_LIMIT // _HOST_SHARE)
    host_bytes = host_bytes if padded.is_causal else 0

    def make() -> Engine:
        pool = PagePool(n_pages, shape, padded.model.dtype, device)
        return Engine(
            padded.model,
            pool,
            Capacity(first, most=budget, on_settled=remember),
            padded.n_embeddings,
            is_causal=padded.is_causal,
            first_position=padded.first_position,
            paging=Paging(pool, host_bytes, config.may_recompute),
            slices=TimeSlices(config.slice_tokens, _weights(config)),
        )

    return Serving(make, n_bytes, _ROWS, model, host_bytes)


def _weights(config: Config) -> dict[Kind, float]:
    return {Kind.QUESTION: config.question_weight, Kind.BATCH: 1.0}


def _remembered(model: LanguageModel, first: int) -> tuple[int, Callable[[int], None]]:
    """Tokens of the first step: as many as were found to be best earlier; and what remembers that.

    By model, kind of device and versions, for all processes of a user.
    """
    if model.content is None:
        return first, lambda _: None
    key = cache_key("tokens of a step", model.padded, model.content)
    found = user_cache.recall(_KIND, key)
    if isinstance(found, int) and found > 0:
        first = found
    return first, functools.partial(user_cache.note, _KIND, key)


def _step_of(model: PaddedModel, budget_tokens: int) -> tuple[int, int]:
    """Tokens of a step for which there is memory, and the bytes that its forward takes."""
    import torch

    while True:
        try:
            return budget_tokens, _bytes_of_forward(model, budget_tokens)
        except torch.cuda.OutOfMemoryError:
            if budget_tokens <= PAGE_TOKENS:
                raise
            budget_tokens //= 2


def _bytes_of_forward(model: PaddedModel, n_tokens: int) -> int:
    """Bytes that a forward of as many tokens takes at its peak, on a CUDA device."""
    import torch

    rows = [Segment([0] * 64, range(64))] * max(1, n_tokens // 64)
    before = torch.cuda.memory_allocated(model.model.device)
    torch.cuda.reset_peak_memory_stats(model.model.device)
    pack = Pack(
        rows,
        device=model.model.device,
        is_causal=model.is_causal,
        first_position=model.first_position,
    )
    with torch.inference_mode():
        Forward(model.model, model.is_causal).hidden(pack, [])
    return int(torch.cuda.max_memory_allocated(model.model.device) - before)
