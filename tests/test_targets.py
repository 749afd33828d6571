"""Laws of which weights get a mask, and along which dimension."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import tiny_models
import torch
from rules import mask_optimizer
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize
from torchmetrics import Metric, MetricCollection

from maskpro_lightning import NMPattern, find_targets, parameter_groups
from maskpro_lightning.weights.targets import clean_name, describe

ATTENTION = [f"self_attn.{projection}_proj.weight" for projection in "qkvo"]
LLAMA = [*ATTENTION, *(f"mlp.{projection}_proj.weight" for projection in ("gate", "up", "down"))]


class Shared(nn.Module):
    """One layer under two names, and its weight in another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.same = self.one
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.one.weight


class LinearWithLora(nn.Linear):
    """A layer as PEFT builds it, down to the names."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 4)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 8)})


class Distance(Metric):
    """A metric with a network inside, as FID or LPIPS have."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 8)

    def update(self, x: Tensor) -> None: ...

    def compute(self) -> Tensor:
        return torch.zeros(())


class Measured(pl.LightningModule):
    """A LightningModule with metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.metric = Distance()
        self.metrics = MetricCollection([Distance()])
        self.fc = nn.Linear(8, 8)


class Parts(nn.Module):
    """Layers by name, and one in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 8)
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 4))


def chosen(model: nn.Module, **globs: Any) -> list[tuple[str, int]]:
    return [(target.name, target.input_dim) for target in find_targets(model, "2:4", **globs)]


def names(model: nn.Module, **globs: Any) -> list[str]:
    return [name for name, _ in chosen(model, **globs)]


def in_layer_0(layers: str, weights: Sequence[str], input_dim: int) -> list[tuple[str, int]]:
    return [(f"{layers}.0.{weight}", input_dim) for weight in weights]


# --- the default choice -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        pytest.param(lambda: nn.Linear(8, 8), [("weight", -1)], id="a layer"),
        pytest.param(
            lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)),
            [("0.weight", -1), ("2.weight", -1)],
            id="an MLP with BatchNorm",
        ),
        pytest.param(
            lambda: nn.TransformerEncoderLayer(8, 2, 16),
            [
                ("self_attn.in_proj_weight", -1),
                ("self_attn.out_proj.weight", -1),
                ("linear1.weight", -1),
                ("linear2.weight", -1),
            ],
            id="torch's transformer",
        ),
        pytest.param(
            lambda: nn.Sequential(
                nn.Conv1d(8, 8, 3),
                nn.Conv2d(8, 8, 3, groups=2),
                nn.Conv3d(8, 8, 3),
                nn.Conv2d(8, 8, 3, groups=8),  # depthwise
                nn.ConvTranspose2d(8, 8, 3),
                nn.BatchNorm2d(8),
            ),
            [("0.weight", 1), ("1.weight", 1), ("2.weight", 1)],
            id="convolutions",
        ),
        pytest.param(
            tiny_models.llama, in_layer_0("model.layers", LLAMA, -1), id="Llama with its lm_head"
        ),
        pytest.param(
            lambda: tiny_models.llama(tied=True),
            in_layer_0("model.layers", LLAMA, -1),
            id="Llama with tied embeddings",
        ),
        pytest.param(
            tiny_models.gpt2,
            in_layer_0(
                "transformer.h",
                [f"{w}.weight" for w in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")],
                0,
            ),
            id="GPT-2",
        ),
        pytest.param(
            tiny_models.mixtral,
            in_layer_0(
                "model.layers",
                [*ATTENTION, "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
                -1,
            ),
            id="Mixtral",
        ),
        pytest.param(
            tiny_models.gpt_oss,
            [
                *in_layer_0("model.layers", ATTENTION, -1),
                ("model.layers.0.mlp.experts.gate_up_proj", -2),
                ("model.layers.0.mlp.experts.down_proj", -2),
            ],
            id="gpt-oss",
        ),
        pytest.param(Shared, [("one.weight", -1)], id="a shared weight, once"),
        pytest.param(LinearWithLora, [("weight", -1)], id="without LoRA's factors"),
        pytest.param(Measured, [("fc.weight", -1)], id="without metrics"),
    ],
)
def test_the_default_choice(
    model: Callable[[], nn.Module], expected: list[tuple[str, int]]
) -> None:
    assert chosen(model()) == expected


def test_a_target_is_the_models_own_weight() -> None:
    model = Parts()
    first = find_targets(model, "2:4")[0]
    assert first.module is model.fc1
    assert first.parameter is model.fc1.weight


# --- globs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        ({}, ["fc1.weight", "fc2.weight", "head.0.weight"]),
        ({"include": ["fc1"]}, ["fc1.weight"]),
        ({"include": ["fc1.weight"]}, ["fc1.weight"]),
        ({"include": ["fc?", "head.*"]}, ["fc1.weight", "fc2.weight", "head.0.weight"]),
        ({"exclude": ["fc1"]}, ["fc2.weight", "head.0.weight"]),
        ({"exclude": ["fc1.weight", "head.*"]}, ["fc2.weight"]),
        ({"include": ["fc*"], "exclude": ["*2*"]}, ["fc1.weight"]),
        ({"include": None, "exclude": ()}, ["fc1.weight", "fc2.weight", "head.0.weight"]),
    ],
    ids=str,
)
def test_globs_choose_layers_or_parameters(globs: dict[str, Any], expected: list[str]) -> None:
    assert names(Parts(), **globs) == expected


