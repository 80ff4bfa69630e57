"""Small random models of many families, saved as folders with small tokenizers.

Options that make a model small are given to a configuration where it has them; a family adds what
only it needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import CONFIG_MAPPING

from dask_pcm.factcheck import LABELS, PROMPT, generate

N_VOCABULARY = 640
#: Windows of the families that have them: shorter than the texts by which a model is probed when
#: it is loaded, and longer than these, but shorter than the longest rows.
NARROW_TOKENS, WIDE_TOKENS = 16, 80
#: Standard deviation of the weights: about those of a trained model, so that rows differ.
_STD = 0.1
#: One-dimensional parameters that are rates, and not to be disturbed.
_RATES = ("A_log", "dt_bias", ".D")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_WINDOWS = (
    "sliding_window",
    "attention_window_size",
    "local_attention",
    "window_size",
    "attention_chunk_size",
    "keep_window_size",
    "index_topk",
    "index_block_size",
)
_SMALL = {
    "vocab_size": N_VOCABULARY,
    "max_position_embeddings": 512,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "dff", "d_inner"), 128),
    **dict.fromkeys(("n_positions", "max_seq_len", "context_length"), 512),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 128),
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "use_sliding_window": True,
    "max_window_layers": 0,
    **dict.fromkeys(_EXPERTS, 4),
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "state_size": 8,
    "expand": 2,
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size"), 8),
    "mamba_d_ssm": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of model.

    Attributes
    ----------
    name
        Its model type, and how it is configured if that is not the usual way.
    model_type
        As transformers calls it.
    words
        The kind of its tokenizer: "bytes" or "spaces".
    options
        Of its configuration.
    has_state
        Whether layers keep a state instead of keys and values, so that no engine computes it.
    alone
        The attention with which transformers is asked for one row.
    """

    name: str
    model_type: str
    words: str = "bytes"
    options: dict[str, Any] = field(default_factory=dict)
    has_state: bool = False
    alone: str = "eager"

    @property
    def windows(self) -> list[str]:
        """The options of its configuration that are windows."""
        return [name for name in _WINDOWS if name in _options_of(self.model_type)]


def _options_of(model_type: str) -> set[str]:
    """The options of a configuration by the names under which they are stored."""
    kind = CONFIG_MAPPING[model_type]
    named = {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}
    return named - {*getattr(kind, "attribute_map", {})}


def built(family: Family, folder: Path, window_tokens: int = NARROW_TOKENS) -> None:
    """Save a random model of a family, and its tokenizer."""
    torch.manual_seed(0)
    known = _options_of(family.model_type)
    options = {name: value for name, value in _SMALL.items() if name in known}
    options |= dict.fromkeys(family.windows, window_tokens) | family.options
    config = CONFIG_MAPPING[family.model_type](**options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=_STD)
        elif not name.endswith(_RATES):
            parameter.data += _STD * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer(family.words).save_pretrained(folder)


def tokenizer(words: str) -> Any:
    """A tokenizer that was trained on claims, of the kind "bytes" or "spaces"."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    claims = generate(400, seed=3)
    lines = [
        PROMPT.format(claim=c, evidence=e)
        for c, e in zip(claims.claim, claims.evidence, strict=True)
    ]
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=words == "spaces"))
    letters = pre_tokenizers.ByteLevel.alphabet()
    if words == "bytes":  # as GPT-2 has them
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    else:  # as SentencePiece has them: the whole text is one word
        begin, space = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
        made.normalizer = normalizers.Sequence([begin, space])
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        letters = []
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCABULARY,
        special_tokens=special,
        initial_alphabet=letters,
        max_token_length=12,
        show_progress=False,
    )
    made.train_from_iterator([*lines, *LABELS], trainer)
    if words == "spaces":
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )


def _phi3_long(n_tokens: int) -> dict[str, Any]:
    """Rows of more than `n_tokens` have other frequencies, as in the Phi models of 128k tokens."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0 + k for k in range(8)]}
    limit = {"original_max_position_embeddings": n_tokens}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, **limit, **factors}
    return {"rope_parameters": rope, **limit}


_EVERY_SECOND = {"attn_layer_period": 2, "attn_layer_offset": 1}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
#: Of layers that choose blocks of keys.
_BLOCKS = {
    "index_topk_blocks": 1,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
}
#: Families that need nothing of their own.
_PLAIN = """
    afmoe apertus arcee aria_text beam biogpt bitnet bloom codegen cohere cohere2 cohere2_moe
    ctrl cwm deepseek_v4 diffllama doge ernie4_5 exaone4 exaone_moe falcon flex_olmo flint gemma
    gemma2 gemma3_text gemma4_unified_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox
    gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa
    granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax
    inkling_text inkling2_text internlm3 iquestcoder jais2 jetmoe laguna llama llama4_text
    mellum mimo_v2_flash minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder
    moshi mpt nanochat nemotron olmo olmo2 olmo3 olmoe openai-gpt opt persimmon phi phi3 phimoe
    qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma
    xglm xlnet trocr whisper blenderbot pegasus marian mbart plbart
""".split()
#: Encoders that are causal models when they are told to be.
_DECODERS = """
    bart bert bert-generation big_bird bigbird_pegasus camembert data2vec-text electra ernie
    megatron-bert prophetnet rembert roberta roberta-prelayernorm roformer xlm-roberta
""".split()
#: Families whose keys and values are compressed together, so that heads share none.
_LATENT = """
    axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa minicpm3 youtu
""".split()
_STATES = """
    falcon_h1 falcon_mamba lfm3 mamba minimax nemotron_h recurrent_gemma rwkv xlstm
""".split()
_LINEAR_STATES = ("olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
FAMILIES = (
    *(Family(name, name) for name in _PLAIN),
    *(Family(f"{name}, decoder", name, options={"is_decoder": True}) for name in _DECODERS),
    *(Family(name, name, options={"num_key_value_heads": 4}) for name in _LATENT),
    Family("minimax_m3_vl_text", "minimax_m3_vl_text", options=_BLOCKS),
    Family("ernie4_5_moe", "ernie4_5_moe", options={"moe_k": 2}),
    Family("bert, encoder", "bert"),
    Family("phi3, longrope", "phi3", options=_phi3_long(100)),
    # transformers 5.23's eager attention adds its bias twice.
    Family("falcon, alibi", "falcon", options={"alibi": True}, alone="sdpa"),
    Family("gpt_neo", "gpt_neo", options={"attention_types": [[["global", "local"], 2]]}),
    *(Family(name, name, has_state=True) for name in _STATES),
    *(Family(name, name, options=_LINEAR, has_state=True) for name in _LINEAR_STATES),
    Family("jamba", "jamba", options=_EVERY_SECOND, has_state=True),
    Family("lfm2", "lfm2", options={"layer_types": ["conv", "full_attention"] * 2}, has_state=True),
    Family("bamba", "bamba", options={"attn_layer_indices": [1]}, has_state=True),
    Family(
        "granitemoehybrid",
        "granitemoehybrid",
        options={"layer_types": ["mamba", "attention"] * 2},
        has_state=True,
    ),
    Family("mamba2", "mamba2", options={"num_heads": 8}, has_state=True),
)
