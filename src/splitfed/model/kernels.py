"""Kernels: the bits that a device gives on a few small computations, as one digest.

Torch's own kernels are told by its version and the vector instructions. But matrix products,
convolutions, transforms and many elementwise functions come from libraries (MKL, oneDNN, cuDNN)
that choose their code by vendor, model and cache of the machine, and by the environment: two CPUs
that say the same of themselves may round otherwise. No name tells that, so it is computed.

The inputs are quotients of integers, which are the same bits everywhere, with full mantissas:
sums of short numbers wouldn't round at all. The shapes are small; what a library does to large
ones alone isn't seen.

The traps: the digest must depend on nothing but the device, and leave nothing behind. Grad mode,
autocast, inference mode and default devices belong to a thread, so it is computed in a thread of
its own, where none is set; nothing is drawn; each dtype is named. A pool of OpenMP belongs to the
thread that first needed it, too, and a process that forks beside one of its own can't use it. And
that thread doesn't end: one that was joined still gives its pool back, and a fork at that moment
leaves a lock to the child that nobody opens. `torch.autograd.grad` isn't used: its first call takes
a fifth of a second.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- its usual name
from torch.nn import grad as gradients

from splitfed.protocol.safetensors import crc32

_PRIME = 65_521
_STEP = 40_503
"""The remainders of its multiples, divided by the prime, are the inputs: spread over -1 to 1."""

Values = Callable[..., Tensor]
Computation = Callable[[], Tensor | tuple[Tensor, ...]]

# (m, k, n): libraries take other code for vectors, for what is skinny, and past a block.
_PRODUCTS = {
    torch.float32: (
        (5, 4, 6),
        (2, 6, 3),
        (1, 64, 10),
        (7, 33, 5),
        (3, 513, 1),
        (16, 256, 64),
        (64, 64, 64),
        (70, 130, 100),
        (4, 4_096, 4),
    ),
    torch.float64: ((7, 33, 5), (3, 513, 1), (70, 130, 100)),
    torch.bfloat16: ((1, 64, 10), (16, 256, 64), (70, 130, 100)),
    torch.float16: ((16, 256, 64),),
}
# Shapes of input and kernel, stride, padding, groups.
_CONVOLUTIONS = (
    ((2, 3, 12, 12), (8, 3, 3, 3), 1, 0, 1),
    ((2, 32, 9, 9), (48, 32, 3, 3), 2, 1, 1),
    ((2, 64, 6, 6), (32, 64, 1, 1), 1, 0, 1),
    ((2, 16, 6, 6), (16, 1, 3, 3), 1, 1, 16),
)
_ELEMENTWISE: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.exp,
    torch.tanh,
    torch.erf,
    torch.sigmoid,
    torch.sin,
    torch.cos,
    F.gelu,
    F.silu,
    F.softplus,
)


class _Worker:
    """A thread of its own, which waits for the next call; after a fork the child has another."""

    def __init__(self) -> None:
        self._thread = threading.Thread()
        self._calls: SimpleQueue[tuple[Future[str], torch.device]] = SimpleQueue()

    def digest(self, device: torch.device) -> str:
        """The digest, computed there."""
        if not self._thread.is_alive():
            # If two callers do so at once, one thread waits for ever: it costs nothing.
            self._calls = SimpleQueue()
            self._thread = threading.Thread(target=self._work, args=(self._calls,), daemon=True)
            self._thread.start()
        future: Future[str] = Future()
        self._calls.put((future, device))
        return future.result()

    @staticmethod
    def _work(calls: SimpleQueue[tuple[Future[str], torch.device]]) -> None:
        while True:
            future, device = calls.get()
            try:
                future.set_result(_digest(device))
            except BaseException as error:  # noqa: BLE001 -- it is raised where it was asked for
                future.set_exception(error)


_worker = _Worker()


def kernels_digest(device: torch.device) -> str:
    """A digest of the bits that computations on a device give in this process."""
    return _worker.digest(device)


def _digest(device: torch.device) -> str:
    torch.get_num_threads()  # a thread counts for itself until it has asked for the process's count
    hasher = hashlib.sha256()
    for compute in _computations(partial(_values, device)):
        hasher.update(repr(_bits(compute)).encode())
    return hasher.hexdigest()[:16]


def _values(
    device: torch.device,
    *shape: int,
    at: int = 0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    size = torch.Size(shape).numel()
    steps = torch.arange(at, at + size, dtype=torch.int64, device="cpu") * _STEP % _PRIME
    spread = (steps.to(torch.float64) * 2 - _PRIME) / _PRIME
    return (spread * scale).reshape(shape).to(dtype).to(device)


def _bits(compute: Computation) -> Sequence[int]:
    try:
        found = compute()
    except (RuntimeError, TypeError):  # a dtype or function that the device doesn't have
        return ()
    return [crc32(tensor) for tensor in (found if isinstance(found, tuple) else (found,))]


def _computations(values: Values) -> Iterator[Computation]:
    for dtype, shapes in _PRODUCTS.items():
        for m, k, n in shapes:
            yield partial(_product, values, dtype, m, k, n)
    for shape in _CONVOLUTIONS:
        yield partial(_convolution, values, *shape)
    for function in _ELEMENTWISE:
        yield lambda function=function: function(values(1_000, scale=4.0))  # type: ignore[misc]
    yield lambda: values(1_000, scale=4.0, dtype=torch.float64).exp()
    yield lambda: _adam(values)
    yield lambda: _sums(values)
    yield lambda: _attention(values, torch.float32)
    yield lambda: _attention(values, torch.bfloat16)
    yield lambda: torch.view_as_real(torch.fft.rfft(values(3, 120)))


def _product(
    values: Values, dtype: torch.dtype, m: int, k: int, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As a linear layer needs it: forward, and both gradients."""
    x, weight = values(m, k, dtype=dtype), values(n, k, at=1, dtype=dtype)
    y = F.linear(x, weight, values(n, at=2, dtype=dtype))
    return y, y @ weight, y.t() @ x


def _convolution(
    values: Values,
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: int,
    padding: int,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = values(*shape), values(*kernel, at=1)
    places = (stride, padding, 1, groups)
    y = F.conv2d(x, weight, None, *places)
    of_input = gradients.conv2d_input(x.shape, weight, y, *places)
    return y, of_input, gradients.conv2d_weight(x, weight.shape, y, *places)


def _adam(values: Values) -> Tensor:
    """A step as an optimizer takes it."""
    weight, gradient = values(1_000), values(1_000, at=7)
    first = torch.lerp(weight, gradient, 0.1)
    second = (weight.square() * 0.999).addcmul(gradient, gradient, value=0.001)
    return weight.addcdiv(first, second.sqrt() / 0.3 + 1e-8, value=-1e-3)


def _sums(values: Values) -> tuple[Tensor, ...]:
    """Sums of rows, of columns and of all, and products one by one of a batch."""
    x = values(24, 203, scale=3.0)
    images = values(4, 6, 5, 5)
    batch = values(6, 20, 48)
    return (
        batch @ batch.transpose(1, 2),
        x.softmax(1),
        x.log_softmax(1),
        F.layer_norm(x, (203,)),
        F.batch_norm(images, None, None, training=True),
        x.sum(0),
        values(40_000).sum(),
        x.var(1),
    )


def _attention(values: Values, dtype: torch.dtype) -> Tensor:
    query, key, value = (values(2, 2, 17, 16, at=place, dtype=dtype) for place in range(3))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)
