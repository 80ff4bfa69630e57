"""The client checks a model folder before any GPU is used: configuration, tokenizer and weights.

The check does not import torch. It reads transformers' mappings from its source, and the names and
sizes of tensors from the headers of their files. ``fit`` checks what only transformers can tell.
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

#: Files of a model besides its weights.
PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja")
#: The single weight file and the index of several, in the order in which transformers looks.
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_BIN = ("pytorch_model.bin", "pytorch_model.bin.index.json")
#: First bytes of files of torch before 1.6; their size cannot be checked.
_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
#: Names of transformers' mappings, and the usual suffixes of causal model classes.
_CAUSAL = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
_SEQ2SEQ = "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"
_MASKED = "MODEL_FOR_MASKED_LM_MAPPING_NAMES"
_CAUSAL_ENDS = ("ForCausalLM", "LMHeadModel")
_OWN = "To use it anyway, write a loader and a Context."


def check_folder(path: Path, is_trusted: bool = False) -> list[Path]:
    """Check a model folder; return the files with its weights.

    Parameters
    ----------
    is_trusted
        Whether code in the folder may be run.

    Raises
    ------
    ModelError
        If the folder is incomplete, corrupt or quantised, or its model is neither a causal language
        model nor an encoder.
    """
    config = path / "config.json"
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{str(path)!r} is not a model folder: {_without_config(path)}.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{str(config)!r} cannot be read: {error}.") from error
    if not isinstance(found, dict) or "model_type" not in found:
        raise ModelError(f"{str(config)!r} names no model_type.")
    if not (is_trusted and has_code(path)):
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
    """Why a folder without config.json cannot be used, for an error message."""
    if (path / "adapter_config.json").exists():
        return "it contains only an adapter. Merge the adapter into its model and save the result"
    return "it has no config.json"


# -- architecture --------------------------------------------------------------------------------


def _check_architecture(config: Path, found: Mapping[str, Any]) -> None:
    """Raise ModelError unless transformers knows the model's type and can load it as causal."""
    kind = str(found["model_type"])
    name = str((found.get("architectures") or [""])[0])
    if not _is_known(kind) and found.get("auto_map"):
        raise ModelError(
            f"{str(config)!r} has model_type {kind!r}, which transformers knows only by the code in"
            " that folder. To run that code, here and on workers, write LLM(...,"
            " trust_remote_code=True)."
        )
    if not _is_known(kind):
        raise ModelError(
            f"{str(config)!r} has model_type {kind!r}, which the installed transformers does not"
            " know."
        )
    known = _mappings()
    if _CAUSAL not in known or _continues_texts(found, kind, name, known):
        return
    if _embeds(found, kind, name, known):
        return
    causal = _several(known[_CAUSAL].get(kind))
    what = f"of {name}" if name else f"of model_type {kind!r}"
    raise ModelError(
        f"{str(config)!r} is {what}, which is not a causal model{_other(name, kind, known)}. LLM"
        " needs a model that transformers loads with AutoModelForCausalLM, or an encoder."
        + (f" For this model_type that is {' or '.join(causal)}." if causal else "")
    )


def has_code(path: Path) -> bool:
    """Whether a folder has code for a model that transformers does not know.

    Raises
    ------
    ModelError
        If that code is elsewhere.
    """
    try:
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # ``check_folder`` says so
    code = found.get("auto_map") if isinstance(found, dict) else None
    if not isinstance(code, dict) or _is_known(str(found.get("model_type"))):
        return False
    for name in code.values():
        file = f"{str(name).partition('.')[0]}.py"
        if "--" in file or not (path / file).exists():
            raise ModelError(
                f"{str(path)!r} needs code that is not in it: {name}. Download the folder again,"
                " with its *.py files."
            )
    return True


def is_encoder(path: Path) -> bool:
    """Whether a folder that was checked has an encoder, which only embeds texts."""
    found = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if has_code(path):
        return "AutoModelForCausalLM" not in found["auto_map"]
    name = str((found.get("architectures") or [""])[0])
    return _embeds(found, str(found["model_type"]), name, _mappings())


def _embeds(
    config: Mapping[str, Any], kind: str, name: str, known: Mapping[str, Mapping[str, Any]]
) -> bool:
    """Whether a model of this type and class is an encoder of texts."""
    masked = known.get(_MASKED, {})
    if kind not in masked or kind in known.get(_SEQ2SEQ, {}) or config.get("is_decoder"):
        return False
    names = [*_several(known.get("MODEL_MAPPING_NAMES", {}).get(kind)), *_several(masked[kind])]
    names += _several(known.get("MODEL_FOR_PRETRAINING_MAPPING_NAMES", {}).get(kind))
    return name in ("", *names)


def _continues_texts(
    config: Mapping[str, Any], kind: str, name: str, known: Mapping[str, Mapping[str, Any]]
) -> bool:
    """Whether a model of this type and class is a causal language model."""
    if kind not in known[_CAUSAL]:
        return False
    if name.endswith(_CAUSAL_ENDS):
        return True
    names = [each.lower() for each in _several(known[_CAUSAL][kind])]
    if kind not in known.get(_SEQ2SEQ, {}) or config.get("is_decoder"):
        # Saved without its head or without a class name: ``fit`` finds any missing tensors.
        bases = _several(known.get("MODEL_MAPPING_NAMES", {}).get(kind))
        names += ["", *(base.lower() for base in bases if "ForConditional" not in base)]
    return name.lower() in names


