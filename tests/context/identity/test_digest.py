from __future__ import annotations

import collections
import functools
import hashlib
import logging
import math
import operator
import os
import re
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dask_pcm.context.identity.digest import digest, identify
from dask_pcm.errors import IdentityWarning, RecipeError

SCALE = 3


def scaled(x):
    return x * SCALE


SOURCE = """
import os
TABLE = {"b": 1, "a": 2}
class Box:
    factor = 2
    def __init__(self, x): self.x = x
    def get(self): return self.x * Box.factor
def helper(x): return x in {"c", "a", "b"}
def load(path, n=3, *, tags=frozenset({"x", "y"})):
    def inner(x):
        try:
            return helper(x) and TABLE[x] > n
        except KeyError:
            return os.path.join(path, str(x))
    return inner, Box(4)
"""

KERNEL = """
import sys
source, pad, filename = open(sys.argv[1]).read(), int(sys.argv[2]), sys.argv[3]
import __main__
exec(compile("\\n" * pad + source, filename, "exec"), __main__.__dict__)
from dask_pcm.context.identity.digest import digest
import numpy as np
print(digest(load, load("p"), Box(3), np.arange(3)))
"""


def in_kernel(tmp_path: Path, source: str, pad: int, filename: str) -> str:
    """The digest that a fresh process finds, as two notebook kernels would."""
    file = tmp_path / "cell.py"
    file.write_text(source)
    command = [sys.executable, "-c", KERNEL, str(file), str(pad), filename]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_equal_across_kernels_files_and_lines(tmp_path):
    first = in_kernel(tmp_path, SOURCE, 0, "ipykernel_1/111.py")
    assert len(first) == 32
    assert first == in_kernel(tmp_path, SOURCE, 17, "ipykernel_2/222.py")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("factor = 2", "factor = 5"),
        ('"a": 2', '"a": 9'),
        ("n=3", "n=4"),
        ('{"c", "a", "b"}', '{"c", "a"}'),
        ("> n", ">= n"),
        ("except KeyError", "except ValueError"),
        ('"x", "y"', '"x"'),
    ],
)
def test_every_part_of_a_function_counts(tmp_path, old, new):
    assert old in SOURCE
    changed = in_kernel(tmp_path, SOURCE.replace(old, new, 1), 0, "a.py")
    assert changed != in_kernel(tmp_path, SOURCE, 0, "a.py")


def test_closures_and_globals_count(monkeypatch):
    def make(n):
        return lambda x: x + n

    assert digest(make(1)) == digest(make(1)) != digest(make(2))
    before = digest(scaled)
    monkeypatch.setitem(globals(), "SCALE", 4)
    assert digest(scaled) != before


def test_a_users_module_counts_by_its_code_and_not_its_lines(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "my_model_code.py"

    def load():
        import my_model_code

        return my_model_code.build()

    module.write_text("def build():\n    return 1\n")
    first = digest(load)
    module.write_text("\n\n# a comment\ndef build():\n    return 1\n")
    assert digest(load) == first
    module.write_text("def build():\n    return 2\n")
    assert digest(load) != first


LOADERS = """
import mypkg
import mypkg.sub
def load(): return mypkg.sub.f()
def load2():
    from mypkg import sub
    return sub.f()
def load3():
    from mypkg.sub import f
    return f()
def load4():
    import helper
    return helper.g()
"""


def test_a_users_packages_count_through_what_they_import(tmp_path):
    def digests(value):
        root = tmp_path / str(value)
        (root / "mypkg").mkdir(parents=True)
        (root / "mypkg" / "__init__.py").write_text("from . import sub\n")
        (root / "mypkg" / "sub.py").write_text(f"def f(): return {value}\n")
        (root / "helper.py").write_text("import other\ndef g(): return other.k()\n")
        (root / "other.py").write_text(f"def k(): return {value}\n")
        (root / "loaders.py").write_text(LOADERS)
        code = f"import sys; sys.path.insert(0, {str(root)!r}); import loaders as x;"
        code += "from dask_pcm.context.identity.digest import digest as d;"
        code += "print(d(x.load), d(x.load2), d(x.load3), d(x.load4))"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        return run.stdout.split()

    first, second = digests(1), digests(2)
    assert len(first) == 4
    assert all(a != b for a, b in zip(first, second, strict=True))


def cells(*sources):
    """A namespace, as a kernel builds it cell by cell."""
    namespace = {"__name__": "__main__"}
    for number, source in enumerate(sources):
        exec(compile(source, f"cell-{number}", "exec"), namespace)
    return namespace["load"]


def test_one_cell_or_two_is_the_same():
    helper = "def g(x):\n    y = ('a', 'b', 'c')\n    return x in y, y\n"
    load = "def load(x):\n    y = ('a', 'b', 'c')\n    return g(x), y\n"
    assert digest(cells(helper + load)) == digest(cells(helper, load))
    x = [1, 2]
    assert digest([x, x]) == digest([[1, 2], [1, 2]])


def test_data_that_is_shared_many_times_is_walked_once():
    shared = [1]
    for _ in range(60):  # walked anew at each place it would take 2**60 steps
        shared = [shared, shared]
    assert len(digest(shared)) == 32


def test_what_wraps_a_function_shows_it():
    cached = "import functools\n@functools.cache\ndef load():\n    return {}\n"
    assert digest(cells(cached.format(1))) == digest(cells(cached.format(1)))
    assert digest(cells(cached.format(1))) != digest(cells(cached.format(2)))


def test_globals_of_a_class_inside_a_function_count():
    load = "def load():\n    class A:\n        x = CONST\n    return A\n"
    assert digest(cells("CONST = 1", load)) != digest(cells("CONST = 2", load))


def test_kinds_of_values():
    values = [
        0,
        False,
        0.0,
        "0",
        b"0",
        None,
        [],
        (),
        {},
        set(),
        [0],
        (0,),
        Path("0"),
        np.zeros(1),
        np.zeros(2),
        pd.DataFrame({"a": [1]}),
        pd.DataFrame({"a": [2]}),
        functools.partial(scaled, 1),
        functools.partial(scaled, 2),
        len,
        "".join,
        pd.DataFrame,
        np.dtype("f4"),
    ]
    found = [digest(value) for value in values]
    assert len(set(found)) == len(values)
    assert found[-4:] == [digest(value) for value in values[-4:]]


def test_order_of_dicts_and_sets_does_not_count():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"x", "y", "z"}) == digest({"z", "y", "x"})
    assert digest([1, 2]) != digest([2, 1])


