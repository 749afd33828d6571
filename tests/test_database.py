"""Laws of a database that several processes want at once: the first makes it, all can use it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from maskpro_lightning.tracking.database import make_database

START = """
import sys
from maskpro_lightning.tracking.database import make_database
make_database(sys.argv[1])
from mlflow.tracking import MlflowClient
MlflowClient(sys.argv[1]).create_experiment(sys.argv[2])
"""


@pytest.mark.slow
def test_processes_that_start_at_once_all_get_the_database(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    started = [
        subprocess.Popen([sys.executable, "-c", START, uri, str(n)], stderr=subprocess.PIPE)
        for n in range(3)
    ]
    ended = [(process.communicate()[1], process.returncode) for process in started]
    assert [code for _, code in ended] == [0, 0, 0], ended
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mlflow.db"]


HOLD = """
import sys, time
from pathlib import Path
from maskpro_lightning.tracking.database import _locked
path = Path(sys.argv[1])
for _ in range(100):
    with _locked(path / "lock"):
        (path / "held").touch(exist_ok=False)
        (path / "held").unlink()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no flock")
def test_a_lock_that_is_removed_after_use_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    started = [
        subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    ended = [(process.communicate()[1], process.returncode) for process in started]
    assert [code for _, code in ended] == [0, 0, 0], ended
    assert list(tmp_path.iterdir()) == []


def test_a_database_that_cannot_be_made_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(uri: str) -> None:
        raise OSError(uri)

    monkeypatch.setattr("mlflow.tracking.MlflowClient", fail)
    with pytest.raises(OSError, match="sqlite"):
        make_database(f"sqlite:///{tmp_path}/mlflow.db")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["", "http://host:5000", "file:./mlruns", "postgresql://host/db"])
def test_what_is_no_file_of_sqlite_is_left_alone(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_database(uri)
    assert list(tmp_path.iterdir()) == []
