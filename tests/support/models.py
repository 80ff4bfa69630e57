"""Tiny random models and tokenizers of the kinds that there are, made where they are needed."""

from __future__ import annotations

from collections.abc import Mapping
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

LINES = ["Claim: the moon is round. Answer: yes no maybe", "a b c d e f g h i j k l m n"] * 20
N_TOKENS = 600
#: Options that make any of these small.
SMALL = {"vocab_size": N_TOKENS, "hidden_size": 32, "num_hidden_layers": 2}
ATTENTION = {**SMALL, "num_attention_heads": 4, "intermediate_size": 64}
ENCODER_DECODER = {
    "vocab_size": N_TOKENS,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}


def tokenizer(kind: str = "byte", *, bos: bool = False) -> Any:
    """A tokenizer of a kind, with control tokens ``<s>``, ``</s>`` and ``<|turn|>``."""
    special = ["<unk>", "<s>", "</s>", "<|turn|>"]
    options: dict[str, Any] = {"special_tokens": special, "show_progress": False}
    trainer: Any
    if kind == "byte":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, **options)
    elif kind == "spaces":  # as SentencePiece has them: the whole text is one word
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        prefix = normalizers.Prepend("▁")
        made.normalizer = normalizers.Sequence([prefix, normalizers.Replace(" ", "▁")])
        letters = [f"<0x{i:02X}>" for i in range(256)]
        options["special_tokens"] = [*special, *letters]
        trainer = trainers.BpeTrainer(vocab_size=500, max_token_length=8, **options)
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", **options)
    else:
        made = Tokenizer(models.WordLevel(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(**options)
    made.train_from_iterator(LINES, trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|turn|>"],
    )


def random_model(kind: str, config: str, **options: Any) -> Any:
    """A model of a class of transformers, with weights far from those of a new one."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**options))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def saved(folder: Path, model: Any, words: Any = None) -> Path:
    """A model folder."""
    model.save_pretrained(folder)
    (words or tokenizer()).save_pretrained(folder)
    return folder


def llama(**options: Any) -> Any:
    given: Mapping[str, Any] = {**ATTENTION, "max_position_embeddings": 256, **options}
    return random_model("LlamaForCausalLM", "LlamaConfig", **given)
