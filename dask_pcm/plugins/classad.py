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
    try:
        text = Path(environ[which]).read_text(encoding="utf-8", errors="replace")
    except (KeyError, OSError):
        return None
    found = re.search(rf"^{attribute} = (\d+)\s*$", text, re.MULTILINE | re.IGNORECASE)
    return int(found[1]) if found else None
