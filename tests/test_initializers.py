"""Laws of the initial masks: equal to slow oracles, in every layout, from any layer's inputs."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import initializer_oracle
import oracle
import pytest
import torch
from modules import inputs_of
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from maskpro_lightning.initial import initializers
from maskpro_lightning.initial.statistics import InputStatistics, bytes_needed, layer_shape
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.masks.philox import key_of

TWO_OF_FOUR = NMPattern(2, 4)
KEY = key_of(0, "layer.weight")
# What rounding to float32 leaves of a mean at worst, relative to the size of what is averaged: a
# BLAS may add up to 2^12 rows one by one. A bfloat16 anywhere would leave 2^-9.
ROUNDING = 2**12 * 2**-24

every_pattern = pytest.mark.parametrize(
    "pattern", [NMPattern(1, 2), NMPattern(2, 4), NMPattern(3, 5), NMPattern(4, 8)], ids=str
)
both_moments = pytest.mark.parametrize("second_moments", [True, False])
# Each takes the rows (R, 24) of a Linear into another layout, given with its input_dim.
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "Linear": (lambda rows: rows, -1),
    "Linear by columns": (lambda rows: rows.T.contiguous().T, -1),
    "Conv1D": (lambda rows: rows.T.contiguous(), 0),
    "Conv1d": (lambda rows: rows.unflatten(1, (3, 8)).mT.contiguous(), 1),
    "Conv2d": (lambda rows: rows.unflatten(1, (1, 3, 8)).movedim(-1, 1).contiguous(), 1),
    "channels last": (lambda rows: rows.unflatten(1, (3, 1, 8)).movedim(-1, 1), 1),
    "experts": (lambda rows: rows.unflatten(0, (2, -1)), -1),
    "transposed experts": (lambda rows: rows.unflatten(0, (2, -1)).mT.contiguous(), -2),
}
CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(8, 6, 3, padding=1), (8, 7)),
    "2d": (nn.Conv2d(8, 6, (3, 2), stride=(2, 1), padding=(0, 2)), (8, 7, 6)),
    "3d": (nn.Conv3d(4, 6, (2, 3, 1), dilation=(1, 2, 1)), (4, 3, 6, 4)),
    "groups": (nn.Conv2d(8, 6, 3, groups=2, dilation=2, stride=3), (8, 11, 9)),
    "same": (nn.Conv2d(8, 6, (4, 3), padding="same"), (8, 5, 6)),
    "valid": (nn.Conv2d(8, 6, 3, padding="valid"), (8, 5, 6)),
    "reflect": (nn.Conv2d(8, 6, 3, padding=(1, 2), padding_mode="reflect"), (8, 5, 6)),
    "replicate": (nn.Conv2d(8, 6, 3, padding=(1, 2), padding_mode="replicate"), (8, 5, 6)),
    "circular": (nn.Conv2d(8, 6, 3, padding=(1, 2), padding_mode="circular"), (8, 5, 6)),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(*shape: int, seed: int = 0) -> Tensor:
    """Inputs whose products are exact in float32, while they themselves are not in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-300, 300, shape, generator=generator).float()


def hessian_of(columns: int, parts: int = 1, seed: int = 0) -> Tensor:
    """Mean of 2 x x^T of correlated inputs of unequal size, (C, K, K)."""
    mixing = normal(columns, columns, seed=seed) + 2 * torch.eye(columns)
    inputs = normal(parts, 4 * columns, columns, seed=seed + 1) @ mixing
    return inputs.mT @ inputs / (2 * columns)


def collect(layer: nn.Module, inputs: Tensor, second_moments: bool = True) -> InputStatistics:
    with InputStatistics(inputs_of(layer=layer), second_moments=second_moments) as statistics:
        layer(inputs)
    return statistics


def assert_same_moments(actual: Tensor, expected: Tensor) -> None:
    """Equal but for rounding, for which a sum of x_i x_j may be as large as |x_i| |x_j|."""
    size = expected.diagonal(dim1=-2, dim2=-1).double().sqrt()
    bound = ROUNDING * size[..., None] * size[..., None, :]
    assert actual.shape == expected.shape
    assert ((actual.double() - expected).abs() <= bound).all()


# --- masks --------------------------------------------------------------------------------------


