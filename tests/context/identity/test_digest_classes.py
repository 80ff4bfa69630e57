"""Classes count by what their author wrote: in every process the same, and each part of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

#: A user's module. Functions `use_*` are digested; each names one class of a kind.
SOURCE = '''
import abc, collections, contextlib, ctypes, dataclasses, enum, functools, logging, re, threading
import typing
import attrs, pydantic, torch
from typing import Annotated, ForwardRef, Generic, NamedTuple, NewType, ParamSpec, Protocol
from typing import TypedDict, TypeVar

T = TypeVar("T", bound=int)
P = ParamSpec("P")
Id = NewType("Id", int)
LOW = 3

class Box(Generic[T]):
    """Doc of Box."""
    size = 4
class Small(Box[bool]):
    pass

class Part(pydantic.BaseModel):
    weight: float = pydantic.Field(default=1.5, gt=0)
class Verdict(pydantic.BaseModel):
    """Doc of Verdict."""
    model_config = pydantic.ConfigDict(extra="forbid")
    label: str = "yes"
    """Doc of a field."""
    score: int | None = pydantic.Field(default=None, ge=LOW)
    parts: list[Part] = pydantic.Field(default_factory=lambda: [Part(weight=2.0)])
    child: "Verdict | None" = None
    _seen: set[str] = pydantic.PrivateAttr(default_factory=set)
    @pydantic.field_validator("label", mode="after")
    @classmethod
    def check(cls, value):
        """Doc of check."""
        return value.strip(" .")
    @pydantic.model_validator(mode="after")
    def whole(self):
        return self
    @pydantic.computed_field
    @property
    def long(self) -> str:
        return self.label * 2
class Page(pydantic.BaseModel, Generic[T], frozen=True):
    items: list[T] = []
    most: int = 10
@pydantic.dataclasses.dataclass(config={"strict": True})
class Claim:
    text: str
    tags: list[str] = pydantic.Field(default_factory=list, max_length=7)
class Animal(pydantic.BaseModel):
    kind: typing.Literal["cat", "dog"] = "cat"
ADAPTER = pydantic.TypeAdapter(list[Verdict])
@pydantic.validate_call
def checked(n: Annotated[int, pydantic.Field(gt=2)]) -> int:
    return n + 12

@attrs.define
class Point:
    x: int = attrs.field(default=5, validator=attrs.validators.ge(0))
    y: list = attrs.field(factory=list, converter=lambda v: [*v, 6])
@attrs.frozen(kw_only=True)
class Cold:
    z: int = 8

@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    n: int = 3
    names: list = dataclasses.field(default_factory=lambda: ["a"], metadata={"unit": "m"})
    def twice(self): return self.n * 2
class Row(NamedTuple):
    id: int
    text: str = "none"
class Answer(TypedDict, total=False):
    label: str
    extra: "Answer"
class Colour(enum.Enum):
    RED = 1
    GREEN = enum.auto()
    def warm(self): return self is Colour.RED
class Flags(enum.Flag):
    A = 1
    B = 2
class Scorer(Protocol):
    cutoff: float
    def score(self, text: str) -> float: ...
class Base(abc.ABC):
    @abc.abstractmethod
    def run(self): ...
class Real(Base, Scorer):
    log, lock = logging.getLogger("x"), threading.Lock()
    pattern = re.compile("a+b")
    labels = frozenset({"x", "y", "zz"})
    def __init__(self): self.net = None
    def __len__(self): return 33
    def run(self): return super().run()
    @functools.cached_property
    def table(self): return {"k": 44}
    @functools.lru_cache
    def slow(self, x): return x + 55
    @functools.singledispatchmethod
    def show(self, x): return "any"
    @show.register
    def _(self, x: int): return "int"
    @contextlib.contextmanager
    def held(self): yield 66
    half = functools.partialmethod(slow, x=77)
class Meta(type):
    def __call__(cls, *args): return super().__call__(*args)
class Made(metaclass=Meta):
    __slots__ = ("a", "b")
class Net(torch.nn.Module):
    def __init__(self, n=9):
        super().__init__()
        self.layer = torch.nn.Linear(n, n)
    @torch.no_grad()
    def forward(self, x): return self.layer(x) + 88
class Struct(ctypes.Structure):
    _fields_ = [("x", ctypes.c_int), ("y", ctypes.c_double)]
Pair = collections.namedtuple("Pair", "left right", defaults=[99])
def make(n):
    class Local(pydantic.BaseModel):
        value: int = n
    return Local
Local = make(21)

@functools.singledispatch
def shown(x): return "any"
@shown.register
def _(x: int): return "whole"
shown(1), shown("x"), shown(None)  # fills its cache
def retried(times):
    def wrap(func):
        @functools.wraps(func)
        def wrapper(*args): return [func(*args) for _ in range(times)]
        return wrapper
    return wrap
@retried(times=31)
def flaky(): return Colour.GREEN

def use_generic(): return Small(), Box[int]()
def use_typing(x: P.args = ()) -> Id: return T, P, Id, ForwardRef("Verdict"), int | None
def use_pydantic(): return Verdict(label="yes")
def use_page(): return Page[int](items=[1])
def use_claim(): return Claim("text")
def use_adapter(): return ADAPTER.validate_python([])
def use_animal(): return Animal()
def use_checked(): return checked(3)
def use_attrs(): return Point(), Cold()
def use_dataclass(): return Options()
def use_row(): return Row(1), Pair(1)
def use_answer(): return Answer(label="x")
def use_enum(): return Colour.RED, Flags.A
def use_protocol(): return Real()
def use_made(): return Made()
def use_net(): return Net()
def use_struct(): return Struct()
def use_local(): return Local()
def use_shown(): return shown(1)
def use_flaky(): return flaky()
'''

#: What is changed, to what, and the functions that this changes; after a star only where the
#: source of the classes can be found.
CHANGES = [
    ("size = 4", "size = 5", "generic"),
    ("Box[bool]", "Box[int]", "generic"),
    ("bound=int", "bound=str", "generic typing page"),
    ('NewType("Id", int)', 'NewType("Id", str)', "typing"),
    ('"forbid"', '"ignore"', "pydantic adapter"),
    ('label: str = "yes"', 'label: str = "no"', "pydantic adapter"),
    ("ge=LOW", "le=LOW", "pydantic adapter"),
    ("LOW = 3", "LOW = 4", "pydantic adapter"),
    ("gt=0", "gt=1", "pydantic adapter"),
    ("weight: float = ", "weight: int = ", "pydantic adapter"),
    ("weight=2.0", "weight=3.0", "pydantic adapter"),
    ('" ."', '"_"', "pydantic adapter"),
    ('mode="after")\n    def whole', 'mode="before")\n    def whole', "* pydantic adapter"),
    ("self.label * 2", "self.label * 3", "pydantic adapter"),
    ("most: int = 10", "most: int = 11", "page"),
    ("frozen=True):\n    items", "frozen=False):\n    items", "* page"),
    ('"strict": True', '"strict": False', "* claim"),
    ("max_length=7", "max_length=8", "claim"),
    ('["cat", "dog"]', '["cat", "cow"]', "animal"),
    ("gt=2)", "gt=1)", "checked"),
    ("n + 12", "n + 13", "checked"),
    ("default=5", "default=6", "attrs"),
    ("validators.ge(0)", "validators.ge(1)", "* attrs"),
    ("*v, 6", "*v, 7", "attrs"),
    ("z: int = 8", "z: int = 9", "attrs"),
    ("attrs.frozen(kw_only=True)", "attrs.frozen(kw_only=False)", "attrs"),
    ("n: int = 3", "n: int = 4", "dataclass"),
    ('lambda: ["a"]', 'lambda: ["b"]', "dataclass"),
    ('"unit": "m"', '"unit": "s"', "* dataclass"),
    ("self.n * 2", "self.n * 3", "dataclass"),
    ('text: str = "none"', 'text: str = "any"', "row"),
    ("defaults=[99]", "defaults=[98]", "row"),
    ("total=False", "total=True", "* answer"),
    ('"Answer"\n', '"Verdict"\n', "answer"),
    ("RED = 1", "RED = 3", "enum flaky"),
    ("self is Colour.RED", "self is Colour.GREEN", "enum flaky"),
    ("B = 2", "B = 4", "enum"),
    ("cutoff: float", "cutoff: int", "protocol"),
    ("a+b", "a*b", "protocol"),
    ('"zz"', '"z"', "protocol"),
    ("return 33", "return 34", "protocol"),
    ('"k": 44', '"k": 45', "protocol"),
    ("x + 55", "x + 56", "protocol"),
    ('x: int): return "int"', 'x: int): return "i"', "protocol"),
    ("yield 66", "yield 67", "protocol"),
    ("x=77", "x=78", "protocol"),
    ("super().__call__(*args)", "super().__call__()", "made"),
    ('"a", "b")', '"a", "c")', "made"),
    ("n=9", "n=8", "net"),
    ("+ 88", "+ 89", "net"),
    ("ctypes.c_double", "ctypes.c_float", "struct"),
    ("make(21)", "make(22)", "local"),
    ('"whole"', '"integer"', "shown"),
    ("times=31", "times=32", "flaky"),
]
#: What changes nothing.
PLACES = [
    ('"""Doc of Box."""', ""),
    ('"""Doc of Verdict."""', '"""Another."""'),
    ('"""Doc of a field."""', ""),
    ('"""Doc of check."""', ""),
    ("class Part", "\n\n# Moved.\nclass Part"),
    ("def use_page(): ", 'def use_page():\n    "Doc of a function."\n    '),
]

SCRIPT = """
import importlib, json, os, sys, types
from dask_pcm.context.identity.digest import digest

