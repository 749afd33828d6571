"""What comes after a command: lines to type, and a page to open."""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from rich.console import Console

from maskpro_lightning.catalog import recipes
from maskpro_lightning.tracking.credentials import without_credentials

# MLflow shows experiments as generative ones unless it is told otherwise.
_AS_TRAINING = "?workflowType=machine_learning"


def typed(command: str, words: Sequence[str]) -> str:
    """A command as a user types it, recipes by their names and without passwords."""
    names = {str(path): recipe for recipe, path in recipes().items()}
    return without_credentials(shlex.join(["maskpro", command, *(names.get(w, w) for w in words)]))


def nearby(path: str | Path) -> Path:
    """A path from the working folder, if it is in there."""
    path = Path(path)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def tell_export(checkpoint: str, output: str) -> None:
    """Print the command that exports a checkpoint of this fit, with the options of the fit."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ckpt_path")
    _, given = parser.parse_known_args(sys.argv[2:])
    words = [*given, f"--ckpt_path={nearby(checkpoint)}", "--output", output]
    Console().print(f"To export it: {typed('export', words)}", soft_wrap=True, highlight=False)


def tell_mlflow(
    loggers: Sequence[Any], console: Console, above: Mapping[str, str] = {}, metric: str = ""
) -> None:
    """Print how to see a fit, or a comparison, in MLflow.

    Args:
        loggers: The trainer's loggers; those of MLflow are told of.
        console: Where to print.
        above: The run above the comparison's, by the id of the logger's; empty if there is none.
        metric: What to sort the runs by.
    """
    for logger in loggers:
        uri = getattr(logger, "_tracking_uri", None)
        if type(logger).__name__ == "MLFlowLogger" and uri is not None:
            if uri.startswith("sqlite:///"):
                uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
            python = nearby(sys.executable)
            uri = without_credentials(uri)
            # None if no experiment was opened, which would ask the server now.
            number = getattr(logger, "_experiment_id", None)
            page = "" if number is None else f"#/experiments/{number}/runs{_AS_TRAINING}"
            if page and (parent := above.get(logger._run_id)):
                # Those below a run are listed if they are asked for, and not sorted by time.
                asked = {
                    "searchFilter": f"tags.mlflow.parentRunId = '{parent}'",
                    "orderByKey": f"metrics.`{metric}`",
                    "orderByAsc": "true",
                }
                page += f"&{urlencode(asked, quote_via=quote)}"
            console.print(
                f"MLflow: {python} -m mlflow ui --backend-store-uri {uri}, then open\n"
                f"http://127.0.0.1:5000/{page}",
                soft_wrap=True,
            )
