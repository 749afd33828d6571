"""What a rank has of each of several weights, by their names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.weights.layout import local
from maskpro_lightning.weights.sharding import layouts, reshard
from maskpro_lightning.weights.targets import Target


class Parts:
    """A rank's parts of weights, and how whole ones come of them.

    Args:
        targets: The weights.
        pattern: What groups are.
        model: What FSDP has wrapped, if it has.

    Attributes:
        weights: The parameters by name.
        layouts: Where a rank's part of each lies in the whole weight.
    """

    def __init__(
        self, targets: Sequence[Target], pattern: NMPattern, model: nn.Module | None = None
    ) -> None:
        self._model = model
        self.weights = {target.name: target.parameter for target in targets}
        weights = [(target.parameter, pattern, target.input_dim) for target in targets]
        self.layouts = dict(zip(self.weights, layouts(model, weights), strict=True))

    def reshard(self) -> None:
        """Make sure that the weights are the shards which the next forward pass gathers."""
        if self._model is not None:
            reshard(self._model)

    def own(self, name: str) -> Tensor:
        """The part of a weight as it is now, sharing memory; right once all are resharded."""
        return local(self.weights[name].detach())

    def whole(self, name: str) -> Tensor:
        """The whole of a weight as it is now; all ranks have to ask for it."""
        self.reshard()
        return self.join(name, self.own(name))

    def take(self, name: str, whole: Tensor) -> Tensor:
        """The part of what has a weight's shape, a copy."""
        layout = self.layouts[name]
        return layout.own(layout.take(whole)).clone()

    def join(self, name: str, own: Tensor) -> Tensor:
        """The whole of what is shaped like the parts of a weight; all ranks have to ask for it."""
        return self.layouts[name].whole(own)
