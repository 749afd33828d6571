"""What a command's own options are, told without waiting for PyTorch."""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path

from maskpro_lightning.catalog import recipes

#: By command and name of the option: what it is for.
HELP = {
    "export": {
        "ckpt_path": "The checkpoint of a fit, a file or a folder that ranks wrote; needed.",
        "output": "Folder to write.",
        "format": "auto, huggingface, safetensors, compressed or maskllm.",
        "max_shard_size": "Of a file, at most.",
        "log_model": "Keep the model in MLflow's run too, true or false.",
        "registered_name": "Name to register it in MLflow.",
        "push_to_hub": "Name on the Hugging Face Hub to upload the folder to.",
        "private": "Whether a repository that is made there is private.",
    },
    "evaluate": {
        "ckpt_path": "The checkpoint of a fit; without one, the model is measured as it is.",
        "wikitext2": "Hub name or folder of WikiText; null leaves it out.",
        "window": "Tokens of a window of WikiText.",
        "tasks": "Tasks of lm-evaluation-harness, such as arc_easy,hellaswag.",
        "limit": "Examples of each task, at most.",
    },
    "measure": {
        "batch_sizes": "Rows of the batches that layers are timed with.",
        "dtype": "bfloat16, float16 or float32.",
    },
    "plan": {
        "devices": "Number of ranks; by default the recipe's, on all nodes.",
        "strategy": "How to shard: ddp, fsdp1 or fsdp2; by default as the recipe does.",
        "tflops": "10^12 multiplications and additions that a device does in a second: in "
        "bfloat16 an H100 some 400, an A100 some 140, a core of a CPU 0.1. By default a core's if "
        "the recipe's accelerator is cpu, and an H100's otherwise.",
    },
}
HELP["compare"] = {k: v for k, v in HELP["export"].items() if k != "ckpt_path"}
_OF_FIT = {
    "trainer.max_steps": "Steps of the fit.",
    "trainer.val_check_interval": "Steps between two validations.",
    "trainer.logger": "Where to log; --trainer.logger=false does not.",
    "data.batch_size": "And whatever else the recipe's data and model take: see --print_config.",
    "ckpt_path": "A checkpoint to go on from.",
}
_VALIDATE = {"ckpt_path": "The checkpoint to measure; without one, the recipe's model."}
_PURPOSE = {
    "fit": "Learn a mask.",
    "validate": "Measure a model, or a checkpoint.",
    "compare": "Measure the dense model and one-shot masks, learn a mask, print one table, export.",
    "evaluate": "Measure the model dense and as in a checkpoint, side by side.",
    "export": "Write a checkpoint's sparse model for others to load.",
    "measure": "Time the layers dense and 2:4 on this device.",
    "plan": "Tell what a fit needs, without loading the model.",
}


def help_of(command: str) -> str | None:
    """What ``maskpro COMMAND --help`` says; None if it is no such command."""
    if command not in _PURPOSE:
        return None
    parts = [f"usage: maskpro {command} --config RECIPE [options]", _PURPOSE[command]]
    own = HELP.get(command, {"fit": _OF_FIT, "validate": _VALIDATE}.get(command, {}))
    parts.append(f"Options:\n{_lines({f'--{name}': text for name, text in own.items()})}")
    if command in ("fit", "compare", "plan"):
        found = {f"--trainer.callbacks.{name}": text for name, text in callback_options().items()}
        parts.append(f"How masks are learned (MaskProCallback):\n{_lines(found)}")
    if command == "compare":
        found = {f"--{name}": text for name, text in _OF_FIT.items() if name != "ckpt_path"}
        parts.append(f"How long, on what:\n{_lines(found)}")
    parts.append(f"RECIPE is a YAML file or one of: {', '.join(recipes())}.")
    parts.append(
        f"All that Lightning's Trainer takes, too: maskpro {command} --help_all, or\n"
        f"https://lightning.ai/docs/pytorch/stable/common/trainer.html\n"
        f"What would run: maskpro {command} --config RECIPE --print_config"
    )
    return "\n\n".join(parts)


def callback_options() -> dict[str, str]:
    """The arguments of MaskProCallback and what they are for, with defaults, from its source."""
    source = Path(__file__).parent.with_name("fit") / "callback.py"
    classes = (n for n in ast.parse(source.read_text("utf-8")).body if isinstance(n, ast.ClassDef))
    found = next(each for each in classes if each.name == "MaskProCallback")
    functions = (n for n in found.body if isinstance(n, ast.FunctionDef))
    arguments = next(each for each in functions if each.name == "__init__").args
    names = [argument.arg for argument in (*arguments.args, *arguments.kwonlyargs)][1:]
    given = [*arguments.defaults, *arguments.kw_defaults]
    defaults = dict(zip(names[::-1], given[::-1], strict=False))
    texts = _arguments_in(ast.get_docstring(found) or "")
    return {
        name: " ".join([texts.get(name, ""), _default(defaults.get(name))]).strip()
        for name in names
    }


def _arguments_in(docstring: str) -> dict[str, str]:
    """The descriptions below "Args:" by name."""
    _, _, below = docstring.partition("Args:\n")
    found: dict[str, str] = {}
    name = ""
    for line in below.splitlines():
        if not line.startswith("    "):
            if line.strip():
                break
        elif not line.startswith("     "):
            name, _, text = line.strip().partition(": ")
            found[name] = text
        elif name:
            found[name] += f" {line.strip()}"
    return {name: text.replace(":class:", "").replace(":func:", "") for name, text in found.items()}


def _default(node: ast.expr | None) -> str:
    if node is None or (isinstance(node, ast.Constant) and node.value is None):
        return ""
    return f"[{ast.unparse(node)}]"


def _lines(options: dict[str, str]) -> str:
    """Options and their texts, wrapped below each other."""
    lines = []
    for name, text in options.items():
        lines.append(f"  {name}")
        lines += textwrap.wrap(
            inspect.cleandoc(text), 92, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return "\n".join(lines)
