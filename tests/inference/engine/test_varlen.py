"""Packs as sequences of different lengths: the kernel needs a GPU, and is written out here."""

from __future__ import annotations

import random

import pytest
import torch

from dask_pcm.inference.engine import graphs as graphs_module
from dask_pcm.inference.engine import varlen
from dask_pcm.inference.engine.packs import Segment
from dask_pcm.inference.engine.pages import KVShape, PagePool
from tests.inference.engine.conftest import FAMILIES
from tests.inference.engine.test_engine import ENDINGS, prompts_of, text


def written_out(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
    """``varlen_attn``: the last tokens of each sequence ask; causal ones end with the last key."""
    out = torch.full((*q.shape[:2], v.shape[2]), torch.nan)
    queries, keys = cu_q.diff().tolist(), cu_k.diff().tolist()
    assert max(queries) == max_q and max(keys) <= max_k
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    n_each = q.shape[1] // k.shape[1]
    for n_q, n_k, at_q, at_k in zip(queries, keys, cu_q.tolist(), cu_k.tolist(), strict=False):
        one = q[at_q : at_q + n_q].transpose(0, 1)
        known = (x[at_k : at_k + n_k].repeat_interleave(n_each, 1).transpose(0, 1) for x in (k, v))
        key, value = known
        far = torch.arange(n_k - n_q, n_k)[:, None] - torch.arange(n_k)[None]
        left, right = window_size
        unseen = torch.zeros_like(far, dtype=torch.bool)
        unseen |= far > left if left >= 0 else unseen
        unseen |= far < -right if right >= 0 else unseen
        scores = (one @ key.transpose(1, 2) * scale).masked_fill(unseen, -torch.inf)
        out[at_q : at_q + n_q] = (scores.softmax(-1) @ value).transpose(0, 1)
    return out


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    monkeypatch.setattr(varlen, "is_taken", lambda query, value: True)
    monkeypatch.setattr(varlen, "kernel", lambda: written_out)


@pytest.fixture
def graphs(monkeypatch):
    """Counts what would be graphs on a GPU, and computes it."""
    made = []
    monkeypatch.setattr(graphs_module, "_captured", lambda compute: made.append(1) or compute)
    monkeypatch.setattr(graphs_module, "_LEAST_CACHED", 64)
    return made


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_steps_of_fixed_shapes_say_the_same(alone, graphs, family):
    rng = random.Random(1)
    one, prompts = alone(family), prompts_of(rng)
    expected = [one.continued(row, 6) for row in prompts]
    driven = one.engine(budget_tokens=1000)
    driven.engine._graphs.is_on = True
    for k, row in enumerate(prompts):
        driven.generate(k, row, 3 + k % 4)
    found = driven.run()
    for k, new in enumerate(expected):
        assert found[k] == new[: 3 + k % 4]
    assert graphs  # of several sizes, as rows end


def test_a_model_that_cannot_be_captured_goes_on_without(alone, monkeypatch):
    def fails(compute):
        raise RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture")

    monkeypatch.setattr(graphs_module, "_captured", fails)
    rng = random.Random(2)
    one, row = alone("llama"), text(rng, 20)
    driven = one.engine()
    driven.engine._graphs.is_on = True
    driven.generate("row", row, 5)
    assert driven.run()["row"] == one.continued(row, 5)
    assert not driven.engine._graphs.is_on


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("gpt_oss",)])
@pytest.mark.parametrize("budget_tokens", [64, 23])
def test_scores_and_tokens_are_those_of_each_row_alone(alone, family, budget_tokens):
    rng = random.Random(0)
    one, prompts = alone(family), prompts_of(rng)
    expected = [(one.scores(row, ENDINGS), one.continued(row, 4)) for row in prompts]
    driven = one.engine(budget_tokens=budget_tokens)
    for k, row in enumerate(prompts):
        driven.score(("score", k), row, ENDINGS)
        driven.generate(("new", k), row, 4)
    found = driven.run()
    for k, (scores, new) in enumerate(expected):
        assert found["score", k] == pytest.approx(scores, abs=1e-4)
        assert found["new", k] == new


def test_plain_rows_are_taken_as_they_are():
    made = varlen.sequences_of(
        [Segment([1, 2, 3], range(3)), Segment([4], [0])], [0, 3], None, "cpu"
    )
    assert made.order is None and made.own is None and made.cached is None
    assert made.cu_queries.tolist() == made.cu_keys.tolist() == [0, 3, 4]
    assert (made.most_queries, made.most_keys) == (3, 3)


def test_a_token_asks_once_however_many_endings_have_it():
    #     0 - 1 - 2 - 3
    #           \ 4 - 5
    #               \ 6
    row = Segment([0] * 7, [0, 1, 2, 3, 2, 3, 3], parents=[-1, 0, 1, 2, 1, 4, 4])
    made = varlen.sequences_of([row], [0], None, "cpu")
    assert made.order is not None and made.order.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert made.cu_queries.tolist() == [0, 4, 6, 7] and made.cu_keys.tolist() == [0, 4, 8, 12]
    own = torch.arange(7.0)[:, None, None]
    keys, values = made.keys_and_values(None, 0, own, -own)
    assert (
        keys.flatten().tolist()
        == (-values).flatten().tolist()
        == [0, 1, 2, 3, 0, 1, 4, 5, 0, 1, 4, 6]
    )


def test_keys_in_pages_come_before_those_of_the_pack():
    rows = [Segment([7, 8], [18, 19], [3, 1], 18, True), Segment([9], [2], [0], 2, True)]
    pool = PagePool(4, KVShape(2, 1, 1, 1), torch.float32, "cpu")
    pool.kv[:4, 1, :, 0] = torch.arange(4 * 16.0).view(4, 16, 1)
    made = varlen.sequences_of(rows, [0, 2], pool, "cpu")
    own = torch.tensor([100.0, 101, 102])[:, None, None]
    keys, values = made.keys_and_values(pool, 1, own, own)
    first = [*range(48, 64), 16, 17, 100, 101]
    assert keys.flatten().tolist() == values.flatten().tolist() == [*first, 0, 1, 102]
    assert made.cu_keys.tolist() == [0, 20, 23] and made.cu_queries.tolist() == [0, 2, 3]
