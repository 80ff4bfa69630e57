"""What ``map_partitions`` returns, under everything that an ordinary Dask DataFrame does."""

from __future__ import annotations

import os

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import dask_pcm as pcm

META = {"id": "i8", "verdict": "str"}


def load(name="model"):
    return name


LLM, OTHER = pcm.Context(load), pcm.Context(load, "other")


@pytest.fixture
def noted(tmp_path):
    """A function that notes how many rows it gets; ``noted.rows()`` are those since last asked."""
    log = str(tmp_path / "rows")

    def infer(frame, model, path=log):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{len(frame)}\n".encode())
        os.close(descriptor)
        return pd.DataFrame({"id": frame["id"], "verdict": model}, index=frame.index)

    def rows():
        if not os.path.exists(log):
            return 0
        with open(log) as file:
            total = sum(map(int, file))
        os.unlink(log)
        return total

    infer.rows = rows
    return infer


@pytest.fixture
def claims_frame(claims):
    return pcm.read_parquet(claims())


@pytest.fixture
def verdicts(noted, claims_frame):
    return pcm.map_partitions(noted, claims_frame, context=LLM, meta=META, batch_rows=32)


class TestHead:
    """Of a function by rows, only the rows that are looked at are inferred."""

    def test_head_and_tail(self, client, noted, verdicts):
        assert verdicts.head(5).id.tolist() == [0, 1, 2, 3, 4]
        assert noted.rows() == 5
        assert verdicts.tail(3).id.tolist() == [197, 198, 199]
        assert noted.rows() == 3
        assert verdicts[["verdict"]].head(4).verdict.tolist() == ["model"] * 4
        assert noted.rows() == 4
        assert (verdicts.id + 1).head(2).tolist() == [1, 2]
        assert noted.rows() == 2
        assert verdicts.partitions[2].head(2).id.tolist() == [100, 101]
        assert noted.rows() == 2
        assert verdicts.head(60, npartitions=2).id.tolist() == list(range(60))
        assert noted.rows() <= 100
        assert len(verdicts.head(7, compute=False).optimize().persist()) == 7

    def test_of_a_chain_of_two_contexts(self, client, noted, verdicts):
        second = pcm.map_partitions(
            lambda f, m: f.assign(second=m),
            verdicts,
            context=OTHER,
            meta={**META, "error": "str", "second": "str"},
            batch_rows=16,
        )
        assert second.head(5).second.tolist() == ["other"] * 5
        assert noted.rows() == 5

    def test_of_a_function_on_partitions_it_is_the_partition(self, client, noted, claims_frame):
        whole = pcm.map_partitions(noted, claims_frame, context=LLM, meta=META)
        assert whole.head(5).id.tolist() == [0, 1, 2, 3, 4]
        assert noted.rows() == 50
        assert whole.partitions[1].id.compute().tolist() == list(range(50, 100))
        assert noted.rows() == 50

    def test_length_and_partitions(self, client, noted, verdicts):
        assert len(verdicts) == 200
        assert noted.rows() == 0
        assert verdicts.partitions[1:3].id.compute().tolist() == list(range(50, 150))
        assert noted.rows() == 100


class TestTogether:
    def test_joins_and_shuffles_before_and_after(self, client, noted, claims_frame):
        facts = dd.from_pandas(pd.DataFrame({"id": range(0, 200, 2), "fact": "f"}), npartitions=3)
        before = claims_frame.merge(facts, on="id", how="inner").shuffle("id", npartitions=5)
        verdicts = pcm.map_partitions(noted, before, context=LLM, meta=META, batch_rows=32)
        after = verdicts.merge(claims_frame, on="id", how="left").sort_values("id")
        found = after.compute()
        assert found.id.tolist() == list(range(0, 200, 2))
        assert set(found.verdict) == {"model"} and found.claim.notna().all()
        assert noted.rows() == 100
        by_id = verdicts.set_index("id").compute()
        assert by_id.index.tolist() == list(range(0, 200, 2))

    def test_two_contexts_joined_with_each_other(self, client, noted, claims_frame):
        first = pcm.map_partitions(noted, claims_frame, context=LLM, meta=META)
        second = pcm.map_partitions(noted, claims_frame, context=OTHER, meta=META)
        both = first.merge(second, on="id", suffixes=("", "_other")).compute()
        assert len(both) == 200
        assert set(both.verdict) == {"model"} and set(both.verdict_other) == {"other"}
        assert noted.rows() == 400

    def test_persist_repartition_delayed_and_to_parquet(self, client, noted, verdicts, tmp_path):
        kept = verdicts.persist()
        assert kept.id.sum().compute() == sum(range(200)) and len(kept) == 200
        assert noted.rows() == 200
        assert kept.repartition(npartitions=2).map_partitions(len).compute().tolist() == [100, 100]
        parts = dask.compute(*verdicts.to_delayed())
        assert pd.concat(parts).id.tolist() == list(range(200))
        verdicts.to_parquet(tmp_path / "plain")
        assert pd.read_parquet(tmp_path / "plain").id.tolist() == list(range(200))
        assert noted.rows() == 0  # what is persisted is not inferred again

    def test_several_results_at_once_infer_once(self, client, noted, verdicts):
        n, errors = dask.compute(verdicts.id.count(), verdicts.error.count())
        assert (n, errors) == (200, 0)
        assert noted.rows() == 200


