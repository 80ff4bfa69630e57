"""User arguments are validated on the client, in the call that received them.

Each error says what was found, what was expected and what to write instead. Objects of other
libraries are recognised by the name of their module, so none of these libraries is imported here.
"""

from __future__ import annotations

import difflib
import dis
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from dask.base import is_dask_collection

from dask_pcm.errors import ArgumentError, RecipeError, SchemaError

P = ParamSpec("P")
R = TypeVar("R")

#: Names that other libraries use for our options.
_ALIASES = {
    "batch_rows": "batch_size batchsize bs num_rows n_rows nrows chunk_size chunksize",
    "rows_per_piece": "chunk_size chunksize batch_size num_rows n_rows nrows rows_per_partition",
    "bytes_per_piece": "blocksize block_size",
    "path": "output output_dir output_path out out_dir outdir folder directory filename",
    "n_rows": "n limit size rows",
    "context": "contexts model llm ctx",
    "llm": "model context",
    "choices": "labels classes candidate_labels options answers",
    "prompt": "template prompt_template",
    "completion": "target continuation text",
    "max_tokens": "max_new_tokens max_length max_output_tokens",
    "temperature": "temp",
    "stop": "stop_strings stop_sequences stop_words",
    "keep_columns": "columns keep",
    "truncate_column": "truncate truncation",
    "required_columns": "columns",
    "device_memory": "memory gpu_memory vram",
    "max_failed_rows": "max_errors max_failures max_failed",
    "max_failed_share": "max_failed_fraction max_error_rate",
}
#: Libraries whose objects are live (models, engines, indexes) and cannot be sent to workers.
_LIVE = frozenset(
    "torch transformers sentence_transformers peft diffusers optimum vllm llama_cpp ctranslate2"
    " tensorflow keras jax flax onnxruntime sklearn xgboost lightgbm catboost spacy faiss".split()
)
#: The call to write, by verb.
_CALLS = {
    "map_partitions": "map_partitions(func, ddf, context=..., meta=...)",
    "classify": "classify(ddf, llm, prompt=..., choices=...)",
    "embed": "embed(ddf, llm, prompt=...)",
    "generate": "generate(ddf, llm, prompt=..., max_tokens=...)",
    "score": "score(ddf, llm, prompt=..., completion=...)",
    "sample": "sample(ddf, 20)",
    "write_parquet": "write_parquet(ddf, path)",
}
#: Calls that write other libraries' data as Parquet, by library and class; "" for any class.
_WRITERS = {
    ("polars", ""): "frame.write_parquet(path)",
    ("polars", "LazyFrame"): "frame.sink_parquet(path)",
    ("datasets", ""): "dataset.to_parquet(path)",
    ("datasets", "DatasetDict"): "dataset['train'].to_parquet(path), one split at a time,",
    ("datasets", "IterableDatasetDict"): "dataset['train'].to_parquet(path), one split at a time,",
    ("pyspark", ""): "frame.write.parquet(path)",
}
#: Expressions that convert other libraries' data to a pandas frame.
_PANDAS = {
    "pandas": "frame",
    "pyarrow": "table.to_pandas()",
    "numpy": "pandas.DataFrame(array)",
    "cudf": "frame.to_pandas()",
    "modin": "frame._to_pandas()",
}


def name_of(func: Any) -> str:
    """The name of a callable in messages."""
    return getattr(func, "__qualname__", None) or type(func).__qualname__


def is_live(value: Any) -> bool:
    """Whether a value is an object of a model library, or a bound method of one."""
    owner = getattr(value, "__self__", None)
    value = value if owner is None or inspect.ismodule(owner) else owner
    if isinstance(value, type) or inspect.isroutine(value):
        return False
    return any(cls.__module__.partition(".")[0] in _LIVE for cls in type(value).__mro__)


def checked(func: Callable[P, R]) -> Callable[P, R]:
    """Make a function raise ArgumentError for unknown options, and suggest the right name."""
    signature = inspect.signature(func)

    @functools.wraps(func)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        """Check the arguments, then call the function."""
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            hint = _hint(kwargs, signature.parameters, func.__name__)
            raise ArgumentError(f"{func.__name__}: {error}.{hint}") from None
        return func(*args, **kwargs)

    return call


