"""Tasks of lm-evaluation-harness on a model in memory, without a copy of it on disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

try:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ModuleNotFoundError as error:
    if error.name != "lm_eval":
        raise
    raise SystemExit("--tasks needs lm_eval: pip install 'maskpro-lightning[tasks]'") from None


def on_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    limit: int | None = None,
    folder: str | None = None,
) -> dict[str, float]:
    """What a model reaches on tasks, by ``TASK METRIC``; errors of estimates are left out.

    Args:
        model: A causal language model of Hugging Face.
        tokenizer: Its tokenizer.
        tasks: Names of tasks or groups of them, such as "arc_easy".
        limit: Examples of each task, at most.
        folder: Of tasks of your own, in YAML.

    Raises:
        ValueError: there is no such task; names those that are missing.
    """
    manager = TaskManager(include_path=folder)
    known = set(manager.all_tasks)
    missing = [task for task in tasks if task not in known]
    if missing:
        raise ValueError(
            f"lm_eval has no task {', '.join(map(repr, missing))}: 'lm_eval ls tasks' lists them."
        )
    found = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer),
        tasks=list(tasks),
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
    )
    return {
        f"{task} {metric.removesuffix(',none')}": float(value)
        for task, numbers in found["results"].items()
        for metric, value in numbers.items()
        if isinstance(value, float) and "stderr" not in metric
    }
