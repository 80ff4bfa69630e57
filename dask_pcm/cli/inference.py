"""What ``dask-pcm run`` computes of each row: an answer, a text, a vector, or a function's own.

Each kind has options of its own; those of another kind are refused.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    import dask.dataframe as dd

    from dask_pcm.inference import LLM

F = TypeVar("F", bound=Callable[..., Any])

#: Options that only one kind has, by the option that asks for the kind.
_OWN = {
    "--choices": ("normalize", "logprobs"),
    "--generate": ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop", "n"),
    "--embed": ("pooling", "no_normalize"),
    "--function": ("adds", "batch_rows"),
}
_OPTIONS = (
    click.option("--prompt", help="Text with column names in braces, or @FILE."),
    click.option(
        "--choices", multiple=True, help="Answer by A,B,C (repeatable), or @FILE, one per line."
    ),
    click.option("--normalize", help="'tokens': compare scores of choices per token."),
    click.option("--logprobs", is_flag=True, help="Add the score of each choice."),
    click.option("--generate", is_flag=True, help="Continue the prompt."),
    click.option("--max-tokens", type=click.IntRange(1), metavar="N", help="New tokens at most."),
    click.option("--temperature", type=float, metavar="T", help="0 takes the likeliest token."),
    click.option("--top-k", type=click.IntRange(1), metavar="K", help="Likeliest tokens to draw."),
    click.option("--top-p", type=float, metavar="P", help="Probability of the tokens to draw."),
    click.option("--seed", type=int, metavar="N", help="Another seed draws other texts."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before TEXT (repeatable)."),
    click.option("--n", type=click.IntRange(1), metavar="N", help="Texts drawn of each row."),
    click.option("--embed", is_flag=True, help="Turn the prompt into a vector."),
    click.option("--pooling", type=click.Choice(["mean", "cls", "last"]), help="Of hidden states."),
    click.option("--no-normalize", is_flag=True, help="Keep the length of vectors."),
    click.option(
        "--function",
        metavar="MODULE:NAME",
        help="Call NAME(frame, model) of a module or FILE.py on batches of rows.",
    ),
    click.option(
        "--adds",
        multiple=True,
        metavar="COLUMN[=DTYPE]",
        help="A column that the function adds (repeatable); text by default.",
    ),
    click.option(
        "--batch-rows", type=click.IntRange(1), metavar="N", help="Rows for a call of the function."
    ),
    click.option(
        "--truncate-column", metavar="FIELD", help="Field to truncate if a row is too long."
    ),
    click.option(
        "--special-tokens-in-fields",
        is_flag=True,
        help="Treat control tokens in a row's fields as control tokens, not as text.",
    ),
    click.option(
        "--batch-timeout",
        metavar="TIME",
        help="Limit for one batch, such as 10m; rows that exceed it alone fail.",
    ),
    click.option(
        "--keep-columns",
        multiple=True,
        metavar="COLUMNS",
        help="Columns to keep, A,B (repeatable).",
    ),
)


def inference_options(command: F) -> F:
    """Add the options that say what is computed."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def inferred(ddf: dd.DataFrame, model: Callable[[], LLM], asked: dict[str, Any]) -> dd.DataFrame:
    """The frame that the options ask for.

    Parameters
    ----------
    model
        Makes the recipe of the model; called once the options are known to fit together.
    asked
        The values of ``inference_options``, by name.
    """
    kind = kind_of(asked)
    kept = texts_of(asked["keep_columns"]) or None
    if kind == "--function":
        return _mapped(ddf, model, asked, kept)
    from dask_pcm.inference import classify, embed, generate

    given = {
        "prompt": text_of(asked["prompt"]),
        "truncate_column": asked["truncate_column"],
        "special_tokens_in_fields": asked["special_tokens_in_fields"],
        "batch_timeout": asked["batch_timeout"],
        "keep_columns": kept,
    }
    own = {name: asked[name] for name in _OWN[kind] if asked[name] not in (None, (), False)}
    if kind == "--choices":
        return classify(ddf, model(), choices=texts_of(asked["choices"]), **given, **own)
    if kind == "--generate":
        return generate(ddf, model(), **given, **own)
    own = {"pooling": asked["pooling"], "normalize": not asked["no_normalize"]}
    return embed(ddf, model(), **given, **own)


