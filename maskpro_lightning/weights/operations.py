"""PyTorch's operations: which are products and along what they sum, and which keep zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

Operands = list[tuple[Tensor, Iterable[int]]]


def _matrices(first: int, *, batch: bool = False) -> Callable[..., Operands]:
    """A product of the matrices at arguments ``first`` and the next: sums over -1 and -2."""

    def operands(args: Sequence[Any]) -> Operands:
        left, right = args[first : first + 2]
        summed = (0,) if batch else ()
        return [(left, (left.dim() - 1, *summed)), (right, (max(0, right.dim() - 2), *summed))]

    return operands


def _convolution(args: Sequence[Any]) -> Operands:
    inputs, weight = args[:2]
    kernel = range(2, weight.dim())
    transposed = bool(args[6]) if len(args) > 6 else False
    return [(inputs, (inputs.dim() - weight.dim() + 1,)), (weight, (int(not transposed), *kernel))]


def _linear(args: Sequence[Any]) -> Operands:
    return [(args[0], (args[0].dim() - 1,)), (args[1], (args[1].dim() - 1,))]


def _time_batch_channel(args: Sequence[Any]) -> Operands:
    return [(args[0], (2,)), (args[1], (0, 1))]


def _trilinear(args: Sequence[Any]) -> Operands:
    found: Operands = []
    for tensor, expanded in zip(args[:3], args[3:6], strict=True):
        kept = [dim for dim in range(tensor.dim() + len(expanded)) if dim not in expanded]
        found.append((tensor, [place for place, dim in enumerate(kept) if dim in args[6]]))
    return found


def _fused(args: Sequence[Any]) -> Operands:
    """A whole layer in one operation, whose matrices are (outputs, inputs)."""
    inputs = args[0]
    matrices = [tensor for tensor in tensors(args[1:]) if tensor.dim() == 2]
    return [(inputs, (inputs.dim() - 1,)), *((matrix, (1,)) for matrix in matrices)]


#: The products of PyTorch: which arguments are multiplied, and which dimensions summed over.
PRODUCTS: Mapping[str, Callable[[Sequence[Any]], Operands]] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "_int_mm"), _matrices(0)),
    **dict.fromkeys(("_scaled_mm", "_scaled_mm_v2", "_grouped_mm"), _matrices(0)),
    **dict.fromkeys(("_scaled_grouped_mm", "_scaled_grouped_mm_v2"), _matrices(0)),
    **dict.fromkeys(("addmm", "addmv", "baddbmm", "_addmm_activation"), _matrices(1)),
    **dict.fromkeys(("addmm_", "addmv_", "baddbmm_"), _matrices(1)),
    "addbmm": _matrices(1, batch=True),
    **dict.fromkeys(("convolution", "_convolution", "convolution_overrideable"), _convolution),
    **dict.fromkeys(
        ("mkldnn_convolution", "cudnn_convolution", "miopen_convolution"), _convolution
    ),
    "conv_tbc": _time_batch_channel,
    **dict.fromkeys(("linear", "_mkl_linear", "mkldnn_linear"), _linear),
    "_trilinear": _trilinear,
    **dict.fromkeys(("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn", "_lstm_mps"), _fused),
    **dict.fromkeys(("_native_multi_head_attention", "_transformer_encoder_layer_fwd"), _fused),
}
#: Operations whose result is zero wherever the weight is zero.
KEEPS_ZEROS = {
    *("_to_copy", "clone", "copy_", "contiguous", "to", "alias", "detach", "lift_fresh", "_conj"),
    *("mul", "mul_", "div", "div_", "neg", "neg_", "native_dropout", "dropout", "expand_copy"),
    *("abs", "sign", "round", "trunc", "tanh", "relu", "sin", "_fused_dropout", "bernoulli"),
    *("fake_quantize_per_tensor_affine_cachemask", "fake_quantize_per_channel_affine_cachemask"),
    *("_fake_quantize_learnable_per_tensor_affine", "where", "view_copy", "repeat"),
}
#: Endings of the names of operations that use only the shape of their argument.
FORGETS = ("_like", "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided")


def tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in arguments or results, also those in lists."""
    if isinstance(values, Tensor):
        yield values
        return
    if isinstance(values, str) or not isinstance(values, Iterable):
        return
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors(value)
