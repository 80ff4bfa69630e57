"""An input (file, folder, pattern, URL or several) becomes a list of Parquet files, or an error.

No row is skipped silently. So symbolic links are followed, a dangling link or a folder that cannot
be listed is an error, and a file without a suffix is opened to see whether it is Parquet.
"""

from __future__ import annotations

import glob
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote

import fsspec
from dask.utils import natural_sort_key
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from dask_pcm.errors import InputError, shown_cause
from dask_pcm.parquet.footers import MAGIC, SUFFIXES
from dask_pcm.paths import path_text

AnyPath = str | bytes | os.PathLike[str]
_N_READERS = 16
_WILD = re.compile(r"[*?[]")
_BRACES = re.compile(r"\{([^{}]*,[^{}]*)\}")
#: Names of backups, and of archives of single files.
_IS_COPY = re.compile(
    r"(~|\.(bak|backup|old|orig|save|copy|tmp|temp|part|partial|swp|gz|bz2|xz|zst|zip))$",
    re.IGNORECASE,
)
_PACKED = re.compile(r"\.(parquet|parq|pq)\.(gz|bz2|xz|zst|zip)$", re.IGNORECASE)
#: Names in object stores that may be Parquet; opening any other is not worth a request.
_MAY_BE_DATA = re.compile(r"[^.]+|.*\.\d+|.*parq.*", re.IGNORECASE)


def path_texts(given: AnyPath | Iterable[AnyPath]) -> list[str]:
    """The paths of an input as strings, in their order; those of a set are sorted.

    Raises
    ------
    InputError
        If there is none, or something is not a path.
    """
    if isinstance(given, (str, bytes, os.PathLike)):
        given = [given]
    if hasattr(given, "read"):  # iterating over an open file would yield its lines
        raise InputError(
            f"read_parquet takes paths, not open files ({type(given).__name__}): workers open the"
            " files. Pass the path of the file."
        )
    if isinstance(given, Mapping) or hasattr(given, "columns") or not isinstance(given, Iterable):
        raise InputError(
            "read_parquet takes the path of a file or folder, or a list of paths; found"
            f" {type(given).__name__}. Wrap data in memory with"
            " dask.dataframe.from_pandas(frame, npartitions=...)."
        )
    paths = [path.as_py() if hasattr(path, "as_py") else path for path in given]
    if wrong := [path for path in paths if not isinstance(path, (str, bytes, os.PathLike))]:
        raise InputError(f"All items of a list of inputs must be paths; found {wrong[0]!r:.80}.")
    if not paths:
        raise InputError("The list of input paths is empty. Pass at least one file or folder.")
    texts = [path_text(path) for path in paths]
    if not all(texts):
        raise InputError("An input path is empty. Pass '.' for the current folder.")
    return sorted(texts, key=natural_sort_key) if isinstance(given, Set) else texts


def find_files(
    given: Sequence[str], options: Mapping[str, Any] | None = None
) -> tuple[list[str], list[str]]:
    """Find the files and folders that an input names, and the URLs of the Parquet files in them.

    Paths keep their order; the files of each are in natural order of their names. `options` are
    those of the filesystem.

    Raises
    ------
    InputError
        If there are no files, a file is named twice, or rows would be left out.
    """
    roots: list[str] = []
    urls: dict[str, str] = {}
    seen: dict[str, tuple[str, str]] = {}
    for path in given:
        try:
            fs, named = _resolve(path, options or {})
            names = _distinct(fs, _files(fs, named, path))
        except InputError:
            raise
        except Exception as error:  # each store's library raises its own types
            raise InputError(f"Cannot open the input {path!r}: {error}") from shown_cause(error)
        roots += (_url(fs, name, path) for name in named)
        for name in names:
            url = _url(fs, name, path)
            first_url, first = seen.setdefault(_identity(fs, name, url), (url, path))
            if url in urls or first_url != url:
                by = f" ({first!r} and {path!r})" if first != path else ""
                alias = f": {url!r} is the same file" if first_url != url else ""
                raise InputError(
                    f"The input names {first_url!r} twice{by}{alias}. Name each file once."
                )
            urls[url] = path
    _check_same_partition(urls)
    return roots, list(urls)


def _identity(fs: Any, name: str, url: str) -> str:
    """A key that is equal for all names of one file."""
    return _file_id(name) if is_local(fs) else url


def _is_own(path: str) -> bool:
    """Whether no part of a path is a symbolic link."""
    return os.path.realpath(path) == path


def _file_id(path: str) -> str:
    """A key of a local file that links, also hard ones, do not change."""
    try:
        found = os.stat(path)
    except OSError:  # gone meanwhile, which is said when it is opened
        return os.path.realpath(path)
    return f"{found.st_dev}:{found.st_ino}"


