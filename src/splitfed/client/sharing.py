"""One half that several clients train: seen, and said once.

A half may serve many clients on purpose: each pulls before its turn, or all add to one step. A
newcomer's clients just have no copy of their own, and each goes on from the last one's step as if
it were its own. That is what is looked for: a batch of one client on exactly the weights that a
step on another one's batches has left.

The trap: who loads weights, by a pull or by hand, does so in place, as a step does. Only the end of
a step is announced (torch's hook for all optimizers), so the weights are compared with those of
then. Halves with one client, which is nearly all of them, cost nothing.
"""

from __future__ import annotations

import warnings
import weakref

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_Weights = tuple[object, ...]


class Sharing:
    """The clients of one half.

    Args:
        half: It.
    """

    def __init__(self, half: nn.Module) -> None:
        self._half = weakref.ref(half)
        self._clients: set[str] = set()
        self._trained: set[str] = set()
        """Whose batches were counted since the last step."""
        self._before: _Weights = ()
        """The weights that these were counted at."""
        self._left: tuple[_Weights, frozenset[str]] | None = None
        """The weights that the last step has left, and whose batches it was on."""
        self._warned = False

    @classmethod
    def of(cls, half: nn.Module, client_id: str) -> Sharing:
        """Enter a client of a half."""
        found = _halves.get(half)
        if found is None:
            found = _halves[half] = cls(half)
        found._clients.add(client_id)
        if len(found._clients) == 2 and not _installed:
            _installed.append(register_optimizer_step_post_hook(_stepped))
        return found

    def counted(self, client_id: str) -> None:
        """Take note of a batch; warn, once, of one that goes on from another client's step."""
        if len(self._clients) < 2:
            return
        weights = self._weights()
        if self._left is not None and not self._warned and weights == self._left[0]:
            last, others = client_id, self._left[1] - {client_id}
            if len(self._left[1]) == 1 and others:
                self._warned = True
                warnings.warn(
                    f"clients {min(others)!r} and {last!r} train one client half: the batch of "
                    f"{last!r} goes on from the other's step. Give each a half of its own, "
                    "SplitClient(copy.deepcopy(half), ...), and average them with pull() and "
                    "push(). If the half is meant to be handed on, ignore this",
                    stacklevel=2,
                )
        self._trained.add(client_id)
        self._before = weights

    def stepped(self) -> None:
        """Take note of an optimizer's step, which may have been on other parameters."""
        weights = self._weights()
        if self._trained and weights != self._before:
            self._left = weights, frozenset(self._trained)
            self._trained.clear()

    def _weights(self) -> _Weights:
        """What tells the weights of now from those of another time."""
        half = self._half()
        trained = [] if half is None else [p for p in half.parameters() if p.requires_grad]
        # What is written by way of `.data` moves no counter.
        # Only where a look costs nothing: a GPU would have to finish its work first.
        seen = [p for p in trained[:2] if p.numel() and p.device.type == "cpu"]
        firsts = [p.detach().reshape(-1)[0].item() for p in seen]
        return (*(parameter._version for parameter in trained), *firsts)


# Per process, as torch's hook is, and by the half: clients come and go.
_halves: weakref.WeakKeyDictionary[nn.Module, Sharing] = weakref.WeakKeyDictionary()
_installed: list[object] = []


def _stepped(optimizer: object, args: object, kwargs: object) -> None:
    for sharing in list(_halves.values()):
        sharing.stepped()
