"""The demo: verify generated claims with the model shipped in the package."""

from __future__ import annotations

from pathlib import Path

import dask.dataframe as dd
import pyarrow as pa
import pyarrow.parquet as pq

from dask_pcm.factcheck.claims import LABELS, PROMPT, generate
from dask_pcm.inference import LLM, classify

#: A model of about 210,000 parameters that verifies generated claims; trained by
#: ``python -m dask_pcm.factcheck.train``.
MODEL_PATH = Path(__file__).parent / "model"
#: Seed of the demo's claims; the model was not trained on them.
SEED = 20_261
ROWS_PER_FILE = 500


def demo_model() -> LLM:
    """Return the demo model as a context."""
    return LLM(MODEL_PATH, name="demo")


def write_claims(folder: Path, n_rows: int) -> None:
    """Write generated claims as Parquet files of `ROWS_PER_FILE` rows."""
    folder.mkdir(parents=True, exist_ok=True)
    claims = pa.Table.from_pandas(generate(n_rows, SEED), preserve_index=False)
    for number, start in enumerate(range(0, max(n_rows, 1), ROWS_PER_FILE)):
        pq.write_table(claims.slice(start, ROWS_PER_FILE), folder / f"claims-{number:04d}.parquet")


def verify(claims: dd.DataFrame, llm: LLM) -> dd.DataFrame:
    """Verify claims, with columns claim and evidence, by a language model."""
    return classify(claims, llm, prompt=PROMPT, choices=LABELS)


def accuracy(path: Path) -> float:
    """Share of an output's rows whose answer equals their label."""
    verdicts = dd.read_parquet(path, columns=["label", "answer"])
    return float((verdicts.label == verdicts.answer).mean().compute())
