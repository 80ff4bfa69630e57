"""What HTCondor writes beside a job: the job's and the machine's own descriptions (ClassAds)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

#: The variables with the files' names.
JOB, MACHINE = "_CONDOR_JOB_AD", "_CONDOR_MACHINE_AD"


def number_in(environ: Mapping[str, str], which: str, attribute: str) -> int | None:
    """A whole number in one of this job's files; None where there is none.

    Expressions count as none: only HTCondor evaluates them.
    """
    found = _value(environ, which, attribute, r"(\d+)")
    return None if found is None else int(found)


def text_in(environ: Mapping[str, str], which: str, attribute: str) -> str | None:
    """A text in one of this job's files; None where there is none."""
    return _value(environ, which, attribute, r'"([^"\\]*)"')


def _value(environ: Mapping[str, str], which: str, attribute: str, value: str) -> str | None:
    try:
        text = Path(environ[which]).read_text(encoding="utf-8", errors="replace")
    except (KeyError, OSError):
        return None
    found = re.search(rf"^{attribute} = {value}\s*$", text, re.MULTILINE | re.IGNORECASE)
    return found[1] if found else None
