"""Laws of a comparison in MLflow: a run for each mask, below one, with the same metrics in all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import MLFlowLogger
from mlflow.entities import Dataset, DatasetInput

from maskpro_lightning.tracking.comparison import log_comparison, markdown

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

ROWS = {
    "dense": {"val_loss": 3.0, "sparsity": 0.0},
    "magnitude": {"val_loss": 4.3, "sparsity": 0.5},
    "maskpro": {"val_loss": 3.25, "sparsity": 0.5},
}


def test_each_mask_is_a_run_below_one_and_the_learned_ones_is_that_of_its_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_PARENT_RUN_ID", raising=False)
    logger = MLFlowLogger("x", "quickstart maskpro", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    client, fit = logger.experiment, logger.run_id
    data = Dataset("python-docs", "0123", "local", "{}")
    client.log_inputs(fit, datasets=[DatasetInput(data, [])])
    client.set_terminated(fit)
    parent = log_comparison(logger, ROWS, "2:4", "quickstart compare", "maskpro")
    runs: dict[str, Any] = {}
    for run in client.search_runs([logger.experiment_id]):
        assert run.info.status == "FINISHED"
        runs[run.data.tags.get("maskpro.mask", "above")] = run
    assert set(runs) == {*ROWS, "above"}
    above = runs.pop("above")
    assert above.info.run_id == parent
    assert above.info.run_name == "quickstart compare"
    assert above.data.tags["mlflow.note.content"] == markdown(ROWS)
    assert above.data.metrics == {"compare/val_loss": 3.25, "compare/sparsity": 0.5}
    points = client.get_metric_history(above.info.run_id, "compare/val_loss")
    assert [point.value for point in points] == [3.25]
    assert [used.dataset.digest for used in above.inputs.dataset_inputs] == ["0123"]
    assert runs["maskpro"].info.run_id == fit
    for mask, run in runs.items():
        assert run.data.tags["mlflow.parentRunId"] == above.info.run_id
        assert run.data.metrics == {f"compare/{name}": v for name, v in ROWS[mask].items()}
        assert [used.dataset.digest for used in run.inputs.dataset_inputs] == ["0123"]


def test_the_table_has_a_line_for_each_mask() -> None:
    assert markdown(ROWS).splitlines() == [
        "| mask | val_loss | sparsity |",
        "| --- | ---: | ---: |",
        "| dense | 3 | 0.00% |",
        "| magnitude | 4.3 | 50.00% |",
        "| maskpro | 3.25 | 50.00% |",
    ]
