"""The engine beside what a user would write with transformers, on a CPU or a GPU.

A random Llama on random tokens: on CPUs one of 9 million parameters in float32, in CPU seconds of
one thread; on a GPU one of 1.2 billion in bfloat16, in seconds. Systems are measured in turn,
several times, and the medians' ratio is printed. "Padded" batches are right-padded for scoring and
keep the logits of the last tokens only; transformers' ``generate`` pads on the left.
"""

from __future__ import annotations

import functools
import inspect
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from benchmarks.table import Rows, median, parser
from dask_pcm.inference.engine.attention import last_shape, packed, switch
from dask_pcm.inference.engine.capacity import Capacity
from dask_pcm.inference.engine.engine import Engine
from dask_pcm.inference.engine.packs import Pack, Segment
from dask_pcm.inference.engine.pages import KVShape, PagePool
from dask_pcm.inference.engine.rows import Embedded, Generated, Pooling, Scored, trie_of


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured on a kind of device.

    Attributes
    ----------
    shape, encoder
        Of the model, and of one that embeds, as their configurations have it.
    std
        Of its weights: about those of a trained one, so that rows differ.
    budget_tokens, n_pages
        Tokens of a step, and pages.
    n_padded_tokens
        Tokens of a padded batch.
    n_times
        How many times the rows of the smallest setting; those of short rows, squared.
    now
        The clock that counts, in seconds.
    """

    device: str
    dtype: torch.dtype
    shape: dict[str, int]
    encoder: dict[str, int]
    std: float
    budget_tokens: int
    n_pages: int
    n_padded_tokens: int
    n_times: int
    now: Callable[[], float]

    @property
    def n_vocabulary(self) -> int:
        """Tokens that the model knows."""
        return self.shape["vocab_size"]


def _synchronized() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


CPU = Setting(
    device="cpu",
    dtype=torch.float32,
    shape={
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 1024,
        "max_position_embeddings": 2048,
        "vocab_size": 8000,
    },
    encoder={
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "vocab_size": 8000,
    },
    std=0.06,
    budget_tokens=512,
    n_pages=1200,
    n_padded_tokens=2048,
    n_times=1,
    now=time.process_time,
)
GPU = Setting(
    device="cuda",
    dtype=torch.bfloat16,
    shape={
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "max_position_embeddings": 2048,
        "vocab_size": 32_000,
    },
    encoder={
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "vocab_size": 32_000,
    },
    std=0.02,
    budget_tokens=8192,
    n_pages=16_384,
    n_padded_tokens=32_768,
    n_times=8,
    now=_synchronized,
)
PARTS = ("scoring", "prefix", "choices", "embedding", "generation")


def made(setting: Setting, is_encoder: bool = False) -> Any:
    """The model; its attention is switched."""
    torch.manual_seed(0)
    if is_encoder:
        kind, config = transformers.BertModel, transformers.BertConfig(**setting.encoder)
    else:
        kind, config = transformers.LlamaForCausalLM, transformers.LlamaConfig(**setting.shape)
    config._attn_implementation = "eager"
    with torch.device(setting.device):
        model = kind(config).to(setting.dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=setting.std)
    switch(model)
    return model


def text(rng: random.Random, n_tokens: int) -> list[int]:
    """Random tokens, which every model knows."""
    return [rng.randrange(3, 8000) for _ in range(n_tokens)]


def lognormal(rng: random.Random, n_rows: int) -> list[list[int]]:
    """Rows of lognormal lengths, of 60 tokens in the mean and 512 at most."""
    return [text(rng, min(512, max(3, int(rng.lognormvariate(3.75, 0.8))))) for _ in range(n_rows)]


class Embedding:
    """Vectors of texts, by the engine and in padded batches."""

    def __init__(self, setting: Setting) -> None:
        self.model = made(setting, is_encoder=True)
        self._setting = setting
        pool = PagePool(1, KVShape(1, 1, 1, 1), setting.dtype, setting.device)
        capacity = Capacity(setting.budget_tokens, most=setting.budget_tokens)
        n_vocabulary = setting.encoder["vocab_size"]
        self._engine = Engine(self.model, pool, capacity, n_vocabulary, is_causal=False)

    def ours(self, rows: Sequence[list[int]]) -> list[Any]:
        """By an engine."""
        switch(self.model)
        found: list[Any] = [None] * len(rows)
        for k, row in enumerate(rows):
            done = functools.partial(found.__setitem__, k)
            self._engine.add([Embedded(list(row), done, pooling=Pooling.MEAN)])
        drained(self._engine)
        return found

    def padded(self, batches: Sequence[Sequence[list[int]]]) -> list[Any]:
        """In batches, padded on the right."""
        self.model.set_attn_implementation("sdpa")
        found = []
        for rows in batches:
            longest = max(map(len, rows))
            ids = torch.tensor(
                [[*row, *[0] * (longest - len(row))] for row in rows], device=self._setting.device
            )
            mask = (ids != 0).long()
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            vectors = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            found += [*vectors.cpu().numpy()]
        return found


class Systems:
    """The same model by the engine and by transformers."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.model = made(setting)
        pack = Pack([Segment([1, 2], [0, 1])], device=setting.device)
        with torch.inference_mode(), packed(pack):
            self.model(input_ids=pack.ids, position_ids=pack.positions, use_cache=False)
        shape = last_shape()
        assert shape is not None
        pool = PagePool(setting.n_pages, shape, setting.dtype, setting.device)
        capacity = Capacity(setting.budget_tokens, most=setting.budget_tokens)
        self._engine = Engine(self.model, pool, capacity, setting.n_vocabulary)

    def engine(self) -> Engine:
        """The engine, which knows nothing of earlier rows (``drained``)."""
        switch(self.model)
        return self._engine

    def tensor(self, values: Sequence[Any]) -> Any:
        """Whole numbers on the device."""
        return torch.tensor(values, device=self.setting.device)

    def score(self, rows: Sequence[list[int]], endings: Sequence[tuple[int, ...]]) -> Engine:
        """Score endings of rows by an engine."""
        engine, trie = self.engine(), trie_of(tuple(endings))
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
            ids = self.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
            last = self.tensor([len(row) - 1 for row in rows])
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
            self.model.lm_head(hidden[range(len(rows)), last]).log_softmax(-1)

    def by_hand(self, rows: Sequence[list[int]]) -> None:
        """Last logits of rows, packed by hand, in full batches and nothing else."""
        switch(self.model)
        budget = self.setting.budget_tokens
        batch: list[list[int]] = []
        for row in [*rows, None]:
            if batch and (row is None or sum(map(len, batch)) + len(row) > budget):
                segments = [Segment(one, range(len(one))) for one in batch]
                pack = Pack(segments, device=self.setting.device)
                ends = [at + len(one) - 1 for at, one in zip(pack.starts, batch, strict=True)]
                inputs = {"input_ids": pack.ids, "position_ids": pack.positions}
                with packed(pack):
                    kept = self.tensor(ends)
                    self.model(**inputs, use_cache=False, logits_to_keep=kept).logits.log_softmax(
                        -1
                    )
                batch = []
            batch += [] if row is None else [row]

    def one_by_one(self, rows: Sequence[list[int]], endings: Sequence[tuple[int, ...]]) -> None:
        """Scores of endings, a row and an ending each in a padded batch."""
        texts = [[*row, *ending] for ending in endings for row in rows]
        self.padded(in_batches(sorted(texts, key=len, reverse=True), self.setting.n_padded_tokens))

    def padded_generate(self, rows: Sequence[tuple[list[int], int]]) -> None:
        """Continue rows in a padded batch, until the longest is done."""
        self.model.set_attn_implementation("sdpa")
        longest = max(len(row) for row, _ in rows)
        ids = self.tensor([[0] * (longest - len(row)) + row for row, _ in rows])
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
        named = inspect.signature(transformers.ContinuousBatchingConfig).parameters
        config = transformers.ContinuousBatchingConfig(
            **{"page_size" if "page_size" in named else "block_size": 16},
            num_blocks=self.setting.n_pages,
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


def in_batches(rows: Sequence[list[int]], n_tokens: int) -> list[list[list[int]]]:
    """Rows in the given order, in batches of as many tokens when padded."""
    found: list[list[list[int]]] = []
    for row in rows:
        longest = max(len(row), *(map(len, found[-1] if found else [[]])))
        if found and longest * (len(found[-1]) + 1) <= n_tokens:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def seconds(setting: Setting, works: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of works that are done in turn; the first round warms up."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats + 1):
        for work, of in zip(works, times, strict=True):
            begun = setting.now()
            work()
            of.append(setting.now() - begun)
    return [median(of[1:]) for of in times]


def scoring(table: Rows, systems: Systems, repeats: int) -> None:
    """Rows of lognormal lengths."""
    rows = lognormal(random.Random(0), 384 * systems.setting.n_times)
    arrival = [rows[at : at + 32] for at in range(0, len(rows), 32)]
    ordered = sorted(rows, key=len, reverse=True)
    works: list[Callable[[], object]] = [
        lambda: systems.score(rows, [(5,), (6,), (7,)]),
        lambda: systems.padded(arrival),
        lambda: systems.padded([ordered[at : at + 32] for at in range(0, len(rows), 32)]),
        lambda: systems.padded(in_batches(ordered, systems.setting.n_padded_tokens)),
        lambda: systems.by_hand(ordered),
    ]
    ours, padded, by_length, by_tokens, by_hand = seconds(systems.setting, works, repeats)
    name = "lognormal lengths, scored: arrival-order padded batches of 32, over ours"
    table.add(name, padded / ours, ">= 2.8")
    table.add("… ours over a sorted padded loop, batches of 32", ours / by_length, "<= 0.85")
    n_tokens = systems.setting.n_padded_tokens
    table.add(f"… ours over one with batches of {n_tokens:,} tokens", ours / by_tokens)
    table.add("… ours over the same packed by hand", ours / by_hand, "<= 1.05")


def prefix(table: Rows, systems: Systems, repeats: int) -> None:
    """300 tokens in common, and about 25 of each row's own."""
    rng = random.Random(1)
    shared, n_rows = text(rng, 300), 64 * systems.setting.n_times**2
    ragged = [max(3, int(rng.lognormvariate(3, 0.7))) for _ in range(n_rows)]
    for name, lengths in (("equal", [25] * n_rows), ("ragged", ragged)):
        rows = [[*shared, *text(rng, n)] for n in lengths]

        def ours(rows: list[list[int]] = rows) -> object:
            return systems.score(rows, [(5,), (6,), (7,)])

        def padded(rows: list[list[int]] = rows) -> None:
            systems.padded(in_batches(rows, 2 * systems.setting.n_padded_tokens))

        own_s, padded_s = seconds(systems.setting, [ours, padded], repeats)
        name = f"300 tokens shared and 25 own, {name}, unsorted: recomputed, over ours"
        table.add(name, padded_s / own_s, ">= 10")


def choices(table: Rows, systems: Systems, repeats: int) -> None:
    """Six endings of several tokens."""
    rows = lognormal(random.Random(2), 96 * systems.setting.n_times)
    endings = [(11,), (12, 13), (14, 15, 16), (14, 15, 17), (12, 18), (11, 18, 19, 20)]
    works: list[Callable[[], object]] = [
        lambda: systems.score(rows, endings),
        lambda: systems.one_by_one(rows, endings),
    ]
    ours, singly = seconds(systems.setting, works, repeats)
    table.add("six endings scored one by one, over ours", singly / ours, ">= 5")


def embedding(table: Rows, systems: Systems, repeats: int) -> None:
    """Rows of lognormal lengths, by an encoder; the mean of a row's tokens is its vector."""
    setting = systems.setting
    encoder, rows = Embedding(setting), lognormal(random.Random(4), 384 * setting.n_times)
    ordered = sorted(rows, key=len, reverse=True)
    works: list[Callable[[], object]] = [
        lambda: encoder.ours(rows),
        lambda: encoder.padded([rows[at : at + 32] for at in range(0, len(rows), 32)]),
        lambda: encoder.padded([ordered[at : at + 32] for at in range(0, len(rows), 32)]),
        lambda: encoder.padded(in_batches(ordered, setting.n_padded_tokens)),
    ]
    ours, padded, by_length, by_tokens = seconds(setting, works, repeats)
    table.add("embedded: arrival-order padded batches of 32, over ours", padded / ours, ">= 2.8")
    table.add("… ours over a sorted padded loop, batches of 32", ours / by_length, "<= 0.85")
    table.add(f"… ours over one with batches of {setting.n_padded_tokens:,} tokens",
              ours / by_tokens)  # fmt: skip
    pairs = zip(encoder.ours(ordered), encoder.padded([[row] for row in ordered]), strict=True)
    table.add("… largest difference from each row alone", max(abs(a - b).max() for a, b in pairs))


def generation(table: Rows, systems: Systems, repeats: int) -> None:
    """Greedy continuations of ragged lengths, 24 tokens in the mean."""
    rng, setting = random.Random(3), systems.setting
    shared, n_rows = text(rng, 300), 48 * setting.n_times
    for name, least, most, begin, bars in (
        ("prompts of 20–200", 20, 200, [], (">= 1.7", ">= 1.6")),
        ("prompts of 200–600", 200, 600, [], ("", ">= 2.5")),
        ("300 tokens shared, 10–40 own", 10, 40, shared, ("", ">= 1.5")),
    ):
        lengths = [min(96, max(2, int(rng.expovariate(1 / 24)))) for _ in range(n_rows)]
        rows = [([*begin, *text(rng, rng.randint(least, most))], n) for n in lengths]
        is_sharing = bool(begin)
        works: list[Callable[[], object]] = [
            functools.partial(systems.generate, rows),
            functools.partial(systems.padded_generate, rows),
            *(
                functools.partial(systems.continuous, rows, setting.budget_tokens // n, is_sharing)
                for n in (4, 2, 1)
            ),
        ]
        ours, by_generate, *continuous = seconds(systems.setting, works, repeats)
        table.add(f"{name}: padded generate, over ours", by_generate / ours, bars[0])
        best = min(continuous) / ours
        table.add("… the best of three continuous batchings, over ours", best, bars[1])
        if setting.dtype == torch.float32:  # else tokens differ by what they are computed with
            same = systems.continuous(rows, 256, is_sharing) == systems.generate(rows)
            table.add("… all tokens are those of continuous batching", same, "== 1")


def main() -> None:
    """Run the parts, print the table."""
    options = parser(__doc__)
    options.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = options.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    table, systems = Rows(), Systems(GPU if given.device == "cuda" else CPU)
    with torch.inference_mode():
        for part in given.only:
            globals()[part](table, systems, given.repeats)
    table.write(given.json)


if __name__ == "__main__":
    main()