def test_include_masks_what_is_left_out_by_default() -> None:
    assert names(tiny_models.llama(), include=["lm_head"]) == ["lm_head.weight"]
    assert names(LinearWithLora(), include=["lora_A*"]) == ["lora_A.default.weight"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("glob", ["fc3", "FC1", "c1", "fc1.bias.*"])
def test_a_glob_that_matches_nothing_is_refused(argument: str, glob: str) -> None:
    message = (
        f"'{glob}' matches no layer or parameter of Parts; its layers are named like "
        f"'embedding.weight'."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        find_targets(Parts(), "2:4", **{argument: ["fc1", glob]})


def test_the_name_of_a_part_stands_for_all_layers_in_it() -> None:
    inside = {name for name in names(Parts()) if name.startswith("head.")}
    assert inside
    assert set(names(Parts())) - set(names(Parts(), exclude=["head"])) == inside
    assert set(names(Parts(), include=["head"])) >= inside


def test_a_shared_weight_is_left_out_by_any_of_its_names() -> None:
    with pytest.raises(ValueError, match=r"^No layer of Shared is left to mask"):
        find_targets(Shared(), "2:4", exclude=["one"])


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_string_in_place_of_a_list_is_refused(argument: str) -> None:
    message = f'{argument} is a list of globs: write {argument}=["fc1"].'
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        find_targets(Parts(), "2:4", **{argument: "fc1"})


@pytest.mark.parametrize(
    ("model", "globs", "what"),
    [
        (Parts, {"exclude": ["*"]}, "Parts 3 None ['*']"),
        (Parts, {"include": ["embedding"]}, "Parts 3 ('embedding',) []"),
        (nn.ReLU, {}, "ReLU 0 None []"),
    ],
    ids=["all left out", "an embedding", "no weights"],
)
def test_a_choice_of_nothing_is_refused(
    model: Callable[[], nn.Module], globs: dict[str, Any], what: str
) -> None:
    name, count, include, exclude = what.split()
    message = (
        f"No layer of {name} is left to mask: its {count} maskable weights are all left out "
        f"(include={include}, exclude={exclude})."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        find_targets(model(), "2:4", **globs)


# --- weights that cannot be masked --------------------------------------------------------------


def quantised() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    return layer


INDIVISIBLE = (
    "has {} input features, not a multiple of 4 (pattern 2:4): {} or choose another pattern."
)
INTEGER = (
    "holds torch.int8 numbers; masks need dense floating-point weights of at least 16 bits: {} or "
    "load the model unquantised."
)
NO_VALUES = "is on the meta device, without values: load the weights before masking."
REMEDY = 'leave it out with exclude=["1"]'


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nn.Conv2d(3, 8, 3), INDIVISIBLE.format(3, REMEDY)),
        (lambda: nn.Linear(6, 8), INDIVISIBLE.format(6, REMEDY)),
        (quantised, INTEGER.format(REMEDY)),
        (lambda: nn.Linear(8, 8, device="meta"), NO_VALUES),
    ],
    ids=["three channels", "six inputs", "quantised", "meta"],
)
def test_a_weight_that_cannot_be_masked_is_refused_by_name(
    layer: Callable[[], nn.Module], message: str
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), layer())
    message = f"'1.weight' {message}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        find_targets(model, "2:4")
    assert names(model, exclude=["1"]) == ["0.weight"]


def test_a_parametrised_weight_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), parametrizations.weight_norm(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match=r"^'1.weight' is computed from other parameters"):
        find_targets(model, "2:4")


def test_a_weight_beside_a_parametrised_bias_is_masked() -> None:
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "bias", nn.ReLU())
    assert names(layer) == ["weight"]


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrapped", "clean"),
    [
        ("net.0.weight", "net.0.weight"),
        ("_orig_mod.net.0.weight", "net.0.weight"),
        ("net._orig_mod.0.weight", "net.0.weight"),
        ("_fsdp_wrapped_module.net._fsdp_wrapped_module.weight", "net.weight"),
        ("net._checkpoint_wrapped_module.fc.weight", "net.fc.weight"),
        ("_fsdp_wrapped_module._orig_mod._checkpoint_wrapped_module.fc.weight", "fc.weight"),
        ("net._orig_mod", "net"),
        ("net._fsdp_wrapped_module._orig_mod", "net"),
        ("net._orig_mod._fsdp_wrapped_module", "net"),
        ("_orig_mod", ""),
        ("", ""),
    ],
)
def test_names_are_free_of_wrappers(wrapped: str, clean: str) -> None:
    assert clean_name(wrapped) == clean


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def test_wrapped_layers_have_the_names_of_bare_ones() -> None:
    bare = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    expected = names(bare)
    wrapped = nn.Sequential(compiled(bare[0]), checkpoint_wrapper(compiled(bare[1])))
    for model in (wrapped, compiled(bare), compiled(wrapped)):
        assert names(model) == expected == ["0.weight", "1.weight"]
        assert names(model, exclude=["0"]) == ["1.weight"]


# --- what targets are made into -----------------------------------------------------------------


def test_parameter_groups_are_what_maskpro_takes() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(8, 8, 3), nn.Linear(8, 4))
    optimizer = mask_optimizer(parameter_groups(find_targets(model, "2:4")), "2:4")
    found = {name: g["input_dim"] for g in optimizer.param_groups for name in g["param_names"]}
    assert found == {"0.weight": -1, "1.weight": 1, "2.weight": -1}


def test_describe_counts_layers_and_numbers() -> None:
    model = nn.Sequential(nn.Linear(200, 8), nn.Linear(8, 4))
    targets = find_targets(model, "2:4", exclude=["1"])
    expected = "2:4 masks on 1 weights: 1,600 of the model's 1,644 numbers (97.3%)."
    assert describe(model, targets, NMPattern(2, 4)) == expected
