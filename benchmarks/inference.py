"""The engine beside what a user would write with transformers: CPU seconds on one thread.

A random Llama of 9 million parameters on random tokens; systems are measured in turn, several
times, and the medians' ratio is printed. "Padded" batches are right-padded for scoring and
keep the logits of the last tokens only; transformers' ``generate`` pads on the left.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from benchmarks.table import Rows, median, parser
from dask_pcm.inference.engine.attention import last_shape, packed, switch
from dask_pcm.inference.engine.engine import Engine
from dask_pcm.inference.engine.packs import Pack, Segment
from dask_pcm.inference.engine.pages import PagePool
from dask_pcm.inference.engine.rows import Generated, Scored, trie_of

N_VOCABULARY = 8000
SHAPE = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 1024,
    "max_position_embeddings": 2048,
    "vocab_size": N_VOCABULARY,
}
#: Tokens of a step, and pages.
BUDGET_TOKENS, N_PAGES = 512, 1200
PARTS = ("scoring", "prefix", "choices", "generation")


def made() -> Any:
    """The model; with weights as large as those of a trained one, so that rows differ."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.06)
    return model


def text(rng: random.Random, n_tokens: int) -> list[int]:
    """Random tokens."""
    return [rng.randrange(3, N_VOCABULARY) for _ in range(n_tokens)]


def lognormal(rng: random.Random, n_rows: int) -> list[list[int]]:
    """Rows of lognormal lengths, of 60 tokens in the mean and 512 at most."""
    return [text(rng, min(512, max(3, int(rng.lognormvariate(3.75, 0.8))))) for _ in range(n_rows)]