def kind_of(asked: dict[str, Any]) -> str:
    """The option that says what is computed; UsageError unless there is one, and all others fit."""
    kinds = [kind for kind in _OWN if asked[kind[2:]]]
    if len(kinds) != 1:
        raise click.UsageError(f"Give one of {', '.join(_OWN)}, which say what is computed.")
    (kind,) = kinds
    for other, names in _OWN.items():
        wrong = [name for name in names if asked[name] not in (None, (), False)]
        if other != kind and wrong:
            raise click.UsageError(f"{_option(wrong[0])} belongs to {other}, not to {kind}.")
    if kind == "--function":
        reads = ("prompt", "truncate_column", "special_tokens_in_fields")
        if given := [name for name in reads if asked[name]]:
            raise click.UsageError(f"{_option(given[0])} does not belong to --function.")
        if not asked["adds"]:
            raise click.UsageError(
                "Name the columns that the function adds: --adds COLUMN[=DTYPE]."
            )
    elif asked["prompt"] is None:
        raise click.UsageError(f"{kind} needs --prompt.")
    if kind == "--generate" and asked["max_tokens"] is None:
        raise click.UsageError("--generate needs --max-tokens.")
    return kind


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _mapped(
    ddf: dd.DataFrame, model: Callable[[], LLM], asked: dict[str, Any], kept: list[str] | None
) -> dd.DataFrame:
    """A function's own columns beside those that are kept."""
    import pandas as pd

    from dask_pcm.config import Config
    from dask_pcm.errors import SchemaError
    from dask_pcm.frames.map_partitions import check_columns, map_partitions

    meta = ddf._meta
    if kept is not None:
        meta = meta[check_columns(ddf, kept, "--keep-columns")]
    for column in asked["adds"]:
        name, _, dtype = column.partition("=")
        try:
            meta = meta.assign(**{name: pd.array([], dtype=dtype or "str")})
        except TypeError as error:
            raise SchemaError(f"--adds {column}: {error}.") from None
    return map_partitions(
        function_of(asked["function"]),
        ddf,
        context=model(),
        meta=meta,
        batch_rows=asked["batch_rows"] or Config.read().batch_rows,
        batch_timeout=asked["batch_timeout"],
    )


def function_of(given: str, option: str = "--function") -> Callable[..., Any]:
    """The function MODULE:NAME, found as ``python`` finds modules from here, or in FILE.py.

    Workers need not have its module: the function is sent by its code.
    """
    import cloudpickle

    where, _, name = given.rpartition(":")
    if not where or not name:
        raise click.BadParameter(
            f"{given!r} names no function; expected MODULE:NAME or FILE.py:NAME.",
            param_hint=option,
        )
    file = Path(where)
    folder, module_name = Path(os.getcwd()), where
    if file.suffix == ".py":
        folder, module_name = file.absolute().parent, file.stem
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module(module_name)
        found = getattr(module, name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise click.BadParameter(f"{given!r}: {error}.", param_hint=option) from error
    if option == "--function" and not callable(found):
        raise click.BadParameter(f"{given!r} is no function.", param_hint=option)
    cloudpickle.register_pickle_by_value(module)
    function: Callable[..., Any] = found
    return function


def text_of(value: str) -> str:
    """A text, or the content of @FILE without its last line feed."""
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"Cannot read {value[1:]!r} as text: {error}.") from error


def texts_of(values: tuple[str, ...]) -> list[str]:
    """Flatten comma-separated texts, repeated options and @FILEs into one list."""
    items: list[str] = []
    for value in values:
        separator = "\n" if value.startswith("@") else ","
        found = [item.strip() for item in text_of(value).split(separator)]
        # Skip blank lines of a file; an empty text between commas is a mistake to be reported.
        items += [item for item in found if item or separator == ","]
    return items