class TestAlignment:
    """Put together with its own input, row stands by row, also where each file counts from 0."""

    @pytest.fixture(params=["dask", "ours"])
    def read(self, request, claims):
        folder = claims(n_files=8, n_rows=25)
        return dd.read_parquet(folder) if request.param == "dask" else pcm.read_parquet(folder)

    @pytest.mark.parametrize("batch_rows", [None, 8])
    def test_with_its_input(self, client, read, batch_rows):
        def doubled(frame, model):
            return pd.DataFrame({"twice": frame["id"] * 2}, index=frame.index)

        meta = {"twice": "i8"}
        options = {"context": LLM, "meta": meta, "batch_rows": batch_rows}
        result = pcm.map_partitions(doubled, read, **options)
        other = pcm.map_partitions(doubled, read, **{**options, "context": OTHER})
        together = read.assign(twice=result.twice, other=other.twice)
        found = together.compute()
        assert found.id.tolist() == list(range(200))
        assert found.twice.tolist() == found.other.tolist() == [2 * i for i in range(200)]
        assert read[result.twice >= 300].id.compute().tolist() == list(range(150, 200))
        assert (result.twice - read.id).tail(2).tolist() == [198, 199]
        assert together.head(3).twice.tolist() == [0, 2, 4]
        chained = pcm.map_partitions(
            lambda f, m: f.assign(more=f["twice"] + 1),
            result,
            context=OTHER,
            meta={**result.dtypes.to_dict(), "more": "i8"},
            batch_rows=batch_rows,
        )
        assert read.assign(more=chained.more).more.compute().tolist() == [
            2 * i + 1 for i in range(200)
        ]

    def test_what_is_read_only_once_is_read_once(self, client):
        """A read of the user's own that gives something else each time, and is used twice."""

        def draw(i):
            return pd.DataFrame({"x": np.random.default_rng().integers(0, 10**9, 20)})

        def same(frame, model):
            return frame.rename(columns={"x": "y"})

        drawn = dd.from_map(draw, range(4), meta={"x": "i8"})
        result = pcm.map_partitions(same, drawn, context=LLM, meta={"y": "i8"})
        together = drawn.assign(y=result.y).compute()
        assert (together.x == together.y).all()
        first, second = dask.compute(drawn, result)
        assert first.x.tolist() == second.y.tolist()

    def test_reads_of_files_are_folded_into_the_map(self, client, read, tmp_path):
        read.compute().to_csv(tmp_path / "a.csv", index=False)
        for frame in (read, dd.read_csv(tmp_path / "a.csv")):
            made = pcm.map_partitions(lambda f, m: f[["id"]], frame, context=LLM, meta={"id": "i8"})
            graph = made.optimize(fuse=False).dask
            assert not any(graph[key].dependencies for key in made.__dask_keys__())

    def test_written_by_a_run(self, client, read, tmp_path):
        verdicts = pcm.map_partitions(
            lambda f, m: pd.DataFrame({"twice": f["id"] * 2}, index=f.index),
            read,
            context=LLM,
            meta={"twice": "i8"},
            batch_rows=8,
        )
        together = read.assign(twice=verdicts.twice, error=verdicts.error)
        pcm.write_parquet(together, tmp_path / "out", progress=False)
        found = pd.read_parquet(tmp_path / "out").sort_values("id")
        assert found.id.tolist() == list(range(200)) and (found.twice == 2 * found.id).all()


