"""Every dtype that torch trains in crosses the cut exactly; a tensor that can't be stored is named when it is split."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness_http import running
from torch import Tensor, nn

import splitfed
from splitfed.errors import UnsupportedError
from splitfed.service.http.app import make_app


class Spectral(nn.Module):
    """A spectral layer: complex weights of several strides, and a running mean of what came."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, dtype=torch.complex128))
        self.grid = nn.Parameter(torch.randn(3, 4, 5, dtype=torch.complex128).permute(2, 0, 1))
        self.scale = nn.Parameter(torch.tensor(1 + 2j, dtype=torch.complex128))
        self.register_buffer("mean", torch.zeros(5, dtype=torch.complex128))
        self.register_buffer("empty", torch.zeros(0, 5, dtype=torch.complex128))

    def forward(self, z: Tensor) -> Tensor:
        """Frequencies (N, 5) to the same."""
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * z.mean(0))
        return z * self.weight * self.scale + self.mean + self.grid.sum((1, 2))


class Forth(nn.Module):
    """To frequencies."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, 8) to (N, 5)."""
        return torch.fft.rfft(x)


class Back(nn.Module):
    """From frequencies."""

    def forward(self, z: Tensor) -> Tensor:
        """(N, 5) to (N, 8)."""
        return torch.fft.irfft(z, n=8)


def model() -> nn.Module:
    """In double precision, with a spectral layer whose inputs and outputs are complex too."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), Forth(), Spectral(), Back(), nn.Linear(8, 2)).double()


def test_check_of_a_model_of_complex128() -> None:
    """Around the complex part, and within it."""
    for at in ("2", "1:4", "1:3"):
        assert splitfed.check(model(), at, torch.randn(4, 8).double()).ok


@pytest.mark.parametrize("keep_graphs", [8, 0])
@pytest.mark.parametrize("http", [False, True])
def test_commits_of_complex128_are_the_unsplit_steps(http: bool, keep_graphs: int, tmp_path: Path) -> None:
    """Weights, buffers, activations, gradients and Adam's state, through files and over HTTP, by new replicas."""

    def adam(parameters: object) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=0.1)  # type: ignore[arg-type]

    plain = model()
    half, body = splitfed.split(copy.deepcopy(plain), "2")
    store = splitfed.GradientStore(tmp_path, sync="process")
    server = splitfed.SplitServer(body, store, keep_graphs=keep_graphs)
    with running(make_app(server)) as service:
        client = splitfed.SplitClient(half, service.url if http else server, client_id="a")
        mine, theirs = adam(client.parameters()), adam(plain.parameters())
        for _ in range(3):
            x = torch.randn(4, 8).double()
            for module, optimizer in ((client, mine), (plain, theirs)):
                optimizer.zero_grad()
                module(x).square().mean().backward()
                optimizer.step()
            splitfed.Accumulator(body, store, adam).step()
    whole = splitfed.join(client, store.load_weights()).state_dict()
    for name, expected in plain.state_dict().items():
        assert whole[name].dtype == expected.dtype
        assert torch.equal(whole[name], expected), name


def with_buffer(value: Tensor, *, persistent: bool = True) -> nn.Module:
    """A model whose middle has a buffer."""
    found = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    found[1].register_buffer("graph", value, persistent=persistent)
    return found


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.eye(4).to_sparse(), r"'graph' can't.*\.to_dense\(\).*persistent=False"),
        (lambda: torch.eye(4).to_sparse_csr(), r"'1.graph' is.*sparse_csr.*\.to_dense\(\), or \.to_sparse_coo\(\)"),
        (lambda: torch.eye(4).to_mkldnn(), r"'1.graph' is.*mkldnn.*\.to_dense\(\)"),
        (lambda: torch.nested.nested_tensor([torch.ones(2)]), r"'1.graph' is.*nested.*\.to_dense\(\)"),
        (lambda: torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8), r"'graph' can't.*\.dequantize\(\)"),
        (lambda: torch.ones([1] * 9), r"'graph' can't.*at most 8 dimensions.*reshape"),
    ],
    ids=["coo", "csr", "mkldnn", "nested", "quantized", "dimensions"],
)
def test_a_buffer_that_cannot_be_stored_is_named(make: Callable[[], Tensor], message: str, tmp_path: Path) -> None:
    """When the model is split, and when a body is served; nothing is on file then."""
    found = with_buffer(make())
    with pytest.raises(UnsupportedError, match=message):
        splitfed.split(found, "1")
    with pytest.raises(UnsupportedError, match=message.replace("1.graph", "graph")):
        splitfed.SplitServer(found[1], splitfed.GradientStore(tmp_path / "run"))
    assert not (tmp_path / "run" / "body").exists()


def test_a_sparse_buffer_outside_of_the_weights() -> None:
    """The way out that the error names: it is the structure's, not a version's."""
    assert splitfed.check(with_buffer(torch.eye(4).to_sparse(), persistent=False), "1", torch.randn(4, 4)).ok
