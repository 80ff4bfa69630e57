"""Classes and caches of a notebook, in a real IPython: the cells that have run say what counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from dask_pcm.context.identity.cells import Text, texts

KERNEL = """
import io, json, sys
from contextlib import redirect_stdout
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance(history_length=0)
def run(cell):
    with redirect_stdout(io.StringIO()):
        result = shell.run_cell(cell, store_history=True)
    result.raise_error()
    return result.result

def digests(cells):
    run("%reset -f in out")
    run("%reset -f")
    run("from dask_pcm.context.identity.digest import digest")
    return [run("digest(f)") for cell in cells for _ in [run(cell)] if "f" in shell.user_ns]

json.dump([digests(cells) for cells in json.load(sys.stdin)], sys.stdout)
"""


def in_notebooks(*notebooks):
    """What `f` is after each cell that has it, notebook by notebook; each is a new kernel's."""
    run = subprocess.run(
        [sys.executable, "-c", KERNEL],
        input=json.dumps(notebooks),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout)


BOX = (
    "class Box:\n    t = 1\n    def get(self): return self.more()\n    def more(self): return {}\n"
)
USE = "def f(x): return Box().get()"


@pytest.mark.parametrize(
    "magic", ["%%time", "%%capture out", "%%prun -q", "%%capture\n%%time", "%%capture\n%pwd\n"]
)
def test_a_class_that_is_defined_again_under_a_cell_magic(magic):
    plain, changed = BOX.format(1), BOX.format(2).replace("t = 1", "t: int = 1")
    found = in_notebooks([plain, USE, f"{magic}\n{plain}", f"{magic}\n{changed}"], [changed, USE])
    first, again, now = found[0]
    assert first == again != now == found[1][0]


@pytest.mark.parametrize("magic", ["%%writefile /dev/null", "%%timeit -n1 -r1"])
def test_a_class_in_a_cell_that_defines_none_does_not_count(magic):
    first, after = in_notebooks([BOX.format(1), USE, f"{magic}\n{BOX.format(2)}"])[0]
    assert first == after


def test_an_unrelated_annotated_variable_does_not_count():
    annotated = "import pydantic\nclass Box(pydantic.BaseModel):\n    id: int\n"
    first, after = in_notebooks([annotated, "def f(x): return Box(id=1)", "n_rows: int = 5"])[0]
    assert first == after


def test_a_function_may_be_tried_and_its_cache_be_changed():
    memo = "def f(x):\n    MEMO[x] = x\n    return MEMO"
    tried, changed, emptied = (
        ["MEMO = {}", memo, "f(3)", "f(4)"],
        ["MEMO = {}", memo, "MEMO[3] = 4"],
        ["MEMO = {}", memo, "f(3)", "MEMO = {}"],
    )
    found = in_notebooks(tried, changed, emptied)
    assert len({*found[0], found[1][0], *found[2]}) == 1
    assert found[1][1] != found[1][0]


def test_what_an_unknown_magic_has_run_is_not_known():
    cells = ["a = 1", "get_ipython().run_cell_magic('their', '', 'b = 2')"]
    assert list(texts({"In": cells})) == [Text("b = 2", is_run=False), Text("a = 1")]
    assert list(texts({"In": ["broken("]})) == [Text("broken(")]
    assert list(texts({})) == []


#: Cells, as a script has them one after the other.
CELLS = [
    "import json\nfrom os import environ",
    "import dataclasses, functools, pydantic",
    "n_rows: int = 3",
    "CACHE = {}",
    "@dataclasses.dataclass\nclass Options:\n    n: set = dataclasses.field(default_factory=set)",
    "class Claim(pydantic.BaseModel):\n    id: int = pydantic.Field(default=3, gt=2)",
    "class Table:\n    @functools.cached_property\n    def words(self): return {'x', 'y', 'z'}",
    "Table.limit = 7",
    "table = Table()",
    "def f(x):\n"
    "    for y in x:\n"
    "        CACHE[y] = json.loads(y), environ.get('HOME')\n"
    "    return Claim(), Options(), table.words, n_rows",
]


def test_a_script_and_a_notebook_are_the_same(tmp_path):
    script = tmp_path / "script.py"
    shown = (
        "from dask_pcm.context.identity.digest import digest\n"
        "print(digest(f))\nf(['1'])\nprint(digest(f))\n"
    )
    script.write_text("\n".join([*CELLS, shown]))
    command = [sys.executable, script]
    environment = os.environ | {"SLURM_JOB_ID": "7", "PYTHONHASHSEED": "5"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    before, after = run.stdout.split()
    assert before == after
    assert in_notebooks([*CELLS, "f(['1'])"]) == [[before, before]]
