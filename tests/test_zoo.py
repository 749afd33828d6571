"""What share of each architecture of transformers is masked; all else has a reason."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING

from maskpro_lightning.weights import reasons
from maskpro_lightning.weights.summary import rows
from maskpro_lightning.weights.targets import find_targets, select

# The least share of all numbers that is masked by default; most of the rest are embeddings.
# benchmarks/architectures.py measures all that there are.
LEAST_SHARE = {
    "albert": 0.97,
    "bart": 0.85,
    "beit": 0.98,
    "bert": 0.77,
    "big_bird": 0.66,
    "blip": 0.87,
    "bloom": -0.01,
    "clip": 0.80,
    "codegen": 0.95,
    "cohere": 0.93,
    "convbert": 0.76,
    "convnext": 0.97,
    "convnextv2": 0.97,
    "ctrl": 0.79,
    "deberta": 0.67,
    "deberta-v2": 0.76,
    "deepseek_v2": 0.66,
    "deepseek_v3": 0.98,
    "deit": 0.98,
    "dinov2": 0.98,
    "distilbert": 0.62,
    "electra": 0.69,
    "encodec": 0.55,
    "falcon": 0.94,
    "falcon_mamba": 0.74,
    "fnet": 0.68,
    "funnel": 0.80,
    "gemma": 0.89,
    "gemma2": 0.76,
    "gemma3_text": 0.76,
    "gpt2": 0.67,
    "gpt_bigcode": 0.63,
    "gpt_neo": 0.90,
    "gpt_neox": 0.97,
    "gpt_oss": 0.98,
    "gptj": 0.95,
    "granitemoe": 0.98,
    "hubert": 0.93,
    "ibert": 0.77,
    "jamba": 0.98,
    "jetmoe": 0.97,
    "layoutlm": 0.74,
    "lilt": 0.77,
    "llama": 0.97,
    "llama4_text": 0.98,
    "longformer": 0.80,
    "mamba": 0.74,
    "mamba2": 0.97,
    "mbart": 0.85,
    "megatron-bert": 0.89,
    "mistral": 0.97,
    "mixtral": 0.98,
    "mobilebert": 0.81,
    "mobilenet_v2": 0.94,
    "modernbert": 0.73,
    "mpt": 0.91,
    "mt5": 0.24,
    "nystromformer": 0.77,
    "olmo2": 0.95,
    "olmoe": 0.98,
    "opt": 0.66,
    "patchtst": 0.97,
    "pegasus": 0.85,
    "perceiver": 0.98,
    "phi": 0.90,
    "phi3": 0.96,
    "phimoe": 0.98,
    "qwen2": 0.93,
    "qwen2_moe": 0.96,
    "qwen3": 0.93,
    "qwen3_moe": 0.96,
    "recurrent_gemma": 0.66,
    "reformer": 0.97,
    "regnet": 0.98,
    "resnet": 0.98,
    "roberta": 0.67,
    "rwkv": 0.96,
    "sam": 0.94,
    "segformer": 0.97,
    "siglip": 0.86,
    "speecht5": 0.98,
    "squeezebert": 0.52,
    "stablelm": 0.94,
    "starcoder2": 0.93,
    "swin": 0.98,
    "t5": 0.71,
    "vit": 0.98,
    "vits": 0.59,
    "wav2vec2": 0.93,
    "whisper": 0.44,
    "xglm": 0.52,
    "xlnet": 0.89,
    "xmod": 0.78,
    "zamba": 0.97,
}


def on_meta(name: str, **changes: Any) -> nn.Module:
    """The model of an architecture's default configuration, without weights."""
    config = CONFIG_MAPPING[name]
    kind = MODEL_MAPPING[config]
    kind = kind[0] if isinstance(kind, tuple) else kind
    with torch.device("meta"):
        model: nn.Module = kind(config(**changes))
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LEAST_SHARE)
def test_what_multiplies_is_masked_and_all_else_is_told(name: str) -> None:
    model = on_meta(name)
    selection = select(model, "2:4", on_meta=True)
    told = {id(each.parameter) for each in (*selection.targets, *selection.left_out)}
    silent = [n for n, p in model.named_parameters() if p.dim() > 1 and id(p) not in told]
    assert silent == []
    assert all(each.reason for each in selection.left_out)
    found = rows(model, selection)
    assert found[0].what == "masked"
    assert found[0].share >= LEAST_SHARE[name]
    assert math.isclose(sum(row.share for row in found), 1)
    # Little is of layers that nobody knows: positions, biases, routers; IBert's own embeddings.
    unknown = sum(row.share for row in found if row.what.endswith(reasons.UNKNOWN))
    assert unknown < (0.22 if name == "ibert" else 0.04)


def test_convolutions_that_standardise_their_weights_are_no_targets() -> None:
    with pytest.raises(ValueError, match="other weights that forward computes"):
        find_targets(on_meta("bit"), "2:4", on_meta=True)
