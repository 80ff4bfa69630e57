"""Rows whose keys and values are more than the device has room for, on small random models.

"same": logits against the model's own forward of the whole row, for models whose attention differs.
"cost": seconds and pages sent, by how many times its room a row takes. "beside": the first token of
a question that comes while such a row runs. With --device cuda, all of it on a GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.responsive import Asked, engine_of, model, play, prompts, quantile
from benchmarks.table import Rows, parser
from dask_pcm.inference.engine.attention import last_shape, packed, switch, switch_back
from dask_pcm.inference.engine.capacity import Capacity
from dask_pcm.inference.engine.engine import Engine
from dask_pcm.inference.engine.packs import Pack, Segment
from dask_pcm.inference.engine.pages import PAGE_TOKENS, PagePool, n_pages_for
from dask_pcm.inference.engine.timeslice import Kind, Owner
from tests.support import models as tiny

PARTS = ("same", "cost", "beside")
#: Pages on the device, tokens of a step, and new tokens of a row.
N_PAGES, BUDGET, N_OUT = 24, 128, 32
#: Tokens of a row over those that the device has room for.
TIMES = (2, 4, 8)
N_VOCABULARY, N_REPEATS = 2048, 3
_SIZES = {"vocab_size": N_VOCABULARY, "hidden_size": 128, "num_hidden_layers": 4}
_COMMON = {
    **_SIZES,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 4096,
}
_WINDOW = {**_COMMON, "sliding_window": 100, "head_dim": 16}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "heads in groups (Llama)": ("LlamaForCausalLM", "LlamaConfig", _COMMON),
    "norms of keys (Qwen 3)": ("Qwen3ForCausalLM", "Qwen3Config", {**_COMMON, "head_dim": 16}),
    "a window (Mistral)": ("MistralForCausalLM", "MistralConfig", _WINDOW),
    "windows, a cap (Gemma 2)": ("Gemma2ForCausalLM", "Gemma2Config", _WINDOW),
    "windows, sinks (gpt-oss)": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_WINDOW, "num_local_experts": 4},
    ),
    "learned positions (GPT-2)": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": N_VOCABULARY,
            "n_embd": 128,
            "n_layer": 4,
            "n_head": 8,
            "n_positions": 4096,
        },
    ),
}


def same(table: Rows, device: str) -> None:
    """Logits of new tokens, the row streamed, against one forward of transformers of all of it."""
    for k, (name, (kind, config, options)) in enumerate(FAMILIES.items()):
        one = tiny.random_model(kind, config, **options).to(device)
        for values in one.parameters():  # so that logits differ by as much as in trained models
            if values.dim() > 1:
                torch.nn.init.normal_(values, std=0.08)
        one.set_attn_implementation("eager")
        engine = _engine(one)
        kept = _noted(engine)
        (prompt,) = prompts(1, (1500, 1500), k)
        row = Asked([token % N_VOCABULARY for token in prompt], N_OUT)
        play(engine, [row])
        assert engine.paging.n_sent
        switch_back(one)
        tokens = torch.tensor([[*row.prompt, *row.tokens[:-1]]], device=device)
        with torch.inference_mode():
            whole = one(input_ids=tokens, use_cache=False).logits[0, len(row.prompt) - 1 :].float()
        worst = (torch.stack(kept) - whole).abs().max()
        table.add(f"{name}: largest difference of logits, over 1e-4", float(worst) / 1e-4, "<= 1")


def _noted(engine: Engine) -> list[Any]:
    """The logits of new tokens, as the engine computes them."""
    found: list[Any] = []
    forward = engine._forward
    compute = forward.logits

    def noted(pack: Any, kept: Any = None) -> Any:
        logits = compute(pack, kept)
        if kept is not None and len(kept):
            found.append(logits[-1])
        return logits

    forward.logits = noted  # type: ignore[method-assign]
    return found


def _engine(one: Any) -> Engine:
    """An engine of a model of any family."""
    switch(one)
    pack = Pack([Segment([1, 2], [0, 1])], device=one.device)
    with torch.inference_mode(), packed(pack):
        one(input_ids=pack.ids, position_ids=pack.positions, use_cache=False)
    shape = last_shape()
    assert shape is not None
    pool = PagePool(N_PAGES, shape, one.dtype, one.device)
    return Engine(one, pool, Capacity(BUDGET, most=BUDGET, least=1), N_VOCABULARY)


def cost(table: Rows, device: str) -> None:
    """Seconds of a row, streamed over with room for all; and what was sent."""
    one = model().to(device)
    for times in TIMES:
        (prompt,) = prompts(1, (times * N_PAGES * PAGE_TOKENS,) * 2, times)
        n_all = n_pages_for(len(prompt) + N_OUT)
        read, spent, shares = [], [], []
        for _ in range(N_REPEATS):
            rows = [Asked(prompt, N_OUT) for _ in range(2)]
            streamed = play(engine_of(one, N_PAGES, BUDGET, most_bytes=1 << 30), rows[:1])
            whole = play(engine_of(one, n_all, BUDGET), rows[1:])
            assert rows[0].tokens == rows[1].tokens
            begin = [row.first[1] for row in rows]
            read.append(begin[0] / begin[1])
            gaps = [statistics.median(row.gaps) for row in rows]
            spent.append(gaps[0] / gaps[1])
            shares.append(streamed.engine.paging.n_sent / n_all)
            assert not whole.engine.paging.n_sent
        name = f"{times} times as long as there is room for: "
        table.add(name + "seconds to the first token, over with room", statistics.median(read))
        table.add(name + "seconds between tokens, over with room", statistics.median(spent))
        table.add(name + "pages sent, over all pages of the row", max(shares), "<= 1")


def beside(table: Rows, device: str) -> None:
    """Questions while a long row of a batch runs, and the same on an idle engine."""
    one = model().to(device)
    (prompt,) = prompts(1, (4 * N_PAGES * PAGE_TOKENS,) * 2, 0)
    asked = prompts(20, (20, 40), 1)
    question = Owner(Kind.QUESTION, "a")

    def shorts() -> list[Asked]:
        return [Asked(one, 8, 6 + 4 * k, question, k) for k, one in enumerate(asked)]

    idle = play(engine_of(one, N_PAGES, BUDGET), shorts())
    rows = shorts()
    long = Asked(prompt, 96, owner=Owner(Kind.BATCH, "job"))
    busy = play(engine_of(one, N_PAGES, BUDGET, most_bytes=1 << 30), [long, *rows])
    assert busy.engine.paging.n_sent
    for q, bar in ((0.5, "<= 1.5"), (0.99, "<= 1.5")):
        here = quantile([row.first[0] for row in rows], q)
        alone = quantile([row.first[0] for row in idle.rows], q)
        name = f"questions beside a long row, steps to the first token, p{100 * q:.0f}, over idle"
        table.add(name, here / alone, bar)
    seconds = [statistics.median(row.first[1] for row in mine) for mine in (rows, idle.rows)]
    table.add("… seconds to the first token, p50, over idle", seconds[0] / seconds[1])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--device", default="cpu")
    args = options.parse_args()
    torch.set_num_threads(1)
    table = Rows()
    parts: dict[str, Callable[[Rows, str], None]] = {"same": same, "cost": cost, "beside": beside}
    for part in args.only:
        parts[part](table, args.device)
    table.write(args.json)


if __name__ == "__main__":
    main()
