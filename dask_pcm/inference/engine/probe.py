"""Whether an engine computes what a model computes of each row alone; verified when it is loaded.

Windows are narrowed meanwhile, so that a short text is longer than they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dask_pcm.inference.engine.attention import (
    UnfitError,
    last_shape,
    switch,
    was_asked,
)
from dask_pcm.inference.engine.forward import Forward
from dask_pcm.inference.engine.packs import Pack, Segment
from dask_pcm.inference.engine.pages import KVShape, PagePool, n_pages_for

_KINDS = {"full_attention", "sliding_attention"}
_WINDOW = 16


def packed_logits(model: Any, rows: Sequence[Sequence[int]]) -> list[Any]:
    """Logits of rows in one pack, shapes (tokens, vocabulary); the first row in two steps.

    Switches the model's attention.

    Raises
    ------
    UnfitError
        If an engine cannot compute the model at all.
    """
    import torch

    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if unknown := kinds - _KINDS:
        raise UnfitError(f"it has layers of the kind {', '.join(sorted(unknown))}")
    if len(rows[0]) < 2:
        raise UnfitError("it takes texts of one token only")
    switch(model)
    shape = kv_shape(model)
    pool = PagePool(n_pages_for(len(rows[0])), shape, model.dtype, model.device)
    pages = pool.take(pool.n_pages)
    pool.clean()
    first, cut = list(rows[0]), len(rows[0]) // 2
    begun = Segment(first[:cut], range(cut), pages, 0, True)
    rest = Segment(first[cut:], range(cut, len(first)), pages, cut, True)
    packs = [[begun, *(Segment(list(row), range(len(row))) for row in rows[1:])], [rest]]
    found: list[Any] = []
    for segments in packs:
        pack = Pack(segments, pool, model.device)
        with torch.inference_mode():
            logits = Forward(model).logits(pack)
        found.append(logits.split([len(s.tokens) for s in segments]))
    (start, *others), (end,) = found
    return [torch.cat([start, end]), *others]


def kv_shape(model: Any) -> KVShape:
    """What each layer of a model with switched attention keeps of a token.

    Raises
    ------
    UnfitError
        If layers differ in it, or some keep nothing.
    """
    import torch

    pack = Pack([Segment([0, 0], [0, 1])], device=model.device)
    with torch.inference_mode():
        Forward(model).logits(pack)
    shape = last_shape()
    n_layers = model.config.get_text_config().num_hidden_layers
    if shape is None or shape.n_layers != n_layers:
        raise UnfitError("its layers differ in what they keep of a token")
    return shape


def packed_hidden(model: Any, rows: Sequence[Sequence[int]], first_position: int) -> Sequence[Any]:
    """Last hidden states of rows of an encoder in one pack, shapes (tokens, width).

    Switches the model's attention.

    Raises
    ------
    UnfitError
        If its layers do not ask for attention by transformers' interface.
    """
    import torch

    switch(model)
    segments = [Segment(list(row), range(len(row))) for row in rows]
    pack = Pack(segments, device=model.device, is_causal=False, first_position=first_position)
    with torch.inference_mode():
        found = Forward(model, is_causal=False).hidden(pack, slice(None))
    if not was_asked():
        raise UnfitError("its layers have an attention of their own")
    split: Sequence[Any] = found.split([len(row) for row in rows])
    return split


@contextmanager
def narrowed(model: Any) -> Iterator[None]:
    """Within the block, sliding windows are a few tokens wide."""
    holders = [*model.modules(), model.config, model.config.get_text_config()]
    wide = {
        id(one): (one, one.sliding_window)
        for one in holders
        if isinstance(getattr(one, "sliding_window", None), int) and one.sliding_window > _WINDOW
    }
    try:
        for one, _ in wide.values():
            one.sliding_window = _WINDOW
        yield
    finally:
        for one, window in wide.values():
            one.sliding_window = window
