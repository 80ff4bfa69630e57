"""What only a GPU shows; left out where torch finds none."""

from __future__ import annotations

import pytest

from dask_pcm.factcheck import LABELS, PROMPT, generate
from dask_pcm.factcheck.demo import MODEL_PATH
from dask_pcm.inference.calls import Classify
from dask_pcm.inference.loading import load_model
from dask_pcm.inference.prompts import Template

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")


def test_a_model_goes_to_the_gpu_and_answers_as_on_the_cpu():
    on_gpu, on_cpu = (load_model(str(MODEL_PATH), device=d) for d in (None, "cpu"))
    assert on_gpu.facts["device"].startswith("cuda")
    call = Classify(
        template=Template(PROMPT),
        choices=LABELS,
        truncate_column=None,
        kept=("id",),
        batch_tokens=8_192,
    )
    claims = generate(500, seed=11)
    gpu, cpu = call(claims, on_gpu), call(claims, on_cpu)
    assert (gpu.answer == cpu.answer).mean() > 0.99
    assert (gpu.answer_probability - cpu.answer_probability).abs().max() < 1e-3
