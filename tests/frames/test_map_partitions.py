"""``map_partitions`` as an ordinary Dask DataFrame, on a real cluster."""

from __future__ import annotations

from collections import Counter

import dask.dataframe as dd
import pandas as pd
import pytest
from dask.utils import key_split
from distributed import wait

import dask_pcm as pcm
from dask_pcm.errors import RecipeError, RowCountError, SchemaError
from tests.support.patience import until

META = {"id": "i8", "verdict": "str"}


def load(name="model"):
    return name


def verify(frame, model):
    return pd.DataFrame({"id": frame["id"], "verdict": f"{model} says " + frame["claim"]})


def verify_all_but_7(frame, model):
    if (frame["id"] == 7).any():
        raise ValueError("seven is not to be verified")
    return verify(frame, model)


LLM = pcm.Context(load)


@pytest.fixture
def frame(claims):
    return pcm.read_parquet(claims())


def test_whole_partitions(client, frame):
    verdicts = pcm.map_partitions(verify, frame, context=LLM, meta=META)
    found = verdicts.compute()
    assert found.id.tolist() == list(range(200))
    assert found.verdict.iloc[3] == "model says claim 3"
    assert found.index.tolist() == list(range(200))
    assert verdicts.divisions == frame.divisions


@pytest.mark.parametrize("names", ["id", ("id",), (name for name in ["id"])])
def test_columns_that_are_required_are_named_as_people_do(frame, names):
    verdicts = pcm.map_partitions(
        lambda frame, model: frame, frame, context=LLM, meta={"id": "i8"}, required_columns=names
    )
    assert list(verdicts.expr.frame.columns) == ["id"]


@pytest.fixture
def tasks_of(client, shared_cluster):
    """Prefixes of the tasks that a computation ran, with how many of each."""

    def count(frame):
        scheduler = shared_cluster.scheduler
        # Results that are still there would not be computed again.
        until(lambda: not scheduler.tasks, 10)
        persisted = frame.persist()
        wait(persisted)
        return Counter(key_split(key) for key in list(scheduler.tasks))

    return count


def test_one_task_a_partition_that_reads_and_infers(tasks_of, frame):
    verdicts = pcm.map_partitions(verify, frame, context=LLM, meta=META)
    assert tasks_of(verdicts) == {"pcm_verify": 4}
    assert tasks_of(verdicts.optimize()) == {"pcm_verify": 4}
    pruned = pcm.map_partitions(
        lambda f, m: f.assign(verdict=m), frame[["id"]], context=LLM, meta=META
    )
    assert tasks_of(pruned).total() == 4
    by_rows = pcm.map_partitions(verify, frame, context=LLM, meta=META, batch_rows=8)
    assert tasks_of(by_rows.head(5, compute=False)) == {"pcm_verify": 1}


def test_what_stands_above_is_not_fused_into_it(tasks_of, frame):
    verdicts = pcm.map_partitions(verify, frame, context=LLM, meta=META)
    filtered = verdicts[verdicts.id > 5].assign(x=1).optimize()
    found = tasks_of(filtered)
    assert found["pcm_verify"] == 4
    assert found.total() == 8


def test_unrelated_columns_are_not_read(client, frame):
    verdicts = pcm.map_partitions(
        lambda f, m: f.assign(verdict=m),
        frame,
        context=LLM,
        meta=META,
        required_columns=["id"],
    )
    assert verdicts.compute().columns.tolist() == ["id", "verdict"]


def test_it_lives_with_the_rest_of_dask(client, frame, tmp_path):
    verdicts = pcm.map_partitions(verify, frame, context=LLM, meta=META)
    assert verdicts.head(3).id.tolist() == [0, 1, 2]
    assert verdicts.persist().id.sum().compute() == sum(range(200))
    assert verdicts.merge(frame, on="id").compute().shape == (200, 3)
    assert verdicts.partitions[2].compute().id.tolist() == list(range(100, 150))
    assert verdicts.groupby("id").size().compute().sum() == 200
    assert verdicts.repartition(npartitions=2).compute().id.nunique() == 200
    verdicts.to_parquet(tmp_path / "plain")
    assert len(pd.read_parquet(tmp_path / "plain")) == 200


def test_one_context_after_the_other(client, frame):
    first = pcm.map_partitions(verify, frame, context=LLM, meta=META)
    second = pcm.map_partitions(
        lambda f, m: f.assign(second=m),
        first,
        context=pcm.Context(load, "other"),
        meta={**META, "second": "str"},
    )
    found = second.compute()
    assert set(found.second) == {"other"}
    assert found.verdict.iloc[0] == "model says claim 0"


