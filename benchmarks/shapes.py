"""A small vision transformer that tells ten noisy shapes apart, trained here from a fixed seed.

Its images are drawn by a formula, so that nothing has to be downloaded.

Shape suffixes: ``B`` images, ``S`` pixels of a side, ``T`` patches, ``D`` width.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import trange

#: Pixels of an image's side and of a patch's, classes, images of a batch.
SIDE, PATCH, CLASSES, BATCH = 32, 8, 10, 64
TRAINING_STEPS = 3000


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Polygons of 3 to 7 corners and flowers of 3 to 7 petals, turned, scaled, shifted, in noise.

    Returns:
        Images (B, S, S) and int64 classes (B,): corners - 3, or petals + 2.
    """

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    labels_B = torch.randint(CLASSES, (count,), generator=generator)
    points_B11 = (3 + labels_B % 5)[:, None, None]
    axis_S = torch.linspace(-1, 1, SIDE)
    x_BSS, y_BSS = axis_S - between(-0.25, 0.25), axis_S[:, None] - between(-0.25, 0.25)
    angle_BSS = torch.atan2(y_BSS, x_BSS) + between(0, 2 * math.pi)
    wedge_B11 = math.pi / points_B11
    polygon_BSS = wedge_B11.cos() / (angle_BSS % (2 * wedge_B11) - wedge_B11).cos()
    flower_BSS = 0.75 + 0.25 * (points_B11 * angle_BSS).cos()
    edge_BSS = polygon_BSS.where(labels_B[:, None, None] < 5, flower_BSS) * between(0.5, 0.9)
    inside_BSS = torch.sigmoid(20 * (edge_BSS - torch.hypot(x_BSS, y_BSS)))
    noise_BSS = torch.randn(count, SIDE, SIDE, generator=generator)
    return inside_BSS * between(0.7, 1.3) + 0.25 * noise_BSS, labels_B


def batches(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of images and classes; another seed gives others."""
    generator = torch.Generator().manual_seed(seed)
    return [draw(BATCH, generator) for _ in range(count)]


class Block(nn.Module):
    """Attention, then two linear layers, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        parts = self.query_key_value(self.attention_norm(hidden_BTD)).chunk(3, dim=-1)
        split = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts]
        mixed_BTD = scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        hidden_BTD = hidden_BTD + self.output(mixed_BTD)
        up = nn.functional.gelu(self.up(self.mlp_norm(hidden_BTD)))
        output_BTD: Tensor = hidden_BTD + self.down(up)
        return output_BTD


class VisionTransformer(nn.Module):
    """Classes' logits (B, 10) of images (B, S, S)."""

    def __init__(self, width: int = 96, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Linear(PATCH**2, width)
        self.places = nn.Parameter(torch.randn((SIDE // PATCH) ** 2, width) / 10)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images_BSS: Tensor) -> Tensor:
        rows = images_BSS.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
        hidden_BTD = self.embedding(rows.flatten(3).flatten(1, 2)) + self.places
        logits: Tensor = self.head(self.norm(self.blocks(hidden_BTD)).mean(1))
        return logits


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of a batch in nats."""
    images, labels = batch
    return cross_entropy(model(images), labels)


def trained(folder: Path) -> VisionTransformer:
    """The model, in evaluation mode: trained once, then read from ``folder``."""
    file = folder / "shapes.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer()
    if file.exists():
        model.load_state_dict(load_file(file))
        return model.eval()
    optimizer = AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    scheduler = OneCycleLR(optimizer, 3e-3, total_steps=TRAINING_STEPS)
    generator = torch.Generator().manual_seed(0)
    bar = trange(TRAINING_STEPS, desc="Training the vision transformer", unit="step", leave=False)
    for _ in bar:
        value = loss(model, draw(BATCH, generator))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)
    save_file(model.state_dict(), file)
    return model.eval()
