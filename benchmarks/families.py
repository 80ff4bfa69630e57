"""Many families of models, each compared with transformers on one row at a time.

A random model of each family is saved as a folder with a tokenizer, loaded as a worker loads it,
and used to score choices for rows of different lengths and to continue them. The reference is
transformers on each row and choice alone: one sequence a forward, eager attention, nothing padded.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

from benchmarks.family_models import FAMILIES, NARROW_TOKENS, WIDE_TOKENS, Family, built
from benchmarks.table import Rows, median, parser
from dask_pcm import LLM
from dask_pcm.config import Config
from dask_pcm.errors import ModelError
from dask_pcm.factcheck import LABELS, generate
from dask_pcm.inference import fit
from dask_pcm.inference.engine.rows import Generated, Row, Scored, trie_of
from dask_pcm.inference.engine.sampling import Sampling
from dask_pcm.inference.engine.serving import Serving
from dask_pcm.inference.language_model import LanguageModel
from dask_pcm.inference.loading import load_model
from dask_pcm.inference.padded import PaddedModel
from dask_pcm.inference.padded_generate import continue_rows
from dask_pcm.inference.prompts import Scoring, plan_scoring

#: A family is wrong from this difference of log-probabilities on, relative to their spread if that
#: is larger than 1.
_WRONG = 5e-3
_N_NEW = 6
#: Sequences of a batch in the loop that a user would write.
_N_BATCH = 32
#: What rows share, longer than a page and a narrow window.
_TASK = (
    "Evidence : what was said of a person by the evidence is SUPPORTED . Claim : a claim is NOT"
    " ENOUGH . Evidence : {evidence} Claim : {claim} Answer :"
)


def prompts(n_rows: int) -> list[str]:
    """Prompts of different lengths."""
    claims = generate(4 * n_rows, seed=5)
    found = []
    for k in range(n_rows):
        some = claims.iloc[4 * k : 4 * k + 1 + 3 * k % 4]
        found.append(_TASK.format(evidence=" ".join(some.evidence), claim=some.claim.iloc[0]))
    return found


@dataclass(frozen=True, slots=True)
class Results:
    """What a model says of rows.

    Attributes
    ----------
    scores
        Log-probability of each choice of each row.
    tokens
        New tokens of each row.
    """

    scores: list[list[float]]
    tokens: list[list[int]]

    def difference(self, other: Results) -> float:
        """The largest difference of scores, relative to their spread if that is larger than 1."""
        pairs = [
            pair
            for mine, others in zip(self.scores, other.scores, strict=True)
            for pair in zip(mine, others, strict=True)
        ]
        spread = max(max(row) - min(row) for row in other.scores)
        return max(abs(mine - theirs) for mine, theirs in pairs) / max(1.0, spread)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a family is computed, and how well.

    Attributes
    ----------
    path
        "engine", "padded", "refused" or "failed"; "unknown" if transformers fails on it.
    why
        The reason for the padded path, or the message.
    difference
        Of log-probabilities; see ``Results``.
    n_differ
        Rows whose new tokens differ.
    over_loop
        CPU seconds over those of a plain padded loop; None where that is not measured.
    """

    path: str
    why: str = ""
    difference: float = 0.0
    n_differ: int = 0
    over_loop: float | None = None

    @property
    def is_wrong(self) -> bool:
        """Whether it is computed, and not as each row alone."""
        return not self.difference <= _WRONG  # NaN is wrong


class Alone:
    """A model of transformers that is asked for one sequence at a time."""

    def __init__(self, folder: Path, attention: str) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention
        ).eval()

    def results(self, texts: Sequence[str]) -> Results:
        """Scores and new tokens of each text."""
        with torch.inference_mode():
            scores = [self._scores(text) for text in texts]
            return Results(scores, [self._continued(text) for text in texts])

    def _scores(self, text: str) -> list[float]:
        whole = [self.tokenizer(f"{text} {label}")["input_ids"] for label in LABELS]
        n_shared = 0
        while len({tokens[n_shared] for tokens in whole}) == 1:
            n_shared += 1
        found = []
        for tokens in whole:
            logits = self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
            logprobs = logits.double().log_softmax(-1)
            own = range(n_shared, len(tokens))
            found.append(sum(float(logprobs[at - 1, tokens[at]]) for at in own))
        return found

    def _continued(self, text: str) -> list[int]:
        ids = torch.tensor([self.tokenizer(text)["input_ids"]])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=_N_NEW, do_sample=False
        )
        new: list[int] = out[0, ids.shape[1] :].tolist()
        return new[: new.index(2)] if 2 in new else new


