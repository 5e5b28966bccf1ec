"""What pickles of models and learners refer to; imports nothing of the package, so that they load without it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class Net(nn.Module):
    """Two convs with norms that have statistics, a new norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.neck = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.body(x)
        return self.head(F.relu(self.neck(x)).mean((2, 3)))


class Images(TensorDataset):
    """With what fastai's export asks of a dataset."""

    def new_empty(self) -> Images:
        return Images(*[t[:0] for t in self.tensors])
