"""What people give by mistake, and the sentence that helps."""

from __future__ import annotations

import functools
from pathlib import Path

import dask.dataframe as dd
import pandas as pd
import pyarrow as pa
import pytest
import torch

import dask_pcm as pcm
from dask_pcm.errors import ArgumentError, LoadError, RecipeError, SchemaError

META = {"id": "i8"}


def load(path="model"):
    return path


def verify(frame, model, prefix="", *, limit=3):
    return frame


async def coroutine(frame, model):
    return frame


def generator(frame, model):
    yield frame


async def async_generator(frame, model):
    yield frame


class Verifier:
    def __init__(self, frame=None, model=None):
        self.frame = frame

    def __call__(self, frame, model):
        return frame


class AsyncVerifier:
    async def __call__(self, frame, model):
        return frame


def decorated(func):
    @functools.wraps(func)
    def call(frame, model):
        return func(frame)

    return call


LLM = pcm.Context(load)
FRAME = dd.from_pandas(pd.DataFrame({"id": range(4)}), npartitions=2)


def over(func, *args, context=LLM, frame=FRAME, **options):
    return pcm.map_partitions(func, frame, *args, context=context, meta=META, **options)


class TestFunctions:
    @pytest.mark.parametrize(
        "func",
        [verify, Verifier(), functools.partial(verify, limit=2), decorated(lambda f: f), print],
        ids=["function", "object", "partial", "decorated", "builtin"],
    )
    def test_that_can_be_called(self, func):
        over(func)

    def test_with_their_arguments(self):
        over(verify, "p", limit=2)
        over(lambda frame, *, small, large: frame, context={"small": LLM, "large": LLM})
        over(lambda frame, model, **options: frame, batch_size=8)  # its own

    @pytest.mark.parametrize(
        ("func", "message"),
        [
            (coroutine, "coroutine is a coroutine function"),
            (functools.partial(coroutine), "coroutine is a coroutine function"),
            (AsyncVerifier(), "AsyncVerifier is a coroutine function"),
            (generator, "generator is a generator .* with 'return'"),
            (async_generator, "is an asynchronous generator"),
            (Verifier, "found the class Verifier"),
            ("verify", "needs a function as its first argument; found str"),
            (lambda frame: frame, r"<lambda>\(frame, live\): too many positional arguments"),
            (lambda frame, model, more: frame, "missing a required argument: 'more'"),
            (len, "too many positional arguments"),
        ],
    )
    def test_that_cannot(self, func, message):
        with pytest.raises(RecipeError, match=message):
            over(func)

    def test_several_contexts_under_other_names(self):
        with pytest.raises(RecipeError, match=r"verify\(frame, small=live\): missing .* 'model'"):
            over(verify, context={"small": LLM})


def named(path, name="x", files=()):
    return path


class TestReservedNames:
    def test_an_option_that_the_loader_has_as_well_is_refused(self):
        with pytest.raises(RecipeError, match=r"parameter 'name'.*partial\(named, name=\.\.\.\)"):
            pcm.Context(named, "a", name="b")
        with pytest.raises(RecipeError, match="parameter 'files'"):
            pcm.Context(named, "a", files=[__file__])

    def test_bound_or_not_given_it_is_not(self):
        assert pcm.Context(functools.partial(named, name="b"), "a", name="c").name == "c"
        assert pcm.Context(named, "a", "b", name="c").name == "c"
        assert pcm.Context(named, "a").name == "named"


class TestOptions:
    @pytest.mark.parametrize(
        "name", ["batch_size", "batchsize", "num_rows", "chunk_size", "batch_row", "bs"]
    )
    def test_rows_of_a_call(self, name):
        with pytest.raises(RecipeError, match=f"{name}=, did you mean .*'s batch_rows="):
            over(verify, **{name: 8})
        with pytest.raises(ArgumentError, match=f"{name}=, did you mean classify's batch_rows="):
            pcm.classify(FRAME, LLM, prompt="{id}", choices=["a", "b"], **{name: 8})

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: pcm.write_parquet(FRAME, output_dir="x"), "write_parquet's path="),
            (lambda: pcm.write_parquet(FRAME, "x", retry_fail=True), "retry_failed="),
            (lambda: pcm.write_parquet(FRAME, "x", max_errors=1), "max_failed_rows="),
            (lambda: pcm.read_parquet("x", chunk_size=1), "rows_per_piece="),
            (lambda: pcm.map_partitions(verify, FRAME, model=LLM, meta=META), "context="),
            (lambda: FRAME.pcm.classify(LLM, prompt="", labels=[]), "classify's choices="),
            (lambda: FRAME.pcm.write_parquet("x", over_write=True), "overwrite="),
        ],
    )
    def test_other_names(self, call, message):
        with pytest.raises(ArgumentError, match=f"did you mean .*{message}"):
            call()

    def test_of_contexts(self):
        with pytest.raises(RecipeError, match=r"memory=, did you mean Context's device_memory="):
            pcm.Context(load, "x", memory="4 GiB")

    def test_that_is_like_none(self):
        with pytest.raises(ArgumentError, match=r"unexpected keyword argument 'threshold'\.$"):
            pcm.write_parquet(FRAME, "x", threshold=1)


