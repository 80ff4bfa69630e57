"""How long a job still has when its batch system sends it a signal: the batch system is asked.

Three ends have three times: that of the walltime, that of a preemption (the partition's grace time)
and that of a cancelled job. With a preemption's signal, Slurm sets the job's end anew, so that one
question answers the first two; after SIGTERM, SIGKILL follows in its ``KillWait``. HTCondor has one
time for all of them, and writes it beside the job. PBS does not say; by default it kills a job ten
seconds after SIGTERM (``kill_delay``).
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
from collections.abc import Mapping
from datetime import datetime, timedelta

from dask_pcm.plugins.classad import JOB, MACHINE, number_in

logger = logging.getLogger(__name__)

#: Where no batch system says how long; the same as Slurm's own default of KillWait.
UNKNOWN_S = 30.0
#: PBS's own default of ``kill_delay``, which jobs cannot ask for; ``pools/local.py`` has the same.
_SHORT_S = 10.0
#: A batch system that does not answer within this time is not waited for: the job's time runs.
_ANSWER_S = 5.0


def time_left_s(number: int, environ: Mapping[str, str] = os.environ) -> float:
    """Seconds until this job's end, after signal `number`; blocks for seconds at most.

    Under Slurm, the end of the job as ``squeue`` has it (``%e``) and, after SIGTERM, ``KillWait``.
    Under HTCondor, the smaller of what the job has asked for (``JobMaxVacateTime``) and what the
    machine gives (``MachineMaxVacateTime``). Ten seconds under PBS and
    in jobs that are processes of one machine. ``UNKNOWN_S`` elsewhere, and
    where Slurm does not answer.
    """
    if JOB in environ:
        asked = number_in(environ, JOB, "JobMaxVacateTime")
        given = number_in(environ, MACHINE, "MachineMaxVacateTime")
        return float(min((n for n in (asked, given) if n is not None), default=UNKNOWN_S))
    job = environ.get("SLURM_JOB_ID")
    if "PBS_JOBID" in environ or "PCM_JOB_ID" in environ:
        return _SHORT_S
    if job is None:
        return UNKNOWN_S
    try:
        if number == signal.SIGTERM:
            found = re.search(r"^KillWait\s*=\s*(\d+)", _said("scontrol", "show", "config"), re.M)
            return float(found[1]) if found else UNKNOWN_S
        return max(0.0, _end_of(job, environ).timestamp() - datetime.now().timestamp())
    except (OSError, KeyError, ValueError, subprocess.SubprocessError) as error:
        logger.warning(
            "Slurm does not say when job %s ends (%s); %.0f s are assumed. Set"
            " DASK_PCM__WORKER__NOTICE in the job script if it has more or less.",
            job,
            error,
            UNKNOWN_S,
        )
        return UNKNOWN_S


def _end_of(job: str, environ: Mapping[str, str]) -> datetime:
    """The end of this job, in local time, as this machine has it."""
    # The id of one element of an array is that of the array as well.
    if "SLURM_ARRAY_TASK_ID" in environ:
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    end = _said("squeue", "--noheader", f"--jobs={job}", "--format=%e").strip()
    if end == "NONE":  # no limit, so this is a preemption, and Slurm has not noted its end yet
        partition = _said("scontrol", "show", "partition", environ["SLURM_JOB_PARTITION"])
        grace = re.search(r"GraceTime=(\d+)", partition)
        return datetime.now() + timedelta(seconds=int(grace[1]) if grace else UNKNOWN_S)
    return datetime.fromisoformat(end)


def _said(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=_ANSWER_S
    ).stdout
