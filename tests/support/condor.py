"""Whether there is an HTCondor to which this user can submit; ``make test-condor`` brings one."""

from __future__ import annotations

import os
import shutil
import subprocess

_COMMANDS = ("condor_submit", "condor_q", "condor_rm", "condor_hold", "condor_vacate_job")
#: A queue that does not answer within this time is none.
_ANSWER_S = 20.0


def missing() -> str:
    """Why tests cannot submit to HTCondor here; "" if they can."""
    absent = [command for command in _COMMANDS if shutil.which(command) is None]
    if absent:
        return f"no {', '.join(absent)}"
    if os.geteuid() == 0:
        return "it refuses jobs of root"
    try:
        said = subprocess.run(
            ["condor_q", "-totals"], capture_output=True, text=True, timeout=_ANSWER_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"condor_q has not answered within {_ANSWER_S:.0f} s"
    return "" if said.returncode == 0 else f"condor_q: {said.stderr.strip()}"
