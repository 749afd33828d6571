"""Laws of what is seen of weights without a layer's call: Hessians are those computed by hand."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from maskpro_lightning import NMPattern, find_targets
from maskpro_lightning.initial import calibration, initializers
from maskpro_lightning.initial.calibration import initial_masks
from maskpro_lightning.initial.operands import lying
from maskpro_lightning.initial.reconstruction import PairedStatistics
from maskpro_lightning.initial.statistics import Inputs, InputStatistics, is_watched

PATTERN = NMPattern(2, 4)
# Inputs are computed in float32, by hand in float64 and by the layer in another order.
CLOSE: Mapping[str, Any] = {"rtol": 2e-5, "atol": 2e-5}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def collected(model: nn.Module, *batches: tuple[Any, ...]) -> dict[str, Tensor]:
    """Hessians (C, K, K) of a model's targets, collected over batches."""
    targets = find_targets(model, "2:4")
    watched = [target for target in targets if is_watched(target)]
    how = lying(watched, lambda: model(*batches[0]), None)
    with InputStatistics(Inputs(targets, how), second_moments=True) as statistics:
        for batch in batches:
            model(*batch)
    assert statistics.unseen == []
    return statistics.hessian


def moments(*rows: Tensor) -> Tensor:
    """Mean of 2 x x^T of rows (T, K) of each part, (C, K, K)."""
    return torch.stack([2 * x.double().T @ x.double() / len(x) for x in rows])


def assert_hessians(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, hessian in expected.items():
        assert found[name].shape == hessian.shape, name
        scale = hessian.abs().max()
        torch.testing.assert_close(found[name].double() / scale, hessian / scale, **CLOSE)


# --- recurrent layers ----------------------------------------------------------------------------


def lstm_by_hand(layer: nn.LSTM, x: Tensor) -> tuple[dict[str, list[Tensor]], Tensor]:
    """What each weight is multiplied with, step by step in float64; x is (time, batch, K)."""
    weights = {name: value.detach().double() for name, value in layer.named_parameters()}
    rows: dict[str, list[Tensor]] = {}
    x = x.double()
    for number in range(layer.num_layers):
        outputs = []
        for back in ("", "_reverse")[: 1 + layer.bidirectional]:
            end = f"l{number}{back}"
            h = c = torch.zeros(x.shape[1], layer.hidden_size, dtype=torch.float64)
            hidden = []
            for step in x.flip(0) if back else x:
                rows.setdefault(f"weight_ih_{end}", []).append(step)
                rows.setdefault(f"weight_hh_{end}", []).append(h)
                gates = step @ weights[f"weight_ih_{end}"].T + h @ weights[f"weight_hh_{end}"].T
                gates = gates + weights[f"bias_ih_{end}"] + weights[f"bias_hh_{end}"]
                i, f, g, o = gates.chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                hidden.append(h)
            outputs.append(torch.stack(hidden[::-1] if back else hidden))
        x = torch.cat(outputs, -1)
    return rows, x


@pytest.mark.parametrize("gradients", [True, False])
def test_recurrent_weights_see_the_layers_input_and_the_state_before(gradients: bool) -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(8, 4, num_layers=2, bidirectional=True)
    batches = normal(5, 3, 8), normal(7, 2, 8, seed=1)
    fused = layer(batches[0])[0]
    with torch.set_grad_enabled(gradients):
        found = collected(layer, *((x,) for x in batches))
    by_hand = [lstm_by_hand(layer, x) for x in batches]
    torch.testing.assert_close(fused.double(), by_hand[0][1], **CLOSE)
    expected = {
        name: moments(torch.cat([row for rows, _ in by_hand for row in rows[name]]))
        for name in by_hand[0][0]
    }
    assert found.keys() == expected.keys()
    assert_hessians(found, expected)


def test_fused_layers_run_as_before_afterwards() -> None:
    layer, x = nn.LSTM(8, 4), normal(5, 3, 8)
    flags = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled
    before = layer(x)[0], torch.backends.mha.get_fastpath_enabled()
    collected(layer, (x,))
    assert (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled) == flags
    assert torch.backends.mha.get_fastpath_enabled() == before[1]
    assert torch.equal(layer(x)[0], before[0])


# --- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_projections_of_attention_see_their_own_inputs(training: bool) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, kdim=4, vdim=12, bias=False, batch_first=True)
    layer.train(training)
    query, key, value = normal(2, 5, 8), normal(2, 6, 4, seed=1), normal(2, 6, 12, seed=2)
    with torch.set_grad_enabled(training):
        found = collected(layer, (query, key, value))
        nn.init.eye_(layer.out_proj.weight)
        joined = layer(query, key, value)[0].detach()
    rows = {"q_proj_weight": query, "k_proj_weight": key, "v_proj_weight": value}
    rows["out_proj.weight"] = joined
    assert_hessians(found, {name: moments(x.flatten(0, 1)) for name, x in rows.items()})


def test_a_joined_projection_is_cut_where_its_inputs_differ() -> None:
    layer = nn.MultiheadAttention(8, 2)
    x, memory = normal(5, 2, 8), normal(6, 2, 8, seed=1)
    own, crossed = (collected(layer, batch) for batch in ((x, x, x), (x, memory, memory)))
    assert_hessians(own, {"in_proj_weight": moments(x.flatten(0, 1))})
    rows = [each.flatten(0, 1) for each in (x, memory, memory)]
    assert_hessians(crossed, {"in_proj_weight": moments(*rows)})


def test_attention_in_one_operation_is_seen_through() -> None:
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), normal(2, 5, 8)
    with torch.no_grad():
        assert_hessians(collected(layer, (x, x, x)), {"in_proj_weight": moments(x.flatten(0, 1))})