def digests(module):
    return {k[4:]: digest(f) for k, f in vars(module).items() if k.startswith("use_")}

def typed(source):
    module = sys.modules["cells"] = types.ModuleType("cells")
    exec(compile(source, "<cell>", "exec"), vars(module))
    return module

def filed(source, number):
    folder = f"{sys.argv[1]}/{number}"
    os.mkdir(folder)
    with open(f"{folder}/own.py", "w") as file:
        file.write(source)
    sys.path.insert(0, folder)
    sys.modules.pop("own", None)
    return importlib.import_module("own")

found = []
for number, source in enumerate(json.load(open(sys.argv[1] + "/sources.json"))):
    own = filed(source, number)
    found.append([digests(own), digests(typed(source))])
    if number == 0:  # what is used does not change
        [getattr(own, name)() for name in list(vars(own)) if name.startswith("use_")]
        found.append([digests(own), digests(typed(source))])
json.dump(found, sys.stdout)
"""


def in_process(folder: Path, sources: list[str], seed: int) -> subprocess.Popen[str]:
    folder.mkdir()
    (folder / "sources.json").write_text(json.dumps(sources))
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)],
        env=os.environ | {"PYTHONHASHSEED": str(seed)},
        text=True,
        stdout=subprocess.PIPE,
    )


def changed(old: str, new: str) -> str:
    assert SOURCE.count(old) >= 1, old
    return SOURCE.replace(old, new)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Digests of every variant by function: with source, and without; and in another process."""
    root = tmp_path_factory.mktemp("classes")
    changes = [changed(*change[:2]) for change in [*CHANGES, *PLACES]]
    processes = [
        in_process(root / "1", [SOURCE, *changes], 1),
        in_process(root / "2", [SOURCE], 2),
    ]
    return [json.loads(process.communicate()[0]) for process in processes]


def test_every_process_finds_the_same(found):
    one, other = found
    assert one[0] == one[1] == other[0] == other[1]


@pytest.mark.parametrize("number", range(len(CHANGES)), ids=[new for _, new, _ in CHANGES])
def test_what_the_author_wrote_counts(found, number):
    filed, typed = found[0][0]
    filed_now, typed_now = found[0][2 + number]
    expected = CHANGES[number][2]
    assert {k for k in filed if filed[k] != filed_now[k]} == set(expected.split()) - {"*"}
    if "*" not in expected:
        assert {k for k in typed if typed[k] != typed_now[k]} == set(expected.split())


@pytest.mark.parametrize("number", range(len(PLACES)), ids=[new for _, new in PLACES])
def test_docstrings_and_lines_do_not_count(found, number):
    assert found[0][2 + len(CHANGES) + number] == found[0][0]