def _other(name: str, kind: str, known: Mapping[str, Mapping[str, Any]]) -> str:
    """What kind of model it is instead, as the end of a phrase; empty if unknown."""
    kinds = {
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "a model of images and text",
        _SEQ2SEQ: "an encoder-decoder (seq2seq)",
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": "a model of speech",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "a classifier",
    }
    for mapping, words in kinds.items():
        if name and name in _several(known.get(mapping, {}).get(kind, ())):
            return f" but {words}"
    for mapping, words in list(kinds.items())[:3]:
        if kind in known.get(mapping, {}):
            return f" but {words}"
    return ""


def _several(names: Any) -> tuple[str, ...]:
    """Class names of a mapping's entry, which is one name, several or None."""
    return (names,) if isinstance(names, str) else tuple(names or ())


def _is_known(model_type: str) -> bool:
    """Whether transformers knows a model type; True if transformers is not installed here."""
    # Most types have a folder of their name. Its own configuration module imports torch.
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return True  # workers check it when they load the model
    if (Path(spec.origin).parent / "models" / model_type.replace("-", "_")).is_dir():
        return True
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


@functools.lru_cache(maxsize=1)
def _mappings() -> dict[str, dict[str, Any]]:
    """transformers' mappings from model type to class names; empty without transformers.

    Parsed from source: importing the module would import torch.
    """
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
    """The pairs of a list that are literals in the source."""
    items = node.elts if isinstance(node, ast.List) else []
    return dict(ast.literal_eval(item) for item in items if isinstance(item, ast.Tuple))


def _check_plain(config: Path, found: Mapping[str, Any]) -> None:
    """Raise ModelError if the weights are quantised, also those of a nested part."""
    parts = [found, *(part for part in found.values() if isinstance(part, dict))]
    for part in parts:
        for key in ("quantization_config", "compression_config"):
            if about := part.get(key):
                method = about.get("quant_method") if isinstance(about, dict) else None
                raise ModelError(
                    f"{str(config)!r} says that the weights are quantised"
                    f" ({method or 'by an unnamed method'}). LLM does not support quantised"
                    f" weights: use a folder that is not quantised. {_OWN}"
                )


def _check_tokenizer(path: Path) -> None:
    """Raise ModelError if the tokenizer is missing or corrupt."""
    file = path / "tokenizer.json"
    if file.exists():
        from tokenizers import Tokenizer

        try:
            Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises plain Exception
            raise ModelError(f"{str(file)!r} is corrupt: {error}.") from error
    elif not any(path.glob("*.model")) and not any(path.glob("vocab*")):
        raise ModelError(
            f"{str(path)!r} has no tokenizer files (tokenizer.json, *.model or vocab.*)."
        )


# -- weights -------------------------------------------------------------------------------------


def weight_files(path: Path) -> list[Path]:
    """The files from which transformers would read a folder's weights.

    Raises
    ------
    ModelError
        If there are none, or some are missing.
    """
    for single, index in (_SAFETENSORS, _BIN):
        shards = sorted(set(_index(path / index).values()))
        if missing := [shard for shard in shards if not (path / shard).exists()]:
            raise ModelError(f"{str(path)!r} lacks {missing[0]!r}, which its index lists.")
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
    """File name by tensor name; empty if there is no index."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): Path(shard).name for name, shard in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{str(file)!r} is corrupt: {type(error).__name__}: {error}.") from error


def _check_index(path: Path, files: list[Path]) -> None:
    """Raise ModelError if a tensor of the index is missing in its file's header."""
    if len(files) == 1 and files[0].name in (_SAFETENSORS[0], _BIN[0]):
        return
    names = {file.name: {*_header(file)} for file in files if file.suffix != ".bin"}
    for tensor, shard in _index(path / _SAFETENSORS[1]).items():
        if shard in names and tensor not in names[shard]:
            raise ModelError(
                f"{str(path / shard)!r} lacks {tensor!r}, which the index lists for it. Copy or"
                " download the folder again."
            )


def _header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: a description of each tensor by name."""
    with file.open("rb") as stream:
        n_header = int.from_bytes(stream.read(8), "little")
        found = json.loads(stream.read(n_header))
    return {name: about for name, about in found.items() if name != "__metadata__"}


def _safetensors_problem(file: Path) -> str | None:
    """What is wrong with a safetensors file, from its header and size; None if nothing.

    The format: eight bytes of header length, a JSON header with ``data_offsets``, then the data.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        n_header = int.from_bytes(stream.read(8), "little")
    if size < 8 or n_header > size - 8:
        return f"its header should have {n_header} bytes, the file has {size}"
    try:
        ends = [about["data_offsets"][1] for about in _header(file).values()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its header is not valid"
    expected = 8 + n_header + max(ends, default=0)
    return None if size == expected else f"it should have {expected} bytes and has {size}"


def _bin_problem(file: Path) -> str | None:
    """What is wrong with a file of ``torch.save``; None if nothing.

    The file is a zip archive with its directory at the end, so truncation shows without reading
    the data.
    """
    with file.open("rb") as stream:
        head = stream.read(len(_LEGACY))
    if head == _LEGACY:
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        what = "it is truncated" if head.startswith(b"PK") else "it is not a torch file"
        return f"{what} ({error})"
    is_whole = any(name.endswith("data.pkl") for name in names)
    return None if is_whole else "it contains no tensors"
