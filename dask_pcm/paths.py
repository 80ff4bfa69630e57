"""Paths and URLs as people give them: as text, without secrets, and when a file has changed."""

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

#: Object stores whose libraries read no user and password from a URL.
_KEY_IN_BUCKET = re.compile(r"(s3a?|s3n|gs|gcs|oss|r2)://[^/@\s]*:[^/@\s]*@(.*)", re.DOTALL)


class _Redacts(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage()), ()
        return True


#: fsspec logs the URLs that it asks for, passwords and signatures included.
for _name in ("fsspec", "fsspec.http"):
    logging.getLogger(_name).addFilter(_Redacts())


def path_text(path: str | bytes | os.PathLike[str]) -> str:
    """A path or URL as text.

    Raises
    ------
    InputError
        Where it was a URL before pathlib took one of its slashes, or has a key and a secret in it
        which its store would take for a part of the bucket's name.
    """
    text = os.fsdecode(path)
    if found := _KEY_IN_BUCKET.match(text):
        scheme, bucket = found.groups()
        raise InputError(
            f"A URL of {scheme} has no place for a key and a secret. Give '{scheme}://{bucket}',"
            " and the secret where the store's library looks for it: in its environment variables,"
            " its configuration files, or storage_options."
        )
    if isinstance(path, PurePath) and re.match(r"[a-z][a-z0-9+.-]+:/(?!/)", text):
        url = text.replace(":/", "://", 1)
        raise InputError(
            f"{path!r} would be a local folder: pathlib takes a URL for a path. Give {url!r}, as"
            " text."
        )
    return text


def redacted_repr(value: Any) -> str:
    """What ``repr`` shows of a dataclass, without the secrets of URLs in it."""
    shown = (field.name for field in fields(value) if field.repr)
    texts = (f"{name}={redacted(repr(getattr(value, name)))}" for name in shown)
    return f"{type(value).__name__}({', '.join(texts)})"


def names_of(paths: Iterable[str]) -> dict[str, str]:
    """Input files by paths, as a manifest names them: without what may be a secret.

    A new signature is no other file. Where URLs differ in nothing else, they are numbered.

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
    """When a file was written, or another sign that it is the same; empty if there is none."""
    keys = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified")
    signs = (info[key] for key in keys if info.get(key) not in (None, ""))
    sign = next(signs, None)
    if sign is None:
        return ""
    return sign.isoformat() if isinstance(sign, datetime) else repr(sign)
