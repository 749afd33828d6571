"""Laws of help: a command's own options first, true to the code, and without a wait."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from maskpro_lightning import MaskProCallback
from maskpro_lightning.cli import main
from maskpro_lightning.commands.options import HELP, callback_options, help_of

COMMANDS = ("fit", "validate", "compare", "evaluate", "export", "measure", "plan")


def test_the_callbacks_options_are_its_arguments_with_their_texts() -> None:
    found = callback_options()
    assert list(found) == list(inspect.signature(MaskProCallback).parameters)
    documented = inspect.getdoc(MaskProCallback) or ""
    for name, text in found.items():
        assert len(text) > 10, f"{name} has no text"
        assert f"{name}: {text.split()[0]}" in documented
    assert found["pattern"].endswith("['2:4']")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_what_is_the_commands_own_and_where_the_rest_is(command: str) -> None:
    text = help_of(command)
    assert text is not None
    assert len(text.splitlines()) < 120
    assert f"maskpro {command} --help_all" in text
    for name in HELP.get(command, ()):
        assert f"--{name}\n" in text
    assert ("--trainer.callbacks.pattern" in text) == (command in ("fit", "compare", "plan"))


# Another test of this process may have made a strategy that cannot be imported by its name.
@pytest.mark.filterwarnings("ignore:(?s).*No module named 'lightning.pytorch.strategies.odd'")
@pytest.mark.parametrize("command", ["evaluate", "export", "measure", "plan", "compare"])
def test_each_option_that_help_tells_of_is_one(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["maskpro"])
    with pytest.raises(SystemExit):
        main([command, "--help_all"])
    shown = capsys.readouterr().out
    assert "--trainer.max_steps" in shown
    for name, text in HELP[command].items():
        assert f"--{name}" in shown
        assert text.split()[0] in shown


def test_help_does_not_wait_for_pytorch() -> None:
    refuse = "import sys; sys.modules.update(dict.fromkeys(('torch', 'lightning', 'jsonargparse')))"
    for command in COMMANDS:
        code = f"{refuse}; from maskpro_lightning.__main__ import main; main()"
        found = subprocess.run(
            [sys.executable, "-c", code, command, "--help"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == 0, found.stderr
        assert found.stdout.startswith(f"usage: maskpro {command}")