def _distinct(fs: Any, names: Iterable[str]) -> list[str]:
    """Names of files in natural order, each file once; its own name is preferred to a link."""
    if not is_local(fs):
        return sorted(names, key=natural_sort_key)
    found: dict[str, str] = {}
    for name in sorted(names, key=natural_sort_key):
        one = _file_id(name)
        if one not in found or (_is_own(name) and not _is_own(found[one])):
            found[one] = name
    return sorted(found.values(), key=natural_sort_key)


def _url(fs: Any, name: str, given: str) -> str:
    """The URL of a file; for a file in an archive, chained to the archive's URL."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"The file name {os.fsencode(name)!r} is not valid UTF-8. Rename the file."
        ) from error
    inner, chain, archive = given.partition("::")
    if not chain or "://" not in inner:
        return str(fs.unstrip_protocol(name))
    return f"{inner.partition('://')[0]}://{name}{chain}{archive}"


def is_local(fs: Any) -> bool:
    """Whether a filesystem is the local one."""
    return isinstance(fs, LocalFileSystem)


def _resolve(given: str, options: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The filesystem of a path or pattern, and the files and folders that it matches."""
    fs, path = fsspec.core.url_to_fs(given, **options)
    fs.invalidate_cache()  # a cached listing may miss new or changed files
    # An existing name counts as it is, even if it contains wildcard characters.
    if fs.exists(path):
        return fs, [path]
    found: list[str] = []
    for pattern in _alternatives(path):
        matched = [pattern] if fs.exists(pattern) else _matches(fs, pattern)
        if not matched and is_local(fs) and os.path.islink(pattern):
            raise _broken(pattern)
        if not matched:
            of = "" if pattern == path else f", one of {given!r}"
            raise InputError(
                f"There is no input at {pattern if of else given!r}{of}.{_hint(fs, given, pattern)}"
            )
        found += matched
    return fs, list(dict.fromkeys(found))


def _hint(fs: Any, given: str, pattern: str) -> str:
    """A sentence that suggests an existing path, if another spelling of this one exists."""
    literal = re.sub(r"\[", "[[]", pattern)
    others = [os.path.expandvars(given), unquote(pattern), *([literal] if "[" in pattern else [])]
    for other in others if is_local(fs) else ():
        if other not in (given, pattern) and (os.path.exists(other) or glob.glob(other)):
            return f" Did you mean {other!r}?"
    return ""


def _alternatives(pattern: str) -> list[str]:
    """Expand the braces of a pattern.

    >>> _alternatives("{a,b}/x{1,2}")
    ['a/x1', 'a/x2', 'b/x1', 'b/x2']
    """
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    head, tail = pattern[: found.start()], pattern[found.end() :]
    choices = found.group(1).split(",")
    return [each for choice in choices for each in _alternatives(f"{head}{choice}{tail}")]


def _matches(fs: Any, pattern: str) -> list[str]:
    """The folders and the Parquet files that a pattern matches."""
    if not _WILD.search(pattern):
        return []
    fixed = _WILD.split(pattern, maxsplit=1)[0].rpartition("/")[0]
    matched = _glob(pattern) if is_local(fs) else fs.glob(pattern)
    # Hidden names match only if the pattern itself begins a part with the same character.
    dotted = {part[0] for part in pattern[len(fixed) :].split("/") if part[:1] in ("_", ".")}
    below = (name for name in matched if not _hidden(name[len(fixed) :]) - dotted)
    folders: list[str] = []
    files: list[str] = []
    for name in sorted(below):
        if not any(name.startswith(f"{folder}/") for folder in folders[-1:]):
            (folders if fs.isdir(name) else files).append(name)
    names = [*folders, *_data(fs, files)]
    for name in names:
        _check_plain(name[len(fixed) :] + "/" * (name in folders), pattern)
    return names


def _glob(pattern: str) -> Iterator[str]:
    """Match a pattern on a local disk, following links; ``**`` matches any depth.

    Python's own ``**`` would visit a folder again through every link to it.
    """
    head, deep, tail = pattern.partition("/**")
    if not deep:
        yield from glob.glob(pattern, include_hidden=True)
        return
    matches = re.compile(glob_translate(f"/**{tail}")).match
    for folder in glob.glob(head or "/", include_hidden=True):
        for name in _walk(folder):
            parts = name[len(folder) :].strip("/").split("/")
            if any(matches("/" + "/".join(parts[: n + 1])) for n in range(len(parts))):
                yield name


def _files(fs: Any, roots: Sequence[str], given: str) -> list[str]:
    """The Parquet files among files and in folders; a file named by the user always counts."""
    found: list[str] = []
    others: list[str] = []
    for root in roots:
        if not fs.isdir(root):
            found.append(root)
            continue
        names = _walk(root) if is_local(fs) else fs.find(root)
        names = [name for name in names if not _hidden(name[len(root) :])]
        data = _data(fs, names)
        for name in data:
            _check_plain(name[len(root) :], given)
            if is_local(fs):
                _check_links(name, root, given)
        found += data
        others += set(names).difference(data)
    if not found:
        more = f"; it holds {len(others)} other files, such as {min(others)!r}" if others else ""
        raise InputError(
            f"There are no Parquet files ({', '.join(SUFFIXES)}, or without a suffix) in"
            f" {given!r}{more}."
        )
    return found


