"""Signals and storage failures of verbs that run until they are ended.

A signal's handler runs in the middle of whatever the main thread does, maybe inside of the very
event that it would set, which holds a lock then: setting it there can wait for ever. So a thread of
its own sets it. The computing stays in the main thread, whose number of torch threads is part of
the numerics class.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from splitfed.errors import CorruptedError, StoreCapabilityError, StoreError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Together a minute; after it the process ends, so that its supervisor sees the failure.
_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
_CALM = 60.0


class Stopping:
    """Within this context SIGTERM and SIGINT set `event` instead of ending the process.

    A second SIGINT ends it.
    """

    def __init__(self) -> None:
        self.event = threading.Event()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stopping:
        # Python lets only the main thread handle signals: elsewhere the event is set by hand.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._stop) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=self.event.set, daemon=True).start()


def keep_going(
    run: Callable[[], Any],
    stop: threading.Event,
    *,
    pauses: tuple[float, ...] = _PAUSES,
    calm: float = _CALM,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Call `run`, and call it again when the storage fails, after longer and longer pauses.

    No gradient is lost meanwhile: it is pending in the store.

    Args:
        run: Returns once `stop` is set.
        stop: Ends a pause.
        pauses: Between a failure and the next try, in seconds; a failure after the last one is
            raised.
        calm: After so many seconds without a failure the pauses begin with the first again.
        clock: Seconds that never go back.

    Raises:
        StoreError: the storage failed once more than there are pauses, or isn't fit for the job.
    """
    failures = 0
    began = clock()
    while not stop.is_set():
        try:
            run()
            return
        except (StoreCapabilityError, CorruptedError):
            # No pause mends these.
            raise
        except StoreError as error:
            if clock() - began > calm:
                failures = 0
            if failures == len(pauses):
                raise
            pause = pauses[failures]
            print(
                f"splitfed: {error}; trying again in {pause:g} seconds",
                file=sys.stderr,
                flush=True,
            )
            stop.wait(pause)
            failures += 1
            began = clock()
