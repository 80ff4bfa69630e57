"""What is installed counts by its name, wherever packages lie; what is the user's is bounded."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pandas as pd
import pytest

import dask_pcm
from dask_pcm.context.identity import sources
from dask_pcm.context.identity.digest import digest
from dask_pcm.errors import IdentityWarning

VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
#: The packages that the tests run with, real torch among them.
PACKAGES = sysconfig.get_path("purelib")
ROOT = str(Path(dask_pcm.__file__).parents[1])
BASE = getattr(sys, "_base_executable", sys.executable)

#: The README's example, small; prints how long Context(load) took, and the answers.
EXAMPLE = """
import logging, sys, time
import dask_pcm as pcm
from dask.distributed import Client, LocalCluster

def load(path):
    import torch
    from transformers import AutoModel
    assert path == "models/verifier" and AutoModel is not None
    return torch.nn.Identity()

def verify(claims, model):
    return claims[["id"]].assign(verdict=[str(model(i)) for i in claims["id"]])

if __name__ == "__main__":
    import pathlib
    import torch
    assert torch.__file__.startswith(sys.argv[2]), torch.__file__
    start = time.monotonic()
    model = pcm.Context(load, "models/verifier", device_memory="1 MiB")
    print(time.monotonic() - start)
    folder = pathlib.Path(sys.argv[1])
    options = dict(processes=False, dashboard_address=':0', silence_logs=logging.ERROR)
    with LocalCluster(n_workers=1, threads_per_worker=1, **options) as cluster:
        with Client(cluster) as client:
            pcm.install(client)
            claims = pcm.read_parquet(str(folder / "claims"))
            meta = {"id": "i8", "verdict": "str"}
            verdicts = pcm.map_partitions(verify, claims, context=model, meta=meta, batch_rows=2)
            run = pcm.write_parquet(verdicts, str(folder / "verdicts"), progress=False)
            found = pcm.read_parquet(str(folder / "verdicts")).compute()
            print(run.report.state, list(found.verdict))
"""


def linked(folder: Path) -> str:
    """The packages under another name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(PACKAGES)
    return str(folder)


def environment(tmp_path: Path, **options: bool) -> tuple[str, Path]:
    """The interpreter of a new environment without packages, and the folder of its packages."""
    venv.EnvBuilder(with_pip=False, symlinks=True, **options).create(tmp_path / "env")
    return str(tmp_path / "env/bin/python"), tmp_path / f"env/lib/{VERSION}/site-packages"


def layout(kind: str, tmp_path: Path) -> tuple[str, str, dict[str, str]]:
    """An interpreter, the folder in which it finds torch, and its settings."""
    if kind == "site-packages":
        return sys.executable, PACKAGES, {}
    if kind == "module system":
        folder = linked(tmp_path / f"apps/torch/lib/{VERSION}/site-packages")
        return BASE, folder, {"PYTHONPATH": folder}
    if kind == "dist-packages":
        folder = linked(tmp_path / "usr/lib/python3/dist-packages")
        return BASE, folder, {"PYTHONPATH": folder}
    if kind == "overlay":
        python, site_packages = environment(tmp_path)
        (site_packages / "base.pth").write_text(PACKAGES)
        return python, PACKAGES, {}
    folder = linked(tmp_path / f"user/lib/{VERSION}/site-packages")
    python = BASE if kind == "user site" else environment(tmp_path, system_site_packages=True)[0]
    return python, folder, {"PYTHONUSERBASE": str(tmp_path / "user")}


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "kind",
    ["site-packages", "module system", "user site", "overlay", "system site", "dist-packages"],
)
def test_the_readmes_example_in_six_layouts(kind, tmp_path):
    python, folder, settings = layout(kind, tmp_path)
    (tmp_path / "claims").mkdir()
    pd.DataFrame({"id": range(4)}).to_parquet(tmp_path / "claims/a.parquet")
    (tmp_path / "example.py").write_text(EXAMPLE)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    path = os.pathsep.join(filter(None, [settings.get("PYTHONPATH"), ROOT]))
    run = subprocess.run(
        [python, "-W", "error::UserWarning", tmp_path / "example.py", tmp_path, folder],
        env=clean | settings | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    seconds, answers = run.stdout.strip().splitlines()
    assert answers == "finished ['0', '1', '2', '3']"
    assert float(seconds) < 2


@pytest.mark.parametrize(
    ("folder", "metadata", "is_installed"),
    [
        ("apps/lib/site-packages", None, True),
        ("usr/lib/python3/dist-packages", None, True),
        ("target", "dist-info", True),
        ("project", None, False),
        ("project", "egg-info", False),  # an editable install leaves one beside the sources
    ],
)
def test_what_counts_as_installed(folder, metadata, is_installed, tmp_path, monkeypatch):
    root, name = tmp_path / folder, f"layout_{len(str(tmp_path))}_{folder.count('/')}_{metadata}"
    name = name.replace("-", "_")
    (root / name).mkdir(parents=True)
    for file in ("__init__.py", "part.py"):
        (root / name / file).write_text("raise AssertionError('imported')\n")
    if metadata:
        (root / f"a-1.0.{metadata}").mkdir()
        (root / f"a-1.0.{metadata}/RECORD").write_text(f"{name}/__init__.py,,\n")
    monkeypatch.syspath_prepend(root)
    sources.is_installed.cache_clear()
    assert sources.is_installed(name) == sources.is_installed(f"{name}.part") == is_installed
    assert name not in sys.modules
    (root / "beside.py").write_text("")  # the user's own, where pip was told --target .
    in_named_folder = root.name.endswith("-packages")
    assert sources.is_installed("beside") == in_named_folder


def test_looking_for_a_module_imports_nothing_and_survives_finders_that_raise(
    tmp_path, monkeypatch
):
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "part.py").write_text("from . import other, missing\nVALUE = 1\n")
    (package / "other.py").write_text("def broken(:\n")
    monkeypatch.syspath_prepend(tmp_path)

    class Finder:
        def find_spec(self, name, path=None, target=None):
            raise AssertionError(name)

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])

    def load():
        from own_package import part

        return part.VALUE

    before = digest(load)
    assert "own_package" not in sys.modules
    (package / "part.py").write_text("from . import other, missing\nVALUE = 2\n")
    assert digest(load) != before
    assert sources.find("own_package.part.deeper") is sources.find("no.such.module") is None


def test_a_package_too_large_to_read_counts_by_its_name_and_says_so(tmp_path, monkeypatch):
    package = tmp_path / "huge_package"
    package.mkdir()
    names = [f"part{number}" for number in range(40)]
    (package / "__init__.py").write_text("".join(f"from . import {name}\n" for name in names))
    for name in names:
        (package / f"{name}.py").write_text("import own_helper\n" + "# A comment.\n" * 10_000)
    (tmp_path / "own_helper.py").write_text("y = 1\n")
    monkeypatch.syspath_prepend(tmp_path)

    def load():
        import huge_package

        return huge_package

    def found():
        with pytest.warns(
            IdentityWarning, match=r"'huge_package' \(.*__init__.py\) is not"
        ) as all_:
            value = digest(load)
        assert "modules so far: huge_package, huge_package.part" in str(all_[0].message)
        return value

    before = found()
    (package / "part0.py").write_text("x = 2\n")
    assert found() == before
    (tmp_path / "own_helper.py").write_text("y = 2\n")
    assert found() != before
