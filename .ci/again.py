"""Run what failed in the last ``make test`` once more, each test alone; say what became of both.

``python3 .ci/again.py CODE``, where CODE is what make ended with. Exits with 0 if all of it passes
now. A run that ended without a verdict (an error of collection, an interruption), or in which many
tests failed, is not tried again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PYTHON = ".venv/bin/python"
FAILED = Path(".pytest_cache/v/cache/lastfailed")
#: So many failures are no bad luck.
MANY = 10


def main(code: int) -> int:
    failed = sorted(json.loads(FAILED.read_text())) if FAILED.exists() else []
    if not failed or len(failed) > MANY or not all("::" in name for name in failed):
        print(f"{len(failed)} failed: not tried again.")
        return code
    again = {}
    # Without the deadline: a test that is skipped has not passed.
    env = {name: value for name, value in os.environ.items() if name != "PCM_TEST_DEADLINE"}
    for name in failed:
        command = [PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "-q", name]
        again[name] = subprocess.run(command, check=False, env=env).returncode
    print("\nflaky: first run, and once more alone")
    for name, result in again.items():
        print(f"  failed, {'passed' if result == 0 else 'failed'}  {name}")
    return code if any(again.values()) else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
