"""A recipe on the command line becomes model, data and trainer, with each command's options."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console

from maskpro_lightning.catalog import resolve
from maskpro_lightning.commands.advice import tell_export, tell_mlflow, typed
from maskpro_lightning.commands.compare import masked_by
from maskpro_lightning.commands.options import HELP
from maskpro_lightning.commands.plan import Strategy
from maskpro_lightning.files.card import Card, push, write_card
from maskpro_lightning.files.checkpoint import loader_of
from maskpro_lightning.files.distributed import is_distributed
from maskpro_lightning.files.export import Format, export_sparse
from maskpro_lightning.fit.callback import MaskProCallback
from maskpro_lightning.fit.finetuning import SparseFinetuning
from maskpro_lightning.tracking.configuration import SaveConfig
from maskpro_lightning.tracking.database import make_database
from maskpro_lightning.tracking.mlflow_model import log_model
from maskpro_lightning.tracking.runs import parameters_of


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
                lacks = ("does not appear to have a file", "is not a local folder")
                names = [n for n in names if any(f"{n} {what}" in str(error) for what in lacks)]
            if not names:
                raise
            raise SystemExit(
                f"No folder here, no cache and no Hub that can be reached has all the files of "
                f"{' or '.join(map(repr, names))}: fetch it once where there is a network "
                f"(hf download NAME), or give the folder of a model. A sparse model that a recipe "
                f"trains on is written first, by maskpro compare or export."
            ) from None


class Command(_CLI):
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
        """Tell how the checkpoint becomes a model for others, and where the run is to be seen."""
        path = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if path and self.trainer.is_global_zero:
            trainer: Any = self.trainer
            trains = any(isinstance(each, SparseFinetuning) for each in trainer.callbacks)
            tell_export(path, "trained-model" if trains else "sparse-model")
        if self.trainer.is_global_zero:
            tell_mlflow(self.trainer.loggers, Console())

    def instantiate_classes(self) -> None:
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        strategy = getattr(config["trainer"]["strategy"], "class_path", "")
        if self.subcommand is None or not strategy.endswith(".ModelParallelStrategy"):
            super().instantiate_classes()
        else:
            from maskpro_lightning.modules.loading import loading_late

            with loading_late():
                super().instantiate_classes()
        trainer: Any = self.trainer
        for callback in trainer.callbacks:
            if isinstance(callback, MaskProCallback):
                callback.to_do = ""  # the command is told, once the checkpoint is there

    #: The command, where it is not one of Lightning's.
    name = ""


def _prepare(init_args: Any, command: str, checkpoint: str | None, learned: str) -> None:
    """Make an MLflow database, and let a run's name say which command, or row, it is of."""
    make_database(init_args.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI", ""))
    fits = "resumed" if checkpoint else None
    what = {"fit": fits, "compare": learned}.get(command, command)
    if init_args.get("run_name") is not None and what is not None:
        init_args["run_name"] = f"{init_args['run_name']} {what}"


class Built(Command):
    """Builds model, data and trainer from a recipe and runs nothing."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(run=False, save_config_callback=SaveConfig)

    @property
    def masked(self) -> MaskProCallback | SparseFinetuning:
        """The callback that says which weights are masked."""
        return masked_by(self.trainer)


class Measured(Built):
    """Adds the options of ``maskpro measure``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        sizes, dtypes = list[PositiveInt], Literal["bfloat16", "float16", "float32"]
        told = HELP["measure"]
        default = [1, 16, 256, 4096]
        parser.add_argument("--batch_sizes", type=sizes, default=default, help=told["batch_sizes"])
        parser.add_argument("--dtype", type=dtypes, default="bfloat16", help=told["dtype"])


class WithCheckpoint(Built):
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


class Evaluated(WithCheckpoint):
    """Adds the options of ``maskpro evaluate``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        from maskpro_lightning.commands.evaluate import WIKITEXT2

        super().add_arguments_to_parser(parser)
        told, text, count = HELP["evaluate"], str | None, PositiveInt | None
        parser.add_argument("--wikitext2", type=text, default=WIKITEXT2, help=told["wikitext2"])
        parser.add_argument("--window", type=PositiveInt, default=2048, help=told["window"])
        parser.add_argument("--tasks", type=text, default=None, help=told["tasks"])
        parser.add_argument("--limit", type=count, default=None, help=told["limit"])


class AfterFit(WithCheckpoint):
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
        if Path(output).exists():
            Console().print(f"Written over: what was in {output}", soft_wrap=True)
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
            command=typed(self.name, sys.argv[1:]),
            trained=isinstance(self.masked, SparseFinetuning),
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


class BeforeFit(_CLI):
    """Builds what a recipe describes without memory for its weights."""

    def __init__(self) -> None:
        with torch.device("meta"):
            super().__init__(run=False, save_config_callback=None)

    def before_instantiate_classes(self) -> None:
        trainer = self.config["trainer"]
        asked = {
            "devices": _ranks(trainer["devices"]) * trainer["num_nodes"],
            "strategy": _sharding(trainer["strategy"]),
            "tflops": 0.1 if trainer["accelerator"] == "cpu" else 400.0,
        }
        for name, value in asked.items():
            if self.config[name] is None:
                self.config[name] = value
        # A plan is no run, and planned for other devices than those that are here.
        trainer["logger"], trainer["accelerator"], trainer["devices"] = False, "cpu", 1
        trainer["strategy"], trainer["precision"] = "auto", "32-true"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        told = HELP["plan"]
        for name, kind in (("devices", int), ("strategy", Strategy), ("tflops", PositiveFloat)):
            parser.add_argument(f"--{name}", type=kind | None, default=None, help=told[name])


def _ranks(devices: Any) -> int:
    """The number of ranks of a node that a Trainer's ``devices`` asks for; 1 if it does not say."""
    if isinstance(devices, str) and "," in devices:
        devices = [index for index in devices.split(",") if index.strip()]
    if isinstance(devices, list):
        return len(devices)
    return int(devices) if str(devices).isdigit() else 1


def _sharding(strategy: Any) -> Strategy:
    """What a plan calls a Trainer's strategy; FSDP2 if it does not say."""
    name = getattr(strategy, "class_path", str(strategy)).rpartition(".")[2].lower()
    if name.startswith("ddp"):
        return "ddp"
    return "fsdp1" if name.startswith("fsdp") else "fsdp2"