def test_several_contexts_come_as_keywords(client, frame):
    def judge(f, prefix, *, small, large):
        return f[["id"]].assign(verdict=prefix + small + large)

    contexts = {"small": pcm.Context(load, "s"), "large": pcm.Context(load, "l")}
    found = pcm.map_partitions(judge, frame, "p", context=contexts, meta=META).compute()
    assert set(found.verdict) == {"psl"}


def test_partitions_may_filter_and_expand(client, frame):
    even = pcm.map_partitions(
        lambda f, m: f[f.id % 2 == 0].assign(verdict=m)[["id", "verdict"]],
        frame,
        context=LLM,
        meta=META,
    )
    assert len(even.compute()) == 100


def test_a_frame_of_any_origin(client):
    pandas = pd.DataFrame({"id": range(10), "claim": "x"}, index=list("abcdefghij"))
    frame = dd.from_pandas(pandas, npartitions=3)
    found = pcm.map_partitions(verify, frame, context=LLM, meta=META).compute()
    assert found.index.tolist() == list("abcdefghij")


def test_without_a_cluster_it_works_too(frame):
    found = pcm.map_partitions(verify, frame, context=LLM, meta=META).compute(scheduler="sync")
    assert len(found) == 200


class TestByRows:
    def test_batches_cover_the_rows_in_order(self, client, frame):
        def sizes(f, m):
            return pd.DataFrame({"id": f["id"], "verdict": str(len(f))})

        found = pcm.map_partitions(sizes, frame, context=LLM, meta=META, batch_rows=32).compute()
        assert found.id.tolist() == list(range(200))
        assert found.verdict.value_counts().to_dict() == {"32": 128, "18": 72}
        assert found.error.isna().all()

    def test_a_row_that_raises_has_its_reason_and_its_neighbours_their_answers(self, client, frame):
        verdicts = pcm.map_partitions(
            verify_all_but_7, frame, context=LLM, meta=META, batch_rows=32
        )
        found = verdicts.compute().set_index("id")
        assert found.error.dropna().to_dict() == {7: "ValueError: seven is not to be verified"}
        assert found.verdict.isna().sum() == 1
        assert len(found) == 200

    def test_columns_that_cannot_be_null_become_nullable(self, client, frame):
        def scored(f, m):
            verify_all_but_7(f, m)
            return pd.DataFrame({"id": f["id"], "score": f["id"] * 2, "sure": f["id"] > 3})

        meta = {"id": "i8", "score": "i8", "sure": "bool"}
        verdicts = pcm.map_partitions(scored, frame, context=LLM, meta=meta, batch_rows=10)
        found = verdicts.compute()
        assert found.dtypes.astype(str).to_dict() == verdicts.dtypes.astype(str).to_dict()
        assert str(found.score.dtype) == "Int64" and str(found.id.dtype) == "int64"
        assert found.score.isna().sum() == 1
        assert found.score.iloc[8] == 16

    def test_the_functions_own_error_column_is_kept(self, client, frame):
        def own(f, m):
            return f[["id"]].assign(error=["too long" if i == 3 else None for i in f["id"]])

        meta = {"id": "i8", "error": "str"}
        found = pcm.map_partitions(own, frame, context=LLM, meta=meta, batch_rows=32).compute()
        assert found.error.dropna().to_dict() == {3: "too long"}

    @pytest.mark.parametrize(
        ("func", "message"),
        [
            (lambda f, m: verify(f, m).iloc[:-1], r"got 32 rows and returned 31"),
            (lambda f, m: verify(f, m).iloc[::-1], r"an index that differs"),
            (lambda f, m: ["x"] * len(f), r"returned list; expected a DataFrame"),
        ],
    )
    def test_one_row_for_each_in_order(self, client, frame, func, message):
        verdicts = pcm.map_partitions(func, frame, context=LLM, meta=META, batch_rows=32)
        with pytest.raises(RowCountError, match=message):
            verdicts.compute()

    def test_a_function_may_change_its_frame(self, client, frame):
        def changing(f, m):
            claim = f.pop("claim")
            f["id"] += 1000
            if (f["id"] == 1007).any():
                raise ValueError("seven")
            return pd.DataFrame({"id": f["id"], "verdict": claim})

        found = pcm.map_partitions(changing, frame, context=LLM, meta=META, batch_rows=10).compute()
        assert found.error.dropna().to_dict() == {7: "ValueError: seven"}
        assert found.id.drop(7).tolist() == [i + 1000 for i in range(200) if i != 7]
        assert found.verdict[3] == "claim 3"

    def test_whole_numbers_stay_whole_beside_nulls(self, client, frame):
        def large(f, m):
            value = pd.Series(2**60 + 1, index=f.index)
            if (f["id"] == 7).any():
                value = value.astype("float64")
                value[7] = float("nan")
                value[value.notna()] = 0.0
            return pd.DataFrame({"id": f["id"], "large": value})

        meta = {"id": "i8", "large": "i8"}
        found = pcm.map_partitions(large, frame, context=LLM, meta=meta, batch_rows=5).compute()
        assert found.large[0] == 2**60 + 1 and found.large.isna().sum() == 1

    def test_errors_whose_text_is_odd(self, client, frame):
        class NoTextError(Exception):
            def __str__(self):
                raise RuntimeError

        def odd(f, m):
            if (f["id"] == 3).any():
                raise ValueError("\udcff")
            if (f["id"] == 4).any():
                raise NoTextError
            return verify(f, m)

        found = pcm.map_partitions(odd, frame, context=LLM, meta=META, batch_rows=5).compute()
        assert found.error.dropna().to_dict() == {
            3: "ValueError: \\udcff",
            4: "NoTextError: (its text is not available: RuntimeError in __str__)",
        }

    def test_the_length_needs_no_inference(self, client, frame):
        def never(f, m):
            raise AssertionError

        assert len(pcm.map_partitions(never, frame, context=LLM, meta=META, batch_rows=8)) == 200


