"""A model folder, looked through on the client: what is wrong with it is said before any GPU waits.

torch is not imported for it: transformers' mappings are read from its source, names and sizes of
tensors from the headers of their files. What only transformers can tell is asked in ``fit``.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dask_pcm.errors import ModelError

#: Files that count besides the weights.
PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja")
#: One file with all weights, and what names several, in the order in which transformers looks.
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_BIN = ("pytorch_model.bin", "pytorch_model.bin.index.json")
#: How files of torch before 1.6 begin; nothing in them says how long they are.
_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
#: transformers' mappings, and how most classes of causal models end.
_CAUSAL = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
_SEQ2SEQ = "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"
_CAUSAL_ENDS = ("ForCausalLM", "LMHeadModel")
_OWN = "Use a Context with a loader of your own for it."


def check_folder(path: Path) -> list[Path]:
    """Look through a model folder; return the files with its weights.

    Raises
    ------
    ModelError
        Where it is incomplete or corrupt, quantised, or of a model that does not continue texts.
    """
    config = path / "config.json"
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{str(path)!r} is no model folder: {_without_config(path)}.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{str(config)!r} cannot be read: {error}.") from error
    if not isinstance(found, dict) or "model_type" not in found:
        raise ModelError(f"{str(config)!r} names no model_type.")
    _check_architecture(config, found)
    _check_plain(config, found)
    _check_tokenizer(path)
    files = weight_files(path)
    for file in files:
        problem = _safetensors_problem(file) if file.suffix != ".bin" else _bin_problem(file)
        if problem:
            raise ModelError(f"{str(file)!r} is corrupt: {problem}. Copy or download it again.")
    _check_index(path, files)
    return files


def _without_config(path: Path) -> str:
    if (path / "adapter_config.json").exists():
        return "it has an adapter alone. Merge it into its model and save that"
    return "it has no config.json"


# -- of which kind -------------------------------------------------------------------------------


def _check_architecture(config: Path, found: Mapping[str, Any]) -> None:
    """Whether transformers knows the type of model, and it is a causal one."""
    kind = str(found["model_type"])
    name = str((found.get("architectures") or [""])[0])
    if not _is_known(kind):
        raise ModelError(
            f"{str(config)!r} says model_type {kind!r}, which transformers does not know here."
        )
    known = _mappings()
    if _CAUSAL not in known or _continues_texts(found, kind, name, known):
        return
    causal = _several(known[_CAUSAL].get(kind))
    what = f"of {name}" if name else f"of model_type {kind!r}"
    raise ModelError(
        f"{str(config)!r} is {what}, which is no causal model{_other(name, kind, known)}. LLM takes"
        " models that continue texts, which transformers loads with AutoModelForCausalLM."
        + (f" Of this type that would be {' or '.join(causal)}." if causal else "")
    )


def _continues_texts(
    config: Mapping[str, Any], kind: str, name: str, known: Mapping[str, Mapping[str, Any]]
) -> bool:
    if kind not in known[_CAUSAL]:
        return False
    if name.endswith(_CAUSAL_ENDS):
        return True
    names = [each.lower() for each in _several(known[_CAUSAL][kind])]
    if kind not in known.get(_SEQ2SEQ, {}) or config.get("is_decoder"):
        # Saved without its head, or without a name: what is missing shows by its tensors.
        bases = _several(known.get("MODEL_MAPPING_NAMES", {}).get(kind))
        names += ["", *(base.lower() for base in bases if "ForConditional" not in base)]
    return name.lower() in names


def _other(name: str, kind: str, known: Mapping[str, Mapping[str, Any]]) -> str:
    """What it is instead, in words."""
    kinds = {
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "a model of images and text",
        _SEQ2SEQ: "an encoder-decoder (seq2seq)",
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": "a model of speech",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "a classifier",
        "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "a model that fills in masked words",
    }
    for mapping, words in kinds.items():
        if name and name in _several(known.get(mapping, {}).get(kind, ())):
            return f" but {words}"
    for mapping, words in list(kinds.items())[:3]:
        if kind in known.get(mapping, {}):
            return f" but {words}"
    return ""


def _several(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


def _is_known(model_type: str) -> bool:
    # Most types have a folder of their name; to ask transformers itself is to import torch.
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return True  # workers will say
    if (Path(spec.origin).parent / "models" / model_type.replace("-", "_")).is_dir():
        return True
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


@functools.lru_cache(maxsize=1)
def _mappings() -> dict[str, dict[str, Any]]:
    """Classes of transformers by type of model, for each purpose; empty without transformers."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return {}
    source = Path(spec.origin).parent / "models" / "auto" / "modeling_auto.py"
    found: dict[str, dict[str, Any]] = {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, node.value
            if name.endswith("_MAPPING_NAMES") and isinstance(value, ast.Call) and value.args:
                found[name] = _pairs(value.args[0])
    return found


def _pairs(node: ast.expr) -> dict[str, Any]:
    """Those of a list that are written out."""
    items = node.elts if isinstance(node, ast.List) else []
    return dict(ast.literal_eval(item) for item in items if isinstance(item, ast.Tuple))


def _check_plain(config: Path, found: Mapping[str, Any]) -> None:
    parts = [found, *(part for part in found.values() if isinstance(part, dict))]
    for part in parts:
        for key in ("quantization_config", "compression_config"):
            if about := part.get(key):
                method = about.get("quant_method") if isinstance(about, dict) else None
                raise ModelError(
                    f"{str(config)!r} says that the weights are quantised"
                    f" ({method or 'by a method that it does not name'}). LLM reads weights as"
                    f" they are: give a folder that is not quantised. {_OWN}"
                )


def _check_tokenizer(path: Path) -> None:
    file = path / "tokenizer.json"
    if file.exists():
        from tokenizers import Tokenizer

        try:
            Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises Exception itself
            raise ModelError(f"{str(file)!r} is corrupt: {error}.") from error
    elif not any(path.glob("*.model")) and not any(path.glob("vocab*")):
        raise ModelError(
            f"{str(path)!r} has no tokenizer files (tokenizer.json, *.model or vocab.*)."
        )


# -- weights -------------------------------------------------------------------------------------


def weight_files(path: Path) -> list[Path]:
    """The files that transformers reads a folder's weights from.

    Raises
    ------
    ModelError
        Where there are none, or some are missing.
    """
    for single, index in (_SAFETENSORS, _BIN):
        shards = sorted(set(_index(path / index).values()))
        if missing := [shard for shard in shards if not (path / shard).exists()]:
            raise ModelError(f"{str(path)!r} lacks {missing[0]!r}, which its index names.")
        if (path / single).exists():
            return [path / single]
        if shards:
            return [path / shard for shard in shards]
    kinds = ("*.safetensors", "*.bin", "*.gguf", "*.h5", "*.msgpack", "*.pth", "*.pt")
    others = sorted(file.name for pattern in kinds for file in path.glob(pattern))
    found = f"; found {', '.join(others[:3])}, which it does not read" if others else ""
    names = ", ".join((*_SAFETENSORS, *_BIN))
    raise ModelError(f"{str(path)!r} has no weights: transformers reads {names}{found}.")


def _index(file: Path) -> dict[str, str]:
    """Files of tensors by name; nothing where there is no index."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): Path(shard).name for name, shard in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{str(file)!r} is corrupt: {type(error).__name__}: {error}.") from error


def _check_index(path: Path, files: list[Path]) -> None:
    """Whether the index's tensors are in their files, as far as headers tell."""
    if len(files) == 1 and files[0].name in (_SAFETENSORS[0], _BIN[0]):
        return
    names = {file.name: {*_header(file)} for file in files if file.suffix != ".bin"}
    for tensor, shard in _index(path / _SAFETENSORS[1]).items():
        if shard in names and tensor not in names[shard]:
            raise ModelError(
                f"{str(path / shard)!r} lacks {tensor!r}, which the index says is there. Copy or"
                " download the folder again."
            )


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        n_header = int.from_bytes(stream.read(8), "little")
        found = json.loads(stream.read(n_header))
    return {name: about for name, about in found.items() if name != "__metadata__"}


def _safetensors_problem(file: Path) -> str | None:
    """What is wrong with a safetensors file, from its header and size; the format is

    eight bytes of header length, a JSON header with ``data_offsets``, then the data.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        n_header = int.from_bytes(stream.read(8), "little")
    if size < 8 or n_header > size - 8:
        return f"its header should have {n_header} bytes, the file has {size}"
    try:
        ends = [about["data_offsets"][1] for about in _header(file).values()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its header is not readable"
    expected = 8 + n_header + max(ends, default=0)
    return None if size == expected else f"it should have {expected} bytes and has {size}"


def _bin_problem(file: Path) -> str | None:
    """What is wrong with a file of ``torch.save``: a zip archive, whose table is at its end."""
    with file.open("rb") as stream:
        head = stream.read(len(_LEGACY))
    if head == _LEGACY:
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        what = "it is cut off" if head.startswith(b"PK") else "it is no file of torch"
        return f"{what} ({error})"
    is_whole = any(name.endswith("data.pkl") for name in names)
    return None if is_whole else "it holds no tensors"
