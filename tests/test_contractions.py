"""Laws of what one watched forward pass tells: along which dimension each weight is summed over."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from maskpro_lightning.weights import reasons
from maskpro_lightning.weights.contractions import Observed, Product, observe
from maskpro_lightning.weights.pieces import Piece
from maskpro_lightning.weights.targets import select
from maskpro_lightning.weights.verification import verify

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


class Raw(nn.Module):
    """One parameter, and what is done with it and the input."""

    def __init__(self, shape: tuple[int, ...], product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(shape))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.w)


def summed(seen: Observed, model: nn.Module) -> dict[str, set[int]]:
    """The dimensions summed over by parameters of two or more dimensions, if all agree."""
    return {
        name: set().union(*(p.dims for p in seen.products.get(id(weight), set())))
        for name, weight in model.named_parameters()
        if weight.dim() > 1
    }


def watched(model: nn.Module, *inputs: Any) -> dict[str, set[int]]:
    with observe(model) as seen:
        model(*inputs)
    return summed(seen, model)


def picked(x: Tensor, w: Tensor) -> Tensor:
    """A weight for each row of the batch, by numbers that depend on it."""
    return torch.bmm(x, w[x[:, 0, : len(w)].argmax(-1)])


def grouped(x: Tensor, w: Tensor) -> Tensor:
    """Rows sorted by their experts."""
    ends = torch.tensor([2, 4, 6, 10], dtype=torch.int32)
    return torch._grouped_mm(x.flatten(0, 1).bfloat16(), w.bfloat16(), offs=ends)


# --- the operations of PyTorch, each against what it means --------------------------------------

PRODUCTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor], set[int]]] = {
    "linear": ((8, 16), linear, {1}),
    "x w": ((16, 8), torch.matmul, {0}),
    "matrix by vector": ((8, 16), lambda x, w: torch.mv(w, x[0, 0]), {1}),
    "batches of matrices": ((2, 16, 8), torch.bmm, {1}),
    "baddbmm": ((2, 16, 8), lambda x, w: torch.baddbmm(torch.zeros(()), x, w), {1}),
    "a transposed copy": ((16, 8), lambda x, w: linear(x, w.t().contiguous()), {0}),
    "a cast": ((8, 16), lambda x, w: linear(x.bfloat16(), w.bfloat16()), {1}),
    "a cast of a transposed view": ((16, 8), lambda x, w: linear(x.double(), w.T.double()), {0}),
    "a chunk": ((16, 24), lambda x, w: x @ w.chunk(3, 1)[1], {0}),
    "every second row": ((8, 16), lambda x, w: linear(x, w[::2]), {1}),
    "every second column": ((8, 32), lambda x, w: linear(x, w[:, ::2]), {1}),
    "flattened": ((8, 2, 8), lambda x, w: linear(x, w.flatten(1)), {1, 2}),
    "unflattened": ((4 * 16, 8), lambda x, w: x @ w.view(4, 16, 8)[3], {0}),
    "flattened, copied and unflattened": (
        (8, 2, 16),
        lambda x, w: linear(x, (w * 1).permute(0, 2, 1).flatten(1).clone().view(8, 16, 2)[..., 1]),
        {2},
    ),
    "permuted and copied": ((8, 2, 16), lambda x, w: x @ w.permute(2, 1, 0).reshape(16, 16), {2}),
    "side by side": ((8, 16), lambda x, w: linear(x, torch.cat([w, -w])), {1}),
    "one behind the other": (
        (8, 16),
        lambda x, w: linear(torch.cat([x, x], -1), torch.cat([w, w], 1)),
        {1},
    ),
    "stacked": ((16, 8), lambda x, w: torch.bmm(x, torch.stack([w, w])), {0}),
    "expanded": ((16, 8), lambda x, w: torch.bmm(x, w.expand(2, 16, 8)), {0}),
    "one of some experts": ((4, 8, 16), lambda x, w: linear(x, w[1]), {2}),
    "experts by the batch": ((4, 16, 8), picked, {1}),
    "rows of experts": ((4, 16, 8), grouped, {1}),
    "einsum of one dimension": ((16, 2, 8), partial(torch.einsum, "bth,hnd->btnd"), {0}),
    "einsum of the last": ((2, 8, 16), partial(torch.einsum, "bth,ndh->btnd"), {2}),
    "einsum of two": (
        (4, 2, 8),
        lambda x, w: torch.einsum("btnd,hnd->bth", x.view(2, 5, 2, 8), w),
        {1, 2},
    ),
    "tensordot": ((8, 16), lambda x, w: torch.tensordot(x, w, dims=([2], [1])), {1}),
    "a transposed convolution": (
        (16, 4, 3),
        lambda x, w: nn.functional.conv_transpose1d(x.mT, w, groups=2),
        {0, 2},
    ),
    "time, batch, channel": (
        (3, 16, 8),
        lambda x, w: torch.conv_tbc(x, w, torch.zeros(8)),
        {0, 1},
    ),
}


@pytest.mark.parametrize("grads", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("shape", "product", "dims"), PRODUCTS.values(), ids=PRODUCTS)
def test_the_dimension_that_a_product_sums_over_is_seen(
    shape: tuple[int, ...],
    product: Callable[[Tensor, Tensor], Tensor],
    dims: set[int],
    grads: Callable[[], AbstractContextManager[Any]],
) -> None:
    model = Raw(shape, product)
    with grads():
        assert watched(model, X) == {"w": dims}


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "linear": (lambda: nn.Linear(16, 8), (X,)),
    "bilinear": (lambda: nn.Bilinear(16, 8, 4), (X, X[..., :8])),
    "convolution": (lambda: nn.Conv2d(4, 8, 3, groups=1), (torch.zeros(2, 4, 8, 8),)),
    "grouped convolution": (lambda: nn.Conv1d(16, 8, 3, groups=2), (X.mT,)),
    "transposed convolution": (lambda: nn.ConvTranspose1d(16, 8, 3, groups=2), (X.mT,)),
    "channels last": (
        lambda: nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last),
        (torch.zeros(2, 4, 8, 8),),
    ),
    "LSTM": (lambda: nn.LSTM(16, 8, 2, bidirectional=True), (X,)),
    "LSTM with projections": (lambda: nn.LSTM(16, 8, proj_size=4), (X,)),
    "GRU": (lambda: nn.GRU(16, 8), (X,)),
    "RNN": (lambda: nn.RNN(16, 8), (X,)),
    "LSTMCell": (lambda: nn.LSTMCell(16, 8), (X[0],)),
    "GRUCell": (lambda: nn.GRUCell(16, 8), (X[0],)),
    "attention": (lambda: nn.MultiheadAttention(16, 2, batch_first=True), (X, X, X)),
    "attention with widths of its own": (
        lambda: nn.MultiheadAttention(16, 2, kdim=8, vdim=4),
        (X, X[..., :8], X[..., :4]),
    ),
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (X,)),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize(("make", "inputs"), LAYERS.values(), ids=LAYERS)
def test_groups_of_every_layer_lie_along_what_it_sums_over(
    make: Callable[[], nn.Module], inputs: tuple[Tensor, ...], training: bool
) -> None:
    model = make().train(training)
    with torch.set_grad_enabled(training):  # without, attention runs in one operation
        seen = watched(model, *inputs)
    selection = select(model, "2:4")
    assert len(selection.targets) == len(seen)
    for target in selection.targets:
        assert target.input_dim % len(target.shape) in seen[target.name], target.name


TOKENS = torch.arange(16).view(2, 8)


@pytest.mark.parametrize(
    "make",
    [
        tiny_models.llama,
        tiny_models.gpt2,
        tiny_models.mixtral,
        tiny_models.gpt_oss,
        tiny_models.llama4,
        tiny_models.dbrx,
        tiny_models.xlnet,
        tiny_models.funnel,
        tiny_models.recurrent_gemma,
        tiny_models.grouped_convbert,
        tiny_models.jetmoe,
        tiny_models.zamba,
    ],
    ids=lambda make: make.__name__,
)
@pytest.mark.filterwarnings("ignore")
def test_groups_of_every_known_layer_of_transformers_lie_along_what_it_sums_over(
    make: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    model = make()
    for part in model.modules():  # recurrent ones have no such cache
        if hasattr(part, "config"):
            part.config.use_cache = False
    with observe(model) as seen:
        model(TOKENS.repeat(4, 1))
    verdict = verify(select(model, "2:4"), seen)
    assert [target.name for target in verdict.idle] == []
    unknown = [each.name for each, _ in verdict.unmasked if each.reason == reasons.UNKNOWN]
    assert [
        name for name in unknown if not re.search(r"(router|gate|bias|seg_embed|r_[rsw])", name)
    ] == []


def test_axes_of_a_copy_lie_as_its_dimensions_do() -> None:
    weight = torch.zeros(4, 2, 8)
    view = weight.flatten(1)
    lying = Piece.of(weight, 0).copied(view, view.t().contiguous().t())
    assert lying is not None
    # (4, 16) in columns: 4 bytes from row to row, 16 from column to column.
    assert [(axis.stride, axis.size, axis.dim) for axis in lying.axes] == [
        (4, 4, 0),
        (16, 8, 2),
        (128, 2, 1),
    ]


# --- what is no product of a weight -------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "use"),
    [
        ((1, 5, 16), lambda x, w: (x + w) @ torch.ones(16, 4)),
        ((30, 16), lambda x, w: nn.functional.embedding(torch.arange(5), w) @ torch.ones(16, 4)),
        ((30, 16), lambda x, w: w[x[:, 0].argmax(-1)] @ torch.ones(16, 4)),
        ((5, 16), lambda x, w: torch.cat([x, w.expand(2, 5, 16)], 1) @ torch.ones(16, 4)),
    ],
    ids=["added to the batch", "looked up", "looked up by the batch", "put beside the batch"],
)
def test_a_weight_that_becomes_data_is_not_multiplied_by_what_comes_after(
    shape: tuple[int, ...], use: Callable[[Tensor, Tensor], Tensor]
) -> None:
    model = Raw(shape, use)
    with observe(model) as seen:
        model(X)
    assert id(model.w) not in seen.with_data


def test_a_copy_that_the_batch_is_written_into_is_no_weight_any_more() -> None:
    def overwritten(x: Tensor, w: Tensor) -> Tensor:
        copy = w.clone()
        copy.copy_(x)
        return copy @ torch.ones(16, 4)

    model = Raw((2, 5, 16), overwritten)
    with observe(model) as seen, torch.no_grad():
        model(X)
    assert seen.products == {}


def test_weights_that_are_multiplied_with_each_other_alone_are_not_multiplied_with_data() -> None:
    model = Raw((16, 16), lambda x, w: linear(x, w @ w.t()))
    with observe(model) as seen:
        model(X)
    assert seen.products[id(model.w)]
    assert seen.with_data == set()


# --- other weights made of the weight -----------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "by"),
    [
        (lambda w: w - w.mean(1, keepdim=True), "sub"),
        (lambda w: w + w.detach(), "add"),
        (lambda w: w.softmax(1), "_softmax"),
        (lambda w: w.exp() * 2, "exp"),
        (lambda w: w.clone().sub_(1), "sub_"),
        (lambda w: w.double().exp().float().t().contiguous().t(), "exp"),
        (lambda w: nn.functional.layer_norm(w, [16]), "native_layer_norm"),
        (lambda w: w * w.norm(), None),
        (nn.functional.normalize, None),
        (lambda w: (w / 0.1).round() * 0.1, None),
        (lambda w: torch.where(w.abs() > 0.1, w, 0), None),
        (lambda w: w.clone().mul_(2), None),
        (lambda w: torch.empty_like(w).copy_(w), None),
    ],
)
def test_weights_that_lose_the_zeros_of_the_weight_are_told_from_those_that_keep_them(
    make: Callable[[Tensor], Tensor], by: str | None
) -> None:
    model = Raw((8, 16), lambda x, w: linear(x, make(w)))
    with observe(model) as seen:
        model(X)
    assert seen.products[id(model.w)] == {Product(frozenset({1}), "mm", by)}


# --- nothing changes, nothing stays -------------------------------------------------------------


def deep() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.LSTM(16, 16)).train()


@pytest.mark.parametrize("autocast", [True, False])
def test_results_gradients_and_random_numbers_are_those_of_a_pass_that_nobody_watches(
    autocast: bool,
) -> None:
    found = []
    for watch in (True, False):
        model = deep()
        with (
            observe(model) if watch else nullcontext() as seen,
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            output = model(X)[0]
        output.square().sum().backward()
        found.append([output, *(p.grad for p in model.parameters()), torch.rand(3)])
        if watch:
            assert all(summed(seen, model).values())
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_nothing_is_left_when_the_block_raises() -> None:
    model = deep()
    hooks = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(RuntimeError, match="shape"), observe(model):
        model(X[..., :3])
    assert [dict(vars(module)) for module in model.modules()] == hooks
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_a_compiled_module_is_seen_through_and_compiled_afterwards() -> None:
    runs: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        return lambda *args: (runs.append(1), graph(*args))[1]

    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    compiled = torch.compile(model, backend=backend)
    assert watched(compiled, X) == {"_orig_mod.0.weight": {1}, "_orig_mod.1.weight": {1}}
    assert runs == []
    compiled(X)
    assert len(runs) == 1
    with observe(compiled) as seen:
        compiled(X)
    assert summed(seen, model) == {"0.weight": {1}, "1.weight": {1}}
    assert len(runs) == 1
    compiled(X)
    assert len(runs) == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_checkpointed_is_seen(reentrant: bool) -> None:
    model = nn.Linear(16, 8)
    with observe(model) as seen:
        checkpoint(model, X.clone().requires_grad_(), use_reentrant=reentrant)
    assert summed(seen, model) == {"weight": {1}}


def test_weights_that_share_a_storage_are_told_apart() -> None:
    flat = torch.randn(2 * 8 * 16)
    first, second = nn.Linear(16, 8, bias=False), nn.Linear(8, 16, bias=False)
    first.weight.data = flat[:128].view(8, 16)
    second.weight.data = flat[128:].view(16, 8)
    model = nn.Sequential(first, second)
    with observe(model) as seen:
        first(X)
    assert summed(seen, model) == {"0.weight": {1}, "1.weight": set()}


# --- the verdict --------------------------------------------------------------------------------


class Wrong(nn.Module):
    """A layer that multiplies the other way than the user says, beside a right one."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 16, 16))
        self.other = nn.Parameter(torch.randn(16, 16))
        self.fc = nn.Linear(16, 16)
        self.idle = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.other.mean(1, keepdim=True)
        return self.fc(x @ self.w[3]) + linear(x, self.other - mean)


