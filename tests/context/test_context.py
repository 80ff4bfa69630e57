from __future__ import annotations

import functools
import pickle
import subprocess
import sys
import threading

import cloudpickle
import pytest
from dask.tokenize import tokenize

from dask_pcm import Context
from dask_pcm.context.sealed import Sealed
from dask_pcm.errors import RecipeError


def load(path, n=1):
    return path, n


def test_arguments_count_and_names_and_memory_do_not():
    plain = Context(load, "a")
    assert plain == Context(load, "a", name="other", device_memory="3 GiB")
    assert plain != Context(load, "b")
    assert plain != Context(load, "a", n=2)
    assert len({plain, Context(load, "a", name="x")}) == 1
    assert tokenize(plain) == tokenize(Context(load, "a", device_memory=5))


def test_declared_numbers():
    context = Context(load, "a", device_memory="4 GiB", exclusive=False)
    assert context.device_memory_bytes == 4 << 30
    assert context.ref.is_exclusive is False
    assert context.name == "load"
    assert Context(load, "a").device_memory_bytes is None
    with pytest.raises(RecipeError, match="negative"):
        Context(load, "a", device_memory=-1)


def test_frozen():
    with pytest.raises(AttributeError, match="frozen"):
        Context(load, "a").ref = None


def test_pickled_it_is_the_same():
    context = Context(lambda: 3, name="three")
    again = pickle.loads(cloudpickle.dumps(context))
    assert again == context
    assert again.name == "three"
    assert Sealed(again.digest, again.ref.recipe).open().build() == 3


def test_the_scheduler_needs_no_module_of_the_users(tmp_path, monkeypatch):
    (tmp_path / "only_on_the_client.py").write_text("def load():\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import only_on_the_client

    wire = pickle.dumps(Context(only_on_the_client.load).ref)
    assert b"only_on_the_client" in wire
    monkeypatch.undo()
    monkeypatch.delitem(__import__("sys").modules, "only_on_the_client")
    ref = pickle.loads(wire)
    with pytest.raises(RecipeError, match=r"cannot import.*only_on_the_client.*upload_file"):
        Sealed(ref.digest, ref.recipe).open()


def test_what_cannot_be_pickled_is_refused_at_once():
    lock = threading.Lock()
    with pytest.raises(RecipeError):
        Context(load, lock)
    with pytest.raises(RecipeError):
        Context(lambda: lock)


def test_a_called_loader_is_recognised():
    with pytest.raises(RecipeError, match="not Context\\(load\\(\\*arguments\\)\\)"):
        Context(load("a"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"offload": print}, "offload is given and restore is not"),
        ({"restore": print}, "restore is given and offload is not"),
        ({"close": 5}, "close is a hook of Context: a function .*; found 5"),
        ({"offload": "cpu", "restore": print}, "offload is a hook .*; found 'cpu'"),
        ({"reattach": "no"}, "reattach must be one of True, False, None; found 'no'"),
        ({"exclusive": "no"}, "exclusive must be one of True, False; found 'no'"),
        ({"exclusive": None}, "exclusive must be one of True, False; found None"),
        ({"device_memory": "lots"}, "device_memory must be a size .*; found 'lots'"),
        ({"device_memory": ["4 GiB"]}, "device_memory must be a size"),
        ({"device_memory": True}, "device_memory must be a size"),
    ],
)
def test_what_a_parameter_cannot_be_is_said_at_once(options, says):
    with pytest.raises(RecipeError, match=says):
        Context(load, "a", **options)


def test_hooks_that_go_together():
    assert Context(load, "a", offload=print, restore=print, close=print, reattach=False)
    assert Context(load, "a", close=print, exclusive=True, reattach=None)


class Lexicon:
    def __init__(self, words):
        self.words = words

    @functools.cached_property
    def table(self):
        return {word: number for number, word in enumerate(self.words)}


def test_a_class_of_the_notebook_may_have_cached_properties(monkeypatch):
    monkeypatch.setattr(Lexicon, "__module__", "__main__")  # pickled by value
    recipe = Context(Lexicon, ["a", "b"]).ref.recipe
    worker = (
        "import pickle, sys\n"
        "built = pickle.load(sys.stdin.buffer).build()\n"
        "print(built.table, vars(built)['table'])"
    )
    run = subprocess.run([sys.executable, "-c", worker], input=recipe, capture_output=True)
    assert run.stdout.decode().strip() == "{'a': 0, 'b': 1} {'a': 0, 'b': 1}", run.stderr


def test_what_a_digest_is_made_of_stays_with_the_client():
    ref = Context(load, 2).ref
    assert "the code of load" in ref.parts
    again = pickle.loads(pickle.dumps(ref))
    assert again == ref and again.parts == {}