class Systems:
    """The same model by the engine and by transformers."""

    def __init__(self) -> None:
        self.model = made()
        switch(self.model)
        pack = Pack([Segment([1, 2], [0, 1])])
        with torch.inference_mode(), packed(pack):
            self.model(input_ids=pack.ids, position_ids=pack.positions, use_cache=False)
        shape = last_shape()
        assert shape is not None
        self._pool = PagePool(N_PAGES, shape, torch.float32, "cpu")

    def engine(self, budget_tokens: int = BUDGET_TOKENS) -> Engine:
        """An engine that knows nothing of earlier rows."""
        switch(self.model)
        return Engine(self.model, self._pool, budget_tokens, N_VOCABULARY)

    def score(self, rows: Sequence[list[int]], endings: Sequence[tuple[int, ...]]) -> Engine:
        """Score endings of rows by an engine."""
        engine, trie = self.engine(), trie_of(endings)
        engine.add([Scored(list(row), lambda _: None, trie=trie) for row in rows])
        return drained(engine)

    def generate(self, rows: Sequence[tuple[list[int], int]]) -> dict[int, list[int]]:
        """Continue rows by an engine, each by a number of tokens."""
        engine = self.engine()
        found: dict[int, list[int]] = {}
        for k, (row, n) in enumerate(rows):
            done = functools.partial(found.__setitem__, k)
            engine.add([Generated(list(row), done, n_prompt=len(row), n_max=n, number=k)])
        drained(engine)
        return found

    def padded(self, batches: Sequence[Sequence[list[int]]]) -> None:
        """Last logits of rows, padded on the right."""
        self.model.set_attn_implementation("sdpa")
        for rows in batches:
            longest = max(map(len, rows))
            ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
            last = torch.tensor([len(row) - 1 for row in rows])
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
            self.model.lm_head(hidden[torch.arange(len(rows)), last]).log_softmax(-1)

    def by_hand(self, rows: Sequence[list[int]]) -> None:
        """Last logits of rows, packed by hand, in full batches and nothing else."""
        switch(self.model)
        batch: list[list[int]] = []
        for row in [*rows, None]:
            if batch and (row is None or sum(map(len, batch)) + len(row) > BUDGET_TOKENS):
                pack = Pack([Segment(one, range(len(one))) for one in batch])
                ends = [at + len(one) - 1 for at, one in zip(pack.starts, batch, strict=True)]
                inputs = {"input_ids": pack.ids, "position_ids": pack.positions}
                with packed(pack):
                    kept = torch.tensor(ends)
                    self.model(**inputs, use_cache=False, logits_to_keep=kept).logits.log_softmax(
                        -1
                    )
                batch = []
            batch += [] if row is None else [row]

    def one_by_one(self, rows: Sequence[list[int]], endings: Sequence[tuple[int, ...]]) -> None:
        """Scores of endings, a row and an ending each in a padded batch."""
        texts = [[*row, *ending] for ending in endings for row in rows]
        self.padded(in_batches(sorted(texts, key=len, reverse=True)))

    def padded_generate(self, rows: Sequence[tuple[list[int], int]]) -> None:
        """Continue rows in a padded batch, until the longest is done."""
        self.model.set_attn_implementation("sdpa")
        longest = max(len(row) for row, _ in rows)
        ids = torch.tensor([[0] * (longest - len(row)) + row for row, _ in rows])
        self.model.generate(
            ids,
            attention_mask=(ids != 0).long(),
            max_new_tokens=max(n for _, n in rows),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )

    def continuous(
        self, rows: Sequence[tuple[list[int], int]], n_tokens: int, is_sharing: bool = False
    ) -> dict[int, list[int]]:
        """Continue rows by transformers' continuous batching."""
        from transformers.generation import continuous_batching

        self.model.set_attn_implementation("sdpa")
        generation = transformers.GenerationConfig(
            max_new_tokens=512, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        config = transformers.ContinuousBatchingConfig(
            page_size=16,
            num_blocks=N_PAGES,
            max_batch_tokens=n_tokens,
            allow_block_sharing=is_sharing,
        )
        manager = continuous_batching.ContinuousBatchingManager(
            model=self.model, generation_config=generation, continuous_batching_config=config
        )
        manager.start()
        for k, (row, n) in enumerate(rows):
            manager.add_request(row, request_id=str(k), max_new_tokens=n)
        found: dict[int, list[int]] = {}
        while len(found) < len(rows):
            result = manager.get_result(timeout=60)
            found[int(result.request_id)] = result.generated_tokens
        manager.stop(block=True)
        return found


def drained(engine: Engine) -> Engine:
    """Compute until no row is left, and forget what was shared."""
    while engine.n_rows:
        engine.step()
    while engine.schedule.prefixes.drop_one():
        pass
    return engine


def in_batches(rows: Sequence[list[int]], n_tokens: int = 2048) -> list[list[list[int]]]:
    """Rows in the given order, in batches of as many tokens when padded."""
    found: list[list[list[int]]] = []
    for row in rows:
        longest = max(len(row), *(map(len, found[-1] if found else [[]])))
        if found and longest * (len(found[-1]) + 1) <= n_tokens:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def cpu_s(works: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median CPU seconds of works that are done in turn; the first round warms up."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats + 1):
        for work, of in zip(works, times, strict=True):
            begun = time.process_time()
            work()
            of.append(time.process_time() - begun)
    return [median(of[1:]) for of in times]


def scoring(table: Rows, systems: Systems, repeats: int) -> None:
    """Rows of lognormal lengths."""
    rows = lognormal(random.Random(0), 384)
    arrival = [rows[at : at + 32] for at in range(0, len(rows), 32)]
    ordered = sorted(rows, key=len, reverse=True)
    works: list[Callable[[], object]] = [
        lambda: systems.score(rows, [(5,), (6,), (7,)]),
        lambda: systems.padded(arrival),
        lambda: systems.padded([ordered[at : at + 32] for at in range(0, len(rows), 32)]),
        lambda: systems.padded(in_batches(ordered)),
        lambda: systems.by_hand(ordered),
    ]
    ours, padded, by_length, by_tokens, by_hand = cpu_s(works, repeats)
    name = "lognormal lengths, scored: arrival-order padded batches of 32, over ours"
    table.add(name, padded / ours, ">= 2.8")
    table.add("… ours over a sorted padded loop, batches of 32", ours / by_length, "<= 0.85")
    table.add("… ours over one with batches of 2,048 tokens", ours / by_tokens)
    table.add("… ours over the same packed by hand", ours / by_hand, "<= 1.05")


def prefix(table: Rows, systems: Systems, repeats: int) -> None:
    """300 tokens in common, and about 25 of each row's own."""
    rng = random.Random(1)
    shared = text(rng, 300)
    ragged = [max(3, int(rng.lognormvariate(3, 0.7))) for _ in range(64)]
    for name, lengths in (("equal", [25] * 64), ("ragged", ragged)):
        rows = [[*shared, *text(rng, n)] for n in lengths]

        def ours(rows: list[list[int]] = rows) -> object:
            return systems.score(rows, [(5,), (6,), (7,)])

        def padded(rows: list[list[int]] = rows) -> None:
            systems.padded(in_batches(rows, 4096))

        own_s, padded_s = cpu_s([ours, padded], repeats)
        name = f"300 tokens shared and 25 own, {name}, unsorted: recomputed, over ours"
        table.add(name, padded_s / own_s, ">= 10")


def choices(table: Rows, systems: Systems, repeats: int) -> None:
    """Six endings of several tokens."""
    rows = lognormal(random.Random(2), 96)
    endings = [(11,), (12, 13), (14, 15, 16), (14, 15, 17), (12, 18), (11, 18, 19, 20)]
    works: list[Callable[[], object]] = [
        lambda: systems.score(rows, endings),
        lambda: systems.one_by_one(rows, endings),
    ]
    ours, singly = cpu_s(works, repeats)
    table.add("six endings scored one by one, over ours", singly / ours, ">= 5")


def generation(table: Rows, systems: Systems, repeats: int) -> None:
    """Greedy continuations of ragged lengths, 24 tokens in the mean."""
    rng = random.Random(3)
    shared = text(rng, 300)
    for name, least, most, begin, bars in (
        ("prompts of 20–200", 20, 200, [], (">= 1.7", ">= 1.6")),
        ("prompts of 200–600", 200, 600, [], ("", ">= 2.5")),
        ("300 tokens shared, 10–40 own", 10, 40, shared, ("", ">= 1.5")),
    ):
        lengths = [min(96, max(2, int(rng.expovariate(1 / 24)))) for _ in range(48)]
        rows = [([*begin, *text(rng, rng.randint(least, most))], n) for n in lengths]
        is_sharing = bool(begin)
        works: list[Callable[[], object]] = [
            functools.partial(systems.generate, rows),
            functools.partial(systems.padded_generate, rows),
            *(functools.partial(systems.continuous, rows, n, is_sharing) for n in (128, 256, 512)),
        ]
        ours, by_generate, *continuous = cpu_s(works, repeats)
        table.add(f"{name}: padded generate, over ours", by_generate / ours, bars[0])
        best = min(continuous) / ours
        table.add("… the best of three continuous batchings, over ours", best, bars[1])
        same = systems.continuous(rows, 256, is_sharing) == systems.generate(rows)
        table.add("… all tokens are those of continuous batching", same, "== 1")


def main() -> None:
    """Run the parts, print the table."""
    options = parser(__doc__)
    options.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    options.add_argument("--repeats", type=int, default=3)
    given = options.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    table, systems = Rows(), Systems()
    with torch.inference_mode():
        for part in given.only:
            globals()[part](table, systems, given.repeats)
    table.write(given.json)


if __name__ == "__main__":
    main()
