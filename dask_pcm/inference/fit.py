"""The client checks that a checkpoint has the tensors its architecture needs, as transformers does.

Names in files differ from names in memory: experts stored one by one are merged into one tensor,
and tied tensors are stored once. Only transformers knows these rules, and it needs torch. So the
check runs in a subprocess, on fake tensors that have shapes but no memory, and the result is cached
by the digest of the files.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dask_pcm import user_cache
from dask_pcm.context.bundles import digest_of
from dask_pcm.inference.checkpoint import Checkpoint, options_of

logger = logging.getLogger(__name__)

_KIND = "fits"
_TIMEOUT_S = 300
_N_NAMED = 3


def misfits(path: Path, files: Sequence[Path], content: str, is_encoder: bool = False) -> list[str]:
    """Describe missing and misshapen tensors; empty if there are none or the check cannot run.

    Parameters
    ----------
    path
        A model folder.
    files
        The files with its weights.
    content
        Digest of all files of the folder.
    is_encoder
        Whether it is loaded as an encoder.
    """
    facts = [content, _version("transformers"), _version("torch"), *["encoder"] * is_encoder]
    key = digest_of(json.dumps(facts).encode())
    known = user_cache.recall(_KIND, key.hex())
    if known is None:
        known = _asked(path, files, is_encoder)
        if known is None:
            return []  # workers make the same check when they load the model
        user_cache.note(_KIND, key.hex(), known)
    return [str(problem) for problem in known]


def _version(package: str) -> str:
    """The installed version of a package, without importing it; empty if not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _asked(path: Path, files: Sequence[Path], is_encoder: bool) -> list[str] | None:
    """Run the check in a subprocess; None if it fails, for example without torch."""
    # transformers loads in threads by default, and FakeTensorMode holds for one thread only.
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DEACTIVATE_ASYNC_LOAD": "1"}
    env["CUDA_VISIBLE_DEVICES"] = ""
    kind = "encoder" if is_encoder else "causal"
    command = [sys.executable, "-m", "dask_pcm.inference.fit", kind, str(path), *map(str, files)]
    try:
        done = subprocess.run(command, env=env, capture_output=True, timeout=_TIMEOUT_S, check=True)
        return list(json.loads(done.stdout.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        told = getattr(error, "stderr", None) or b""
        last = told.decode(errors="replace").strip().rpartition("\n")[2]
        logger.info("The client cannot check the tensors of %s: %r %s", path, error, last)
        return None


def problems(path: str, files: Sequence[str], is_encoder: bool = False) -> list[str]:
    """Describe missing and misshapen tensors; imports torch and transformers."""
    import torch
    import transformers
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    mapping = transformers.MODEL_MAPPING if is_encoder else transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    kind = mapping[type(config)]
    options = options_of(kind) if is_encoder else {}
    stored = _stored(files)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _, found = kind.from_pretrained(
            None,
            config=config,
            state_dict={n: torch.empty(shape, dtype=t) for n, (shape, t) in stored.items()},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    wrong = [f"{name} is missing" for name in sorted(found["missing_keys"])]
    for name, found_shape, expected in sorted(found["mismatched_keys"], key=str):
        shapes = f"{list(found_shape)}, and config.json makes it {list(expected)}"
        wrong.append(f"{name} has shape {shapes}")
    more = [f"{len(wrong) - _N_NAMED} more"] if len(wrong) > _N_NAMED else []
    return wrong[:_N_NAMED] + more


def _stored(files: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """Shape and dtype of each stored tensor, by name, without reading data."""
    import torch

    if all(file.endswith(".safetensors") for file in files):
        with Checkpoint(files) as checkpoint:
            return {name: (t.shape, t.dtype) for name, t in checkpoint.tensors.items()}
    found = {}
    for file in files:
        stored = torch.load(file, map_location="meta", weights_only=True)
        found.update({name: (t.shape, t.dtype) for name, t in stored.items()})
    return found


if __name__ == "__main__":
    print(json.dumps(problems(sys.argv[2], sys.argv[3:], sys.argv[1] == "encoder")))