def plans_of(model: PaddedModel, texts: Sequence[str]) -> list[Scoring]:
    """How the choices of each text are scored."""
    return [
        plan_scoring(model.tokenize([f"{text} {label}" for label in LABELS]), model.eos)
        for text in texts
    ]


@contextlib.contextmanager
def serving(model: LanguageModel) -> Iterator[Serving]:
    """The engine of a model, at work."""
    made = model.attend()
    made.start()
    try:
        yield made
    finally:
        made.close()


def results_of(live: LanguageModel, texts: Sequence[str]) -> Results:
    """Scores and new tokens of texts, all in one request, by the path that the model has."""
    model = live.padded
    plans, starts = plans_of(model, texts), model.tokenize(texts)
    if not live.is_attended:
        numbers, n_tokens = range(len(texts)), Config.read().batch_tokens
        each = [_N_NEW] * len(texts)
        new = continue_rows(model, starts, numbers, each, Sampling(), None, n_tokens, model.stops)
        return Results(model.score(plans, n_tokens), [_tokens(one) for one in new])
    scored: list[Row] = [Scored(list(one.shared), trie=trie_of(one.endings)) for one in plans]
    continued = [
        Generated(list(one), n_prompt=len(one), n_max=_N_NEW, stops=model.stops) for one in starts
    ]
    with serving(live) as engine:
        found = engine.submit([*scored, *continued]).result()
    scores = [one if isinstance(one, list) else [float("nan")] * 3 for one in found[: len(plans)]]
    return Results(scores, [_tokens(one) for one in found[len(plans) :]])


def _tokens(found: Any) -> list[int]:
    """New tokens; none that can be equal to others for a row that failed."""
    return list(found) if isinstance(found, list) else [-1]


class Reasons(logging.Handler):
    """Collects what is logged of models that no engine computes."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.found: list[str] = []
        log = logging.getLogger("dask_pcm.inference.probe")
        log.setLevel(logging.INFO)
        log.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "padded batches" in message:
            self.found.append(message.partition(": ")[2].rstrip("."))


def verdict_of(family: Family, window_tokens: int, reasons: Reasons, n_repeats: int) -> Verdict:
    """Build a family's model, load it and compare it with itself alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = prompts(8)
        try:
            built(family, folder, window_tokens)
            expected = Alone(folder, family.alone).results(texts)
        except Exception as error:
            return Verdict("unknown", f"{type(error).__name__}: {error}")
        try:
            model = load_model(LLM(folder).path, dtype="float32", device="cpu")
        except ModelError as error:
            return Verdict("refused", str(error).replace(repr(name), "the folder"))
        except Exception as error:
            return Verdict("failed", f"{type(error).__name__}: {error}")
        found = results_of(model, texts)
        pairs = zip(found.tokens, expected.tokens, strict=True)
        path = "engine" if model.is_attended else "padded"
        return Verdict(
            path,
            "" if model.is_attended else reasons.found[-1],
            found.difference(expected),
            sum(mine != theirs for mine, theirs in pairs),
            over_loop(model.padded, folder, n_repeats)
            if family.has_state and path == "padded" and window_tokens == NARROW_TOKENS
            else None,
        )


