"""The half's methods as a client has them: each is one call across the cut, with the signature of the half's own.

The trap: trainers look at the class too. Hugging Face's Trainer reads the signature of `type(model).forward`, so there
it is a plain function; only a client has a half whose signature it could show.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from splitfed.client.backward import count_samples
from splitfed.client.calls import Session


class Within:
    """The half's forward, or another method of it (`encode`, `generate`), as one call of the client."""

    def __init__(self, client: Any, run: Callable[..., Any], method: Callable[..., Any]) -> None:
        self._client = client
        self._run = run
        self._method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it across the cut."""
        client = self._client
        samples = count_samples(args, kwargs)
        session = Session(client._connection, client._passes, samples, client._scope, client._pinned)
        return client._run(session, self._run, args, kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._method)


class Forward:
    """`client.forward`: runs the half and has its signature; may be replaced, as Accelerate does."""

    def __get__(self, client: Any, owner: type | None = None) -> Callable[..., Any]:
        if client is None:
            return _of_the_class
        replaced: Callable[..., Any] | None = client.__dict__.get("_replaced_forward")
        return Within(client, client.client_half, client.client_half.forward) if replaced is None else replaced

    def __set__(self, client: Any, value: Callable[..., Any]) -> None:
        client.__dict__["_replaced_forward"] = value


def _of_the_class(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self.forward(*args, **kwargs)