def _hint(given: Iterable[str], options: Iterable[str], owner: str) -> str:
    """A sentence for each unknown name that resembles an option of `owner`, or is a verb."""
    options = set(options)
    verbs = [f" Did you mean dask_pcm.{_CALLS[name]}?" for name in given if name in _CALLS]
    others = [name for name in given if name not in _CALLS]
    found = ((name, _meant(name, options)) for name in others if name not in options)
    meant = [
        f"Instead of {name}=, did you mean {owner}'s {option}=?" for name, option in found if option
    ]
    return "".join([*verbs, *(f" {text}" for text in meant)])


def _meant(name: str, options: Iterable[str]) -> str | None:
    """The option that an unknown name most likely means; None if it resembles none.

    >>> _meant("batchsize", ["batch_rows", "meta"]), _meant("max_failed_row", ["max_failed_rows"])
    ('batch_rows', 'max_failed_rows')
    >>> _meant("threshold", ["batch_rows", "meta"])
    """
    options = list(options)
    plain = name.lower().replace("-", "_")
    for option in options:
        if plain in _ALIASES.get(option, "").split():
            return option
    return next(iter(difflib.get_close_matches(plain, options, 1)), None)


def check_function(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], options: Sequence[str]
) -> None:
    """Refuse a function that cannot be called on a partition.

    Parameters
    ----------
    func
        The function to be mapped.
    args, kwargs
        What it would be called with.
    options
        Names of the options of ``map_partitions``, for suggestions.

    Raises
    ------
    RecipeError
        If it is not a plain function, or does not accept these arguments.
    """
    if not callable(func) or is_dask_collection(func):
        raise RecipeError(
            "map_partitions needs a function as its first argument; found"
            f" {type(func).__qualname__}. Write {_CALLS['map_partitions']}."
        )
    if isinstance(func, type):
        raise RecipeError(
            f"map_partitions needs a function; found the class {func.__qualname__}, which every"
            " call would instantiate. Pass a function, or an instance whose class defines"
            " __call__; put what is expensive to create into a Context."
        )
    _check_plain(func, "map_partitions calls", "Return a DataFrame")
    check_arguments(func, args, kwargs, "map_partitions", options)


def check_loader(load: Any) -> None:
    """Refuse a loader that cannot be called, or that can only return None.

    Raises
    ------
    RecipeError
        If it is not a plain function or class, or always returns None.
    """
    if is_live(load):
        raise RecipeError(
            f"Context needs a loader function; found a live object, {load!r:.80}. Live models"
            " cannot be sent to workers: write a function load that returns the model, and pass"
            " Context(load, path), so that each worker loads its own."
        )
    if not callable(load):
        raise RecipeError(
            f"Context needs a loader function as its first argument; found {load!r:.80}."
            " Write Context(load, *arguments), not Context(load(*arguments))."
        )
    _check_plain(load, "Context calls", "Return the live object")
    if _returns_none(load):
        raise RecipeError(
            f"The loader {name_of(load)} always returns None. Return the live object: it is passed"
            " to the functions that use the context."
        )


def check_reserved(load: Any, args: Sequence[Any], given: Iterable[str]) -> None:
    """Refuse options of ``Context`` that the loader has as parameters of its own.

    Parameters
    ----------
    args
        Positional arguments of the loader; a parameter that they bind is not ambiguous.
    given
        Names of the options that were passed to ``Context``.

    Raises
    ------
    RecipeError
        The value would not reach the loader.
    """
    bound = load.keywords if isinstance(load, functools.partial) else {}
    free = [name for name in _parameters(load, args) if name not in bound]
    if taken := [name for name in given if name in free]:
        name = taken[0]
        raise RecipeError(
            f"The loader {name_of(load)} has a parameter {name!r}, and so has Context, which takes"
            f" the {name}= that was passed. Bind the loader's with functools.partial:"
            f" Context(functools.partial({name_of(load)}, {name}=...), ...)."
        )


def _parameters(func: Any, args: Sequence[Any]) -> list[str]:
    """Names of the parameters that these positional arguments leave unbound."""
    try:
        signature = inspect.signature(func, follow_wrapped=False)
        bound = signature.bind_partial(*args).arguments
    except (TypeError, ValueError):  # some builtins have no signature
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        name
        for name, parameter in signature.parameters.items()
        if name not in bound and parameter.kind not in variadic
    ]


