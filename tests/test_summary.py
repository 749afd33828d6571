"""Laws of the table at the start of a fit."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from maskpro_lightning import NMPattern
from maskpro_lightning.weights import summary
from maskpro_lightning.weights.targets import select

PATTERN = NMPattern(2, 4)


class Network(nn.Module):
    """Layers of each kind: masked, unfit, unknown, idle, never multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.prescalers = nn.ModuleList(nn.Linear(1, 16) for _ in range(3))
        self.body = nn.Linear(16, 16)
        self.w = nn.Parameter(torch.randn(16, 16))
        self.idle = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        scaled = sum(layer(x[..., None].float()) for layer in self.prescalers)
        hidden: Tensor = self.body(self.embedding(x) + scaled) @ self.w
        return hidden


def tokens() -> Tensor:
    return torch.arange(6).view(2, 3)


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    model = Network()
    model_inputs = tokens()
    summary.announce(model, select(model, PATTERN), PATTERN, lambda: model(model_inputs))
    return capsys.readouterr().out


def test_rows_add_up_to_the_model_and_group_what_is_alike() -> None:
    model = Network()
    found = summary.rows(model, select(model, PATTERN))
    assert [(row.what, row.weights, row.numbers, row.names) for row in found] == [
        ("masked", 2, 320, "body.weight, idle.weight"),
        ("left out: is an embedding", 1, 640, "embedding.weight"),
        ("left out: is of a layer whose product is not known", 1, 256, "w"),
        (
            "left out: has 1 input, not a multiple of 4",
            3,
            48,
            "prescalers.0.weight, prescalers.1.weight and 1 more",
        ),
        ("vectors", 5, 68, "biases, norms"),
    ]
    total = sum(p.numel() for p in model.parameters())
    assert sum(row.numbers for row in found) == total
    assert [row.share for row in found] == [row.numbers / total for row in found]


def test_the_table_tells_what_multiplies_unmasked_and_how_to_mask_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)  # as if it were not installed
    prescalers = "prescalers.0.weight, prescalers.1.weight and 1 more"
    large = "Large weights that are multiplied without a mask:"
    assert shown(capsys).splitlines() == [
        "2:4 masks of Network",
        f"{'':52}weights  numbers  share  such as",
        f"{'masked':52}      2      320  24.0%  body.weight, idle.weight",
        f"{'left out: is an embedding':52}      1      640  48.0%  embedding.weight",
        f"{'left out: is of a layer whose product is not known':52}      1      256  19.2%  w",
        f"{'left out: has 1 input, not a multiple of 4':52}      3       48   3.6%  " + prescalers,
        f"{'vectors':52}      5       68   5.1%  biases, norms",
        f"{large} w (19.2%) is of a layer whose product is not known.",
        'To mask them, too: include=["w:0"].',
        "Masked, but in no product of the first batch: idle.weight.",
    ]


def test_what_the_table_advises_masks_what_it_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert 'include=["w:0"]' in shown(capsys)
    model = Network()
    targets = select(model, PATTERN, ["w:0"]).targets
    assert [(t.name, t.input_dim) for t in targets] == [
        ("w", 0),
        ("body.weight", -1),
        ("idle.weight", -1),
    ]


def test_no_mask_is_advised_on_what_is_left_out_for_a_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, inputs = Network(), tokens()
    selection = select(model, PATTERN, exclude=["body"])
    summary.announce(model, selection, PATTERN, lambda: model(inputs))
    told = capsys.readouterr().out
    assert "body.weight" in told.partition("multiplied without a mask:")[2]
    assert 'include=["w:0"]' in told


def test_rich_and_plain_tables_say_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "200")
    rich = shown(capsys)
    assert "━" in rich
    rich += "such as"  # names are below what they are of
    monkeypatch.setitem(sys.modules, "rich.console", None)
    cells = [cell for line in shown(capsys).splitlines() for cell in line.split("  ")]
    assert [cell for cell in cells if cell.strip() not in rich] == []


@pytest.mark.parametrize("width", [60, 80])
def test_long_names_are_told_apart_in_a_narrow_terminal(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", str(width))
    block = nn.ModuleDict({"gate_proj": nn.Linear(64, 64), "down_proj": nn.Linear(64, 64)})
    model: nn.Module = nn.ModuleDict({"mlp": block})
    for name in ("0", "layers", "language_model_of_all", "encoder", "wrapped"):
        model = nn.ModuleDict({name: model})
    summary.show(model, select(model, PATTERN), PATTERN)
    told = capsys.readouterr().out
    assert ".mlp.gate_proj.weight " in told
    assert ".mlp.down_proj.weight " in told
    assert max(map(len, told.splitlines())) <= width


def test_what_is_to_be_copied_is_not_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    told = shown(capsys).splitlines()
    assert 'To mask them, too: include=["w:0"].' in told
    assert "Masked, but in no product of the first batch: idle.weight." in told


def test_only_the_first_rank_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summary, "is_initialized", lambda: True)
    for rank, prints in ((0, True), (1, False)):
        monkeypatch.setattr(summary, "get_rank", lambda rank=rank: rank)
        assert bool(shown(capsys)) == prints
