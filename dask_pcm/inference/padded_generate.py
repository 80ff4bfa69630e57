"""Texts of models that have no engine are continued by transformers' ``generate``.

Rows of the same length go together, and nothing is padded: these models differ in what they make of
padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from dask_pcm.inference.engine.rows import NOT_A_NUMBER, RowError
from dask_pcm.inference.engine.sampling import Sampling, perturbed
from dask_pcm.inference.padded import PaddedModel, in_turn


def continue_rows(
    model: PaddedModel,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    n_max: Sequence[int],
    sampling: Sampling,
    is_over: Callable[[Sequence[int]], bool] | None,
    batch_tokens: int,
    stops: frozenset[int],
) -> list[list[int] | RowError]:
    """Continue prompts.

    Some models mix the states of a batch's rows; these are continued one row at a time.

    Parameters
    ----------
    prompts, numbers, n_max
        Token ids of each row, the number that its samples depend on, and new tokens at most.
    is_over
        Says of a row's new tokens whether they are enough.
    batch_tokens
        Tokens of a batch at most, new ones included.
    stops
        Tokens that end a row.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for row, (prompt, n) in enumerate(zip(prompts, n_max, strict=True)):
        groups.setdefault((len(prompt), n), []).append(row)
    found: list[list[int] | RowError] = [[] for _ in prompts]
    with in_turn():
        for (n_prompt, n), rows in groups.items():
            size = max(1, batch_tokens // (n_prompt + n))
            size = model.shapes.n_rows if model.shapes.is_fixed else size
            if size > 1 and len(rows) > 1 and not continues_batches(model):
                size = 1
            if model.shapes.is_fixed:  # full batches: their shapes depend on nothing else
                rows = [*rows, *[rows[-1]] * (-len(rows) % size)]
            for at in range(0, len(rows), size):
                batch = rows[at : at + size]
                of = functools.partial(_continued, model, n, sampling, is_over, stops)
                new = of([prompts[k] for k in batch], [numbers[k] for k in batch])
                for row, tokens in zip(batch, new, strict=True):
                    found[row] = tokens
    return found


def continues_batches(model: PaddedModel) -> bool:
    """Whether rows of a batch have the logits that they have alone once they are continued.

    Not so for RWKV in transformers 5.23.
    """
    if model.continues_batches is None:
        import torch

        n = model.n_embeddings
        texts = torch.tensor(
            [[(7 * k + 3) % n for k in range(8)], [(5 * k + 4) % n for k in range(8)]]
        )
        both = _logits_of_second(model, texts)
        alone = torch.cat([_logits_of_second(model, text[None]) for text in texts])
        # Half precision may send a token to another expert; then rows are continued one at a time.
        most = 1e-3 if model.model.dtype.itemsize >= 4 else 0.1
        is_alike = ((both - alone).std(-1) <= most * alone.std(-1)).all()
        model.continues_batches = bool(is_alike)
    return model.continues_batches


def _logits_of_second(model: PaddedModel, texts: Any) -> Any:
    """Logits of the second new token of texts, shape (texts, vocabulary)."""
    import torch
    import transformers

    ids = texts.to(model.model.device)
    settings = transformers.GenerationConfig(
        min_new_tokens=2,
        max_new_tokens=2,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with torch.inference_mode():
        mask = torch.ones_like(ids)
        found = model.model.generate(ids, attention_mask=mask, generation_config=settings)
    return found.logits[1].float()


def _continued(
    model: PaddedModel,
    n_max: int,
    sampling: Sampling,
    is_over: Callable[[Sequence[int]], bool] | None,
    stops: frozenset[int],
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
) -> list[list[int] | RowError]:
    """Continue prompts of the same length."""
    import torch
    import transformers

    n_prompt = len(prompts[0])
    ids = torch.tensor(prompts, device=model.model.device)
    fill = next(iter(stops), 0)
    is_number = torch.ones(len(prompts), dtype=torch.bool, device=ids.device)

    def choose(tokens: Any, logits: Any) -> Any:
        is_number.logical_and_(~logits.isnan().any(-1))
        return perturbed(logits.float(), sampling, numbers, [tokens.shape[1]] * len(prompts))

    def ends(tokens: Any, logits: Any, **_: Any) -> Any:
        over = [is_over is not None and is_over(one) for one in tokens[:, n_prompt:].tolist()]
        return torch.tensor(over, device=tokens.device)

    settings = transformers.GenerationConfig(
        max_new_tokens=n_max,
        do_sample=False,
        eos_token_id=sorted(stops) or None,
        pad_token_id=fill,
    )
    with torch.inference_mode():
        out = model.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            logits_processor=transformers.LogitsProcessorList([choose]),
            stopping_criteria=transformers.StoppingCriteriaList([ends]),
        )
    found: list[list[int] | RowError] = []
    for tokens, is_good in zip(out[:, n_prompt:].tolist(), is_number.tolist(), strict=True):
        if not is_good:
            found.append(RowError(NOT_A_NUMBER))
            continue
        end = next((k for k, token in enumerate(tokens) if token in stops), len(tokens))
        row = tokens[:end]
        while is_over is not None and row and is_over(row[:-1]):  # others went on
            row = row[:-1]
        found.append(row)
    return found
