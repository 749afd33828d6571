"""Makes MLflow's database in one process at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def make_database(tracking_uri: str) -> None:
    """Create or upgrade MLflow's SQLite database; does nothing for other stores.

    MLflow does so when a client is made, and fails if several processes do it at once. Call this in
    each of them before ``MLFlowLogger(...)``: they then wait for the first one.

    Args:
        tracking_uri: Such as "sqlite:///mlflow.db".
    """
    path = Path(tracking_uri.removeprefix("sqlite:///"))
    if not tracking_uri.startswith("sqlite:///") or not path.name:
        return
    from mlflow.tracking import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(f".{path.name}.lock")):
        MlflowClient(tracking_uri)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for a lock, whose file is gone afterwards; without one where there is no ``flock``.

    Who waits may get the lock of a file that its holder has removed, and then takes the new one.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    while True:
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, path):
                continue
            try:
                yield
            finally:
                path.unlink()
            return


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
