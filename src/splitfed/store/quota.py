"""What one client may have open in the store: recorded calls, shares of batches, pending batches.

Each of these is a file, and goes once it is answered, closed or out of the retention window. A
client that only opens would fill the disk before anything of it goes.

A server keeps no count that it could trust: other servers write for the same client, and commits
delete. So it adds up what it has let a client write, and looks into the store when that reaches the
quota, at most once a second for a client. With n servers a client may so reach n times the quota
for a moment, and never more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from splitfed.checks import at_least
from splitfed.errors import BusyError
from splitfed.store.batches import Pile
from splitfed.store.cache import Bounded
from splitfed.store.layout import TRANSIENT

_CLIENTS = 4096
_LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Quota:
    """What one client may have open in a lineage.

    Raises:
        InputError: one isn't at least 1.
    """

    calls: int = 4096
    """Files of calls that aren't answered for good: recorded forwards, shares of open batches,
    versions of one-trip calls."""
    disk: int = 32 << 30
    """Bytes of these, of its pending batches, and of what its deltas are the change from."""

    def __post_init__(self) -> None:
        at_least("calls", self.calls, 1)
        at_least("disk", self.disk, 1)


@dataclass(slots=True)
class _Account:
    """What a client has open, as far as it is known."""

    calls: int = 0
    num_bytes: int = 0
    full_until: float = 0.0
    """Until then nothing new is looked for."""


class Ledger:
    """Holds the clients of one lineage to a quota.

    Args:
        pile: The files of its batches.
        quota: What each client may have open.
        clock: Seconds, never going back.
    """

    def __init__(
        self, pile: Pile, quota: Quota, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._pile = pile
        self._quota = quota
        self._clock = clock
        self._accounts: Bounded[str, _Account] = Bounded(_CLIENTS)
        self._lock = threading.Lock()

    def charge(self, client_id: str, num_bytes: int, calls: int = 0) -> None:
        """Count what a request is about to write.

        Args:
            client_id: For whom.
            num_bytes: How large it is, roughly.
            calls: How many files of open calls it makes.

        Raises:
            BusyError: the client has too much open.
        """
        account = self._accounts.get(client_id) or self._accounts.put(client_id, _Account())
        with self._lock:
            if self._add(account, num_bytes, calls):
                return
            is_known = self._clock() < account.full_until
        if not is_known:
            found = self.look(client_id)
            with self._lock:
                account.calls, account.num_bytes = found
                if self._add(account, num_bytes, calls):
                    return
                account.full_until = self._clock() + _LOOK_SECONDS
        raise BusyError(
            f"client {client_id!r} has {account.calls} open calls and {account.num_bytes} bytes in "
            f"the store, and asks for {num_bytes} more: this server takes {self._quota.calls} "
            f"calls and {self._quota.disk} bytes of one client. They go with its backwards and "
            "with the next commits; or raise the quota, SplitServer(..., quota=Quota(...)), "
            "--client-calls, --client-disk"
        )

    def look(self, client_id: str) -> tuple[int, int]:
        """What a client has open in the store: files of calls, and bytes."""
        root, sizes = self._pile.keys.root, self._pile.blobs.sizes
        calls = num_bytes = 0
        for kind in TRANSIENT:
            found = sizes(f"{root}/{kind}/{client_id}")
            calls += len(found)
            num_bytes += sum(found.values())
        keys = self._pile.keys
        for folder in (f"{keys.gradients}/{client_id}", keys.references(client_id)):
            num_bytes += sum(sizes(folder).values())
        return calls, num_bytes

    def _add(self, account: _Account, num_bytes: int, calls: int) -> bool:
        """Count what is to be written, if it fits."""
        # Not the calls where none is added: a backward is what frees some.
        if calls and account.calls + calls > self._quota.calls:
            return False
        if account.num_bytes + num_bytes > self._quota.disk:
            return False
        account.calls += calls
        account.num_bytes += num_bytes
        return True
