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

from maskpro_lightning import find_targets, parameter_groups
from maskpro_lightning.weights.names import clean_name
from maskpro_lightning.weights.targets import LeftOut, select

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


class Raw(nn.Module):
    """A parameter of a layer that nobody knows, beside a known one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 8, 4))
        self.norm = nn.LayerNorm(8)
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
            [("0.weight", 1), ("1.weight", 1), ("2.weight", 1), ("4.weight", 0)],
            id="convolutions",
        ),
        pytest.param(
            lambda: nn.LSTM(8, 12, proj_size=4),
            [("weight_ih_l0", -1), ("weight_hh_l0", -1), ("weight_hr_l0", -1)],
            id="a recurrent layer with projections",
        ),
        pytest.param(
            lambda: nn.GRU(8, 4, 2, bidirectional=True),
            [
                (f"weight_{kind}_l{layer}{side}", -1)
                for layer in (0, 1)
                for side in ("", "_reverse")
                for kind in ("ih", "hh")
            ],
            id="a deep recurrent layer in both directions",
        ),
        pytest.param(lambda: nn.GRUCell(8, 8), [("weight_ih", -1), ("weight_hh", -1)], id="a cell"),
        pytest.param(lambda: nn.Bilinear(3, 8, 5), [("weight", -1)], id="a bilinear layer"),
        pytest.param(
            lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=12),
            [*((f"{each}_proj_weight", -1) for each in "qkv"), ("out_proj.weight", -1)],
            id="attention with projections of their own",
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
        pytest.param(
            tiny_models.llama4,
            [
                *in_layer_0("model.layers", ATTENTION, -1),
                ("model.layers.0.feed_forward.experts.gate_up_proj", -2),
                ("model.layers.0.feed_forward.experts.down_proj", -2),
                ("model.layers.0.feed_forward.router.weight", -1),
                *in_layer_0(
                    "model.layers",
                    [
                        f"feed_forward.shared_expert.{projection}_proj.weight"
                        for projection in ("gate", "up", "down")
                    ],
                    -1,
                ),
            ],
            id="Llama 4",
        ),
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
@pytest.mark.parametrize(
    ("glob", "nearest"),
    [
        ("fc3", "'fc2'"),
        ("FC1", "'fc1'"),
        ("c1", "'fc1'"),
        ("*haed*", "'*head*'"),
        ("*.wieght", "'*.weight'"),
        ("*.haed.*", "'head.0' or 'head'"),
        ("fc1.bias.*", "'fc1.bias' or 'fc2.bias'"),
    ],
)
def test_a_glob_that_matches_nothing_is_refused_with_what_may_be_meant(
    argument: str, glob: str, nearest: str
) -> None:
    message = f"'{glob}' matches no layer or parameter of Parts; the nearest is {nearest}."
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


def test_a_dimension_behind_a_glob_adds_to_the_choice() -> None:
    model = Raw()
    assert chosen(model) == [("fc.weight", -1)]
    assert chosen(model, include=["experts:1"]) == [("experts", 1), ("fc.weight", -1)]
    assert chosen(model, include=["*.weight:0"]) == [("fc.weight", 0)]
    assert chosen(model, include=["experts:-2", "fc"]) == [("experts", -2), ("fc.weight", -1)]
    assert chosen(model, include=["experts:-2"], exclude=["fc"]) == [("experts", -2)]


@pytest.mark.parametrize(
    ("include", "idle", "such_as"),
    [
        (["experts"], "experts", "experts.weight:-1"),
        (["fc", "norm"], "norm", "norm.weight:-1"),
    ],
)
def test_a_name_without_a_known_product_is_refused(
    include: list[str], idle: str, such_as: str
) -> None:
    message = (
        f"include=['{idle}'] matches no weight whose product is known: give a parameter's own name "
        f'and the dimension that its product sums over, such as "{such_as}".'
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        find_targets(Raw(), "2:4", include)


@pytest.mark.parametrize(
    ("model", "globs", "why"),
    [
        (
            Parts,
            {"exclude": ["*"]},
            "'embedding.weight' is an embedding; 'fc1.weight' is excluded",
        ),
        (lambda: nn.Linear(6, 8), {}, "'weight' has 6 inputs, not a multiple of 4"),
        (nn.ReLU, {}, "it has no weights of two dimensions"),
    ],
    ids=["all left out", "six inputs", "no weights"],
)
def test_a_choice_of_nothing_is_refused_with_its_reasons(
    model: Callable[[], nn.Module], globs: dict[str, Any], why: str
) -> None:
    name = type(model()).__name__
    message = (
        f"No layer of {name} is left to mask: {why}. Choose another pattern, include or exclude."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        find_targets(model(), "2:4", **globs)


# --- names by their whole parts -----------------------------------------------------------------


@pytest.mark.parametrize("part", ["flora_a", "lora_analysis", "film_head", "lm_header", "weight"])
def test_a_name_that_contains_another_is_not_that(part: str) -> None:
    model = nn.ModuleDict({part: nn.Linear(8, 8)})
    assert names(model) == [f"{part}.weight"]


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lm_head"])
def test_a_part_of_that_name_is_left_out_with_all_inside(part: str) -> None:
    inside = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    model = nn.ModuleDict({part: inside, "body": nn.Linear(8, 8)})
    assert names(model) == ["body.weight"]


def test_what_peft_has_a_trained_copy_of_is_left_out() -> None:
    model = nn.ModuleDict(
        {
            "wrapped": nn.ModuleDict(
                {
                    "original_module": nn.Linear(8, 8),
                    "modules_to_save": nn.ModuleDict({"default": nn.Linear(8, 8)}),
                }
            ),
            "original_module": nn.Linear(8, 8),  # the user's own name for something
        }
    )
    assert names(model) == ["wrapped.modules_to_save.default.weight", "original_module.weight"]


# --- weights that cannot be masked --------------------------------------------------------------


class Standardised(nn.Conv2d):
    """A convolution with a standardised weight, as in BiT."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std(), self.bias)


