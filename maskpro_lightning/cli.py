"""The command ``maskpro``: LightningCLI with recipes by name, and what comes after a fit."""

from __future__ import annotations

import math
import os
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.table import Table
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from maskpro_lightning.catalog import recipes, resolve
from maskpro_lightning.commands import measure, plain
from maskpro_lightning.commands.compare import (
    Row,
    compare,
    masked_by,
    row_of,
    table,
    write_csv,
)
from maskpro_lightning.commands.options import HELP
from maskpro_lightning.commands.plan import Plan, Strategy, hours, plan, plan_training
from maskpro_lightning.files.card import Card, push, write_card
from maskpro_lightning.files.checkpoint import loader_of
from maskpro_lightning.files.distributed import is_distributed
from maskpro_lightning.files.export import Format, export_sparse
from maskpro_lightning.fit.callback import MaskProCallback
from maskpro_lightning.fit.finetuning import SparseFinetuning
from maskpro_lightning.fit.quiet import silence
from maskpro_lightning.tracking.comparison import log_comparison, markdown
from maskpro_lightning.tracking.configuration import SaveConfig
from maskpro_lightning.tracking.credentials import without_credentials
from maskpro_lightning.tracking.database import make_database
from maskpro_lightning.tracking.loggers import Tracking
from maskpro_lightning.tracking.mlflow_model import log_model
from maskpro_lightning.tracking.result import duration, read_result
from maskpro_lightning.tracking.runs import parameters_of, read_run
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
        _Command(save_config_callback=SaveConfig, trainer_defaults={"callbacks": [SaveTheEnd()]})


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


class _CLI(LightningCLI):
    """Says in a line which model or tokenizer is neither at hand nor to be had."""

    def instantiate_classes(self) -> None:
        with self._naming():
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        with self._naming():  # weights that are loaded once their model is sharded
            super()._run_subcommand(subcommand)

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            config = self.config if self.subcommand is None else self.config[self.subcommand]
            parts = [part["init_args"] for part in (config["model"], config["data"]) if part]
            given = {part.get(name) for part in parts for name in ("model", "tokenizer")}
            names = sorted(n for n in given if n is not None and not Path(resolve(n)).exists())
            if "couldn't connect to" not in str(error):  # which is never said of weights
                names = [n for n in names if f"{n} does not appear to have a file" in str(error)]
            if not names:
                raise
            raise SystemExit(
                f"The Hub cannot be reached, or lacks a file, and something is not in the cache of "
                f"{' or '.join(map(repr, names))}: fetch it once where there is a network "
                f"(hf download NAME), or give a folder instead of the name."
            ) from None


class _Command(_CLI):
    """Gets MLflow ready before its loggers are made."""

    def before_instantiate_classes(self) -> None:
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        given = config["trainer"]["logger"]
        for logger in given if isinstance(given, list) else [given]:
            if getattr(logger, "class_path", "").endswith(".MLFlowLogger"):
                command = self.subcommand or self.name
                trains = any(
                    getattr(callback, "class_path", "").endswith(".SparseFinetuning")
                    for callback in config["trainer"]["callbacks"] or ()
                )
                row = "finetuned" if trains else "maskpro"
                _prepare(logger["init_args"], command, config.get("ckpt_path"), row)

    def after_fit(self) -> None:
        """Tell how the checkpoint becomes a model for others."""
        path = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if path and self.trainer.is_global_zero:
            parser = ArgumentParser(add_help=False, allow_abbrev=False)
            parser.add_argument("--ckpt_path")
            _, given = parser.parse_known_args(sys.argv[2:])
            command = _typed("export", [*given, f"--ckpt_path={_nearby(path)}"])
            Console().print(f"To export it: {command}", soft_wrap=True, highlight=False)

    def instantiate_classes(self) -> None:
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        strategy = getattr(config["trainer"]["strategy"], "class_path", "")
        if self.subcommand is None or not strategy.endswith(".ModelParallelStrategy"):
            super().instantiate_classes()
            return
        from maskpro_lightning.modules.loading import loading_late

        with loading_late():
            super().instantiate_classes()

    #: The command, where it is not one of Lightning's.
    name = ""


def _typed(command: str, words: Sequence[str]) -> str:
    """A command as a user types it, recipes by their names and without passwords."""
    names = {str(path): recipe for recipe, path in recipes().items()}
    return without_credentials(shlex.join(["maskpro", command, *(names.get(w, w) for w in words)]))


