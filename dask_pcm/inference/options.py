"""Arguments of the verbs, checked where they are called: on clients and in workers' functions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dask_pcm.errors import PromptError
from dask_pcm.inference.engine.rows import Pooling
from dask_pcm.inference.engine.sampling import Sampling
from dask_pcm.inference.prompts import check_choices

#: Further layers that sentence-transformers knows, and that do not change what is pooled.
_KNOWN_LAYERS = {"Transformer", "Pooling", "Normalize"}
#: What a folder of sentence-transformers says of its pooling.
_MODES = {
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_lasttoken": Pooling.LAST,
}


def checked_choices(
    choices: Sequence[str], normalize: str | None
) -> tuple[tuple[str, ...], str | None]:
    """The choices of ``classify``, and how their scores are compared; PromptError if wrong."""
    if normalize not in (None, "tokens"):
        raise PromptError(f"normalize must be 'tokens' or None; found {normalize!r}.")
    return check_choices(choices), normalize


def checked_generation(
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int,
    stop: str | Sequence[str] | None,
    n: int,
) -> dict[str, Any]:
    """The options of ``Generate``; PromptError for a value out of its range."""
    max_tokens, n, seed, top_k = (_plain(value) for value in (max_tokens, n, seed, top_k))
    for name, value in (("max_tokens", max_tokens), ("n", n)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise PromptError(f"{name} is {value!r}; expected 1 or more.")
    if not isinstance(stop, (str, list, tuple, set, frozenset, type(None))):
        raise PromptError(f"stop must be texts that are not empty; found {stop!r}.")
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if not all(isinstance(one, str) and one for one in stops):
        raise PromptError(f"stop must be texts that are not empty; found {stop!r}.")
    sampling = Sampling(_plain(temperature), top_k, _plain(top_p), seed)
    if n > 1 and not temperature:
        raise PromptError(f"n={n} with temperature 0 gives the same text {n} times; raise it.")
    return {"max_tokens": max_tokens, "sampling": sampling, "stop": stops, "n": n}


def checked_pooling(pooling: str | None, folder: str | Path, is_causal: bool) -> Pooling:
    """How ``embed`` pools: as told, as the folder says, or as usual for the kind of model.

    Raises
    ------
    PromptError
        If there is no such pooling, or the folder has further layers, which are not computed.
    """
    if pooling is not None:
        try:
            return Pooling(pooling)
        except ValueError:
            names = ", ".join(repr(one.value) for one in Pooling)
            raise PromptError(f"pooling must be one of {names}; found {pooling!r}.") from None
    usual = Pooling.LAST if is_causal else Pooling.MEAN
    modules = _json(Path(folder, "modules.json"), [])
    kinds = [str(one.get("type", "")).rpartition(".")[2] for one in modules]
    if unknown := [kind for kind in kinds if kind not in _KNOWN_LAYERS]:
        raise PromptError(
            f"{str(folder)!r} has further layers of sentence-transformers ({', '.join(unknown)}),"
            " which embed does not compute. Give pooling=... for vectors without them."
        )
    for one in modules:
        if str(one.get("type", "")).endswith("Pooling"):
            about = _json(Path(folder, str(one.get("path", "")), "config.json"), {})
            modes = [name for name, is_on in about.items() if "_mode_" in name and is_on is True]
            if len(modes) != 1 or modes[0] not in _MODES:
                raise PromptError(
                    f"{str(folder)!r} pools by {' and '.join(modes) or 'nothing'}, which embed does"
                    " not know. Give pooling=... for another."
                )
            return _MODES[modes[0]]
    return usual


def _plain(value: Any) -> Any:
    """A number of NumPy as Python's own; anything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def _json(path: Path, missing: Any) -> Any:
    """The content of a JSON file; `missing` if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return missing
    except (OSError, ValueError) as error:
        raise PromptError(f"{str(path)!r} cannot be read: {error}.") from error
