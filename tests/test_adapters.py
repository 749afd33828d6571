"""Laws of PEFT's adapters on sparse weights: they leave zeros alone, and merge under the mask."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from modules import Net, fit, loader, same_bits
from safetensors.torch import load_file
from test_finetuning import PATTERN, masks_of, pruned
from torch import Tensor, nn

from maskpro_lightning import SparseFinetuning, export_sparse, merge_adapters

peft = pytest.importorskip("peft")

KINDS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=["0", "2"]),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=["0", "2"], use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]),
    "saved": lambda: peft.LoraConfig(r=4, target_modules=["0"], modules_to_save=["2"]),
}


class Adapted(pl.LightningModule):
    """The network with adapters, of which the first products are not zero."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = peft.get_peft_model(pruned(Net()).net, KINDS[kind]())

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


def held_out(module: Any) -> Tensor:
    return module.loss(next(iter(loader())))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_trained_beside_zeros_and_merged_under_them(kind: str, tmp_path: Path) -> None:
    module = Adapted(kind)
    fit(module, SparseFinetuning(), folder=tmp_path, max_steps=8, validate=False)
    trained = held_out(module).item()
    merged = merge_adapters(module, loss=held_out)
    assert merged.model is module
    assert merged.loss_before == trained
    assert merged.loss_after == held_out(module).item()
    assert not any("lora" in name or "ia3" in name for name, _ in module.named_parameters())
    start = Net()
    for name, mask in masks_of(start).items():
        weight = module.get_parameter(name)
        assert same_bits(weight[~mask], torch.zeros_like(weight[~mask])), name
        assert not torch.equal(weight[mask], start.get_parameter(name)[mask]), name
    export_sparse(module, tmp_path / "sparse")
    written = load_file(tmp_path / "sparse" / "model.safetensors")
    assert torch.equal(written["net.0.weight"], module.net[0].weight)


def test_a_merge_under_the_mask_is_the_ordinary_one_where_weights_are_kept() -> None:
    models = [Adapted("lora").net for _ in range(2)]
    for model in models:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.ones_(parameter)
    dense, sparse = models[0].merge_and_unload(), merge_adapters(models[1]).model
    for name, mask in masks_of(Net()).items():
        key = name.removeprefix("net.")
        assert dense.get_parameter(key).all()
        assert torch.equal(sparse.get_parameter(key), dense.get_parameter(key) * mask)


def test_the_adapters_of_all_parts_of_a_module_are_merged() -> None:
    several = nn.ModuleDict({"text": Adapted("lora"), "image": Adapted("lora")})
    model = merge_adapters(several).model
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    assert not any(type(module).__module__.startswith("peft.") for module in model.modules())


def test_a_layer_is_left_out_of_a_merge_by_the_name_that_the_error_gives() -> None:
    model = Adapted("lora").net
    model.base_model.model[2].base_layer.weight.data.fill_(1.0)
    with pytest.raises(ValueError, match=r'exclude=\["base_model.model.2.base_layer"\]'):
        merge_adapters(model)
    merged = merge_adapters(model, exclude=["base_model.model.2.base_layer"]).model
    assert merged.get_parameter("2.weight").all()
    assert not merged.get_parameter("0.weight")[~masks_of(Net())["net.0.weight"]].any()


def test_the_ordinary_merge_is_warned_of_before_the_first_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "maskpro_lightning"):
        fit(Adapted("lora"), SparseFinetuning(), folder=tmp_path, max_steps=1, validate=False)
        fit(pruned(Net()), SparseFinetuning(), folder=tmp_path, max_steps=1)
    (record,) = (r for r in caplog.records if r.name.startswith("maskpro_lightning"))
    said = record.getMessage()
    assert said.startswith("2 sparse layers have adapters, such as 'net.base_model.model.0'.")
    assert "merge with maskpro_lightning.merge_adapters(model)" in said


def test_a_model_that_an_ordinary_merge_has_filled_is_refused() -> None:
    model = Adapted("lora").net
    with pytest.raises(ValueError, match="holds no PEFT model"):
        merge_adapters(Net())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(parameter)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"0\.base_layer\.weight' is not 2:4: group 0 has 4"):
        merge_adapters(model)


def test_the_modes_of_modules_are_as_before_a_merge() -> None:
    module = Adapted("lora").train()
    module.net.base_model.model[1].eval()
    modes: list[bool] = []

    def loss(model: nn.Module) -> float:
        modes.append(any(part.training for part in model.modules()))
        return 0.0

    merge_adapters(module, PATTERN, loss)
    assert modes == [False, False]
    assert [part.training for part in module.net] == [True, False, True]
