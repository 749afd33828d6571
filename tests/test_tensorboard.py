"""What a fit sends to TensorBoard arrives there: numbers at their steps, and figures as images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from modules import FAST, Net, fit
from rules import mask_callback
from test_mlflow import FIGURES

# Reads what it is to show; tensorboardX, with which Lightning would write too, cannot.
pytest.importorskip("tensorboard")


def shown(folder: Path, plugin: str) -> dict[str, list[Any]]:
    """By tag, what TensorBoard shows in one of its tabs."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    found: dict[str, list[Any]] = {}
    for path in {path.parent for path in folder.rglob("events.out.*")}:
        events = EventAccumulator(str(path))
        events.Reload()
        if plugin in events.ActivePlugins():
            found |= {tag: events.Tensors(tag) for tag in events.PluginTagToContent(plugin)}
    return found


def test_numbers_and_figures_arrive(tmp_path: Path) -> None:
    callback, logger = mask_callback(lr=FAST), TensorBoardLogger(tmp_path, name="", version="")
    fit(Net(), callback, folder=tmp_path, logger=logger, max_steps=8, log_every_n_steps=2)
    numbers, figures = shown(tmp_path, "scalars"), shown(tmp_path, "images")
    for name in ("loss", "entropy", "changed"):
        assert [event.step for event in numbers[f"maskpro/{name}"]] == [1, 3, 5, 7]
    # A tag belongs to one tab, so a figure is not called like a number.
    assert figures.keys() == {f"maskpro/figures/{name.removesuffix('.png')}" for name in FIGURES}
    for (event,) in figures.values():
        width, height, image = event.tensor_proto.string_val
        assert min(int(width), int(height)) > 100
        assert image.startswith(b"\x89PNG")
