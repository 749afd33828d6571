"""Laws of what a checkpoint's weights are read from: the file, or a way on, and never its code."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import FAST, Net, loader, quiet_trainer
from rules import mask_callback

from maskpro_lightning.files.checkpoint import weights_in


def test_the_weights_are_those_that_a_fit_saved(tmp_path: Path) -> None:
    module = Net()
    trainer = quiet_trainer(tmp_path, mask_callback(lr=FAST), max_steps=2)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    found, expected = weights_in(tmp_path / "a.ckpt"), module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_file_of_the_older_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.ckpt"
    state = {"state_dict": {"w": torch.arange(3.0)}}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert torch.equal(weights_in(path)["w"], torch.arange(3.0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"w": torch.zeros(1)}, "holds no state_dict of tensors, so it is no checkpoint"),
        ([1], "holds no state_dict of tensors, so it is no checkpoint"),
        ({"state_dict": {"w": 1}}, "holds no state_dict of tensors, so it is no checkpoint"),
        (
            {"state_dict": {}, "hyper_parameters": {"x": Fraction(1, 2)}},
            "an object of fractions.Fraction, and would have to be run to be read. Write it anew",
        ),
    ],
)
def test_what_is_no_checkpoint_is_refused_with_a_remedy(
    tmp_path: Path, content: Any, message: str
) -> None:
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=f"a.ckpt' .*{re.escape(message)}") as caught:
        weights_in(tmp_path / "a.ckpt")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("cut", [0, 1, 2, 100, -30])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_is_cut_off_is_refused_by_name(tmp_path: Path, cut: int, zipped: bool) -> None:
    path = tmp_path / "a.ckpt"
    content = {"state_dict": {"w": torch.arange(64.0)}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"a.ckpt' is no whole checkpoint: write or download it"):
        weights_in(path)


def test_a_folder_names_what_is_in_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder: .*; in it there is none that ends in"):
        weights_in(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "last.ckpt").touch()
    with pytest.raises(ValueError, match=r"is a folder: .*, such as '.*deep/last.ckpt'\.$"):
        weights_in(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint '.*absent.ckpt'\.$"):
        weights_in(tmp_path / "absent.ckpt")
