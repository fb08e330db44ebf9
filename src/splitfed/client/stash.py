"""The weights that a forward ran on, for a backward that comes after the optimizer has stepped.

Autograd saves a weight by reference, and raises if it has changed by the time of the backward. In a
pipeline it will have changed: the batch before has stepped. So what is saved of the half's own
tensors is copied before anything may change it, and the gradient is that of the weights which the
forward ran on: the "weight stashing" of PipeDream (Narayanan et al., SOSP 2019).

`torch.utils.checkpoint` saves no weights: it would run the half again on those of the newest step,
and its gradient would be of no forward at all. Where anything steps it is refused.

The traps: what autograd saves is most often a view (`weight.t()`), so tensors are known by their
storage. A copy begins at the same place relative to 64 bytes as its original, or a kernel might
round otherwise. And with hooks autograd checks no versions, so this does: an activation that was
changed in place raises as it does without them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from splitfed.errors import UnsupportedError
from splitfed.model.cutpoint import CutPoint
from splitfed.model.recompute import checkpoint_frames

_ALIGNED = 64  # bytes


class _Saved:
    """A tensor that autograd needs at the backward."""

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # Detached, or an output that a node saves would keep that node alive for ever.
        self.tensor = tensor.detach()
        self.version = tensor._version


class WeightStash:
    """What forwards that are ahead have saved of a half's tensors.

    Args:
        half: The client half.
        steps: Whether anything steps while they are ahead; if not, parameters needn't be copied.
    """

    def __init__(self, half: nn.Module, *, steps: bool) -> None:
        self._half = half
        self._steps = steps
        self._waiting: list[weakref.ref[_Saved]] = []
        """What is still a view of the half's own memory."""

    @contextmanager
    def saving(self, *, check: bool) -> Iterator[None]:
        """A block whose forward is to be ahead.

        Args:
            check: Whether to look for checkpoints in it, before anything was sent.

        Raises:
            UnsupportedError: there is one, and weights will have changed by the backward.
        """
        own = {pointer for tensor in self._own() if (pointer := _pointer(tensor))}

        def pack(tensor: Tensor) -> _Saved:
            saved = _Saved(tensor)
            if _pointer(tensor) in own:
                self._waiting.append(weakref.ref(saved))
            return saved

        with ExitStack() as stack:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, _unpack))
            if check and self._steps:
                for module in self._half.modules():
                    # Not at a cut: a layer of a run that has a hook makes a request of its own.
                    if not isinstance(module, CutPoint):
                        hook = module.register_forward_pre_hook(_refuse_checkpoint)
                        stack.callback(hook.remove)
            yield

    def keep(self) -> None:
        """Copy what forwards have saved, before anything may change it."""
        copies: dict[int, Tensor] = {}
        for reference in self._waiting:
            saved = reference()
            if saved is not None:
                saved.tensor = _copied(saved.tensor, copies)
                saved.version = saved.tensor._version
        self._waiting.clear()

    def _own(self) -> list[Tensor]:
        parameters = [p for p in self._half.parameters() if p.requires_grad and self._steps]
        return [*parameters, *self._half.buffers()]


def _refuse_checkpoint(module: nn.Module, args: object) -> None:
    if checkpoint_frames():
        raise UnsupportedError(
            f"{type(module).__name__} of the half is in a checkpoint (torch.utils.checkpoint), "
            "which runs it again in the backward. In a pipeline that is after a step, on other "
            "weights than the forward had: use in_flight=1, or no checkpoint in the half (the body "
            "may have them)"
        )


def _unpack(saved: _Saved) -> Tensor:
    tensor = saved.tensor
    if tensor._version != saved.version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: [{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; "
            f"expected version {saved.version} instead"
        )
    return tensor


def _pointer(tensor: Tensor) -> int:
    """Where a tensor's storage begins; 0 if it has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse, or a subclass of its own kind
        return 0


def _copied(tensor: Tensor, copies: dict[int, Tensor]) -> Tensor:
    """The same view of a copy of its storage, of which there is one for all views."""
    storage = tensor.untyped_storage()
    begin, item = storage.data_ptr(), tensor.element_size()
    if tensor.is_conj() or tensor.is_neg() or begin % item:
        return tensor.clone()
    room = copies.get(begin)
    if room is None:
        size = storage.nbytes()
        room = torch.empty(size + _ALIGNED, dtype=torch.uint8, device=tensor.device)
        shift = (begin - room.data_ptr()) % _ALIGNED
        room = room[shift : shift + size]
        room.copy_(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))
        copies[begin] = room
    place = room.storage_offset() // item + tensor.storage_offset()
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(room.untyped_storage(), place, tensor.shape, tensor.stride())
