"""The command ``maskpro``, or which package it misses."""

import sys


def main() -> None:
    """Run the command line; in one line, say what to install where it cannot run."""
    try:
        from maskpro_lightning import cli
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        sys.exit(f"maskpro needs {package}: pip install 'maskpro-lightning[recipes]'")
    cli.main()


if __name__ == "__main__":
    main()
