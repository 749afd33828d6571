"""The command ``maskpro``: LightningCLI with recipes by name, and what comes after a fit."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from rich.console import Console
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from maskpro_lightning.catalog import recipes
from maskpro_lightning.commands import measure, plain
from maskpro_lightning.commands.advice import tell_mlflow
from maskpro_lightning.commands.building import AfterFit, BeforeFit, Command, Evaluated, Measured
from maskpro_lightning.commands.compare import (
    Row,
    compare,
    masked_by,
    row_of,
    table,
    write_csv,
)
from maskpro_lightning.commands.plan import Plan, gigabytes, hours, plan, plan_training
from maskpro_lightning.commands.plan import table as table_of_plan
from maskpro_lightning.fit.callback import MaskProCallback
from maskpro_lightning.fit.finetuning import SparseFinetuning
from maskpro_lightning.fit.quiet import silence
from maskpro_lightning.tracking.comparison import log_comparison, markdown
from maskpro_lightning.tracking.configuration import SaveConfig
from maskpro_lightning.tracking.loggers import Tracking
from maskpro_lightning.tracking.result import duration, read_result
from maskpro_lightning.tracking.runs import download_run, read_run
from maskpro_lightning.weights.targets import find_targets


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: The arguments; those of the process by default.
    """
    arguments = _named(sys.argv[1:] if args is None else args)
    if plain.main(arguments):
        return
    silence()
    arguments = ["--help" if word == "--help_all" else word for word in arguments]
    command = arguments[0]
    own = {
        "compare": _compare,
        "evaluate": _evaluate,
        "export": _export,
        "measure": _measure,
        "plan": _plan,
    }
    # LightningCLI reads them there; given as its args, it warns of mixing them up with these.
    sys.argv[1:] = arguments[1:] if command in own else arguments
    if command in own:
        own[command]()
    else:
        Command(save_config_callback=SaveConfig, trainer_defaults={"callbacks": [SaveTheEnd()]})


class SaveTheEnd(Callback):
    """Lets a fit end with a checkpoint of its last step.

    Lightning saves every so many steps, or with a validation; what comes after the last of them,
    or all of a short fit, would be lost. A checkpoint that is chosen by a metric is left alone.
    """

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        saver = trainer.checkpoint_callback
        if not isinstance(saver, ModelCheckpoint) or saver.monitor is not None:
            return
        if saver._last_global_step_saved != trainer.global_step:
            saver._save_topk_checkpoint(trainer, saver._monitor_candidates(trainer))


_COST = {
    "policy": "A step costs up to 2 forward passes of a batch: under the drawn mask, and under the "
    "initial one where the batch is new.",
    "straight_through": "A step costs 3 forward passes of a batch: one, and a backward pass, that "
    "counts as two.",
}


def _plan_of(cli: BeforeFit, callback: MaskProCallback | SparseFinetuning) -> tuple[Plan, str]:
    """What a fit needs, and what its steps cost, in words."""
    model = cli.model
    targets = find_targets(
        model, callback.pattern, callback.include, callback.exclude, on_meta=True
    )
    where = {
        "devices": cli.config["devices"],
        "strategy": cli.config["strategy"],
        "rows": _rows(cli),
    }
    if isinstance(callback, MaskProCallback):
        found = plan(
            model,
            targets,
            estimator=callback.estimator.name,
            pattern=callback.pattern,
            memory=callback.memory,
            logits_dtype=callback.logits_dtype,
            teacher=callback.distillation is not None,
            **where,
        )
        more = "" if callback.distillation is None else " Distillation costs one more."
        return found, _COST[callback.estimator.name] + more
    model.trainer = cli.trainer  # rates may follow from the length of its fit
    leaves = tree_leaves(model.configure_optimizers())
    part = None if callback.distillation is None else callback.distillation.part_of(model)
    optimizers = [each for each in leaves if isinstance(each, Optimizer)]
    found = plan_training(model, targets, optimizers, teacher=part, **where)
    dense = " and one of the dense part" if part is not None else ""
    return found, f"A step costs a forward and a backward pass of a batch{dense}."


def _plan() -> None:
    cli = BeforeFit()
    found, cost = _plan_of(cli, masked_by(cli.trainer))
    rows_seen, steps, tflops = _rows(cli), cli.trainer.max_steps, cli.config["tflops"]
    batches = cli.trainer.accumulate_grad_batches
    devices = cli.config["devices"]
    where = "One device" if devices == 1 else f"One of {devices} ranks, {cli.config['strategy']}"
    rows = table_of_plan(found, where)
    console = Console()
    told = [rows, "GB are 10^9 bytes.", cost]
    if batches > 1:
        told.append(f"A step accumulates {batches} batches, each of which costs that.")
    if found.sent:
        told.append(
            f"In a step a rank sends {gigabytes(found.sent * batches)} GB of weights and "
            f"gradients, and takes as many."
        )
    if rows_seen is not None and steps > 0:
        time = hours(cli.model, rows_seen, found.forwards * batches, steps, tflops)
        told.append(
            f"The {steps} steps take about {duration(3600 * time)} at {tflops:g} TFLOP/s a device "
            f"(--tflops), initial mask and validations aside."
        )
    console.print(*told, sep="\n")


def _rows(cli: BeforeFit) -> int | None:
    """The vectors that a layer sees in a step of one rank, if the data says."""
    data = cli.datamodule
    shape = [data.hparams.get(name) if data else None for name in ("batch_size", "length")]
    return None if None in shape else math.prod(size or 0 for size in shape)