@every_pattern
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_magnitude_and_wanda_are_the_oracles(pattern: NMPattern, dtype: torch.dtype) -> None:
    # Few values, hence ties; products that are exact in float32 and overflow float16.
    weight = normal(30, 40).mul(8).round().to(dtype)
    norm = normal(1, 40, seed=1).abs().mul(3).ceil() * 20_000
    expected = initializer_oracle.keep_highest(weight.abs(), pattern.n, pattern.m)
    assert initializers.magnitude(weight, pattern).tolist() == expected
    expected = initializer_oracle.wanda(weight, norm[0], pattern.n, pattern.m)
    assert initializers.wanda(weight, norm.float(), pattern).tolist() == expected


@every_pattern
@pytest.mark.parametrize("block", [1, 12, 128])
@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_sparsegpt_is_exact_elimination(pattern: NMPattern, block: int, damping: float) -> None:
    weight, hessian, live = normal(12, 40), hessian_of(40), torch.ones(40, dtype=torch.bool)
    live[[3, 4, 6, 7, 20]] = False
    hessian *= live * live[:, None]
    mask, updated = initializers.sparsegpt(weight, hessian, pattern, damping=damping, block=block)
    expected = initializer_oracle.sparsegpt(weight, hessian[0], pattern.n, pattern.m, damping)
    assert torch.equal(mask, expected[0])
    assert torch.equal(updated != 0, mask & live)
    # Solving with H amplifies rounding by its condition number.
    condition = float(torch.linalg.cond(hessian[0][live][:, live]))
    torch.testing.assert_close(updated, expected[1], rtol=0, atol=40 * condition * 2**-53)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sparsegpt_computes_in_float32_and_answers_in_the_weights_dtype(dtype: torch.dtype) -> None:
    weight, hessian = normal(12, 40).to(dtype), hessian_of(40).float()
    mask, updated = initializers.sparsegpt(weight, hessian, TWO_OF_FOUR)
    expected = initializer_oracle.sparsegpt(weight, hessian[0], 2, 4, 0.01)
    assert torch.equal(mask, expected[0])
    rounding = torch.finfo(dtype).eps / 2
    damped = hessian[0].double() + 0.01 * hessian[0].diagonal().mean() * torch.eye(40)
    atol = 40 * float(torch.linalg.cond(damped)) * 2**-24
    assert updated.dtype == dtype
    torch.testing.assert_close(updated.double(), expected[1], rtol=rounding, atol=atol)


def test_without_correlations_sparsegpt_is_wanda() -> None:
    weight, norm = normal(12, 40), normal(1, 40, seed=1).abs()
    hessian = 2 * norm.square().diag_embed()
    mask, updated = initializers.sparsegpt(weight, hessian, TWO_OF_FOUR, damping=0.0)
    assert torch.equal(mask, initializers.wanda(weight, norm, TWO_OF_FOUR))
    assert torch.equal(updated, weight * mask)


@pytest.mark.parametrize("seed", range(5))
def test_the_more_a_method_knows_the_smaller_the_error_of_the_outputs(seed: int) -> None:
    weight, place, size = normal(64, 64, seed=seed), torch.arange(64), normal(64, seed=5 + seed)
    # Neighbouring inputs are alike (correlation 0.8), and their sizes spread as e^normal.
    hessian = 0.8 ** (place - place[:, None]).abs() * (size + size[:, None]).exp()[None]
    norm = hessian.diagonal(dim1=1, dim2=2).sqrt()
    mask, updated = initializers.sparsegpt(weight, hessian, TWO_OF_FOUR)
    masks = [
        initializers.wanda(weight, norm, TWO_OF_FOUR),
        initializers.magnitude(weight, TWO_OF_FOUR),
        initializers.random(weight, TWO_OF_FOUR, key=KEY),
    ]
    pruned = [updated, weight * mask, *(weight * other for other in masks)]
    error, unchanged, *others = (initializer_oracle.error(weight, p, hessian[0]) for p in pruned)
    assert error < unchanged
    assert error < others[0] < others[1] < others[2]


