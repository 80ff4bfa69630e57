"""Trying a function makes no other function of it; another option does."""

from __future__ import annotations

import pytest

from dask_pcm.context.identity.digest import digest

#: A user's module: each `use_*` keeps something for itself.
SOURCE = """
import collections
MEMO = {}
SEEN: set = set()
COUNTS = collections.Counter()
GROUPS = collections.defaultdict(list)
STATS = {"threshold": 5, "calls": 0}
MODEL = None
N_CALLS = 0

def use_memo(x):
    if x not in MEMO:
        MEMO[x] = x * 2
    return MEMO[x]
def use_seen(x):
    SEEN.add(x)
    return x
def use_counts(x):
    COUNTS[x] += 1
def use_groups(x):
    GROUPS[x].append(x)
def use_stats(x):
    STATS["calls"] += 1
    return x > STATS["threshold"]
def model():
    global MODEL
    if MODEL is None:
        MODEL = [1, 2, 3]
    return MODEL
def use_model(x):
    return model()
def use_n_calls(x):
    global N_CALLS
    N_CALLS += 1
def main():
    use_memo(1)
"""
#: Where other code than one function writes, the value counts.
SHARED = """
OPTIONS = {"t": 1}
REGISTRY = {}
TABLE = {"t": 1}
LEVELS = {}
LIMIT = 1

def configure(t):
    options = OPTIONS
    options["t"] = t
def use_options(x):
    OPTIONS.setdefault("calls", 0)
    return OPTIONS["t"]
def register(func):
    REGISTRY[func.__name__] = func
    return func
def score(x):
    return x
def use_registry(x):
    return REGISTRY["score"](x)
def use_table(x):
    TABLE["calls"] = 1
    return TABLE["t"]
class Levels:
    @classmethod
    def set(cls, t):
        LEVELS["t"] = t
    @classmethod
    def get(cls):
        return LEVELS["t"]
def use_levels(x):
    return Levels.get()
def set_limit(t):
    global LIMIT
    LIMIT = t
def use_limit(x):
    return x > LIMIT
configure(T)
Levels.set(T)
set_limit(T)
TABLE["t"] = T
register(score)
"""


def users(source):
    return [part.partition("(")[0] for part in source.split("def ") if part.startswith("use_")]


@pytest.mark.parametrize("name", users(SOURCE))
def test_trying_a_function_changes_nothing(name, own_module):
    func = getattr(own_module(SOURCE), name)
    before = digest(func)
    func(7), func(8)
    assert digest(func) == before
    assert digest(getattr(own_module(SOURCE), name)) == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("use_memo", "MEMO = {}", "MEMO = {7: 1}"),
        ("use_stats", '"threshold": 5', '"threshold": 6'),
        ("use_groups", "defaultdict(list)", "defaultdict(list, {1: [2]})"),
        ("use_n_calls", "N_CALLS = 0", "N_CALLS = 3"),
        ("use_model", "[1, 2, 3]", "[1, 2]"),
    ],
)
def test_what_a_cache_starts_with_counts(name, old, new, own_module):
    one, other = own_module(SOURCE), own_module(SOURCE.replace(old, new))
    getattr(one, name)(7), getattr(other, name)(7)
    assert digest(getattr(one, name)) != digest(getattr(other, name))


def shared(t, sign=""):
    source = SHARED.replace("T)", f"{t})").replace("= T", f"= {t}")
    return source.replace("def score(x):\n    return x", f"def score(x):\n    return {sign}x")


@pytest.mark.parametrize("name", users(SHARED))
def test_what_other_code_writes_counts_by_its_value(name, own_module):
    change = (1, "-") if name == "use_registry" else (2,)
    one, again, other = [own_module(shared(*options)) for options in ((1,), (1,), change)]
    assert digest(getattr(one, name)) == digest(getattr(again, name))
    assert digest(getattr(one, name)) != digest(getattr(other, name))
