"""The engine of a model on a device: how large its steps and its pages are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dask_pcm.config import Config
from dask_pcm.inference.engine.attention import packed, switch
from dask_pcm.inference.engine.capacity import Capacity
from dask_pcm.inference.engine.engine import Engine
from dask_pcm.inference.engine.packs import Pack, Segment
from dask_pcm.inference.engine.pages import PAGE_TOKENS, PagePool, n_pages_for
from dask_pcm.inference.engine.probe import kv_shape
from dask_pcm.inference.engine.serving import Serving

if TYPE_CHECKING:
    from dask_pcm.inference.padded import PaddedModel

#: Tokens of a step to begin with, on a CPU; more make it faster only if the model is small.
_CPU_TOKENS = 512
#: Rows in flight: enough that the next step never waits for the next batch; a killed process loses
#: them.
_ROWS = 512
#: Pages hold a step and a row of the longest kind; on a GPU as many tokens at least, within this
#: share of it and half of what is free. On a CPU within these bytes.
_POOL_TOKENS, _POOL_SHARE, _POOL_BYTES = 65_536, 1 / 8, 256 << 20
#: Tokens of the longest row, for models that do not say.
_LONGEST = 4096


def attendant_of(model: PaddedModel) -> Serving:
    """The engine of a model that is on its device; its pages are taken when it starts."""
    budget = Config.read().batch_tokens
    device = model.model.device
    switch(model.model)
    shape = kv_shape(model.model)
    page_bytes = shape.page_bytes(model.model.dtype.itemsize)
    n_pages = n_pages_for(budget + (model.max_tokens or _LONGEST))
    if device.type == "cuda":
        import torch

        budget, forward_bytes = _step_of(model.model, budget)
        free, total = torch.cuda.mem_get_info(device)
        most_bytes = min(int(total * _POOL_SHARE), free // 2)
        n_pages = min(max(n_pages, n_pages_for(_POOL_TOKENS)), most_bytes // page_bytes)
        n_bytes, first = (n_pages + 1) * page_bytes + forward_bytes, budget
    else:
        n_bytes, first = 0, _CPU_TOKENS
        n_pages = min(n_pages, _POOL_BYTES // page_bytes)
    n_pages = max(n_pages, 1)

    def make() -> Engine:
        pool = PagePool(n_pages, shape, model.model.dtype, device)
        return Engine(model.model, pool, Capacity(first, most=budget), model.n_embeddings)

    return Serving(make, n_bytes, _ROWS, model)


def _step_of(model: Any, budget_tokens: int) -> tuple[int, int]:
    """Tokens of a step for which there is memory, and the bytes that its forward takes."""
    import torch

    while True:
        try:
            return budget_tokens, _bytes_of_forward(model, budget_tokens)
        except torch.cuda.OutOfMemoryError:
            if budget_tokens <= PAGE_TOKENS:
                raise
            budget_tokens //= 2


def _bytes_of_forward(model: Any, n_tokens: int) -> int:
    """Bytes that a forward of as many tokens takes at its peak, on a CUDA device."""
    import torch

    rows = [Segment([0] * 64, range(64))] * max(1, n_tokens // 64)
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    pack = Pack(rows, device=model.device)
    with torch.inference_mode(), packed(pack):
        base = getattr(model, "base_model", model)
        base(input_ids=pack.ids, position_ids=pack.positions, use_cache=False)
    return int(torch.cuda.max_memory_allocated(model.device) - before)
