"""Every error that dask_pcm raises on purpose derives from ``PCMError``.

Each message names the thing, what was found, what was expected and what to do. Messages may quote
URLs, rows and files, so ``PCMError`` removes secrets and control characters from them.
"""

from __future__ import annotations

import re

#: User and password of a URL. A password may contain a slash; the part before the slash then looks
#: like a port that is not a number.
_USER = re.compile(
    r"(?i)\b([a-z][a-z0-9+.-]*://)([^\s/'\"<>]+|[^\s/:'\"<>]+:(?!\d+/|:)[^\s'\"<>]+)@"
)
#: Control characters except line feeds and tabs; also those that change the direction of text,
#: which could disguise a message in a terminal.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
#: A query with a key and a value, such as a signature.
_QUERY = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://[^\s?'\"<>]*)\?[^\s'\"<>]*=[^\s'\"<>]*")
#: In web URLs also a query or fragment that is one word: a token. If a dot or slash follows, the
#: "?" is a wildcard in a glob pattern instead.
_TOKEN = re.compile(
    r"(?i)\b(https?://[^\s?#'\"<>]*)[?#][^\s'\"<>./*?:,;)\[\]]{6,}(?=$|[\s'\"<>:,;)])"
)


def redacted(text: str) -> str:
    """Remove passwords, tokens and signatures from the URLs in a text.

    A container or user name before the host is kept if no password comes with it.

    >>> redacted("cannot read https://me:secret@host/model/weights.bin?signature=secret")
    'cannot read https://host/model/weights.bin'
    >>> redacted("abfs://box@account.dfs.core.windows.net/a?.parquet")
    'abfs://box@account.dfs.core.windows.net/a?.parquet'
    """
    return _TOKEN.sub(r"\1", _QUERY.sub(r"\1", _USER.sub(_without_password, text)))


def _without_password(found: re.Match[str]) -> str:
    """The scheme alone, if the user part of the URL may hold a secret."""
    scheme, user = found.groups()
    is_secret = ":" in user or scheme.lower().startswith(("http", "ftp"))
    return scheme if is_secret else found[0]


def shown_cause(error: BaseException) -> BaseException | None:
    """The cause for ``raise ... from``; None if its text, or that of its causes, shows a secret.

    A traceback prints all causes unredacted.
    """
    cause: BaseException | None = error
    while cause is not None:
        texts = str(cause), repr(cause)
        if any(redacted(text) != text for text in texts):
            return None
        cause = cause.__cause__ or cause.__context__
    return error


def printable(text: str) -> str:
    """Escape control characters, so that quoted text cannot control a terminal.

    >>> printable("rows \\x1b[2Jgone")
    'rows \\\\x1b[2Jgone'
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class PCMError(Exception):
    """Base of every error that dask_pcm raises on purpose.

    Its message contains no secrets from URLs and no control characters.
    """

    def __init__(self, *args: object) -> None:
        shown = (printable(redacted(arg)) if isinstance(arg, str) else arg for arg in args)
        super().__init__(*shown)


class RecipeError(PCMError, TypeError):
    """A recipe or a mapped function cannot be called, identified or pickled."""


class IdentityWarning(UserWarning):
    """The identity of a recipe or job misses something that may change its answers."""


class LoadError(PCMError, RuntimeError):
    """A context could not be built; the message contains the loader's own traceback."""


class DeviceMemoryError(MemoryError, PCMError):  # this order survives pickling
    """A context does not fit on the device; the message states the sizes."""


class DeviceBusyError(DeviceMemoryError):
    """A context would fit on the device, but running tasks hold other contexts there."""


class DeviceError(PCMError, RuntimeError):
    """A device failed repeatedly, in a way that only a new process can recover from."""


class DeviceUnusableError(DeviceError):
    """A worker's torch cannot use the device assigned to it; the message states the versions."""


class LostProcessError(PCMError, RuntimeError):
    """An isolated row ended several worker processes, one after the other."""


class DeadlockError(PCMError, RuntimeError):
    """Tasks would wait for each other's contexts without end."""


class RowCountError(PCMError, ValueError):
    """A row-wise function did not return exactly one row per input row."""


class UserFunctionError(PCMError, RuntimeError):
    """A function raised on every row, with an exception that cannot be pickled."""


class ArgumentError(PCMError, TypeError):
    """A function does not have a given option; the message suggests one that it has."""


class SchemaError(PCMError, ValueError):
    """Columns are missing, repeated, reserved, or differ from `meta`."""


class PromptError(PCMError, ValueError):
    """A prompt or a list of choices is invalid, or does not fit the frame."""


class AskError(PCMError, RuntimeError):
    """A question has no answer; the message says why."""


class ModelError(PCMError, ValueError):
    """A model folder is missing, incomplete or corrupt, or a hub id cannot be resolved."""


class StageError(PCMError, RuntimeError):
    """A file of a recipe cannot be staged on a worker, or has changed."""


class TransferError(PCMError, RuntimeError):
    """A peer cannot be reached or trusted, or this process cannot serve files."""


class DiskError(PCMError, RuntimeError):
    """The cache of staged files cannot be created or written, or is full."""


class InputError(PCMError, ValueError):
    """An input dataset is missing, unreadable or not Parquet."""


class OutputError(PCMError, RuntimeError):
    """An output directory cannot be used: it is not writable, not ours, or another job's."""


class BusyError(OutputError):
    """Another run is writing to an output; the message names its owner."""


class FailedRowsError(PCMError, RuntimeError):
    """More rows failed than the limit allows; the message quotes some of their errors."""


class LimitError(PCMError, ValueError):
    """A failure limit is neither a number of rows nor a share of them."""


class RunCancelledError(PCMError, RuntimeError):
    """A run was cancelled; its committed rows are kept."""


class FencedError(PCMError, RuntimeError):
    """A unit belongs to a run that a newer run has fenced off; its result was dropped."""


class ScenarioError(PCMError, ValueError):
    """A scenario is invalid; the message lists file, line and reason of each mistake."""


class PoolError(PCMError, RuntimeError):
    """A pool is wrong, or its batch system refuses its jobs; the message has the system's words."""


class InstallError(PCMError, RuntimeError):
    """The plugins cannot be installed, or versions differ between client and cluster."""
