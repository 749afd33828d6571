"""MLflow's database, made by one process before others use it."""

from __future__ import annotations

import sys
from pathlib import Path


def make_database(tracking_uri: str) -> None:
    """Make the SQLite database of an MLflow store, or bring it up to date; others are left alone.

    MLflow does that when a client is made, and processes that do so at once get in each other's
    way. Call this in each of them before ``MLFlowLogger(...)``: all wait for the first.

    Args:
        tracking_uri: Such as "sqlite:///mlflow.db".
    """
    path = Path(tracking_uri.removeprefix("sqlite:///"))
    if not tracking_uri.startswith("sqlite:///") or not path.name:
        return
    from mlflow.tracking import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("w") as file:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        MlflowClient(tracking_uri)
