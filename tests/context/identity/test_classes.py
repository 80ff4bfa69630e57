"""What is hung on a class later counts if the author did it, and not if a library did."""

from __future__ import annotations

import pytest

from dask_pcm.context.identity.digest import digest

#: A user's statements on a class `A`, with a value in it; `f` uses the class.
ADDED = [
    "class A: pass\nA.t = {}",
    "class A:\n    t = 0\nA.t = {}",
    "class A:\n    a = 1\nfor k, v in {{'t': {}}}.items(): setattr(A, k, v)",
    "class A: pass\nA.words = {{'x': ['y', {}]}}",
    "class A: pass\nimport re\nA.pattern = re.compile('a' * {})",
    "class A: pass\nimport numpy as np\nA.table = np.arange({})",
    "class B:\n    t = {}\nclass A: pass\nA.kind = B",
    "class B:\n    def __init__(self): self.t = {}\nclass A: pass\nA.rule = B()",
    "class A: pass\ndef go(self): return {}\nA.go = go",
    "class A: pass\nA._go = lambda self: {}",
    "class A: pass\nA.go = staticmethod(lambda: {})",
    "class A: pass\nA.go = property(lambda self: {})",
    "class A: pass\nA.__len__ = lambda self: {}",
    "class A:\n    for i in range(2): locals()[f'x{{i}}'] = {}",
    "def mark(cls):\n    cls.t = T\n    return cls\nT = {}\n@mark\nclass A: pass",
    # Classes without a statement of their own.
    "import dataclasses\nA = dataclasses.make_dataclass('A', [('a', int, {})])",
    "import dataclasses\nA = dataclasses.make_dataclass('A', [('a' * {}, int)])",
    "import types\nA = types.new_class('A', (), {{}}, lambda body: body.update(t={}))",
    "A = type('A', (), {{'t': {}}})",
    "import abc\nA = abc.ABCMeta('A', (), {{'t': {}}})",
    "import enum\nA = enum.Enum('A', {{'X': {}}})",
    "import enum\nA = enum.IntFlag('A', 'X Y Z'[: 3 * {}])",
    "from typing import NamedTuple\nA = NamedTuple('A', [('x' * {}, int)])",
    "import collections\nA = collections.namedtuple('A', 'x', defaults=[{}])",
    "from typing import TypedDict\nA = TypedDict('A', {{'x' * {}: int}})",
    "import attrs\nA = attrs.make_class('A', {{'a': attrs.field(default={})}})",
    "import pydantic\nA = pydantic.create_model('A', a=(int, {}))",
]


@pytest.mark.parametrize("statements", ADDED)
def test_what_the_author_does_counts(statements, own_module):
    source = f"{statements}\ndef f(x): return A\n"
    one, again, other = [digest(own_module(source.format(n)).f) for n in (1, 1, 2)]
    assert one == again != other


#: What a library hangs on a class while it is used.
LIBRARY = """
import abc, enum
class A(abc.ABC):
    pass
class Flags(enum.Flag):
    X = 1
    Y = 2
class Manager:  # of a library: its module is installed
    pass
Manager.__module__ = "dask.manager"
def f(x): return A, Flags
"""


def test_what_libraries_do_does_not_count(own_module):
    own = own_module(LIBRARY)
    before = digest(own.f)
    own.A.register(int)
    isinstance(1, own.A)
    _ = own.Flags.X | own.Flags.Y
    own.A._manager = {"registered": 1}
    own.A.__signature__ = "(x)"
    own.A.manager = own.Manager()
    own.A.managers = {"a": [own.Manager()]}
    assert digest(own.f) == before
