"""Laws of writing: whole or not there, readable as the umask says, and nobody in another's way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from modules import FAST, Net, loader, quiet_trainer
from rules import mask_callback
from safetensors.torch import save_file

from maskpro_lightning import export_sparse
from maskpro_lightning.files.atomic import atomic


@pytest.fixture(params=[0o022, 0o007])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_every_file_of_a_fit_and_its_exports_has_the_mode_of_the_umask(
    tmp_path: Path, umask: int
) -> None:
    module = Net()
    logger = CSVLogger(tmp_path)
    trainer = quiet_trainer(tmp_path, mask_callback(lr=FAST), max_steps=2, logger=logger)
    trainer.fit(module, loader())
    for file_format in ("safetensors", "compressed", "maskllm"):
        export_sparse(module, tmp_path / "out", file_format=file_format)
    found = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.*")}
    ours = ["masks.safetensors", "model.safetensors", "compressed.safetensors", "masks.npz"]
    ours += ["history.csv", "parameters.json"]
    assert {name: oct(found[name]) for name in ours} == dict.fromkeys(ours, oct(0o666 & ~umask))


def test_two_writers_of_one_file_leave_the_last_ones_whole(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    with atomic(path) as first:
        save_file({"a": torch.zeros(2)}, first)
        with atomic(path) as second:
            save_file({"b": torch.ones(3)}, second)
        assert first != second
        assert b'"b"' in path.read_bytes()
    assert b'"a"' in path.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "masks"
    path.write_text("older")

    def write() -> None:
        with atomic(path) as partial:
            partial.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"masks": "older"}
