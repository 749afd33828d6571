"""Laws of silence: what tells nothing is not said in a fit, and all is said again after it."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import RichProgressBar
from modules import FAST, Net, loader, quiet_trainer
from rules import mask_callback

from maskpro_lightning import SparseFinetuning


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


@pytest.mark.parametrize("own", [logging.NOTSET, logging.CRITICAL])
@pytest.mark.parametrize("finetunes", [False, True])
def test_warnings_are_heard_where_others_have_silenced_everybody(
    tmp_path: Path, finetunes: bool, own: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    ours, root = logging.getLogger("maskpro_lightning"), logging.getLogger()
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    levels = ours.level, root.level
    root.addHandler(handler)
    try:
        ours.setLevel(own)
        root.setLevel(logging.ERROR)  # as importing MLflow's autologging does
        callback = SparseFinetuning(init="magnitude") if finetunes else mask_callback(lr=FAST)
        quiet_trainer(tmp_path, callback, max_steps=1).fit(Net(), loader())
        logging.getLogger("maskpro_lightning.fit.callback").warning("hear")
        assert ("hear" in heard) == (own == logging.NOTSET)
        assert own in (ours.level, logging.NOTSET)
    finally:
        root.removeHandler(handler)
        ours.setLevel(levels[0])
        root.setLevel(levels[1])


@pytest.mark.parametrize("finetunes", [False, True])
def test_an_epoch_is_not_counted_towards_minus_two(
    finetunes: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = SparseFinetuning(init="magnitude") if finetunes else mask_callback(lr=FAST)
    bar = RichProgressBar()
    settings = {"max_steps": 2, "enable_progress_bar": True}
    trainer = quiet_trainer(tmp_path, callback, bar, **settings)
    trainer.fit(Net(), loader())
    shown = capsys.readouterr().out
    assert "Epoch 0" in shown
    assert "/-2" not in shown
    assert bar._get_train_description(0).strip() == "Epoch 0/-2"
