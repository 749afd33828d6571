"""A training of your own, and the three lines that find a 2:4 mask in it."""

import lightning as L  # noqa: N812
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from maskpro_lightning import MaskProCallback, export_sparse


class Classifier(L.LightningModule):
    """Tells whether a point lies inside a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("accuracy", (self.net(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


if __name__ == "__main__":
    L.seed_everything(0)
    points = torch.randn(5120, 2)
    rows = TensorDataset(points, (points.norm(dim=-1) < 1).long())
    train, held_out = (DataLoader(part, 256) for part in random_split(rows, [4096, 1024]))
    module = Classifier()
    L.Trainer(max_epochs=5).fit(module, train, held_out)  # the training that you have

    masks = MaskProCallback("2:4", exclude=["net.0"], monitor="accuracy", monitor_mode="max")
    L.Trainer(max_epochs=5, callbacks=[masks]).fit(module, train, held_out)
    export_sparse(module, "sparse-model", exclude=["net.0"])