class Both(nn.Module):
    """Attention to itself, then to something else."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.attention(x, x, x)[0] + self.attention(x, memory, memory)[0]


def test_parts_count_the_rows_that_each_has_seen() -> None:
    x, memory = normal(5, 2, 8), normal(6, 2, 8, seed=1)
    mine, others = x.flatten(0, 1), memory.flatten(0, 1)
    found = collected(Both(), (x, memory), (memory, x))
    query = torch.cat([mine, mine, others, others])
    key = torch.cat([mine, others, others, mine])
    assert_hessians(found, {"attention.in_proj_weight": moments(query, key, key)})


# --- experts -------------------------------------------------------------------------------------


def qwen3_moe() -> nn.Module:
    sizes = {"hidden_size": 16, "moe_intermediate_size": 8, "num_experts": 4, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(vocab_size=32, num_hidden_layers=1, **sizes, **heads)
    return Qwen3MoeForCausalLM(config)


def routed_by_hand(experts: Any, x: Tensor, chosen: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What the two weights of each expert are multiplied with, in float64."""
    gate_up, found = experts.gate_up_proj.detach().double(), []
    for number in range(len(gate_up)):
        rows = x.double().repeat_interleave(chosen.shape[1], 0)[chosen.flatten() == number]
        gate, up = (rows @ gate_up[number].T).chunk(2, -1)
        found.append((rows, silu(gate) * up))
    return found


@pytest.mark.parametrize("make", [tiny_models.mixtral, qwen3_moe])
@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_each_expert_has_a_hessian_of_its_own(make: Callable[[], Any], how: str) -> None:
    torch.manual_seed(0)
    model = make()
    model.set_experts_implementation(how)
    experts, calls = model.model.layers[0].mlp.experts, []
    handle = experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    tokens = torch.randint(32, (4, 8))
    with torch.no_grad():
        model(tokens)
        handle.remove()
        found = collected(model, (tokens,))
    rows = routed_by_hand(experts, calls[0][0], calls[0][1])
    name = "model.layers.0.mlp.experts."
    for weight, inputs in zip(("gate_up_proj", "down_proj"), zip(*rows, strict=True), strict=True):
        assert all(len(each) for each in inputs)
        assert_hessians(found, {name + weight: moments(*inputs)})


