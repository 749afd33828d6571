"""Makes MLflow's database in one process at a time."""

from __future__ import annotations

import sys
from pathlib import Path


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
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("w") as file:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        MlflowClient(tracking_uri)
