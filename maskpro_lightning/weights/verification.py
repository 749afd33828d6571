"""Compares masks with the products of a forward pass: do groups lie along what is summed over?"""

from __future__ import annotations

from dataclasses import dataclass

from maskpro_lightning.weights.contractions import Observed, Product
from maskpro_lightning.weights.targets import LeftOut, Selection, Target


@dataclass(frozen=True)
class Verdict:
    """The result of comparing a selection with a forward pass.

    Attributes:
        unmasked: Weights without a mask that were multiplied with data, the largest first, each
            with a dimension that was summed over; None if other values were computed from it first.
        idle: Targets that took part in no product.
        unobserved: Targets whose products could not be seen, as a part of the model is sharded.
    """

    unmasked: list[tuple[LeftOut, int | None]]
    idle: list[Target]
    unobserved: list[Target]


def verify(selection: Selection, observed: Observed) -> Verdict:
    """Compare a selection with the products of a forward pass.

    Args:
        selection: The weights to mask, and the others.
        observed: What :func:`observe` saw of the same model.

    Raises:
        ValueError: names all targets whose products sum over another dimension than the one that
            groups lie along, or see only other values that were computed from the weight.
    """
    wrong = [
        reason
        for target in selection.targets
        if (reason := _wrong(target, observed.products.get(id(target.parameter), set())))
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(selection.targets)} weights would get masks that no product "
            f"sees: {'; '.join(wrong)}."
        )
    unseen = [each for each in selection.targets if id(each.parameter) not in observed.products]
    multiplied = observed.with_data.intersection(observed.products)
    return Verdict(
        unmasked=[
            (each, _dimension(observed.products[id(each.parameter)]))
            for each in sorted(selection.left_out, key=lambda each: -each.numbers)
            if id(each.parameter) in multiplied
        ],
        idle=[] if observed.hidden else unseen,
        unobserved=unseen if observed.hidden else [],
    )


def _dimension(products: set[Product]) -> int | None:
    """The last dimension that all products sum over; None if there is none."""
    if any(product.computed_by is not None for product in products):
        return None
    return max(frozenset.intersection(*(product.dims for product in products)), default=None)


def _wrong(target: Target, products: set[Product]) -> str | None:
    """Why no product sees a target's mask; None if one does, or if the target was in none."""
    own = [product for product in products if product.computed_by is None]
    dims = len(target.shape)
    if any(target.input_dim % dims in product.dims for product in own) or not products:
        return None
    layer = target.name.rpartition(".")[0] or target.name
    if not own:
        made_by = ", ".join(sorted({str(product.computed_by) for product in products}))
        return (
            f"{target.name!r} is multiplied only through other weights that the forward pass "
            f'computes from it ({made_by}): leave it out with exclude=["{layer}"]'
        )
    seen = sorted({dim for product in own for dim in product.dims})
    operations = ", ".join(sorted({product.operation for product in own}))
    return (
        f"{target.name!r} of shape {tuple(target.shape)} has groups along dimension "
        f"{target.input_dim % dims}, but its product ({operations}) sums over "
        f"{' and '.join(map(str, seen))}: name that with "
        f'include=["{target.name}:{seen[-1]}"]'
    )