def test_experts_picked_for_each_row_are_known_again_when_they_are_cast() -> None:
    model = Raw(lambda x, w: torch.bmm(x, w[torch.tensor([2, -3, 2])]), 3, 8, 6)
    targets, x = find_targets(model, "2:4", include=["w:-2"]), normal(3, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        how = lying(targets, lambda: model(x), None)
        with InputStatistics(Inputs(targets, how), second_moments=True) as statistics:
            model(x)
    rows = x.bfloat16()
    found = statistics.hessian["w"]
    assert_hessians({"w": found[[0, 2]]}, {"w": moments(rows[1], rows[[0, 2]].flatten(0, 1))})
    assert torch.equal(found[1], torch.eye(8))


def test_transposed_experts_side_by_side_have_hessians_of_their_own() -> None:
    torch.manual_seed(0)
    model = tiny_models.llama4()
    experts, calls = model.model.layers[0].feed_forward.experts, []
    handle = experts.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    tokens = torch.randint(32, (4, 8))
    with torch.no_grad():
        model(tokens)
        handle.remove()
        found = collected(model, (tokens,))
    x = calls[0].double().view(len(experts.gate_up_proj), -1, 16)
    gate, up = (x @ experts.gate_up_proj.detach().double()).chunk(2, -1)
    name = "model.layers.0.feed_forward.experts."
    assert_hessians(found, {name + "gate_up_proj": moments(*x)})
    assert_hessians(found, {name + "down_proj": moments(*(silu(gate) * up))})


class Experts(nn.Module):
    """Each row goes to the expert that its first number tells."""

    is_transposed = False

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(normal(3, 6, 8, seed=5))

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0].clamp(0, 2).long()
        return torch.cat([x[chosen == number] @ self.w[number].T for number in range(3)])


def test_an_expert_without_tokens_keeps_its_largest_weights(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, x = Experts(), normal(64, 8).abs().clamp(max=1.9)
    (target,) = find_targets(model, "2:4")
    by_size = initializers.magnitude(model.w.detach(), PATTERN)
    for method in ("wanda", "sparsegpt", "reconstruction"):
        with caplog.at_level(logging.WARNING), torch.no_grad():
            batches = lambda: [lambda: model(x)]  # noqa: E731
            mask = dict(initial_masks(method, [target], PATTERN, batches=batches))["w"]
        PATTERN.check(mask)
        assert torch.equal(mask[2], by_size[2])
        assert not torch.equal(mask[0], by_size[0])
    assert "w: 1 of 3 parts saw no input; masked by magnitude." in caplog.text


def test_moments_pair_what_an_expert_sees_in_both_networks() -> None:
    model = Experts()
    targets = find_targets(model, "2:4")
    dense, pruned = (normal(64, 8, seed=seed).abs() * 2 for seed in (0, 1))
    dense[:, 0] = pruned[:, 0] = torch.arange(64) % 3
    statistics = PairedStatistics(Inputs(targets, lying(targets, lambda: model(dense), None)))
    with statistics.dense():
        model(dense)
    with statistics.pruned():
        model(pruned)
    hessian, cross = statistics.moments["w"]
    for expert in range(3):
        x, y = pruned[expert::3].double(), dense[expert::3].double()
        torch.testing.assert_close(hessian[expert].double(), x.T @ x, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(cross[expert].double(), x.T @ (x + y) / 2, rtol=1e-5, atol=1e-4)


def test_what_would_need_too_much_memory_is_masked_by_magnitude(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(calibration, "_STATISTICS_BYTES", 3 * 8 * 8 * 4 - 1)
    model, x = Experts(), normal(64, 8)
    (target,) = find_targets(model, "2:4")
    with caplog.at_level(logging.WARNING), torch.no_grad():
        masks = dict(
            initial_masks("sparsegpt", [target], PATTERN, batches=lambda: [lambda: model(x)])
        )
    assert torch.equal(masks["w"], initializers.magnitude(model.w.detach(), PATTERN))
    assert "w: no input seen" in caplog.text


# --- transposed convolutions and bilinear layers -------------------------------------------------

TRANSPOSED: dict[str, tuple[Any, tuple[int, ...], tuple[Any, ...]]] = {
    "1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5), ()),
    "1d, asked for a size": (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5), ([12],)),
    "2d": (
        nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), padding=(2, 0), dilation=(2, 1)),
        (2, 4, 5, 3),
        (),
    ),
    "2d, longer": (nn.ConvTranspose2d(4, 6, 2, stride=2, output_padding=1), (4, 3, 3), ()),
    "3d": (nn.ConvTranspose3d(4, 6, 2, stride=2, padding=1), (2, 4, 3, 3, 2), ()),
}