@pytest.mark.parametrize(("lay_out", "input_dim"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("method", ["magnitude", "random", "nonzeros", "wanda", "sparsegpt"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_layout_changes_nothing(
    lay_out: Callable[[Tensor], Tensor], input_dim: int, method: str, parts: int
) -> None:
    def prune(weight: Tensor, hessian: Tensor, input_dim: int) -> tuple[Tensor, ...]:
        norm = hessian.diagonal(dim1=1, dim2=2).sqrt()
        given = {"wanda": [norm], "sparsegpt": [hessian]}.get(method, [])
        key = {"key": KEY} if method == "random" else {}
        result = getattr(initializers, method)(weight, *given, TWO_OF_FOUR, input_dim, **key)
        return result if isinstance(result, tuple) else (result,)

    rows, hessian = normal(8, 24), hessian_of(24, parts)
    if method == "nonzeros":
        rows *= initializers.magnitude(rows, TWO_OF_FOUR)
    # Each part of the outputs is a layer of its own; random masks know no parts.
    pieces = rows.chunk(1 if method == "random" else parts)
    alone = [prune(piece, hessian[i : i + 1], -1) for i, piece in enumerate(pieces)]
    weight = lay_out(rows).requires_grad_()
    for result, *expected in zip(prune(weight, hessian, input_dim), *alone, strict=True):
        assert result.stride() == weight.stride()
        assert not result.requires_grad
        torch.testing.assert_close(result, lay_out(torch.cat(expected)), rtol=0, atol=1e-12)
        assert oracle.keeps_exactly(2, 4, result != 0, input_dim)


@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(3, 5)], ids=str)
def test_random_masks_are_uniform_and_functions_of_key_and_group(pattern: NMPattern) -> None:
    groups = 2**16 + 100  # more than are drawn at once
    weight = torch.zeros(groups // 4, 4 * pattern.m)
    mask = initializers.random(weight, pattern, key=KEY)
    assert torch.equal(initializers.random(weight[:50], pattern, key=KEY), mask[:50])
    assert not torch.equal(initializers.random(weight, pattern, key=key_of(1)), mask)
    kinds = oracle.sets(pattern.n, pattern.m)
    drawn = mask.view(-1, pattern.m)
    assert not torch.equal(drawn[2**16 :], drawn[:100])
    share = torch.stack([(drawn == kind).all(-1).double().mean() for kind in kinds])
    p = 1 / len(kinds)
    assert (share - p).abs().max() < 5 * (p * (1 - p) / groups) ** 0.5  # five sigma


@every_pattern
def test_nonzeros_are_the_mask_of_a_sparse_weight(pattern: NMPattern) -> None:
    weight = normal(6, 40)
    mask = initializers.magnitude(weight, pattern)
    assert torch.equal(initializers.nonzeros(weight * mask, pattern), mask)


# --- statistics ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolutions_second_moments_predict_those_of_its_outputs(
    layer: nn.Conv2d, shape: tuple[int, ...], batched: bool
) -> None:
    inputs = integers(3, *shape) if batched else integers(*shape)
    exact = copy.deepcopy(layer).double()
    exact.weight, exact.bias = nn.Parameter(normal(*layer.weight.shape)), None
    outputs = exact(inputs.double()).detach().movedim(-len(shape), 0)
    outputs = outputs.flatten(1).unflatten(0, (layer.groups, -1))
    rows = exact.weight.detach().movedim(1, -1).flatten(1).unflatten(0, (layer.groups, -1))
    hessian = collect(layer, inputs).hessian["layer"].double()
    size = rows.abs() @ hessian.diagonal(dim1=1, dim2=2).sqrt()[..., None]
    expected = 2 * outputs @ outputs.mT / outputs.shape[-1]
    assert ((rows @ hessian @ rows.mT - expected).abs() <= ROUNDING * size @ size.mT).all()


@pytest.mark.parametrize("layer", [nn.Linear(8, 6), Conv1D(6, 8)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (5000, 8)], ids=str)
def test_statistics_of_a_matrix_product_are_moments_of_its_inputs(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    inputs = integers(*shape)
    rows = inputs.view(-1, 8).double()
    expected = 2 * (rows.T @ rows)[None] / len(rows)
    full, lean = collect(layer, inputs), collect(layer, inputs, second_moments=False)
    assert_same_moments(full.hessian["layer"], expected)
    for norm in (full.norm["layer"], lean.norm["layer"]):
        assert norm.dtype == torch.float32
        rms = (expected.diagonal(dim1=1, dim2=2) / 2).sqrt()
        torch.testing.assert_close(norm.double(), rms, rtol=ROUNDING, atol=0)


@both_moments
def test_statistics_are_float32_without_gradients_in_any_mode(second_moments: bool) -> None:
    layer, inputs = nn.Linear(8, 6), integers(3, 5, 8).requires_grad_()
    with InputStatistics(inputs_of(layer=layer), second_moments=second_moments) as statistics:
        with torch.autocast("cpu", torch.bfloat16):
            layer(inputs[0])
        with torch.inference_mode():
            layer(inputs[1])
        layer(input=inputs[2])
        layer.bfloat16()(torch.ones(2**12, 8, dtype=torch.bfloat16))  # whose sums stop at 256
    rows = torch.cat([inputs.detach().view(-1, 8), torch.ones(2**12, 8)]).double()
    expected = 2 * (rows.T @ rows)[None] / len(rows)
    if second_moments:
        assert statistics.hessian["layer"].dtype == torch.float32
        assert_same_moments(statistics.hessian["layer"], expected)
    rms = (expected.diagonal(dim1=1, dim2=2) / 2).sqrt()
    assert not statistics.norm["layer"].requires_grad
    torch.testing.assert_close(statistics.norm["layer"].double(), rms, rtol=ROUNDING, atol=0)


@both_moments
def test_statistics_of_parts_join_to_those_of_the_whole(second_moments: bool) -> None:
    layers = {name: nn.Linear(8, 6) for name in ("both", "one", "neither")}
    barrier, given = Barrier(2, timeout=60), {}

    def collected(**batches: Tensor) -> InputStatistics:
        with InputStatistics(inputs_of(**layers), second_moments=second_moments) as statistics:
            for name, batch in batches.items():
                layers[name](batch)
        return statistics

    def reduce(rank: int) -> None:
        def sum_(tensor: Tensor) -> Tensor:
            given[rank] = tensor
            barrier.wait()
            total = given[0] + given[1]
            barrier.wait()
            return total

        ranks[rank].reduce(sum_)

    inputs = integers(7, 8)
    whole = collected(both=inputs, one=inputs)
    ranks = [collected(both=inputs[:3]), collected(both=inputs[3:], one=inputs)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(reduce, range(2)))
    for rank in ranks:
        assert rank.unseen == whole.unseen == ["neither"]
        for name in ("both", "one"):
            torch.testing.assert_close(rank.norm[name], whole.norm[name], rtol=ROUNDING, atol=0)
            if second_moments:
                assert_same_moments(rank.hessian[name], whole.hessian[name])


def test_layers_without_input_are_unseen() -> None:
    attention = nn.MultiheadAttention(8, 2)
    layers = {
        "used in pieces": attention.out_proj,
        "transposed in groups": nn.ConvTranspose2d(8, 6, 1, groups=2),
        "never called": nn.Linear(8, 6),
        "empty": nn.Linear(8, 6),
        "seen": nn.Linear(8, 6),
    }
    with InputStatistics(inputs_of(**layers), second_moments=True) as statistics:
        attention(*[torch.ones(3, 8)] * 3)
        layers["transposed in groups"](torch.ones(1, 8, 2, 2))
        layers["empty"](torch.ones(0, 8))
        layers["seen"](torch.ones(3, 8))
    assert statistics.unseen == [name for name in layers if name != "seen"]
    assert list(statistics.norm) == list(statistics.hessian) == ["seen"]


def test_hooks_are_removed_also_when_the_body_raises() -> None:
    layer = nn.Linear(8, 6)
    statistics = InputStatistics(inputs_of(layer=layer), second_moments=False)
    layer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError, match="by zero"), statistics:
        layer(torch.ones(1, 8))
    assert not layer._forward_pre_hooks
    assert torch.equal(statistics.norm["layer"], torch.ones(1, 8))


@pytest.mark.parametrize(
    ("layer", "groups", "columns"),
    [
        (nn.Linear(8, 6), 1, 8),
        (Conv1D(6, 8), 1, 8),
        (nn.Conv2d(8, 6, (3, 2), groups=2), 2, 24),
        (nn.ConvTranspose2d(8, 6, 3), 1, 72),
        (nn.ConvTranspose2d(8, 6, 3, groups=2), 0, 0),
        (nn.Bilinear(4, 8, 6), 1, 32),
    ],
)
def test_bytes_needed_are_known_beforehand(layer: nn.Module, groups: int, columns: int) -> None:
    shape = layer_shape(layer)
    assert bytes_needed(shape, second_moments=False) == 4 * groups * columns
    assert bytes_needed(shape, second_moments=True) == 4 * groups * columns**2


# --- errors -------------------------------------------------------------------------------------

WEIGHT, NORM, HESSIAN = torch.ones(6, 8), torch.ones(1, 8), torch.eye(8)[None]
NAN = torch.full((6, 8), float("nan"))


@pytest.mark.parametrize(("values", "count"), [([1, 0, 0, 0], 1), ([0] * 4, 0), ([1, 1, 0, 1], 3)])
def test_a_mask_is_not_guessed_from_zeros(values: list[int], count: int) -> None:
    weight = torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(3, 2)
    weight[1, 4:] = torch.tensor(values)
    message = (
        f"'fc.weight' does not show a 2:4 mask: group 3 has {count} nonzeros of 4 weights (1 of 6 "
        f"groups are wrong). A kept weight can be zero, so masks are not guessed: give the mask "
        f"itself (masks=...)."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        initializers.nonzeros(weight, TWO_OF_FOUR, name="fc.weight")


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("magnitude", [NAN], "There is NaN among the weights or their inputs' norms."),
        ("wanda", [WEIGHT, NAN[:1]], "There is NaN among the weights or their inputs' norms."),
        ("sparsegpt", [NAN, HESSIAN], "The weight holds NaN or infinity: SparseGPT cannot work"),
        ("sparsegpt", [WEIGHT, HESSIAN / 0], "The Hessian holds NaN or infinity: SparseGPT cannot"),
        ("wanda", [WEIGHT, NORM[:, :4]], "(C, K) = (1, 4) do not fit a weight of shape (6, 8): K "),
        ("wanda", [WEIGHT, NORM.repeat(4, 1)], "statistics (C, K) = (4, 8) do not fit a weight"),
        ("wanda", [WEIGHT, NORM[0]], "Inputs with statistics (C, K) = (8,) do not fit a weight"),
        ("sparsegpt", [WEIGHT, HESSIAN[0]], "Inputs with statistics (C, K) = (8,) do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(method: str, arguments: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(initializers, method)(*arguments, TWO_OF_FOUR)


def test_negative_damping_is_refused() -> None:
    with pytest.raises(ValueError, match=r"damping is -1\.0, but damping >= 0 must hold\."):
        initializers.sparsegpt(WEIGHT, HESSIAN, TWO_OF_FOUR, damping=-1.0)


@pytest.mark.parametrize("method", ["magnitude", "random", "nonzeros", "wanda", "sparsegpt"])
def test_inputs_that_m_does_not_divide_are_refused(method: str) -> None:
    given = {"wanda": [NORM], "sparsegpt": [HESSIAN]}.get(method, [])
    key = {"key": KEY} if method == "random" else {}
    with pytest.raises(ValueError, match="8 cannot be cut into groups of 3"):
        getattr(initializers, method)(WEIGHT, *given, NMPattern(1, 3), **key)


def test_damping_grows_until_the_hessian_is_positive_definite() -> None:
    weight, hessian = normal(6, 8), 2 * torch.eye(8) - 1.05 * torch.ones(1, 8, 8) / 4
    assert torch.linalg.eigvalsh(hessian).min() == pytest.approx(-0.1, abs=1e-6)
    result = initializers.sparsegpt(weight, hessian, TWO_OF_FOUR, damping=0.01)
    expected = initializers.sparsegpt(weight, hessian, TWO_OF_FOUR, damping=0.1)
    assert torch.equal(result[1], expected[1])
    message = (
        "The Hessian of 8 inputs is not positive definite, even with 100 times the damping of "
        "0.0: calibrate on more batches or set a larger damping."
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        initializers.sparsegpt(weight, hessian, TWO_OF_FOUR, damping=0.0)


def test_inputs_that_are_not_finite_are_refused_by_the_layers_name() -> None:
    with pytest.raises(ValueError, match="The input of 'layer' holds NaN or infinity"):
        collect(nn.Linear(8, 6), NAN)


def test_a_hessian_that_was_not_collected_is_refused() -> None:
    statistics = collect(nn.Linear(8, 6), NORM, second_moments=False)
    with pytest.raises(RuntimeError, match="set second_moments=True"):
        statistics.hessian  # noqa: B018
