"""Where a client stands: what a restarted process needs to go on under the numbers of the last one.

It is taken between two batches, as plain JSON, and goes into the owner's checkpoint beside its
half, optimizer, generators and place in the data. From there the restarted loop does again what it
did after the checkpoint: each repeated batch bears its old number, so the store knows which of them
it has.

The traps: numbers are places in the loop, so a loop that repeats its batches in another order gives
an old number to other data, which then counts nowhere. And a request of the killed process may
still be on its way, in a mailbox or a proxy. So only numbers of batches and pushes are taken up;
calls and parts, whose records a late request may need, are numbered from a random number on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from splitfed.errors import InputError, SplitFedError
from splitfed.protocol.fields import check_types
from splitfed.protocol.ids import check_client_id, check_number
from splitfed.protocol.messages import RoundInfo

FORMAT = 1


@dataclass(frozen=True, slots=True, eq=False)
class Position:
    """A place between two batches of a client."""

    client_id: str
    process: str
    """What the process called itself, ..."""
    incarnation: int | None
    """... and its number, once a server had opened it."""
    batch: int
    push: int
    """The next number of each."""
    abandoned: tuple[int, ...]
    """Batches that were given up, and that the server hasn't been told of."""
    seen: int
    """The newest version of the body that was seen."""
    closed: int
    """Up to this version of the body a batch was stored: it settles which buffers a call begins
    with."""
    counted: tuple[float, float, float]
    """What the batches since the last push or pull add up to."""
    half: int | None = None
    """The version of the half that the next push is the change from, if there is one."""
    round: RoundInfo | None = None
    """The round that the client trains in."""
    done: int = 0
    """The last round that it has trained in."""
    body: int | None = None
    """The version of the body that calls run at, where it is committed together with the half."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON, which also `torch.load(weights_only=True)` reads."""
        plain = {**asdict(self), "abandoned": [*self.abandoned], "counted": [*self.counted]}
        if self.body is None:
            del plain["body"]  # as before there was one
        return {"format": FORMAT, **plain}

    @classmethod
    def from_json(cls, data: Any, client_id: str) -> Position:
        """The position that `to_json` wrote.

        Args:
            data: It.
            client_id: Whose position is expected.

        Raises:
            InputError: it isn't one, or another client's.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise InputError(
                f"expected what client.position() returned, of format {FORMAT}, got {data!r:.80}"
            )
        plain = {name: value for name, value in data.items() if name != "format"}
        try:
            plain["abandoned"] = tuple(plain["abandoned"])
            plain["counted"] = tuple(plain["counted"])
            if plain["round"] is not None:
                plain["round"] = RoundInfo(**plain["round"])
            found = check_types(cls(**plain))
            check_client_id(found.client_id)
            for name in ("batch", "push", "seen", "done", "incarnation", "half", "body"):
                if getattr(found, name) is not None:
                    check_number(name, getattr(found, name))
            for seq in found.abandoned:
                check_number("abandoned", seq)
        except (KeyError, TypeError, SplitFedError) as error:
            raise InputError(
                f"this isn't a position as client.position() returned it: {error}"
            ) from error
        if found.client_id != client_id:
            raise InputError(
                f"this is a position of client {found.client_id!r}, and this client is "
                f"{client_id!r}: give each the checkpoint of its own"
            )
        return found
