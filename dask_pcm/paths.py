"""User paths and URLs are normalised to text, and shown only without their secrets.

``version_of`` is what tells whether a file has changed since it was listed.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields
from datetime import datetime
from pathlib import PurePath
from typing import Any

from dask_pcm.errors import InputError, redacted

#: URLs with user and password of object stores whose libraries accept none there.
_KEY_IN_BUCKET = re.compile(r"(s3a?|s3n|gs|gcs|oss|r2)://[^/@\s]*:[^/@\s]*@(.*)", re.DOTALL)


class _Redacts(logging.Filter):
    """Redacts the URLs in log records."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Replace the record's message by its redacted form; keep every record."""
        record.msg, record.args = redacted(record.getMessage()), ()
        return True


#: fsspec logs every URL that it requests, passwords and signatures included.
for _name in ("fsspec", "fsspec.http"):
    logging.getLogger(_name).addFilter(_Redacts())


def path_text(path: str | bytes | os.PathLike[str]) -> str:
    """A path or URL as text.

    Raises
    ------
    InputError
        If it is a URL that pathlib has shortened by a slash, or an object store's URL with a key
        and a secret, which the store's library would read as part of the bucket's name.
    """
    text = os.fsdecode(path)
    if found := _KEY_IN_BUCKET.match(text):
        scheme, bucket = found.groups()
        raise InputError(
            f"{scheme} URLs cannot contain a key and a secret. Pass '{scheme}://{bucket}', and set"
            " the secret where the store's library reads it: in environment variables, its"
            " configuration files, or storage_options."
        )
    if isinstance(path, PurePath) and re.match(r"[a-z][a-z0-9+.-]+:/(?!/)", text):
        url = text.replace(":/", "://", 1)
        raise InputError(
            f"{path!r} would be a local folder, because pathlib treats a URL as a path. Pass the"
            f" string {url!r}."
        )
    return text


def redacted_repr(value: Any) -> str:
    """A dataclass's ``repr`` with the URLs in it redacted; for ``__repr__``."""
    shown = (field.name for field in fields(value) if field.repr)
    texts = (f"{name}={redacted(repr(getattr(value, name)))}" for name in shown)
    return f"{type(value).__name__}({', '.join(texts)})"


def names_of(paths: Iterable[str]) -> dict[str, str]:
    """Names of input files in a manifest, by path: redacted and unique.

    A new signature does not change a file's name. URLs that differ only in what is redacted are
    numbered.

    >>> names_of(["https://host/a?sig=1", "https://host/get?id=1", "https://host/get?id=2"])
    {'https://host/a?sig=1': 'https://host/a', 'https://host/get?id=1': 'https://host/get', \
'https://host/get?id=2': 'https://host/get (2)'}
    """
    names: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for path in paths:
        name = redacted(path)
        counts[name] += 1
        names[path] = name if counts[name] == 1 else f"{name} ({counts[name]})"
    return names


def version_of(info: Mapping[str, Any]) -> str:
    """A file's ETag, checksum or modification time; empty if the filesystem reports none.

    Content-based values come first: they do not depend on a clock.
    """
    keys = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified")
    signs = (info[key] for key in keys if info.get(key) not in (None, ""))
    sign = next(signs, None)
    if sign is None:
        return ""
    return sign.isoformat() if isinstance(sign, datetime) else repr(sign)