@pytest.mark.parametrize(("layer", "shape", "more"), TRANSPOSED.values(), ids=TRANSPOSED)
def test_a_transposed_convolutions_second_moments_are_those_of_what_meets_its_weights(
    layer: Any, shape: tuple[int, ...], more: tuple[Any, ...]
) -> None:
    """By the derivative of every output in every weight, which is the input that meets it."""
    x = normal(*shape)
    found = collected(layer, (x, *more))["weight"]
    exact, size = nn.Parameter(layer.weight.detach()[:, :1].double()), (*more, None)[0]
    layer = type(layer)(
        *(4, 1, layer.kernel_size, layer.stride, layer.padding, layer.output_padding),
        bias=False,
        dilation=layer.dilation,
        dtype=torch.float64,
    )
    layer.weight = exact
    outputs = layer(x.double(), size).flatten()
    rows = [torch.autograd.grad(y, exact, retain_graph=True)[0] for y in outputs]
    assert_hessians(
        {"weight": found},
        {"weight": moments(torch.stack([r.movedim(0, -1).flatten() for r in rows]))},
    )


def test_a_bilinear_layer_sees_the_products_of_its_inputs() -> None:
    layer, x, y = nn.Bilinear(3, 8, 5), normal(2, 7, 3), normal(2, 7, 8, seed=1)
    rows = (x.double()[..., None] * y.double()[..., None, :]).view(14, 24)
    for given in ((x, y), (x,)):
        model: Any = layer if len(given) == 2 else KeywordBilinear(layer, y)
        name = "weight" if len(given) == 2 else "layer.weight"
        assert_hessians(collected(model, given), {name: moments(rows)})


class KeywordBilinear(nn.Module):
    def __init__(self, layer: nn.Module, y: Tensor) -> None:
        super().__init__()
        self.layer, self.y = layer, y

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, input2=self.y)


# --- parameters in products ----------------------------------------------------------------------


class Raw(nn.Module):
    def __init__(self, product: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.w, self.product = nn.Parameter(normal(*shape, seed=3)), product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.w)


PRODUCTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], int]] = {
    "x w": (torch.matmul, (8, 6), 0),
    "w x": (lambda x, w: w @ x.mT, (6, 8), -1),
    "einsum of one dimension": (lambda x, w: torch.einsum("bth,hnd->btnd", x, w), (8, 2, 3), 0),
    "einsum of two": (
        lambda x, w: torch.einsum("btnd,knd->btk", x.view(2, 5, 2, 4), w),
        (6, 2, 4),
        -1,
    ),
    "einsum of two, the other way": (
        lambda x, w: torch.einsum("btdn,knd->btk", x.view(2, 5, 4, 2), w),
        (6, 2, 4),
        -1,
    ),
    "a transposed copy": (lambda x, w: x @ w.t().contiguous(), (6, 8), -1),
    "expanded over batches": (lambda x, w: torch.bmm(x, w.expand(2, 8, 6)), (8, 6), 0),
    "one row": (lambda x, w: torch.stack([torch.mv(w, y) for y in x.flatten(0, 1)]), (6, 8), -1),
}


