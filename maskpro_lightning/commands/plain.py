"""The commands that take no recipe, and spare the seconds in which PyTorch is imported."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from maskpro_lightning.catalog import recipes
from maskpro_lightning.commands.options import help_of

_USAGE = """usage: maskpro COMMAND --config RECIPE [--help | --help_all] [options]

  fit       learn a mask
  validate  measure a model, or a checkpoint with --ckpt_path
  compare   measure the dense model and one-shot masks, learn a mask, print one table, export
  evaluate  measure the model dense and as in --ckpt_path, side by side; of language models also
            the perplexity of WikiText-2
  export    write a checkpoint's sparse model for others to load (--format), or keep it in MLflow
            (--log_model, --registered_name)
  measure   time the layers dense and 2:4 on this device (--batch_sizes, --dtype)
  plan      tell what a fit needs on --devices ranks with --strategy, without loading the model
  plot      draw what a run logged: maskpro plot RUN [--tracking_uri URI] [--output FOLDER]
  send      send the folder that a run kept to MLflow, after its server was away (no recipe)

RECIPE is a YAML file or one of: {recipes}.
Every value can be overridden: maskpro fit --config quickstart --trainer.max_steps 100"""


def main(arguments: Sequence[str]) -> bool:
    """Run the command line if it needs no recipe; return whether it does not.

    Args:
        arguments: The command and its options; none ask for help. "--help" tells a command's own
            options, "--help_all" those of Lightning, too.
    """
    commands = {"plot": _plot, "send": _send}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE.format(recipes=", ".join(recipes())))
    elif {"-h", "--help"} & {*arguments[1:]} and (text := help_of(arguments[0])):
        print(text)
    elif arguments[0] in commands:
        commands[arguments[0]](arguments[1:])
    else:
        return False
    return True


def _plot(options: Sequence[str]) -> None:
    from maskpro_lightning.tracking import plots, runs

    parser = ArgumentParser("maskpro plot", description="Draw what a run logged, PNG and SVG.")
    parser.add_argument("run", help="a run's folder, or the id of an MLflow run")
    parser.add_argument("--tracking_uri", help="where MLflow keeps the run, such as sqlite:///...")
    parser.add_argument("--output", type=Path, help="folder to write; the run's by default")
    given = parser.parse_args(options)
    with TemporaryDirectory() as fetched:
        folder = Path(given.run)
        try:
            if given.tracking_uri is not None:
                folder = Path(fetched, given.run)  # as figures are headed by its name
                folder.mkdir()
                runs.download_run(given.run, given.tracking_uri, folder)
            run = runs.read_run(folder)
        except ValueError as error:
            raise SystemExit(str(error).replace(str(folder), f"MLflow run {given.run}")) from None
    own = Path("figures", given.run) if given.tracking_uri else runs.folder_of(folder)
    for path in plots.save(plots.figures(run), given.output or own):
        print(path)


def _send(options: Sequence[str]) -> None:
    from jsonargparse import auto_cli

    from maskpro_lightning.tracking.delivery import send

    print(f"Sent to run {auto_cli(send, args=list(options), prog='maskpro send')}")