class Padded(nn.Conv2d):
    """A convolution with a forward of its own, which multiplies with the weight as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1))) * 2


def quantised() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    return layer


UNFIT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "three channels": (lambda: nn.Conv2d(3, 8, 3), "has 3 inputs, not a multiple of 4"),
    "six inputs": (lambda: nn.Linear(6, 8), "has 6 inputs, not a multiple of 4"),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), "has 1 input, not a multiple of 4"),
    "groups across convolutions": (
        lambda: nn.ConvTranspose2d(12, 8, 3, groups=2),
        "has 6 inputs, not a multiple of 4",
    ),
    "quantised": (
        quantised,
        "holds torch.int8 numbers, not dense floating-point ones of 16 bits or more",
    ),
    "empty": (
        lambda: nn.Linear(0, 8),
        "has no groups along dimension -1, its shape being (8, 0)",
    ),
    "standardised": (
        lambda: Standardised(8, 8, 3),
        "is multiplied only through other weights that forward computes (sub)",
    ),
}
PARAMETRISED = "is computed from other parameters (weight_norm or another parametrization)"


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
@pytest.mark.parametrize(("layer", "reason"), UNFIT.values(), ids=UNFIT)
def test_what_does_not_fit_is_left_out_and_told(
    layer: Callable[[], nn.Module], reason: str
) -> None:
    unfit = layer()
    assert isinstance(unfit.weight, nn.Parameter)
    found = select(nn.Sequential(nn.Linear(8, 8), unfit), "2:4")
    assert [target.name for target in found.targets] == ["0.weight"]
    assert found.left_out == [LeftOut("1.weight", unfit.weight, unfit.weight.numel(), reason)]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_all_that_is_included_and_does_not_fit_is_refused_at_once() -> None:
    layers = [layer() for layer, _ in UNFIT.values()]
    layers.append(parametrizations.weight_norm(nn.Linear(8, 8)))
    reasons = [reason for _, reason in UNFIT.values()] + [PARAMETRISED]
    told = "; ".join(f"'{place}.weight' {reason}" for place, reason in enumerate(reasons))
    excluded = ", ".join(f'"{place}"' for place in range(len(layers)))
    message = (
        f"{len(layers)} of the included weights cannot be masked: {told}. Leave them out with "
        f"exclude=[{excluded}]."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        find_targets(nn.Sequential(*layers, nn.Linear(8, 8)), "2:4", ["*"])
    assert names(nn.Sequential(*layers, nn.Linear(8, 8))) == [f"{len(layers)}.weight"]


@pytest.mark.parametrize("normalise", [parametrizations.weight_norm, nn.utils.spectral_norm])
def test_a_parametrised_weight_is_left_out_with_what_it_is_made_of(
    normalise: Callable[[nn.Module], nn.Module],
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), normalise(nn.Linear(8, 8)))
    found = select(model, "2:4")
    assert [target.name for target in found.targets] == ["0.weight"]
    assert found.left_out
    parameters = dict(model.named_parameters())
    for each in found.left_out:
        assert each.parameter is parameters[each.name]
        assert each.reason == "is what a parametrization computes a weight from"


def test_a_layer_with_a_forward_of_its_own_is_masked_where_it_multiplies_with_its_weight() -> None:
    assert names(nn.Sequential(Padded(8, 8, 3))) == ["0.weight"]


def test_a_layer_that_is_tried_stays_as_it_was() -> None:
    layer = Standardised(8, 8, 3)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    model = nn.Sequential(layer, nn.Linear(8, 8))
    state = torch.get_rng_state()
    select(model, "2:4")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())
    assert layer.weight.device.type == "cpu"


def test_weights_without_values_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, device="meta"))
    message = (
        "'1.weight' is on the meta device, without values (1 of 2 weights): load the weights "
        "before masking."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        find_targets(model, "2:4")
    assert len(find_targets(model, "2:4", on_meta=True)) == 2


def test_weights_without_a_shape_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8))
    with pytest.raises(ValueError, match=r"^'1.weight' has no shape yet \(1 of 2 weights are lazy"):
        find_targets(model, "2:4")
    model(torch.zeros(1, 8))
    assert names(model) == ["0.weight", "1.weight"]


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
        ("my_orig_mod.weight", "my_orig_mod.weight"),
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