def _check_plain(func: Any, who: str, instead: str) -> None:
    """Refuse coroutine functions and generators: calling them does not run their body."""
    while isinstance(func, functools.partial):
        func = func.func
    called = func if inspect.isroutine(func) or isinstance(func, type) else type(func).__call__
    kinds = (
        (inspect.iscoroutinefunction, "a coroutine function (async def)", "def"),
        (inspect.isasyncgenfunction, "an asynchronous generator (async def, yield)", "def"),
        (inspect.isgeneratorfunction, "a generator (it yields)", "return"),
    )
    for is_kind, kind, word in kinds:
        if is_kind(called):
            raise RecipeError(
                f"{name_of(func)} is {kind}: {who} it, which would return an object that has not"
                f" run yet. {instead} from a plain function, with {word!r}."
            )


def check_arguments(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], verb: str, options: Sequence[str]
) -> None:
    """Raise RecipeError if a function does not accept the arguments that `verb` would pass."""
    try:
        # The signature of the decorated function itself: a decorator may change the arguments.
        signature = inspect.signature(func, follow_wrapped=False)
    except (TypeError, ValueError):  # some builtins have no signature
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        shown = [*map(_shown, args), *(f"{name}={_shown(v)}" for name, v in kwargs.items())]
        hint = _hint([name for name in kwargs if name not in signature.parameters], options, verb)
        raise RecipeError(
            f"{name_of(func)}{signature} cannot be called as {verb} would call it,"
            f" {name_of(func)}({', '.join(shown)}): {error}.{hint}"
        ) from None


class _Shown(str):
    """A placeholder in messages for a value that exists only on workers."""

    __slots__ = ()


def _shown(value: Any) -> str:
    """An argument in a message; texts by their type alone: they may be secrets."""
    if isinstance(value, _Shown):
        return str(value)
    is_plain = value is None or isinstance(value, (bool, int, float))
    return repr(value) if is_plain else f"<{type(value).__name__}>"


FRAME, LIVE = _Shown("frame"), _Shown("live")


def _returns_none(func: Any) -> bool:
    """Whether every return of a Python function returns the constant None, by its bytecode.

    >>> def fills_a_global():
    ...     global model
    ...     model = 1
    >>> _returns_none(fills_a_global), _returns_none(lambda: {} or None), _returns_none(len)
    (True, False, False)
    """
    if (code := getattr(func, "__code__", None)) is None:
        return False
    steps = list(dis.get_instructions(code))
    nones = []
    for before, step in zip([None, *steps], steps, strict=False):
        if step.opname == "RETURN_CONST":
            nones.append(step.argval is None)
        elif step.opname == "RETURN_VALUE":
            # If it is a jump target, another path may have left another value on the stack.
            is_constant = before is not None and before.opname == "LOAD_CONST"
            nones.append(is_constant and before.argval is None and not step.is_jump_target)  # type: ignore[union-attr] # is_constant says so
    return bool(nones) and all(nones)


def frame_refused(verb: str, found: Any) -> SchemaError:
    """The error of `verb` for a value that is not a Dask DataFrame, with a way to make one."""
    kind = type(found)
    name = f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}".removeprefix("builtins.")
    return SchemaError(f"{verb} needs a Dask DataFrame; found {name}. {_way_to_frame(verb, found)}")


def _way_to_frame(verb: str, found: Any) -> str:
    """How to make a Dask DataFrame of a value, as a sentence."""
    kind = type(found)
    library, name = kind.__module__.partition(".")[0], kind.__name__
    if isinstance(found, (str, os.PathLike)):
        return f"Read the files first: dask_pcm.read_parquet({os.fspath(found)!r:.80})."
    if library == "dask":
        return "Convert it: .to_frame() for a series, .to_dataframe() for a bag or an array."
    if library == "pyarrow" and not hasattr(found, "to_pandas"):
        return "Read its files: dask_pcm.read_parquet(path)."
    if writer := _WRITERS.get((library, name)) or _WRITERS.get((library, "")):
        return f"Write it with {writer} and read it with dask_pcm.read_parquet(path)."
    if library in _PANDAS or isinstance(found, (list, tuple, dict)):
        frame = _PANDAS.get(library, "pandas.DataFrame(...)")
        frame = "series.to_frame()" if name == "Series" else frame
        return f"Wrap it: dask.dataframe.from_pandas({frame}, npartitions=8)."
    return f"Write {_CALLS[verb]}."