def test_groups_that_lie_otherwise_and_copies_that_lose_zeros_are_refused_together() -> None:
    model = Wrong()
    with observe(model) as seen:
        model(X)
    message = (
        "2 of 4 weights would get masks that no product sees: 'w' of shape (16, 16, 16) has groups "
        'along dimension 2, but its product (mm) sums over 1: name that with include=["w:1"]; '
        "'other' is multiplied only through other weights that the forward pass computes from it "
        '(sub): leave it out with exclude=["other"].'
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        verify(select(model, "2:4", ["w:2", "other:1"]), seen)


def test_the_verdict_names_what_multiplies_unmasked_and_what_does_not_multiply() -> None:
    model = Wrong()
    with observe(model) as seen:
        model(X)
    verdict = verify(select(model, "2:4", exclude=["fc"]), seen)
    assert [(each.name, each.reason, dim) for each, dim in verdict.unmasked] == [
        ("w", "is of a layer whose product is not known", 1),
        ("other", "is of a layer whose product is not known", None),
        ("fc.weight", "is excluded", 1),
    ]
    assert [target.name for target in verdict.idle] == ["idle.weight"]
    assert verdict.unobserved == []


def test_a_weight_that_is_multiplied_both_ways_may_be_masked_along_either() -> None:
    model = Raw((16, 16), lambda x, w: linear(linear(x, w), w.t()))
    with observe(model) as seen:
        model(X)
    for dim in (0, 1):
        assert verify(select(model, "2:4", [f"w:{dim}"]), seen).idle == []


def test_a_parametrised_weight_is_seen_through_what_it_is_computed_from() -> None:
    model = parametrizations.weight_norm(nn.Linear(16, 8))
    with observe(model) as seen:
        model(X)
    (original,) = (w for name, w in model.named_parameters() if name.endswith("original1"))
    assert seen.products[id(original)]
