"""Small random models, what they say of a row alone, and engines on them."""

from __future__ import annotations

import pytest
import torch

from dask_pcm.inference.engine.attention import last_shape, packed, switch
from dask_pcm.inference.engine.capacity import Capacity
from dask_pcm.inference.engine.engine import Engine
from dask_pcm.inference.engine.packs import Pack, Segment
from dask_pcm.inference.engine.pages import PagePool
from dask_pcm.inference.engine.paging import Paging
from dask_pcm.inference.engine.rows import Generated, Scored, trie_of
from tests.support import models as tiny

# As many processes run tests as there are cores: with a thread for each core in all of them, steps
# of small models take five times as long.
torch.set_num_threads(1)

WINDOW = {**tiny.ATTENTION, "sliding_window": 8, "num_key_value_heads": 2}
#: Models whose attention differs: heads in groups, windows, caps, sinks, learned positions.
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**tiny.ATTENTION, "num_key_value_heads": 2}),
    "mistral": ("MistralForCausalLM", "MistralConfig", WINDOW),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**WINDOW, "head_dim": 8}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**WINDOW, "head_dim": 8}),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**WINDOW, "head_dim": 8, "num_local_experts": 4},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": tiny.N_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4},
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**tiny.ATTENTION, "ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
}


def fixed(n_tokens):
    """Steps of as many tokens, as long as there is memory for them."""
    return Capacity(n_tokens, most=n_tokens, least=1)


class Alone:
    """A model of transformers, asked for one row at a time."""

    def __init__(self, family):
        kind, config, options = FAMILIES[family]
        self.model = tiny.random_model(kind, config, **options)
        self.model.set_attn_implementation("eager")

    @torch.inference_mode()
    def logits(self, tokens):
        """Logits of every token of a row, shape (tokens, vocabulary)."""
        self.model.set_attn_implementation("eager")
        return self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()

    def scores(self, tokens, endings):
        found = []
        for ending in endings:
            logprobs = self.logits([*tokens, *ending]).log_softmax(-1)
            at = range(len(tokens) - 1, len(tokens) + len(ending) - 1)
            found.append(sum(logprobs[k, t].item() for k, t in zip(at, ending, strict=True)))
        return found

    def continued(self, tokens, n):
        found = list(tokens)
        for _ in range(n):
            found.append(int(self.logits(found)[-1].argmax()))
        return found[len(tokens) :]

    def engine(self, n_pages=200, budget_tokens=64, **off_device):
        """`off_device`: options of ``Paging``."""
        device = self.model.device
        switch(self.model)
        pack = Pack([Segment([1, 2], [0, 1])], device=device)
        with torch.inference_mode(), packed(pack):
            self.model(input_ids=pack.ids, position_ids=pack.positions, use_cache=False)
        pool = PagePool(n_pages, last_shape(), self.model.dtype, device)
        paging = Paging(pool, **off_device)
        engine = Engine(self.model, pool, fixed(budget_tokens), tiny.N_TOKENS, paging=paging)
        return Driven(engine, pool)


class Driven:
    """An engine, with rows that note their results."""

    def __init__(self, engine, pool):
        self.engine, self.pool = engine, pool
        self.found = {}

    def score(self, key, tokens, endings):
        done = lambda result: self.found.setdefault(key, result)  # noqa: E731
        self.engine.add([Scored(list(tokens), done, trie=trie_of(endings))])

    def generate(self, key, tokens, n_max, draft=(), **options):
        done = lambda result: self.found.setdefault(key, result)  # noqa: E731
        row = Generated(list(tokens), done, n_prompt=len(tokens), n_max=n_max, **options)
        row.resume(draft)
        self.engine.add([row])

    def generate_all(self, prompts, n_max, **options):
        """`n_max` is one for all, or by key."""
        for key, prompt in prompts.items():
            n = n_max[key] if isinstance(n_max, dict) else n_max
            self.generate(key, prompt, n, **options)

    def run(self, most_steps=5000):
        for _ in range(most_steps):
            if not self.engine.n_rows:
                return self.found
            self.engine.step()
            self.pool.validate()
        raise AssertionError(f"{self.engine.n_rows} rows have not ended")


@pytest.fixture
def alone():
    return Alone
