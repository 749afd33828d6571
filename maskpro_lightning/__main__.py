"""The command ``maskpro``, or which package it misses."""

import sys

from maskpro_lightning.commands import plain

_EXTRAS = {"lm_eval": "tasks", "matplotlib": "plots", "mlflow": "mlflow"}


def main() -> None:
    """Run the command line; in one line, say what to install where it cannot run."""
    try:
        if plain.main(sys.argv[1:]):
            return
        from maskpro_lightning import cli
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = _EXTRAS.get(package, "recipes")
        sys.exit(f"maskpro needs {package}: pip install 'maskpro-lightning[{extra}]'")
    cli.main()


if __name__ == "__main__":
    main()
