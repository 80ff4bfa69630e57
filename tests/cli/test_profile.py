"""``dask-pcm profile`` as a user runs it."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from dask_pcm.cli import main
from dask_pcm.factcheck.demo import demo_model
from dask_pcm.inference import profiling
from tests.support.images import images

SOURCE = """
import dask_pcm as pcm
from tests.support.images import labels, load_vit

vit = pcm.Context(load_vit, name="vit")
number = 7
"""


@pytest.fixture
def module(tmp_path):
    (tmp_path / "own.py").write_text(SOURCE)
    return str(tmp_path / "own.py")


def run(*args):
    return CliRunner().invoke(main, ["profile", *map(str, args)])


def test_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "_MOST", 2)
    folder = dict(demo_model().ref.about)["model"]
    file = tmp_path / "found.json"
    found = run(folder, "--prompt-tokens", 8, "--new-tokens", 4, "--json", file)
    assert found.exit_code == 0, found.output
    for text in ("Knee at", "Best with", "has no budget"):
        assert text in found.stdout
    assert "1 at a time:" in found.stderr
    told = json.loads(file.read_text())
    assert told["unit"] == "requests" and told["points"][0]["n"] == 1 and told["knee"] >= 1


def test_a_function_of_another_context(module, tmp_path):
    images(6).to_parquet(tmp_path / "images.parquet")
    options = ["--function", f"{module}:labels", "--input", tmp_path / "images.parquet"]
    found = run(f"{module}:vit", *options)
    assert found.exit_code == 0, found.output
    assert "vit on cpu" in found.stdout and "rows at a time" in found.stdout
    assert "between" not in found.stdout


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["{module}:vit", "--function", "{module}:labels"], "belong together"),
        (["{module}:number"], "has type int; expected a pcm.Context"),
        (["{module}:gone"], "gone"),
        (["{module}:vit"], "pass func and a frame"),
        (["/nowhere/model"], "nowhere"),
        (["{module}:vit", "--json", "/nowhere/x.json"], "cannot be written to '/nowhere/x.json'"),
    ],
)
def test_what_cannot_be_measured_is_said(module, args, text):
    found = run(*(one.format(module=module) for one in args))
    assert found.exit_code != 0 and text in found.output.replace("\n", " ")
    assert "Traceback" not in found.output
