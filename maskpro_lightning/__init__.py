"""Learn strict N:M sparsity masks with one Lightning callback (MaskPro, arXiv 2506.12876)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskpro_lightning.files.compressed import load_compressed
    from maskpro_lightning.files.export import export_sparse
    from maskpro_lightning.files.maskfiles import load_masks, save_masks
    from maskpro_lightning.fit.callback import MaskProCallback
    from maskpro_lightning.fit.distillation import Distillation
    from maskpro_lightning.fit.finetuning import SparseFinetuning
    from maskpro_lightning.masks.pattern import NMPattern
    from maskpro_lightning.optim.estimators import Policy, StraightThrough
    from maskpro_lightning.optim.optimizer import MaskPro
    from maskpro_lightning.tracking.configuration import SaveConfig
    from maskpro_lightning.weights.adapters import merge_adapters
    from maskpro_lightning.weights.kept import keep_sparse
    from maskpro_lightning.weights.targets import find_targets, parameter_groups

__version__ = "0.1.0"

__all__ = [
    "Distillation",
    "MaskPro",
    "MaskProCallback",
    "NMPattern",
    "Policy",
    "SaveConfig",
    "SparseFinetuning",
    "StraightThrough",
    "export_sparse",
    "find_targets",
    "keep_sparse",
    "load_compressed",
    "load_masks",
    "merge_adapters",
    "parameter_groups",
    "save_masks",
]

_HOMES = {
    "Distillation": "fit.distillation",
    "MaskPro": "optim.optimizer",
    "MaskProCallback": "fit.callback",
    "NMPattern": "masks.pattern",
    "Policy": "optim.estimators",
    "SaveConfig": "tracking.configuration",
    "SparseFinetuning": "fit.finetuning",
    "StraightThrough": "optim.estimators",
    "export_sparse": "files.export",
    "find_targets": "weights.targets",
    "keep_sparse": "weights.kept",
    "load_compressed": "files.compressed",
    "load_masks": "files.maskfiles",
    "merge_adapters": "weights.adapters",
    "parameter_groups": "weights.targets",
    "save_masks": "files.maskfiles",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: PyTorch and Lightning take seconds that some commands can spare."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