class TestMeta:
    @pytest.mark.parametrize(
        "meta",
        [
            META,
            list(META.items()),
            pd.DataFrame({"id": pd.Series([], dtype="i8"), "verdict": pd.Series([], dtype="str")}),
            lambda frame: frame[["id"]].assign(verdict=pd.Series([], dtype="str")),
        ],
        ids=["dict", "pairs", "frame", "function"],
    )
    def test_kinds(self, client, noted, claims_frame, meta):
        verdicts = pcm.map_partitions(noted, claims_frame, context=LLM, meta=meta, batch_rows=32)
        assert verdicts.dtypes.astype(str).to_dict() == {**META, "id": "int64", "error": "str"}
        assert verdicts.compute().dtypes.equals(verdicts.dtypes)

    def test_categories_and_arrow(self, client, claims_frame):
        kinds = {
            "id": pd.ArrowDtype(pa.int64()),
            "verdict": pd.CategoricalDtype(["yes", "no"]),
            "tags": pd.ArrowDtype(pa.list_(pa.string())),
            "when": pd.ArrowDtype(pa.timestamp("us", tz="UTC")),
        }

        def infer(frame, model):
            return pd.DataFrame(
                {
                    "id": frame["id"],
                    "verdict": ["yes" if i % 3 else "no" for i in frame["id"]],
                    "tags": [["a"]] * len(frame),
                    "when": pd.Timestamp("2026-01-01", tz="UTC"),
                },
                index=frame.index,
            ).astype(kinds)

        verdicts = pcm.map_partitions(infer, claims_frame, context=LLM, meta=kinds, batch_rows=16)
        found = verdicts.compute()
        assert found.drop(columns="error").dtypes.to_dict() == kinds
        counts = verdicts.groupby("verdict", observed=True).size().compute()
        assert counts.to_dict() == {"no": 67, "yes": 133}
        assert verdicts.id.sum().compute() == sum(range(200))

    def test_categories_and_arrow_that_come_in(self, client, noted):
        frame = pd.DataFrame({"id": range(6), "kind": list("aabbcc")})
        frame = frame.astype({"kind": "category", "id": pd.ArrowDtype(pa.int64())})
        ddf = dd.from_pandas(frame, npartitions=2)
        kept = pcm.map_partitions(
            lambda f, m: f.assign(verdict=m),
            ddf,
            context=LLM,
            meta=ddf._meta.assign(verdict="x"),
            batch_rows=2,
        )
        found = kept.compute()
        assert found.kind.tolist() == list("aabbcc") and str(found.kind.dtype) == "category"
        assert found.id.dtype == pd.ArrowDtype(pa.int64())


class TestPartitions:
    def test_empty_ones_among_others(self, client, noted, claims_frame):
        some = claims_frame[claims_frame.id >= 100]
        verdicts = pcm.map_partitions(noted, some, context=LLM, meta=META, batch_rows=32)
        assert verdicts.compute().id.tolist() == list(range(100, 200))
        assert verdicts.map_partitions(len).compute().tolist() == [0, 0, 50, 50]

    def test_unknown_divisions_and_an_index_that_is_no_range(self, client, noted, claims):
        frame = dd.read_parquet(claims()).clear_divisions()
        assert not frame.known_divisions
        verdicts = pcm.map_partitions(noted, frame, context=LLM, meta=META, batch_rows=32)
        assert not verdicts.known_divisions and len(verdicts.compute()) == 200
        named = pd.DataFrame({"id": range(6)}, index=pd.Index(list("uvwxyz"), name="key"))
        ddf = dd.from_pandas(named, npartitions=3)
        verdicts = pcm.map_partitions(noted, ddf, context=LLM, meta=META, batch_rows=2)
        assert verdicts.divisions == ddf.divisions
        assert verdicts.loc["w":"y"].compute().id.tolist() == [2, 3, 4]
        assert verdicts.compute().index.name == "key"

    def test_an_index_that_repeats(self, client, noted):
        frame = pd.DataFrame({"id": range(8)}, index=[1, 1, 1, 1, 2, 2, 2, 2])
        ddf = dd.from_pandas(frame, npartitions=2)
        verdicts = pcm.map_partitions(noted, ddf, context=LLM, meta=META, batch_rows=3)
        assert verdicts.compute().id.tolist() == list(range(8))

    def test_a_multiindex(self, client, noted, claims):
        frame = dd.read_parquet(claims())
        made = frame.map_partitions(
            lambda f: f.set_index([f["id"] % 2, f["id"]]).rename_axis(["a", "b"])
        )
        verdicts = pcm.map_partitions(noted, made, context=LLM, meta=META, batch_rows=32)
        assert verdicts.compute().index.nlevels == 2


class TestAccessor:
    def test_map_partitions(self, client, noted, claims_frame):
        verdicts = claims_frame.pcm.map_partitions(noted, context=LLM, meta=META, batch_rows=32)
        assert verdicts.head(2).verdict.tolist() == ["model", "model"]

    def test_notebooks_see_texts_and_options(self, claims_frame):
        import inspect

        for name in ("map_partitions", "classify", "write_parquet"):
            method, function = getattr(claims_frame.pcm, name), getattr(pcm, name)
            assert method.__doc__ == function.__doc__
            options = {"ddf", *inspect.signature(method).parameters}
            assert options == set(inspect.signature(function).parameters)

    def test_classify_and_write(self, client, tmp_path):
        from dask_pcm.factcheck import demo_model

        claims = pd.read_parquet("data/fever-sample.parquet").head(20)
        frame = dd.from_pandas(claims, npartitions=2)
        column = next(name for name in claims if claims[name].dtype == "str")
        verdicts = frame.pcm.classify(
            demo_model(),
            prompt=f"{{{column}}} ",
            choices=["SUPPORTED", "REFUTED"],
            truncate_column=column,
        )
        run = verdicts.pcm.write_parquet(tmp_path / "out", progress=False)
        assert run.report.rows == 20
        assert pd.read_parquet(tmp_path / "out").answer.isin(["SUPPORTED", "REFUTED"]).all()