def _compare() -> None:
    cli = AfterFit("compare")
    cli.refuse_own_input()
    console = Console()
    rows = compare(cli.trainer, cli.model, cli.datamodule)
    folder = cli.export()
    tracking = Tracking(cli.trainer, "warn")
    for path in (folder / "comparison.csv", tracking.folder() / "comparison.csv"):
        write_csv(rows, path)
    tracking.file(path)
    above = _show_comparison(cli, tracking, rows)
    console.print(table(rows, f"{cli.masked.pattern} masks of {cli.model.hparams.get('model')}"))
    cli.publish(folder, console, tracking.folder(), markdown(_numbers(rows)))
    cli.log_model(console)
    tell_mlflow(cli.trainer.loggers, console, above, f"compare/{next(iter(rows[0].metrics), '')}")


def _numbers(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    return {
        row.mask: row.metrics | {"sparsity": row.sparsity, "seconds": row.seconds} for row in rows
    }


def _show_comparison(cli: AfterFit, tracking: Tracking, rows: Sequence[Row]) -> dict[str, str]:
    """Log each mask as a run, and draw validations anew, beside what they are compared with.

    Returns:
        The run above all, by that of the fit.
    """
    numbers, found, above = _numbers(rows), row_of(cli.masked), {}

    def log(logger: Any) -> None:
        name = f"{(logger._run_name or 'maskpro').removesuffix(f' {found}')} compare"
        parent = log_comparison(logger, numbers, str(cli.masked.pattern), name, found)
        above[logger.run_id] = parent

    tracking.each("MLFlowLogger", log)
    try:
        from maskpro_lightning.tracking import plots

        drawn = plots.figures(read_run(tracking.folder())).get("validation")
    except (ModuleNotFoundError, ValueError):
        return above
    if drawn is not None:
        tracking.figure(tracking.folder() / "validation.png", drawn)
    return above


def _evaluate() -> None:
    from maskpro_lightning.commands import evaluate
    from maskpro_lightning.modules.language import CausalLM

    cli = Evaluated("evaluate")
    sparse, data, window = cli.checkpoint(), cli.datamodule, cli.config["window"]
    masked = cli.masked
    targets = find_targets(cli.model, masked.pattern, masked.include, masked.exclude)
    sets = {"held-out": data}
    if cli.config["wikitext2"] is not None and isinstance(cli.model, CausalLM):
        name = f"WikiText-2 (windows of {window})"
        try:
            sets[name] = evaluate.wikitext2(data.tokenizer, cli.config["wikitext2"], window)
        except OSError as error:  # no network is one, and what is on no disk
            if cli.config["wikitext2"] != evaluate.WIKITEXT2:
                raise SystemExit(
                    f"{cli.config['wikitext2']!r} could not be read: {error}. Give --wikitext2 a "
                    f"folder of its layout, or null to leave it out."
                ) from None
            print(
                f"WikiText-2 is left out, it could not be fetched: {_first_line(error)}. Give "
                f"--wikitext2 a folder of its layout, or null to leave it out at once."
            )
    tasks = cli.config["tasks"]
    measured = None
    if tasks is not None:
        from maskpro_lightning.commands.tasks import on_tasks

        if not isinstance(cli.model, CausalLM):
            raise SystemExit("--tasks needs a causal language model, CausalLM.")
        names, limit = tasks.split(","), cli.config["limit"]
        measured = lambda: on_tasks(cli.model.model, data.tokenizer, names, limit)  # noqa: E731
    found = evaluate.side_by_side(cli.trainer, cli.model, targets, sets, sparse, measured)
    Console().print(evaluate.table(found, str(cli.model.hparams.get("model"))))


def _export() -> None:
    cli = AfterFit("export")
    streams = cli.is_streamed()
    path, load = cli.config["ckpt_path"], cli.checkpoint()
    if load is None:
        raise SystemExit("maskpro export needs --ckpt_path, a checkpoint of the fit.")
    cli.refuse_own_input()
    if not streams:
        load(cli.model)
    console = Console()
    with TemporaryDirectory() as fetched:
        run = _run_of(path) or _given_run(cli.trainer, Path(fetched))
        found = None if run is None else read_result(run)
        folder = cli.export(path if streams else None)
        cli.publish(folder, console, run, "" if found is None else found.markdown())
    cli.log_model(console)


def _run_of(checkpoint: str) -> Path | None:
    """The folder of the callback's files in the run that wrote a checkpoint, if it lies there."""
    folders = list(Path(checkpoint).absolute().parents)[:3]
    return next((each / "maskpro" for each in folders if (each / "maskpro").is_dir()), None)


def _given_run(trainer: Any, folder: Path) -> Path | None:
    """The same of the MLflow run that a logger was given, fetched into a folder."""
    for logger in trainer.loggers:
        run_id = getattr(logger, "_run_id", None)
        if type(logger).__name__ == "MLFlowLogger" and run_id is not None:
            try:
                download_run(run_id, logger._tracking_uri, folder)
            except ValueError as error:
                raise SystemExit(str(error)) from None
            return folder
    return None


def _measure() -> None:
    cli = Measured("measure")
    callback, device = cli.masked, cli.trainer.strategy.root_device
    targets = find_targets(cli.model, "2:4", callback.include, callback.exclude)
    dtype = getattr(torch, cli.config["dtype"])
    found = measure.measure(targets, device, dtype, cli.config["batch_sizes"])
    console = Console()
    console.print(measure.table(found))
    console.print(measure.conclusion(found), soft_wrap=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _named(arguments: Sequence[str]) -> list[str]:
    """Replace a recipe's name after --config by its path."""
    known, found = recipes(), list(arguments)
    for i, argument in enumerate(found):
        option, equals, name = argument.partition("=")
        if option in ("--config", "-c") and equals and not Path(name).exists():
            found[i] = f"{option}={known.get(name, name)}"
        elif i and found[i - 1] in ("--config", "-c") and not Path(argument).exists():
            found[i] = str(known.get(argument, argument))
    return found
