"""Hugging Face models small enough to build in a millisecond, with random weights."""

from __future__ import annotations

from typing import Any

from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

VOCABULARY = 32
_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}


def llama(*, tied: bool = False) -> PreTrainedModel:
    """A model whose output embeddings are, if ``tied``, its input embeddings."""
    return LlamaForCausalLM(LlamaConfig(**_SIZES, **_SPECIAL, tie_word_embeddings=tied))


def gpt2() -> PreTrainedModel:
    """A model of Conv1D layers, whose weights are (inputs, outputs)."""
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, **_SPECIAL))


def mixtral() -> PreTrainedModel:
    """A model of fused experts, whose weights are (experts, outputs, inputs)."""
    return MixtralForCausalLM(MixtralConfig(**_SIZES, **_EXPERTS, **_SPECIAL))


def gpt_oss() -> PreTrainedModel:
    """A model of fused experts, whose weights are (experts, inputs, outputs)."""
    return GptOssForCausalLM(GptOssConfig(**_SIZES, **_EXPERTS, **_SPECIAL, head_dim=8))


def llama4() -> PreTrainedModel:
    """A model of fused experts, whose weights are (experts, inputs, outputs)."""
    sizes = {"intermediate_size_mlp": 32, "head_dim": 8, "attn_temperature_tuning": False}
    config = Llama4TextConfig(
        **_SIZES, **_EXPERTS, **_SPECIAL, **sizes, interleave_moe_layer_step=1
    )
    return Llama4ForCausalLM(config)
