"""Laws of fits of modules whose weights are odd, or become others: the mask, or a name."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import oracle
import pytest
import torch
from modules import Net, assert_masked, every_estimator, fit, linear
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from maskpro_lightning import MaskProCallback, find_targets
from maskpro_lightning.optim.estimators import EstimatorName
from maskpro_lightning.weights.targets import select


class Replacing(Net):
    """Puts other parameters in the place of its first layer's, when it is told to."""

    def __init__(self, moment: str, how: str) -> None:
        super().__init__()
        self.moment, self.how = moment, how

    def replace(self, moment: str) -> None:
        if self.moment != moment:
            return
        if self.how == "assign":
            state = {name: value.clone() for name, value in self.state_dict().items()}
            self.load_state_dict(state, assign=True)
        elif self.how == "layer":
            self.net[0] = copy.deepcopy(self.net[0])
        else:
            parametrizations.weight_norm(self.net[0])

    def on_fit_start(self) -> None:
        self.replace("before")

    def on_train_batch_end(self, *_: object) -> None:
        if self.global_step == 2:
            self.replace("in the middle")


@every_estimator
@pytest.mark.parametrize("how", ["assign", "layer", "parametrization"])
@pytest.mark.parametrize("moment", ["before", "in the middle"])
def test_a_parameter_that_is_replaced_in_a_fit_ends_it_by_name(
    moment: str, how: str, estimator: EstimatorName, tmp_path: Path
) -> None:
    module, callback = (
        Replacing(moment, how),
        MaskProCallback(init="magnitude", estimator=estimator),
    )
    message = "'net.0.weight' is no longer the parameter that was chosen when the fit began"
    with pytest.raises((ValueError, RuntimeError), match=message):
        fit(module, callback, folder=tmp_path, max_steps=4, validate=False)
    if how != "assign":  # which replaces the other one as well
        assert torch.equal(module.net[2].weight, Net().net[2].weight)  # dense again


@every_estimator
def test_a_sparse_parameter_stays_as_it_is(estimator: EstimatorName, tmp_path: Path) -> None:
    class Graph(Net):
        def __init__(self) -> None:
            super().__init__()
            self.edges = nn.Parameter(torch.eye(8).to_sparse(), requires_grad=False)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.loss([torch.sparse.mm(self.edges, batch[0]), batch[1]])

    module = Graph()
    fit(module, MaskProCallback(estimator=estimator), folder=tmp_path, max_steps=4, validate=False)
    assert torch.equal(module.edges.to_dense(), torch.eye(8))
    assert_masked(module.net, Net().net)


@pytest.mark.parametrize("init", ["wanda", "sparsegpt", "reconstruction"])
def test_calibration_works_under_another_default_dtype(init: str, tmp_path: Path) -> None:
    module, dense = Net().double(), Net().double()
    torch.set_default_dtype(torch.float64)
    try:
        fit(module, MaskProCallback(init=init), folder=tmp_path, max_steps=2, validate=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_masked(module, dense)


def reasons_of(model: nn.Module) -> dict[str, str]:
    return {each.name: each.reason for each in select(model, "2:4").left_out}


@pytest.mark.parametrize("transposed", [False, True])
def test_parameters_of_common_memory_are_left_out(transposed: bool) -> None:
    model = nn.Sequential(linear(8, 0), linear(8, 1), linear(8, 2))
    data = model[0].weight.data
    model[1].weight = nn.Parameter(data.t() if transposed else data)
    reason = "shares its memory with another parameter: make both one, or clone it"
    assert reasons_of(model) == {"0.weight": reason, "1.weight": reason}
    with pytest.raises(ValueError, match=re.escape(f"'0.weight' {reason}")):
        find_targets(model, "2:4", include=["0"])


def test_an_embedding_that_shares_memory_is_not_masked_through_another() -> None:
    model = nn.Sequential(nn.Embedding(8, 8), linear(8, 1), linear(8, 2))
    model[1].weight.data = model[0].weight.data
    assert "1.weight" in reasons_of(model)


def test_parameters_side_by_side_in_one_storage_are_masked() -> None:
    flat = oracle.random(8, 32, seed=0)
    model = nn.Sequential(linear(8, 0), linear(8, 1), linear(8, 2), linear(8, 3))
    for number, layer in enumerate(model):
        columns = slice(8 * number, 8 * number + 8)
        layer.weight.data = flat[:, columns]
    assert reasons_of(model) == {}


def test_weights_that_cannot_be_written_are_left_out() -> None:
    model = nn.Sequential(linear(8, 0), linear(8, 1), linear(8, 2))
    model[0].weight = nn.Parameter(oracle.random(1, 8, seed=0).expand(8, 8))
    with torch.inference_mode():
        made = nn.Linear(8, 8)
    model[1] = made
    assert reasons_of(model) == {
        "0.weight": "holds the same numbers in several places (it was expanded): clone it",
        "1.weight": "was made in inference mode, so that nothing can be written into it",
    }
