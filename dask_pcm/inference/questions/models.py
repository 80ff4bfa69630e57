"""The language models that a cluster knows, for processes that did not make them."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

from distributed import Client

from dask_pcm.context.context import ContextRef
from dask_pcm.errors import InstallError, ModelError
from dask_pcm.plugins.install import NOT_INSTALLED_TEXT


def models_of(client: Client, run: str = "") -> list[ContextRef]:
    """The language models that the gate knows, or those of a run, if that is open.

    Raises
    ------
    InstallError
        The toolkit is not installed there.
    ModelError
        There is no such run at the gate.
    """
    found = client.sync(client.scheduler.pcm_models, run=run)
    if found is None:
        raise InstallError(NOT_INSTALLED_TEXT)
    if found["models"] is None:
        raise ModelError(
            "The run has not begun its work yet, or is paused: its scheduler does not know its"
            " model. Try again, or name the model and the scheduler (--model, --scheduler)."
        )
    return [pickle.loads(ref) for ref in found["models"]]


def named(models: Sequence[ContextRef], wanted: str | None) -> ContextRef | None:
    """The model of a name, folder or hub id; the only one if none is wanted.

    Returns
    -------
    ContextRef or None
        None if a model is wanted that is not among them.

    Raises
    ------
    ModelError
        There are none, or several, of which one has to be named.
    """
    if wanted is not None:
        models = [ref for ref in models if wanted in (ref.name, dict(ref.about).get("model"))]
        if not models:
            return None
    if len(models) == 1:
        return models[0]
    if not models:
        raise ModelError(
            "The cluster knows no language model yet. Name one: --model, with its folder or hub id."
        )
    names = ", ".join(sorted(f"{ref.name!r} ({dict(ref.about).get('model')})" for ref in models))
    raise ModelError(f"The cluster knows several language models: {names}. Name one by --model.")
