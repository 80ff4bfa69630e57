"""Where an output is kept, as one run sees it; and the names that stand there.

``OUTPUT/part-<first row>-<end row>.parquet`` holds the rows of the input from the first to the
one before the end, counted over the whole input, so that names sort in input order and units of
another size in another run fit between. Under ``OUTPUT/_pcm/`` lie:

``manifest.json``
    Which job this is; see ``runs/identity.py``.
``run-<id>/``
    The run's own folder: who drives it (``driver.json``), its progress (``status.json``), requests
    to it (``pause``, ``cancel``), what an overwriting run has stashed (``aside/``), and temporary
    files. Taking over removes it first; from then on the old run is fenced and commits nothing.
``log/``
    A line per started unit and per committed part; see ``log.py``.
``journal/``
    Finished rows of units that are not committed yet, and what rows have cost in processes; see
    ``journal.py``.
``report.json``
    The report of the last run.
``lock`` (in object stores ``lock-<number>``)
    Held while a run decides whether it may begin, and takes over; see ``fence.py``.

``folder.py`` implements this for a folder of a filesystem, ``objects.py`` for an object store.
Each brings its own way to do what the two cannot do alike: a fence, a log, a way to commit.
"""

from __future__ import annotations

HOME = "_pcm"
MANIFEST, REPORT, LOG = f"{HOME}/manifest.json", f"{HOME}/report.json", f"{HOME}/log"
JOURNAL = f"{HOME}/journal"
PAUSE, CANCEL = "pause", "cancel"
