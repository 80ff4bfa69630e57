"""Attention over packs, through transformers' public ``AttentionInterface``.

Models differ in what they tell attention: a sliding window, a cap of the scores (``softcap``) and a
sink (``s_aux``) come as keywords; or the window is known from the configuration's ``layer_types``.
A model that is called without a pack, as by a user's own function, has the attention that it had.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dask_pcm.inference.engine import long_context, varlen
from dask_pcm.inference.engine.packs import Group, Pack
from dask_pcm.inference.engine.pages import KVShape

#: The names by which models find this attention begin so; what they had before follows.
_PREFIX = "dask_pcm_"
#: What some models tell their attention of where tokens are, which a pack knows better.
_PLACES = {"position_ids", "cache_position"}


class UnfitError(Exception):
    """An engine cannot compute the model; the message says why."""


class _Local(threading.local):
    """The pack that models compute on this thread, and what each layer has kept of a token."""

    pack: Pack | None = None

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int, int]] = {}


_local = _Local()


@contextmanager
def packed(pack: Pack) -> Iterator[None]:
    """Within the block, models with this attention compute `pack` on this thread."""
    _local.pack, _local.shapes = pack, {}
    try:
        yield
    finally:
        _local.pack = None


def switch(model: Any) -> None:
    """Have a model use this attention, wherever a pack is computed; again is allowed."""
    from transformers import AttentionInterface, AttentionMaskInterface

    before = model.config._attn_implementation
    is_new = not before.startswith(_PREFIX)
    before = before.removeprefix(_PREFIX)
    AttentionInterface.register(_PREFIX + before, functools.partial(_hook, before))
    AttentionMaskInterface.register(_PREFIX + before, functools.partial(_mask, before))
    try:
        if is_new:  # some models decide by it what they tell their attention
            model.set_attn_implementation("eager")
        model.set_attn_implementation(_PREFIX + before)
    except BaseException:
        model.set_attn_implementation(before)
        raise


def switch_back(model: Any) -> None:
    """Have a model use the attention that it had."""
    before = model.config._attn_implementation
    if before is not None and before.startswith(_PREFIX):
        model.set_attn_implementation(before.removeprefix(_PREFIX))


def last_shape() -> KVShape | None:
    """What the last forward's layers would keep of a token; None if they differ, or none asked."""
    found = set(_local.shapes.values())
    if len(found) != 1:
        return None
    ((n_heads, key_dim, value_dim),) = found
    return KVShape(max(_local.shapes) + 1, n_heads, key_dim, value_dim)


def was_asked() -> bool:
    """Whether a layer has computed attention in the last forward with a pack."""
    return bool(_local.shapes)


@dataclass(frozen=True, slots=True)
class _How:
    """What a layer's attention is told."""

    scale: float
    window: int | None
    softcap: float | None
    sink: Any


def _mask(before: str, *args: Any, **kwargs: Any) -> Any:
    """The mask of attention without a pack; packs have their own."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return (
        None if _local.pack is not None else ALL_MASK_ATTENTION_FUNCTIONS[before](*args, **kwargs)
    )


def _hook(
    before: str,
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Any = None,
    **others: Any,
) -> tuple[Any, Any]:
    """Attention of a layer; from shape (1, heads, tokens, dim) to (1, tokens, heads, dim)."""
    pack = _local.pack
    if pack is None:
        told = {"sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
        others.update({name: value for name, value in told.items() if value is not None})
        plain = _plain(before, module)
        found: tuple[Any, Any] = plain(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others
        )
        return found
    _check_told(attention_mask, others)
    window = sliding_window if sliding_window is not None else _window_of(module)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer = getattr(module, "layer_idx", 0)
    _local.shapes[layer] = (key.shape[1], key.shape[3], value.shape[3])
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return _attend(pack, layer, q, k, v, _How(scale, window, softcap, s_aux))[None], None


def _check_told(mask: Any, others: Mapping[str, Any]) -> None:
    """Raise UnfitError if a layer chooses its keys itself, as sparse attention does.

    Texts that are short enough see all keys, so a comparison of logits need not show it.
    """
    import torch

    if mask is not None:
        raise UnfitError("its layers have masks of their own")
    for name, value in others.items():
        if name not in _PLACES and isinstance(value, torch.Tensor):
            raise UnfitError(f"it tells its attention {name}, which an engine does not know")


def _plain(name: str, module: Any) -> Any:
    """The attention of that name; the eager one is that of the model's own file."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, own)