def like(module, name):
    """An object of a library that is not here."""
    return type(name, (), {"__module__": module})()


class TestFrames:
    @pytest.mark.parametrize(
        ("found", "message"),
        [
            (pd.DataFrame(), r"found pandas\.DataFrame.*from_pandas\(frame, npartitions"),
            (pd.Series([1]), r"found pandas\.Series.*to_frame"),
            (pa.table({"id": [1]}), r"found pyarrow\.Table.*from_pandas\(table\.to_pandas\(\)"),
            ("claims/", r"found str\. .*dask_pcm\.read_parquet\('claims/'\)"),
            (Path("claims"), r"read_parquet\('claims'\)"),
            ([{"id": 1}], r"found list.*from_pandas"),
            (FRAME["id"], r"found dask\.Series.*to_frame"),
            (
                like("polars.dataframe.frame", "DataFrame"),
                r"polars\.DataFrame.*write_parquet\(path",
            ),
            (like("polars.lazyframe.frame", "LazyFrame"), r"frame\.sink_parquet\(path\) and read"),
            (like("datasets.arrow_dataset", "Dataset"), r"dataset\.to_parquet\(path\) and read"),
            (like("datasets.dataset_dict", "DatasetDict"), r"dataset\['train'\]"),
            (like("pyarrow._dataset", "FileSystemDataset"), "Read its files"),
            (LLM, r"found dask_pcm\.Context\. Write "),
        ],
    )
    def test_of_other_libraries(self, found, message):
        for call in (
            lambda: over(verify, frame=found),
            lambda: pcm.classify(found, LLM, prompt="{id}", choices=["a", "b"]),
            lambda: pcm.write_parquet(found, "x"),
        ):
            with pytest.raises(SchemaError, match=message):
                call()


class TestLiveObjects:
    @pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).forward])
    def test_where_a_recipe_is_needed(self, model):
        with pytest.raises(RecipeError, match=r"found a live object.*Context\(load, path\)"):
            pcm.Context(model)
        for context in (model, {"model": model}):
            with pytest.raises(
                RecipeError, match=r"write dask_pcm\.Context\(load, path\)|Write .*"
            ):
                over(verify, context=context)

    def test_a_context_of_a_context(self):
        with pytest.raises(RecipeError, match="is a Context already"):
            pcm.Context(LLM)

    @pytest.mark.parametrize(
        "use",
        [lambda m: m("text"), lambda m: m.generate("text"), lambda m: m["weights"]],
        ids=["call", "attribute", "item"],
    )
    def test_a_context_that_is_used_as_one(self, use):
        """As in Dask's own map_partitions, which knows nothing of contexts."""
        with pytest.raises(ValueError, match=r"dask_pcm\.acquire\(context\) as live"):
            FRAME.map_partitions(lambda frame, model: use(model), LLM)

    def test_what_a_context_does_not_have(self):
        assert not hasattr(LLM, "generate")
        with pytest.raises(RecipeError, match="recipe of a live object"), LLM:
            pass


class TestLoaders:
    @pytest.mark.parametrize(
        ("loader", "message"),
        [
            (coroutine, "is a coroutine function"),
            (generator, "is a generator"),
            (lambda: None, "always returns None"),
            (lambda path: path, "missing a required argument: 'path'"),
            (3, "needs a loader function"),
        ],
    )
    def test_refused_on_the_client(self, loader, message):
        with pytest.raises(RecipeError, match=message):
            pcm.Context(loader)

    def test_that_return_none_at_times(self):
        def load(flag):
            return "model" if flag else None

        with (
            pytest.raises(LoadError, match="It must return the live object"),
            pcm.acquire(pcm.Context(load, False)),
        ):
            pass

    def test_classes(self):
        with pcm.acquire(pcm.Context(Verifier, "frame")) as verifier:
            assert verifier.frame == "frame"
        pcm.Context(torch.nn.Linear, 2, 2)


def test_calls_of_earlier_snapshots_are_told_what_to_write(tmp_path):
    with pytest.raises(ArgumentError, match=r"Did you mean dask_pcm\.sample\(ddf, 20\)\?"):
        pcm.write_parquet(FRAME, tmp_path / "out", sample=20)
    with pytest.raises(SchemaError, match="use rows_per_piece="):
        pcm.read_parquet(tmp_path, 5000)
