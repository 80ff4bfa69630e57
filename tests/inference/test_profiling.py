"""What a context's rate and memory are by what it has to do at a time."""

from __future__ import annotations

import time

import pandas as pd
import pytest

import dask_pcm as pcm
from dask_pcm.errors import LoadError, PromptError
from dask_pcm.factcheck.demo import demo_model
from dask_pcm.inference import profiling
from dask_pcm.inference.profiling import Point, Profile, profile
from tests.support.images import images, labels, load_vit


def points_of(*rates, **about):
    return tuple(Point(1 << k, rate, 100, **about) for k, rate in enumerate(rates))


def profile_of(points, budget_bytes=None, size_bytes=80):
    return Profile("m", "requests", "cpu", points, size_bytes, budget_bytes)


def test_a_language_model_is_asked_by_more_and_more_at_a_time(monkeypatch):
    monkeypatch.setattr(profiling, "_MOST", 8)
    seen = []
    found = profile(demo_model(), prompt_tokens=12, new_tokens=6, on_point=seen.append)
    assert tuple(seen) == found.points and found.unit == "requests"
    assert [point.n for point in found.points] == [1, 2, 4, 8][: len(seen)]
    for point in found.points:
        assert point.rate > 0 and point.first_s > 0 and point.between_s > 0
    assert found.budget_bytes is None and found.spare_bytes is None


def test_what_a_device_has_left_can_be_lent(monkeypatch):
    import dask

    monkeypatch.setattr(profiling, "_MOST", 1)
    with dask.config.set({"pcm.ladder.device.budget": "64 MiB"}):
        found = profile(demo_model(), prompt_tokens=4, new_tokens=2)
    assert found.budget_bytes == 64 << 20
    assert 0 < found.spare_bytes <= found.budget_bytes - found.size_bytes


def test_a_function_is_measured_by_rows_of_a_batch():
    sizes = []

    def counted(frame, model):
        sizes.append(len(frame))
        return labels(frame, model)

    found = profile(pcm.Context(load_vit), counted, images(11))
    assert [point.n for point in found.points] == [1, 2, 4, 8, 11][: len(found.points)]
    assert found.unit == "rows" and all(point.rate > 0 for point in found.points)
    assert set(sizes) == {point.n for point in found.points}
    assert found.size_bytes > 100_000 and found.best in found.points


def test_it_ends_where_a_function_has_no_memory(caplog):
    def up_to_four(frame, model):
        if len(frame) > 4:
            raise MemoryError("too large")
        time.sleep(0.01)  # so that the rate grows with the rows
        return frame

    found = profile(pcm.Context(dict), up_to_four, images(11))
    assert [point.n for point in found.points] == [1, 2, 4]
    assert "no memory for 8 rows at a time: too large" in caplog.text


def test_a_function_without_results_and_one_that_fails_say_so():
    with pytest.raises(PromptError, match="returned NoneType for the first row"):
        profile(pcm.Context(dict), lambda frame, model: None, images(3))

    def up_to_one(frame, model):
        return frame if len(frame) == 1 else 1 / 0

    with pytest.raises(ZeroDivisionError) as raised:
        profile(pcm.Context(dict), up_to_one, images(3))
    assert raised.value.__notes__ == ["This was a batch of 2 rows."]


def test_it_ends_once_the_rate_grows_no_more():
    sweep = iter(points_of(10, 20, 20.5, 20.4, 99))
    assert [point.rate for point in profiling._until_flat(sweep, lambda _: None)] == [
        *(10, 20, 20.5, 20.4)
    ]


def test_the_knee_and_the_most_within_the_limits():
    fast, slow = {"first_s": 0.2, "between_s": 0.05}, {"first_s": 0.2, "between_s": 0.3}
    points = (*points_of(10, 40, 99, **fast), Point(8, 103.0, 100, **slow))
    found = profile_of(points)
    assert found.knee.n == 4 and found.best.n == 4
    assert profile_of(points_of(1, **slow)).best is None
    assert profile_of(points_of(10, 40, 41, **fast)).best.n == 2  # what the last one has is noise


@pytest.mark.parametrize(
    ("budget", "point", "expected"),
    [
        (None, Point(1, 1.0, 100), None),
        (500, Point(1, 1.0, 100), 400),
        (500, Point(1, 1.0, 10), 420),  # its weights are there all the same
        (500, Point(1, 1.0, 100, needed_bytes=70), 330),  # a device has room for them, too
        (150, Point(1, 1.0, 100, needed_bytes=70), -20),
    ],
)
def test_what_is_spare(budget, point, expected):
    assert profile_of((point,), budget).spare_bytes == expected


def test_what_cannot_be_measured_is_said_before_it_is(minilm_folder):
    vit = pcm.Context(load_vit)
    with pytest.raises(PromptError, match="by a function of it: pass func and a frame"):
        profile(vit)
    with pytest.raises(PromptError, match="An encoder is measured by a function"):
        profile(pcm.LLM(minilm_folder))
    with pytest.raises(PromptError, match="on rows"):
        profile(vit, labels, pd.DataFrame({"pixels": []}))
    with pytest.raises(PromptError, match="more than the model takes"):
        profile(demo_model(), prompt_tokens=10_000_000)
    with pytest.raises(LoadError, match="ZeroDivisionError"):
        profile(pcm.Context(lambda: 1 / 0), labels, images(2))
