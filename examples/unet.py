"""A MONAI UNet whose inner levels run on the server; the clinic has the outer ones, and sends neither images nor masks.

The cut is a submodule in the middle of the network: the skip connection around it stays at the clinic, so only the
small inner feature maps cross. The images are synthetic: a disc under heavy noise, to be marked pixel by pixel. Run it:

    python examples/unet.py

Needs monai.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from monai.losses import DiceLoss
from monai.networks.nets import UNet
from torch import Tensor

import splitfed

SIZE = 32
CUT = "model.1.submodule"  # `print(model)` shows the names; any submodule can be the body


def make_model() -> UNet:
    """A UNet with three levels, BatchNorm and dropout, as MONAI builds it."""
    return UNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=(8, 16, 32),
        strides=(2, 2),
        num_res_units=1,
        norm="BATCH",
        dropout=0.1,
    )


def make_images(num: int) -> tuple[Tensor, Tensor]:
    """Images of a disc under noise, and the discs' masks: both (N, 1, 32, 32)."""
    axis = torch.arange(SIZE, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))  # (2, H, W): row and column of each pixel
    centre = torch.rand(num, 2, 1, 1) * (SIZE - 16) + 8
    masks = ((grid - centre).norm(dim=1) < torch.rand(num, 1, 1) * 4 + 4).float()
    return (masks + 0.7 * torch.randn(num, SIZE, SIZE))[:, None], masks[:, None]


def dice(outputs: Tensor, masks: Tensor) -> float:
    """The Dice score of what is above 0: 1 is perfect."""
    found = (outputs > 0).float()
    return float(2 * (found * masks).sum() / (found.sum() + masks.sum()))


def main() -> None:
    """Cut the network, train it, and score it on new images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="an empty folder for the files (default: a temporary one)")
    parser.add_argument("--seed", type=int, default=0, help="of all chance (default: 0)")
    parser.add_argument("--steps", type=int, default=90, help="batches of 16 images (default: 90)")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    model = make_model()
    half, body = splitfed.split(model, CUT)
    with tempfile.TemporaryDirectory() as folder:
        store = splitfed.GradientStore(arguments.store or folder, sync="process")
        client = splitfed.SplitClient(half, splitfed.SplitServer(body, store), client_id="clinic-a")
        accumulator = splitfed.Accumulator(body, store, optimizer=lambda params: torch.optim.Adam(params, lr=5e-3))
        optimizer = torch.optim.Adam(client.parameters(), lr=5e-3)
        loss_fn = DiceLoss(sigmoid=True)  # computed at the clinic: masks aren't sent

        client.train()
        for step in range(1, arguments.steps + 1):
            images, masks = make_images(16)
            optimizer.zero_grad()
            loss = loss_fn(client(images), masks)
            loss.backward()
            optimizer.step()
            accumulator.step()
            if step % 30 == 0:
                print(f"step {step}: loss {loss.item():.3f}, body at version {store.latest_version()}")

        # The whole network again, under MONAI's own names; its outputs are the client's, bit for bit.
        whole = splitfed.join(client, store.load_weights()).eval()
        images, masks = make_images(64)
        with torch.no_grad():
            outputs = whole(images)
            assert torch.equal(outputs, client.eval()(images))
        print(f"dice: {dice(outputs, masks):.3f} on 64 new images")
        print(f"dice of a threshold on the pixels: {dice(images - 0.5, masks):.3f}")


if __name__ == "__main__":
    main()