def over_loop(model: PaddedModel, folder: Path, n_repeats: int) -> float:
    """CPU seconds of the padded path over those of the loop that a user would write."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plans, n_tokens = plans_of(model, prompts(32)), Config.read().batch_tokens
    works: tuple[Callable[[], Any], ...] = (
        functools.partial(model.score, plans, n_tokens),
        functools.partial(padded_loop, plain, plans),
    )
    times: list[list[float]] = [[], []]
    for _ in range(n_repeats + 1):  # the first round warms up
        for work, mine in zip(works, times, strict=True):
            begun = time.process_time()
            work()
            mine.append(time.process_time() - begun)
    ours, loop = (median(mine[1:]) for mine in times)
    return ours / loop


def padded_loop(model: Any, plans: Sequence[Scoring]) -> list[float]:
    """Score every choice of every row as a sequence of its own, in sorted, right-padded batches."""
    whole = [((*plan.shared, *own), len(own)) for plan in plans for own in plan.endings]
    order = sorted(range(len(whole)), key=lambda k: -len(whole[k][0]))
    found = [0.0] * len(whole)
    for begin in range(0, len(order), _N_BATCH):
        batch = order[begin : begin + _N_BATCH]
        longest = len(whole[batch[0]][0])
        ids = torch.tensor([[*whole[k][0], *[0] * (longest - len(whole[k][0]))] for k in batch])
        lengths = torch.tensor([len(whole[k][0]) for k in batch])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for line, k in enumerate(batch):
                tokens, n_own = whole[k]
                own = torch.tensor(tokens[-n_own:])
                logprobs = logits[line, len(tokens) - n_own - 1 : len(tokens) - 1].log_softmax(-1)
                found[k] = float(logprobs.gather(1, own[:, None]).sum())
    return found


def checked_here(path: Path, files: Sequence[Path], is_encoder: bool) -> list[str] | None:
    """The client's check of the tensors, without a process of its own for each model."""
    try:
        return fit.problems(str(path), [str(file) for file in files], is_encoder)
    except Exception:
        return None


def tell(name: str, verdict: Verdict) -> None:
    """Show a family's result as it comes."""
    parts = [f"{name}: {verdict.path}"]
    if verdict.path in ("engine", "padded"):
        parts.append(f"off by {verdict.difference:.1e}{' WRONG' if verdict.is_wrong else ''}")
        parts.append(f"{verdict.n_differ} rows continued otherwise")
    if verdict.over_loop is not None:
        parts.append(f"CPU over a plain loop {verdict.over_loop:.2f}")
    print("; ".join([*parts, verdict.why][: None if verdict.why else -1]), flush=True)


def report(table: Rows, verdicts: dict[str, Verdict]) -> None:
    """Count, and add the measures."""

    def named(is_meant: Callable[[Verdict], bool]) -> list[str]:
        return [name for name, one in verdicts.items() if is_meant(one)]

    verdicts = {name: one for name, one in verdicts.items() if one.path != "unknown"}
    families = {name.partition(", ")[0] for name in verdicts}
    table.add("families", len(families), ">= 60")
    table.add("… and configurations of them", len(verdicts))
    for what, chosen, bar in (
        ("wrong and not refused", named(lambda one: one.is_wrong), "== 0"),
        ("fail to load without a clear message", named(lambda one: one.path == "failed"), "== 0"),
        ("refused with a clear message", named(lambda one: one.path == "refused"), ""),
        ("on the engine", named(lambda one: one.path == "engine"), ">= 30"),
        ("on the padded path", named(lambda one: one.path == "padded"), ""),
        ("continued otherwise than alone", named(lambda one: one.n_differ > 0), "== 0"),
    ):
        table.add(what, len(chosen), bar)
        print("   ", ", ".join(chosen), flush=True)
    for name, one in verdicts.items():
        if one.over_loop is not None:
            table.add(f"{name}: CPU of padded batches over a plain loop", one.over_loop, "<= 1.0")


def main() -> None:
    """Compare the families, print the table."""
    options = parser(__doc__)
    options.add_argument("--only", metavar="NAME", nargs="+", help="names or model types")
    options.add_argument("--repeats", type=int, default=3)
    given = options.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"XDG_CACHE_HOME": cache, "HF_DEACTIVATE_ASYNC_LOAD": "1"}
        with mock.patch.object(fit, "_asked", checked_here):
            table = compared(given.only, given.repeats)
    table.write(given.json)


def compared(only: Sequence[str] | None, n_repeats: int) -> Rows:
    """Compare families, all or those of these names."""
    table, reasons, verdicts = Rows(), Reasons(), dict[str, Verdict]()
    for family in FAMILIES:
        if only and not {family.name, family.model_type} & {*only}:
            continue
        for window_tokens in (NARROW_TOKENS, *([WIDE_TOKENS] if family.windows else [])):
            wide = f", window of {window_tokens}" if window_tokens != NARROW_TOKENS else ""
            name = f"{family.name}{wide}"
            verdicts[name] = verdict_of(family, window_tokens, reasons, n_repeats)
            tell(name, verdicts[name])
    report(table, verdicts)
    return table


if __name__ == "__main__":
    main()