def test_objects_that_contain_themselves():
    def loop():
        loop_list = [1]
        loop_list.append(loop_list)
        return loop_list

    assert digest(loop()) == digest(loop())

    def recursive(n):
        return n and recursive(n - 1)

    assert len(digest(recursive)) == 32


LOCK, LOG = threading.Lock(), logging.getLogger("a.user")


def guarded():
    with LOCK:
        LOG.info("loading")


def test_locks_and_loggers_of_a_module_do_not_count():
    assert digest(guarded) == digest(guarded)


POOL = ThreadPoolExecutor(1)
HASH = hashlib.sha256(b"salt")


def pooled(x):
    return POOL.submit(len, x)


def hashed(x):
    return HASH.copy().update(x)


def test_what_a_pool_of_threads_has_done_does_not_count(monkeypatch):
    before = digest(pooled)
    assert pooled("ab").result() == 2
    assert digest(pooled) == before
    monkeypatch.setitem(globals(), "POOL", ThreadPoolExecutor(1))  # another number in its name
    assert digest(pooled) == before


def test_of_what_counts_by_its_type_alone_it_is_said():
    with pytest.warns(IdentityWarning, match=r"HASH object .* does not notice that it has changed"):
        assert digest(hashed)


def test_scripted_functions_count_by_their_code():
    import torch

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def triple(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and used
        two, again, three = map(torch.jit.script, (double, double, triple))
    assert digest(two) == digest(again) != digest(three)


def test_attributes_of_a_function_count():
    def make(version):
        def load():
            return 1

        load.version = version
        return load

    assert digest(make(1)) == digest(make(1)) != digest(make(2))


def test_tensors_and_patterns_count_by_what_they_hold():
    import torch

    assert digest(torch.ones(3)) == digest(torch.ones(3)) != digest(torch.zeros(3))
    assert digest(torch.ones(3, dtype=torch.bfloat16)) != digest(torch.ones(3))
    assert digest(re.compile("a+")) == digest(re.compile("a+")) != digest(re.compile("b+"))
    assert digest(np.sin) != digest(np.cos)


def test_what_cannot_be_identified_says_so():
    with pytest.raises(RecipeError, match=r"lock.*neither walked nor pickled"):
        digest(threading.Lock())


@pytest.mark.parametrize(
    "make",
    [
        lambda x: re.compile(x).match,
        lambda x: re.compile(x).sub,
        lambda x: {"a": x}.get,
        lambda x: f"{{}} {x}".format,
        lambda x: x.join,
        lambda x: [x].index,
        lambda x: [x].__contains__,
        lambda x: functools.partial(map, {"a": x}.get),
        lambda x: operator.itemgetter(x),
        lambda x: operator.methodcaller("get", x),
        lambda x: np.frompyfunc(lambda y: x, 1, 1),
        lambda x: np.vectorize(lambda y: x),
        lambda x: Words([x]),
        lambda x: int.from_bytes if x == "a" else bool.from_bytes,
        lambda x: np.array([ord(x)]).searchsorted,
    ],
)
def test_methods_of_builtin_objects_count_with_their_objects(make):
    def user(method):
        return lambda d: method(d)

    first, again, other = [digest(user(make(x))) for x in ("a", "a", "b")]
    assert first == again != other


class Words(set):
    """A set whose class is the user's."""


def test_what_a_set_of_a_users_class_holds_besides_counts():
    one, other = Words(["x", "y"]), Words(["y", "x"])
    assert digest(one) == digest(other)
    other.language = "en"
    assert digest(one) != digest(other)


def test_builtin_functions_count_by_name():
    assert digest(math.sin) == digest(math.sin) != digest(math.cos)
    assert digest(np.sin) == digest(np.sin) != digest(np.cos)
    assert digest(dict.fromkeys) != digest(collections.OrderedDict.fromkeys)


@pytest.mark.parametrize(
    "find",
    [
        *(lambda: os.environ, lambda: os.environ.get, os.environ.copy, lambda: dict(os.environ)),
        *(lambda: sys.modules, lambda: sys.path, lambda: sys.argv, lambda: sys.path.index),
    ],
    ids="environ get copy dict modules path argv index".split(),
)
def test_what_belongs_to_the_process_counts_by_name(find, monkeypatch):
    def looking_up(value):
        return lambda: value

    before = digest(looking_up(find()))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setitem(sys.modules, "a_new_module", sys)
    monkeypatch.syspath_prepend("/a/new/folder")
    monkeypatch.setattr(sys, "argv", ["another", "--new"])
    assert digest(looking_up(find())) == before != digest(looking_up([1]))


def test_a_part_of_the_environment_counts(monkeypatch):
    monkeypatch.setenv("LANGUAGE", "en")
    part = {"LANGUAGE": os.environ["LANGUAGE"]}
    assert digest(part) != digest({"LANGUAGE": "de"})


METHOD_CALLS = """
def load(path, n):
    found = []
    while n:
        try:
            found.append(json.loads(path, parse_int=json.dumps))
        except json.JSONDecodeError as error:
            found.append(json.dumps(error) if n else n.strip())
        finally:
            json.dumps(1)
    return found
"""


def test_an_import_beside_a_function_or_in_another_cell_is_the_same():
    imported = "import json\n"
    one, two = cells(imported + METHOD_CALLS), cells(imported, METHOD_CALLS)
    assert digest(one) == digest(two)
    assert digest(cells(imported, METHOD_CALLS.replace("(1)", "(2)"))) != digest(two)
    moved = METHOD_CALLS.replace("            json.dumps(1)", "            pass\n    json.dumps(1)")
    assert digest(cells(imported, moved)) != digest(two)


def test_what_python_gives_a_module_does_not_count():
    load = "def load():\n    class A:\n        x: int = 1\n    return A, __file__\n"
    first = digest(cells(load))
    assert digest(cells("__file__ = 'a/b.py'\nn_rows: int = 5\n", load)) == first
    assert digest(cells("__version__ = 2\n", load.replace("__file__", "__version__"))) != digest(
        cells("__version__ = 3\n", load.replace("__file__", "__version__"))
    )


class Vocabulary:
    def __init__(self, words):
        self.words = words

    @functools.cached_property
    def table(self):
        return {word: number for number, word in enumerate(self.words)}


class Slotted(Vocabulary):
    __slots__ = ("extra",)


@pytest.mark.parametrize("kind", [Vocabulary, Slotted])
def test_values_of_cached_properties_do_not_count(kind):
    def look_up(word, of=None):
        return vocabulary.table[word]

    vocabulary = kind(["a", "b"])
    before = digest(look_up)
    assert look_up("b") == 1
    assert digest(look_up) == before
    vocabulary.words = ["b", "a"]
    assert digest(look_up) != before


def test_a_cache_of_functools_may_be_filled():
    @functools.lru_cache
    def slow(x):
        return x * SCALE

    def load(x):
        return slow(x)

    before = digest(load)
    assert load(2) == 6
    assert digest(load) == before


def test_settings_of_a_librarys_decorator_count():
    import torch

    def decorated(dtype):
        @torch.autocast("cpu", dtype=dtype)
        def infer(x):
            return x @ x

        return infer

    half, again, other = decorated(torch.float16), decorated(torch.float16), torch.bfloat16
    before = digest(half)
    half(torch.ones(2, 2))
    assert digest(half) == before == digest(again) != digest(decorated(other))


def test_parts_name_what_differs(monkeypatch):
    def parts():
        return identify(scaled, [1]).parts

    before = parts()
    monkeypatch.setitem(globals(), "SCALE", 4)
    now = parts()
    assert [name for name in now if now[name] != before.get(name)] == [
        "the global 'SCALE' of scaled"
    ]


FILESYSTEM = "import fsspec; from dask_pcm.context.identity.digest import digest; "
FILESYSTEM += "print(digest(fsspec.filesystem('file', auto_mkdir={}), fsspec.filesystem('memory')))"


def test_a_filesystem_is_the_same_in_every_process():
    def found(auto_mkdir):
        code = FILESYSTEM.format(auto_mkdir)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        return run.stdout

    assert found(True) == found(True) != found(False)
