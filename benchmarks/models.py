"""The bodies that are timed: the study's tiny one, a ResNet-18 for 32×32 images, and transformers of two sizes."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


def tiny() -> nn.Module:
    """784–64 | 64–64 | 64–10, as in the study; cut at '2'."""
    return nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


class Block(nn.Module):
    """The basic residual block of He et al., arXiv 1512.03385."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            self.short = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inner, H, W) to (N, outer, H/stride, W/stride)."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.short(x))


def resnet18() -> nn.Module:
    """ResNet-18 with the 3×3 stem for 32×32 images; cut at 'layer2' to 'flat', the slice '2:7'."""
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
            layer1=nn.Sequential(Block(64, 64, 1), Block(64, 64, 1)),
            layer2=nn.Sequential(Block(64, 128, 2), Block(128, 128, 1)),
            layer3=nn.Sequential(Block(128, 256, 2), Block(256, 256, 1)),
            layer4=nn.Sequential(Block(256, 512, 2), Block(512, 512, 1)),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(512, 10),
        )
    )


def transformer(width: int, layers: int, dropout: float) -> nn.Module:
    """Embedding | encoder layers | head over 64 words, one row of logits a token; the body is the slice '1:-2'."""
    body = [
        nn.TransformerEncoderLayer(width, 8, 4 * width, dropout, batch_first=True, norm_first=True)
        for _ in range(layers)
    ]
    return nn.Sequential(nn.Embedding(64, width), *body, nn.Linear(width, 64), nn.Flatten(0, 1))
