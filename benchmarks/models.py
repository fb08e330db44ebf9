"""The bodies that are timed: the study's tiny one, a ResNet-18 for 32×32 images, transformers, and one with LoRA."""

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


class LoRA(nn.Module):
    """A frozen linear layer and a low-rank change of it that trains (Hu et al., arXiv 2106.09685)."""

    def __init__(self, inner: int, outer: int, rank: int = 8) -> None:
        super().__init__()
        self.base = nn.Linear(inner, outer).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, inner) / inner**0.5)
        self.up = nn.Parameter(torch.zeros(outer, rank))

    def forward(self, x: Tensor) -> Tensor:
        """(..., inner) to (..., outer)."""
        changed: Tensor = self.base(x) + (x @ self.down.T) @ self.up.T
        return changed


class Layer(nn.Module):
    """A transformer layer whose attention is frozen, and whose two linear layers have LoRA."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 8, batch_first=True).requires_grad_(False)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)]).requires_grad_(False)
        self.up, self.down = LoRA(width, 4 * width), LoRA(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, width) to the same."""
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        found: Tensor = x + self.down(torch.relu(self.up(self.norms[1](x))))
        return found


def lora(width: int, layers: int) -> nn.Module:
    """As `transformer`, with frozen layers that LoRA trains; the body is the slice '1:-2'."""
    body = [Layer(width) for _ in range(layers)]
    return nn.Sequential(nn.Embedding(64, width), *body, nn.Linear(width, 64), nn.Flatten(0, 1))