def test_meta_is_enforced(client, frame):
    def other(f, m):
        return f[["id"]].assign(surprise=1)

    verdicts = pcm.map_partitions(other, frame, context=LLM, meta=META)
    with pytest.raises(SchemaError, match=r"missing: \['verdict'\]"):
        verdicts.compute()
    loose = pcm.map_partitions(other, frame, context=LLM, meta=META, enforce_metadata=False)
    assert "surprise" in loose.compute().columns

    def convertible(f, m):
        return pd.DataFrame({"verdict": 1.0, "id": f["id"].astype("float64")})

    found = pcm.map_partitions(convertible, frame, context=LLM, meta=META).compute()
    assert found.columns.tolist() == ["id", "verdict"] and str(found.id.dtype) == "int64"


def test_columns_that_stand_twice(client, frame):
    def twice(f, m):
        return pd.concat([verify(f, m), f[["id"]]], axis=1)

    for batch_rows in (None, 10):
        verdicts = pcm.map_partitions(twice, frame, context=LLM, meta=META, batch_rows=batch_rows)
        with pytest.raises(SchemaError, match="columns more than once: id"):
            verdicts.compute()


def test_an_empty_partition_needs_no_context(client, frame):
    def never(f, m):
        raise AssertionError

    nothing = frame[frame.id < 0]
    assert len(pcm.map_partitions(never, nothing, context=LLM, meta=META).compute()) == 0


class TestRefusedAtOnce:
    def test_a_column_that_is_not_there(self, frame):
        with pytest.raises(SchemaError, match=r"'evidence', which the frame does not have.*'id'"):
            pcm.map_partitions(verify, frame, context=LLM, meta=META, required_columns=["evidence"])

    def test_contexts_that_are_none(self, frame):
        with pytest.raises(RecipeError, match=r"takes a dask_pcm\.Context or a dict"):
            pcm.map_partitions(verify, frame, context=load, meta=META)
        with pytest.raises(RecipeError, match=r"context\['a'\] must be a"):
            pcm.map_partitions(verify, frame, context={"a": 1}, meta=META)

    def test_not_a_dask_dataframe(self):
        with pytest.raises(SchemaError, match=r"found pandas\.DataFrame.*from_pandas"):
            pcm.map_partitions(verify, pd.DataFrame(), context=LLM, meta=META)

    def test_a_function_that_cannot_be_pickled(self, frame):
        import threading

        lock = threading.Lock()
        with pytest.raises(RecipeError):
            pcm.map_partitions(lambda f, m: lock, frame, context=LLM, meta=META)

    def test_meta_and_batch_rows(self, frame):
        with pytest.raises(SchemaError, match="meta must describe a DataFrame"):
            pcm.map_partitions(verify, frame, context=LLM, meta=("x", "i8"))
        with pytest.raises(SchemaError, match="at least 1"):
            pcm.map_partitions(verify, frame, context=LLM, meta=META, batch_rows=0)

    def test_another_dask_frame_as_an_argument(self, frame):
        with pytest.raises(SchemaError, match="maps over one Dask DataFrame"):
            pcm.map_partitions(verify, frame, frame, context=LLM, meta=META)
