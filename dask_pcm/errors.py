"""The exceptions of dask_pcm. Each message names the thing, what was found and what to do."""

from __future__ import annotations

import re

#: Of a password with a slash in it, what stands before that looks like a port that is no number.
_USER = re.compile(
    r"(?i)\b([a-z][a-z0-9+.-]*://)([^\s/'\"<>]+|[^\s/:'\"<>]+:(?!\d+/|:)[^\s'\"<>]+)@"
)
#: All but line feeds and tabs; also what changes the direction of text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_QUERY = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://[^\s?'\"<>]*)\?[^\s'\"<>]*=[^\s'\"<>]*")
#: Of the web, also a query or fragment that is a word: a pattern there goes on with a dot or slash.
_TOKEN = re.compile(
    r"(?i)\b(https?://[^\s?#'\"<>]*)[?#][^\s'\"<>./*?:,;)\[\]]{6,}(?=$|[\s'\"<>:,;)])"
)


def redacted(text: str) -> str:
    """Text whose URLs show no password, token or signature.

    What stands before the host is kept where it is the name of a container or a user alone.

    >>> redacted("cannot read https://me:secret@host/model/weights.bin?signature=secret")
    'cannot read https://host/model/weights.bin'
    >>> redacted("abfs://box@account.dfs.core.windows.net/a?.parquet")
    'abfs://box@account.dfs.core.windows.net/a?.parquet'
    """
    return _TOKEN.sub(r"\1", _QUERY.sub(r"\1", _USER.sub(_without_password, text)))


def _without_password(found: re.Match[str]) -> str:
    scheme, user = found.groups()
    is_secret = ":" in user or scheme.lower().startswith(("http", "ftp"))
    return scheme if is_secret else found[0]


def shown_cause(error: BaseException) -> BaseException | None:
    """An error to raise ours from; None where its text, or that of its own, shows a secret."""
    cause: BaseException | None = error
    while cause is not None:
        texts = str(cause), repr(cause)
        if any(redacted(text) != text for text in texts):
            return None
        cause = cause.__cause__ or cause.__context__
    return error


def printable(text: str) -> str:
    """Text that does nothing to a terminal but show: control characters are escaped.

    >>> printable("rows \\x1b[2Jgone")
    'rows \\\\x1b[2Jgone'
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class PCMError(Exception):
    """Base of every error that dask_pcm raises on purpose.

    Its message holds no secrets of URLs, and no control characters: it may quote files.
    """

    def __init__(self, *args: object) -> None:
        shown = (printable(redacted(arg)) if isinstance(arg, str) else arg for arg in args)
        super().__init__(*shown)


class RecipeError(PCMError, TypeError):
    """A context's recipe, or a function to be mapped, cannot be identified or pickled."""


class IdentityWarning(UserWarning):
    """Something cannot tell one recipe or job from another as well as it should."""


class LoadError(PCMError, RuntimeError):
    """A context could not be built; the message holds the loader's own traceback."""


class DeviceMemoryError(MemoryError, PCMError):  # in this order pickle can make it again
    """A context does not fit on the device; the message has the numbers."""


class DeviceBusyError(DeviceMemoryError):
    """A context would fit on the device, but tasks hold on to others there."""


class DeviceError(PCMError, RuntimeError):
    """A device failed in a way that only a new process mends, and did so again and again."""


class DeviceUnusableError(DeviceError):
    """A worker was given a device that its torch cannot use; the message has the versions."""


class LostProcessError(PCMError, RuntimeError):
    """Worker processes ended, one after the other, while a row was computed alone."""


class DeadlockError(PCMError, RuntimeError):
    """Tasks would wait for each other's contexts for ever."""


class RowCountError(PCMError, ValueError):
    """A function called on n rows at a time did not return one row for each."""


class UserFunctionError(PCMError, RuntimeError):
    """A function raised on every row, with an exception that cannot be sent to the client."""


class ArgumentError(PCMError, TypeError):
    """A function was given an option that it does not have; the message names the one that is."""


class SchemaError(PCMError, ValueError):
    """Columns are missing, repeated, clash with ours, or differ from what was declared."""


class PromptError(PCMError, ValueError):
    """A prompt or a list of choices cannot be used with the frame at hand."""


class ModelError(PCMError, ValueError):
    """A model folder is missing, incomplete or corrupt, or a hub id cannot be resolved."""


class StageError(PCMError, RuntimeError):
    """A file of a recipe cannot be brought to a worker, or is not what it was."""


class TransferError(PCMError, RuntimeError):
    """A peer cannot be reached or trusted, or nothing can be served."""


class DiskError(PCMError, RuntimeError):
    """The cache of staged files cannot be made or written, or has no room."""


class InputError(PCMError, ValueError):
    """An input dataset is missing, unreadable or not Parquet."""


class OutputError(PCMError, RuntimeError):
    """An output directory cannot be used: unwritable, foreign, or another job's."""


class BusyError(OutputError):
    """Another run is at work on an output; the message says whose."""


class FailedRowsError(PCMError, RuntimeError):
    """More rows failed than were allowed; the message holds some of their errors."""


class LimitError(PCMError, ValueError):
    """A limit that says neither how many rows nor which share of them."""


class CancelledError(PCMError, RuntimeError):
    """A run was cancelled; what it has committed stays."""


class FencedError(PCMError, RuntimeError):
    """A unit belongs to a run that a newer run has replaced; its result was dropped."""


class ScenarioError(PCMError, ValueError):
    """A scenario cannot be simulated; the message has file, line and reason of each mistake."""


class InstallError(PCMError, RuntimeError):
    """The plugins cannot be installed, or versions differ between client and cluster."""
