"""Hugging Face models small enough to build in a millisecond, with random weights."""

from __future__ import annotations

from typing import Any

from transformers import (
    ConvBertConfig,
    ConvBertModel,
    DbrxConfig,
    DbrxForCausalLM,
    FunnelConfig,
    FunnelModel,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    XLNetConfig,
    XLNetModel,
    ZambaConfig,
    ZambaForCausalLM,
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


def dbrx() -> PreTrainedModel:
    """A model that keeps all experts of a layer in one matrix."""
    config = DbrxConfig(
        d_model=16,
        n_heads=2,
        n_layers=1,
        max_seq_len=32,
        vocab_size=VOCABULARY,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        ffn_config={
            "ffn_hidden_size": 32,
            "moe_num_experts": 2,
            "moe_top_k": 1,
            "hidden_size": 16,
        },
    )
    return DbrxForCausalLM(config)


def xlnet() -> PreTrainedModel:
    """A model whose attention multiplies with 3-D parameters by einsum."""
    return XLNetModel(
        XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=1, n_head=2, d_inner=32)
    )


def funnel() -> PreTrainedModel:
    """A model whose attention has a 3-D parameter for its positions."""
    config = FunnelConfig(
        vocab_size=VOCABULARY, block_sizes=[1, 1], d_model=16, n_head=2, d_head=8, d_inner=32
    )
    return FunnelModel(config)


def recurrent_gemma() -> PreTrainedModel:
    """A model whose gates are (heads, inputs, outputs)."""
    config = RecurrentGemmaConfig(
        **_SIZES, **_SPECIAL, lru_width=16, attention_window_size=8, num_heads=2, head_dim=8
    )
    return RecurrentGemmaForCausalLM(config)


def grouped_convbert() -> PreTrainedModel:
    """A model of linear layers in groups, (groups, inputs, outputs)."""
    config = ConvBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        embedding_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
        num_groups=2,
    )
    return ConvBertModel(config)


def jetmoe() -> PreTrainedModel:
    """A model whose experts are (experts, outputs, inputs), in attention too."""
    config = JetMoeConfig(**_SIZES, **_EXPERTS, **_SPECIAL, kv_channels=8)
    return JetMoeForCausalLM(config)


def zamba() -> PreTrainedModel:
    """A model of Mamba's heads, (heads, outputs, inputs)."""
    config = ZambaConfig(
        **{**_SIZES, "num_hidden_layers": 3},
        layers_block_type=["linear_attention", "hybrid", "hybrid"],
        mamba_d_state=8,
        mamba_dt_rank=8,
        n_mamba_heads=2,
        use_mamba_kernels=False,
    )
    return ZambaForCausalLM(config)