def _window_of(module: Any) -> int | None:
    """The sliding window of a layer, as its configuration has it."""
    config = getattr(module, "config", None)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or kinds is None:
        return window
    return window if kinds[module.layer_idx] == "sliding_attention" else None


def _attend(pack: Pack, layer: int, q: Any, k: Any, v: Any, how: _How) -> Any:
    """Attention of one layer, shapes (tokens, heads, dim)."""
    import torch

    pages = None if pack.pool is None else pack.pool.kv[:, layer]
    if pack.stored is not None and pages is not None:
        places, page, slot = pack.stored
        pages[page, slot] = torch.cat([k[places], v[places]], -1)
    n_plain = pack.n_plain
    if n_plain == len(q):
        return _attend_plain(pack, layer, q, k, v, pages, how)
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    if n_plain:
        plain = slice(n_plain)
        out[plain] = _attend_plain(pack, layer, q[plain], k[plain], v[plain], pages, how)
    for one in pack.streamed:
        keys, values = _keys_of(one.group, pages, k, v)
        out[one.span] = long_context.attend(
            one,
            layer,
            q[one.span].transpose(0, 1),
            keys[0],
            values[0],
            scale=how.scale,
            window=how.window,
            softcap=how.softcap,
            sink=how.sink,
        )
    return out


def _attend_plain(pack: Pack, layer: int, q: Any, k: Any, v: Any, pages: Any, how: _How) -> Any:
    """Attention of one layer, for tokens of rows of which nothing is streamed."""
    if how.softcap is None and how.sink is None and varlen.is_taken(q, v):
        return varlen.attend(
            pack.sequences,
            pack.pool,
            layer,
            q,
            k,
            v,
            scale=how.scale,
            window=how.window,
            is_causal=pack.is_causal,
        )
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    for group in pack.groups:
        mask = group.mask(how.window)
        if group.span is not None:  # views, and no copies
            one, keys, values = (x[None, group.span].transpose(1, 2) for x in (q, k, v))
            found = _attention(one, keys, values, mask, pack.is_causal, how)
            out[group.span] = found[0].transpose(0, 1)
            continue
        keys, values = _keys_of(group, pages, k, v)
        queries = q[group.index].transpose(1, 2)
        found = _attention(queries, keys, values, mask, pack.is_causal, how)
        to, of = group.kept
        out[to] = found.transpose(1, 2).flatten(0, 1)[of]
    return out


def _keys_of(group: Group, pages: Any, k: Any, v: Any) -> tuple[Any, Any]:
    """Keys and values of a group's rows, shape (rows, heads, keys, dim)."""
    import torch

    if group.table is None:
        return k[group.index].transpose(1, 2), v[group.index].transpose(1, 2)
    cached = pages[group.table].flatten(1, 2)
    keys, values = cached.split([k.shape[-1], v.shape[-1]], -1)
    if not group.is_stored:
        n_rows = len(group.index)
        keys = torch.cat([keys.expand(n_rows, -1, -1, -1), k[group.index]], 1)
        values = torch.cat([values.expand(n_rows, -1, -1, -1), v[group.index]], 1)
    return keys.transpose(1, 2), values.transpose(1, 2)


def _attention(q: Any, k: Any, v: Any, mask: Any, is_causal: bool, how: _How) -> Any:
    """Attention, shapes (rows, heads, tokens, dim)."""
    import torch

    is_grouped = q.shape[1] != k.shape[1]
    if how.softcap is None and how.sink is None:
        return torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and is_causal and q.shape[2] > 1,
            scale=how.scale,
            enable_gqa=is_grouped,
        )
    if is_grouped:
        n_each = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(n_each, 1), v.repeat_interleave(n_each, 1)
    scores = (q @ k.transpose(-1, -2)) * how.scale
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    if mask is None and is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if how.sink is not None:
        sink = how.sink.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return weights[..., : v.shape[2]] @ v
