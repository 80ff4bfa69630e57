"""Names of the files of an output.

``OUTPUT/part-<first row>-<end row>.parquet`` holds the input rows from the first up to, but not
including, the end. Rows are counted over the whole input, so names sort in input order and a later
run may fill gaps with units of any other size. Names of parts are made in ``parts.py``.

All other files of an output are below ``OUTPUT/_pcm/``:

``manifest.json``
    Which job this is; see ``runs/identity.py``.
``run-<id>/``
    The run directory: who drives the run (``driver.json``), its progress (``status.json``),
    requests to it (``pause``, ``cancel``), files that an overwriting run has stashed (``aside/``),
    and temporary files. A takeover removes it first; from then on the old run is fenced and cannot
    commit.
``log/``
    A line per started unit and per committed part; see ``log_lines.py``.
``journal/``
    Finished rows of units that are not committed yet, and what rows have cost in processes; see
    ``journal/``.
``report.json``
    The report of the last run.
``lock`` (in object stores ``lock-<number>``)
    Held while a run checks for other writers and takes over; see ``storage/fence.py``.
"""

from __future__ import annotations

HOME = "_pcm"
MANIFEST, REPORT, LOG = f"{HOME}/manifest.json", f"{HOME}/report.json", f"{HOME}/log"
JOURNAL = f"{HOME}/journal"
#: Requests, in the run directory.
PAUSE, CANCEL = "pause", "cancel"
#: What an overwriting run has stashed, in its run directory.
STASH = "aside"
