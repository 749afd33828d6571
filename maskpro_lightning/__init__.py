"""Learn strict N:M sparsity masks with one Lightning callback (MaskPro, arXiv 2506.12876)."""

from maskpro_lightning.files.compressed import load_compressed
from maskpro_lightning.files.export import export_sparse
from maskpro_lightning.files.maskfiles import load_masks, save_masks
from maskpro_lightning.fit.callback import MaskProCallback
from maskpro_lightning.fit.distillation import Distillation
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.optim.optimizer import MaskPro
from maskpro_lightning.weights.targets import find_targets, parameter_groups

__version__ = "0.1.0"

__all__ = [
    "Distillation",
    "MaskPro",
    "MaskProCallback",
    "NMPattern",
    "export_sparse",
    "find_targets",
    "load_compressed",
    "load_masks",
    "parameter_groups",
    "save_masks",
]