def _nearby(path: str | Path) -> Path:
    """A path from the working folder, if it is in there."""
    path = Path(path)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _prepare(init_args: Any, command: str, checkpoint: str | None, learned: str) -> None:
    """Make an MLflow database, and let a run's name say which command, or row, it is of."""
    make_database(init_args.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI", ""))
    fits = "resumed" if checkpoint else None
    what = {"fit": fits, "compare": learned}.get(command, command)
    if init_args.get("run_name") is not None and what is not None:
        init_args["run_name"] = f"{init_args['run_name']} {what}"


class _Built(_Command):
    """Builds model, data and trainer from a recipe and runs nothing."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(run=False, save_config_callback=SaveConfig)

    @property
    def masked(self) -> MaskProCallback | SparseFinetuning:
        """The callback that says which weights are masked."""
        return masked_by(self.trainer)


class _Measured(_Built):
    """Adds the options of ``maskpro measure``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        sizes, dtypes = list[PositiveInt], Literal["bfloat16", "float16", "float32"]
        told = HELP["measure"]
        default = [1, 16, 256, 4096]
        parser.add_argument("--batch_sizes", type=sizes, default=default, help=told["batch_sizes"])
        parser.add_argument("--dtype", type=dtypes, default="bfloat16", help=told["dtype"])


class _WithCheckpoint(_Built):
    """Adds the checkpoint of a fit."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="A checkpoint.")

    def checkpoint(self) -> Callable[[Any], object] | None:
        """What loads its weights, under the mask to deploy."""
        path = self.config["ckpt_path"]
        if path is None:
            return None
        try:
            return loader_of(path)
        except (OSError, ValueError) as error:
            raise SystemExit(str(error)) from None


class _Evaluated(_WithCheckpoint):
    """Adds the options of ``maskpro evaluate``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        from maskpro_lightning.commands.evaluate import WIKITEXT2

        super().add_arguments_to_parser(parser)
        told, text, count = HELP["evaluate"], str | None, PositiveInt | None
        parser.add_argument("--wikitext2", type=text, default=WIKITEXT2, help=told["wikitext2"])
        parser.add_argument("--window", type=PositiveInt, default=2048, help=told["window"])
        parser.add_argument("--tasks", type=text, default=None, help=told["tasks"])
        parser.add_argument("--limit", type=count, default=None, help=told["limit"])


class _AfterFit(_WithCheckpoint):
    """Adds the options of what writes the sparse model."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        told, text = HELP["export"], str | None
        for name, type_, default in (
            ("output", str, "sparse-model"),
            ("format", Format, "auto"),
            ("max_shard_size", str, "5GB"),
            ("log_model", bool, False),
            ("registered_name", text, None),
            ("push_to_hub", text, None),
            ("private", bool, False),
        ):
            parser.add_argument(f"--{name}", type=type_, default=default, help=told[name])

    def instantiate_classes(self) -> None:
        # What is written tensor by tensor from a folder needs no memory for the model.
        with torch.device("meta") if self.is_streamed() else nullcontext():
            super().instantiate_classes()

    def is_streamed(self) -> bool:
        """Whether an export takes a checkpoint in parts, and nothing but its tensors."""
        given = self.config
        by_tensor = given["format"] != "compressed"
        mlflow = given["log_model"] or given["registered_name"]
        if self.name != "export" or not by_tensor or mlflow or given["ckpt_path"] is None:
            return False
        return is_distributed(given["ckpt_path"])

    def refuse_own_input(self) -> None:
        """Refuse to write over the model that was read: the next run would start from another."""
        given, output = self.model.hparams.get("model"), Path(self.config["output"])
        if given and output.exists() and output.samefile(resolve(str(given))):
            raise SystemExit(
                f"{str(output)!r} is the model that this recipe starts from, and would be written "
                f"over: choose another --output."
            )

    def export(self, checkpoint: str | None = None) -> Path:
        callback, output = self.masked, self.config["output"]
        folder = export_sparse(
            self.model,
            output,
            callback.pattern,
            include=callback.include,
            exclude=callback.exclude,
            file_format=self.config["format"],
            max_shard_size=self.config["max_shard_size"],
            checkpoint=checkpoint,
        )
        for name in ("tokenizer", "processor"):
            if hasattr(self.datamodule, name) and (folder / "config.json").exists():
                getattr(self.datamodule, name).save_pretrained(folder)
        return folder.absolute()

    def publish(self, folder: Path, console: Console, run: Path | None, results: str) -> None:
        """Write the model card of a run, and upload the folder if that was asked for."""
        name, base = self.config["push_to_hub"], self.model.hparams.get("model")
        method = parameters_of(run) if run is not None else {}
        source = getattr(self.datamodule, "hparams", {}).get("source")
        card = Card(
            name or folder.name,
            str(self.masked.pattern),
            base_model=str(base or ""),
            data=str(source or ""),
            results=results,
            method={k: v for k, v in method.items() if k not in ("model", "pattern")},
            command=_typed(self.name, sys.argv[1:]),
        )
        write_card(folder, card)
        console.print(f"Sparse model: {folder}", soft_wrap=True)
        if name is not None:
            try:
                console.print(f"On the Hub: {push(folder, name, private=self.config['private'])}")
            except ValueError as error:
                raise SystemExit(str(error)) from None

    def log_model(self, console: Console) -> None:
        """Keep the sparse model in MLflow, if that was asked for."""
        if not (self.config["log_model"] or self.config["registered_name"]):
            return
        loggers = [x for x in self.trainer.loggers if type(x).__name__ == "MLFlowLogger"]
        if not loggers:
            raise SystemExit("--log_model and --registered_name need an MLFlowLogger.")
        model = getattr(self.model, "model", self.model)
        tokenizer = getattr(self.datamodule, "tokenizer", None)
        uri = log_model(
            loggers[0],
            model,
            tokenizer,
            self.config["registered_name"],
            str(self.masked.pattern),
        )
        console.print(f"MLflow model: {uri}", soft_wrap=True)


class _BeforeFit(_CLI):
    """Builds what a recipe describes without memory for its weights."""

    def __init__(self) -> None:
        # A plan is no run, and planned for other devices than those that are here.
        sys.argv += ["--trainer.logger=false", "--trainer.accelerator=cpu", "--trainer.devices=1"]
        sys.argv += ["--trainer.strategy=auto", "--trainer.precision=32-true"]
        with torch.device("meta"):
            super().__init__(run=False, save_config_callback=None)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        told = HELP["plan"]
        parser.add_argument("--devices", type=int, default=1, help=told["devices"])
        parser.add_argument("--strategy", type=Strategy, default="fsdp2", help=told["strategy"])
        parser.add_argument("--tflops", type=PositiveFloat, default=400.0, help=told["tflops"])


_COST = {
    "policy": "A step costs up to 2 forward passes of a batch: under the drawn mask, and under the "
    "initial one where the batch is new.",
    "straight_through": "A step costs 3 forward passes of a batch: one, and a backward pass, that "
    "counts as two.",
}


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.0f}" if size >= 1e11 else f"{size / 1e9:.3g}"


def _plan_of(cli: _BeforeFit, callback: MaskProCallback | SparseFinetuning) -> tuple[Plan, str]:
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
    cli = _BeforeFit()
    found, cost = _plan_of(cli, masked_by(cli.trainer))
    rows_seen, steps, tflops = _rows(cli), cli.trainer.max_steps, cli.config["tflops"]
    parts = {**found.state, "largest unit, gathered": found.gathered}
    parts |= {} if found.activations is None else {"activations (estimate)": found.activations}
    parts |= {"or workspace of the update (estimate)": found.workspace} if found.workspace else {}
    rows = Table(title=f"One of {cli.config['devices']} ranks, {cli.config['strategy']}")
    rows.add_column("what")
    rows.add_column("GB", justify="right")
    for name, size in {**parts, "at the peak": found.total}.items():
        rows.add_row(name, _gigabytes(size), style="bold" if name == "at the peak" else None)
    console = Console()
    told = [rows, "GB are 10^9 bytes.", cost]
    if found.sent:
        told.append(
            f"In a step a rank sends {_gigabytes(found.sent)} GB of weights and gradients, and "
            f"takes as many."
        )
    if rows_seen is not None and steps > 0:
        time = hours(cli.model, rows_seen, found.forwards, steps, tflops)
        told.append(
            f"The {steps} steps take about {duration(3600 * time)} at {tflops:g} TFLOP/s a device "
            f"(--tflops), initial mask and validations aside."
        )
    console.print(*told, sep="\n")


def _rows(cli: _BeforeFit) -> int | None:
    """The vectors that a layer sees in a step of one rank, if the data says."""
    data = cli.datamodule
    shape = [data.hparams.get(name) if data else None for name in ("batch_size", "length")]
    return None if None in shape else math.prod(size or 0 for size in shape)


def _compare() -> None:
    cli = _AfterFit("compare")
    cli.refuse_own_input()
    console = Console()
    rows = compare(cli.trainer, cli.model, cli.datamodule)
    folder = cli.export()
    tracking = Tracking(cli.trainer, "warn")
    for path in (folder / "comparison.csv", tracking.folder() / "comparison.csv"):
        write_csv(rows, path)
    tracking.file(path)
    _show_comparison(cli, tracking, rows)
    console.print(table(rows, f"{cli.masked.pattern} masks of {cli.model.hparams.get('model')}"))
    cli.publish(folder, console, tracking.folder(), markdown(_numbers(rows)))
    cli.log_model(console)
    _tell_mlflow(cli, console)


def _numbers(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    return {
        row.mask: row.metrics | {"sparsity": row.sparsity, "seconds": row.seconds} for row in rows
    }


def _show_comparison(cli: _AfterFit, tracking: Tracking, rows: Sequence[Row]) -> None:
    """Log each mask as a run, and draw validations anew, beside what they are compared with."""
    numbers, found = _numbers(rows), row_of(cli.masked)

    def log(logger: Any) -> None:
        name = f"{(logger._run_name or 'maskpro').removesuffix(f' {found}')} compare"
        log_comparison(logger, numbers, str(cli.masked.pattern), name, found)

    tracking.each("MLFlowLogger", log)
    try:
        from maskpro_lightning.tracking import plots

        drawn = plots.figures(read_run(tracking.folder())).get("validation")
    except (ModuleNotFoundError, ValueError):
        return
    if drawn is not None:
        tracking.figure(tracking.folder() / "validation.png", drawn)


def _evaluate() -> None:
    from maskpro_lightning.commands import evaluate
    from maskpro_lightning.modules.language import CausalLM

    cli = _Evaluated("evaluate")
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
    cli = _AfterFit("export")
    streams = cli.is_streamed()
    path, load = cli.config["ckpt_path"], cli.checkpoint()
    if load is None:
        raise SystemExit("maskpro export needs --ckpt_path, a checkpoint of the fit.")
    cli.refuse_own_input()
    if not streams:
        load(cli.model)
    console = Console()
    run = _run_of(path)
    found = None if run is None else read_result(run)
    folder = cli.export(path if streams else None)
    cli.publish(folder, console, run, "" if found is None else found.markdown())
    cli.log_model(console)


def _run_of(checkpoint: str | None) -> Path | None:
    """The folder of the callback's files in the run that wrote a checkpoint."""
    folders = [] if checkpoint is None else list(Path(checkpoint).absolute().parents)[:3]
    return next((each / "maskpro" for each in folders if (each / "maskpro").is_dir()), None)


def _measure() -> None:
    cli = _Measured("measure")
    callback, device = cli.masked, cli.trainer.strategy.root_device
    targets = find_targets(cli.model, "2:4", callback.include, callback.exclude)
    dtype = getattr(torch, cli.config["dtype"])
    found = measure.measure(targets, device, dtype, cli.config["batch_sizes"])
    console = Console()
    console.print(measure.table(found))
    console.print(measure.conclusion(found), soft_wrap=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _tell_mlflow(cli: LightningCLI, console: Console) -> None:
    logger: Any
    for logger in cli.trainer.loggers:
        uri = getattr(logger, "_tracking_uri", None)
        if type(logger).__name__ == "MLFlowLogger" and uri is not None:
            if uri.startswith("sqlite:///"):
                uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
            python = _nearby(sys.executable)
            uri = without_credentials(uri)
            # None if no experiment was opened, which would ask the server now.
            number = getattr(logger, "_experiment_id", None)
            page = "" if number is None else f"#/experiments/{number}/runs{_AS_TRAINING}"
            console.print(
                f"MLflow: {python} -m mlflow ui --backend-store-uri {uri}, then open\n"
                f"http://127.0.0.1:5000/{page}",
                soft_wrap=True,
            )


# MLflow shows experiments as generative ones unless it is told otherwise.
_AS_TRAINING = "?workflowType=machine_learning"


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