@pytest.mark.parametrize("context", [nullcontext, torch.inference_mode])
@pytest.mark.parametrize(("product", "shape", "dim"), PRODUCTS.values(), ids=PRODUCTS)
def test_the_inputs_of_a_parameter_are_in_the_order_of_its_weights(
    product: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, ...],
    dim: int,
    context: Callable[[], AbstractContextManager[Any]],
) -> None:
    """By the derivative of every output in the weights of the first one."""
    model, x = Raw(product, *shape), normal(2, 5, 8)
    targets = find_targets(model, "2:4", include=[f"w:{dim}"])
    with context():
        how = lying(targets, lambda: model(x), None)
        with InputStatistics(Inputs(targets, how), second_moments=True) as statistics:
            model(x)
    w = nn.Parameter(model.w.detach().double())
    jacobian = torch.autograd.functional.jacobian(lambda w: product(x.double(), w), w)
    rows = jacobian.movedim(jacobian.dim() - len(shape) + dim % len(shape), -1)
    rows = rows.flatten(0, -len(shape) - 1).reshape(-1, w.numel() // 8, 8)
    rows = rows[rows.abs().sum(-1) > 0]  # an output's own weights
    torch.testing.assert_close(
        statistics.hessian["w"][0].double(), moments(rows)[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("product", "shape", "dim"),
    [
        (lambda x, w: x @ (w * 2), (8, 6), 0),
        (lambda x, w: x[..., :4] @ w[:4] + x[..., 4:] @ w[4:], (8, 6), 0),
        (lambda x, w: torch.cat([x @ w[0, :, :3], x[:1] @ w[0, :, 3:]]), (1, 8, 6), -2),
        (lambda x, w: x @ w.relu(), (8, 6), 0),
    ],
    ids=["scaled", "in pieces", "some outputs", "changed"],
)
def test_what_is_not_understood_is_left_unseen(
    product: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], dim: int
) -> None:
    model = Raw(product, *shape)
    targets = find_targets(model, "2:4", include=[f"w:{dim}"])
    assert lying(targets, lambda: model(normal(2, 5, 8)), None) == {}


def test_another_use_in_a_later_batch_is_an_error() -> None:
    model = Raw(lambda x, w: x @ w if len(x) == 2 else x[..., :4] @ w[:4], 8, 6)
    targets = find_targets(model, "2:4", include=["w:0"])
    how = lying(targets, lambda: model(normal(2, 5, 8)), None)
    statistics = InputStatistics(Inputs(targets, how), second_moments=False)
    with (
        pytest.raises(RuntimeError, match="'w' is not multiplied alike in all batches"),
        statistics,
    ):
        model(normal(3, 5, 8))


def test_backward_passes_are_not_seen() -> None:
    model, x = Raw(torch.matmul, 8, 8), normal(2, 5, 8).requires_grad_()
    targets = find_targets(model, "2:4", include=["w:0"])
    assert lying(targets, lambda: model(x).sum().backward(), None).keys() == {"w"}


def test_processes_agree_on_how_a_weight_lies() -> None:
    """Each rank's part of the sum is what another one that saw cross-attention adds."""
    layer = nn.MultiheadAttention(8, 2)
    targets = [t for t in find_targets(layer, "2:4") if t.name == "in_proj_weight"]
    x, memory = normal(5, 2, 8), normal(6, 2, 8, seed=1)
    given: list[Tensor] = []

    def kept(flags: Tensor) -> Tensor:
        given.append(flags)
        return flags

    crossed = lying(targets, lambda: layer(x, memory, memory), kept)
    joined = lying(targets, lambda: layer(x, x, x), lambda flags: flags + given[0])
    assert joined == crossed
    assert joined["in_proj_weight"].parts == 3
