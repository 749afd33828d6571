"""Laws of silence: what tells nothing is not said in a fit, and all is said again after it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import RichProgressBar
from modules import FAST, Net, loader, quiet_trainer
from rules import mask_callback


@pytest.mark.parametrize("fails", [False, True])
def test_a_fit_warns_of_nothing_that_is_as_it_should_be(
    tmp_path: Path, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Net):
        def on_train_end(self) -> None:
            raise OSError("lost")

    module, callback = (Failing if fails else Net)().eval(), mask_callback(lr=FAST)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        trainer = quiet_trainer(tmp_path, callback, max_steps=2)
        if fails:
            with pytest.raises(OSError, match="lost"):
                trainer.fit(module, loader())
        else:
            trainer.fit(module, loader())
        assert warnings.filters == before
    told = [str(warning.message) for warning in said]
    assert not [text for text in told if "eval mode" in text or "treespec" in text]


def test_an_epoch_is_not_counted_towards_minus_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = RichProgressBar()
    settings = {"max_steps": 2, "enable_progress_bar": True}
    trainer = quiet_trainer(tmp_path, mask_callback(lr=FAST), bar, **settings)
    trainer.fit(Net(), loader())
    shown = capsys.readouterr().out
    assert "Epoch 0" in shown
    assert "/-2" not in shown
    assert bar._get_train_description(0).strip() == "Epoch 0/-2"