def _walk(top: str) -> list[str]:
    """The files below a local folder, links followed, each file once.

    Names without links are preferred. Hidden names are skipped. Folders are compared by their real
    path, so a cycle of links ends.
    """
    found: dict[str, str] = {}
    folders: set[str] = set()
    # Links are at the end, so that every other path to a folder is tried first.
    todo = deque([(top, os.path.realpath(top))])
    while todo:
        path, real = todo.popleft()
        if not os.path.isdir(path):
            if not os.path.exists(path):
                raise _broken(path)
            found.setdefault(real, path)
        elif real not in folders:
            folders.add(real)
            todo.extendleft(_entries(path, real, is_link=False))
            todo.extend(_entries(path, real, is_link=True))
    return list(found.values())


def _entries(path: str, real: str, is_link: bool) -> Iterator[tuple[str, str]]:
    """Visible entries of a folder with their real paths: the links, or all others."""
    try:
        with os.scandir(path) as entries:
            found = [entry for entry in entries if entry.is_symlink() == is_link]
    except OSError as error:
        raise InputError(f"Cannot list the folder {path!r}: {error}") from error
    for entry in sorted(found, key=lambda entry: entry.name):
        if not _hidden(entry.name):
            here = os.path.join(path, entry.name)
            yield here, os.path.realpath(here) if is_link else os.path.join(real, entry.name)


def _broken(path: str) -> InputError:
    """The error for a dangling link."""
    return InputError(
        f"{path!r} is a link to {os.readlink(path)!r}, which does not exist. Fix or remove it."
    )


def _hidden(path: str) -> set[str]:
    """The first characters of the hidden parts of a path: "_", "." or both."""
    return {part[0] for part in path.split("/") if part.startswith(("_", "."))}


def _check_plain(below: str, given: str) -> None:
    """Refuse files in folders such as ``year=2024``: the values in their names would be lost."""
    if "=" in below.rpartition("/")[0]:
        raise InputError(
            f"{given!r} is partitioned by folder names ({below.strip('/')!r}), whose columns"
            " pcm.read_parquet does not read. Read it with dask.dataframe.read_parquet."
        )


def _check_links(name: str, root: str, given: str) -> None:
    """The same, for a file whose real path is reached through a link."""
    folders, own = (os.path.realpath(path).split("/") for path in (os.path.dirname(name), root))
    if extra := [part for part in folders if "=" in part and part not in own]:
        _check_plain(f"{extra[0]}/{os.path.basename(name)}", given)


def _check_same_partition(urls: Mapping[str, str]) -> None:
    """Refuse files from several partitions of a column, such as ``year=2023`` and ``year=2024``.

    Files of one partition are accepted: the value is the same for all rows.
    """
    found: dict[str, tuple[str, str]] = {}
    for url, given in urls.items():
        for part in url.split("/")[:-1] if "=" in url else ():
            key, _, value = part.partition("=")
            if value and found.setdefault(key, (value, given))[0] != value:
                raise InputError(
                    f"{found[key][1]!r} and {given!r} are partitioned by folder names"
                    f" ({part!r}), whose columns pcm.read_parquet does not read. Read them with"
                    " dask.dataframe.read_parquet, or one by one."
                )


def _data(fs: Any, names: Sequence[str]) -> list[str]:
    """The Parquet files among names, by suffix or by their first bytes."""
    sure = {name for name in names if name.lower().endswith(SUFFIXES)}
    look = [name for name in names if name not in sure and not name.endswith("/")]
    if not is_local(fs):  # each look is a request
        look = [name for name in look if _MAY_BE_DATA.fullmatch(name.rpartition("/")[2])]
    with ThreadPoolExecutor(_N_READERS) as pool:
        begins = pool.map(lambda name: _begins(fs, name), look)
        more = [name for name, begin in zip(look, begins, strict=True) if begin == MAGIC]
    for name in [*more, *(name for name in look if _PACKED.search(name))]:
        if _IS_COPY.search(name):
            raise InputError(
                f"{name!r} has data, which may be a copy of another file's: its name ends in none"
                f" of {', '.join(SUFFIXES)}. Move it elsewhere, or name the files that are to be"
                " read: a list, or a pattern such as 'folder/*.parquet'."
            )
    sure.update(more)
    return [name for name in names if name in sure]


def _begins(fs: Any, name: str) -> bytes:
    """The first bytes of a file; empty for anything else, such as a pipe, which would block."""
    if is_local(fs) and not os.path.isfile(name):
        return b""
    try:
        with fs.open(name, "rb", block_size=len(MAGIC)) as file:
            return bytes(file.read(len(MAGIC)))
    except OSError as error:
        raise InputError(f"Cannot check whether {name!r} is a Parquet file: {error}") from error
