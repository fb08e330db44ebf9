"""Tools that record a model in place of running it would miss the part across the cut.

A trace, a script or an exported program is made of what it saw, and what the server computes it
can't see: it would be a model without its body, or one with this batch's outputs for constants. So
a client, a half and a cut point refuse while such a tool is at work, and say what to give it.

The trap: each tool has its own sign that it is at work, some of them of private names that older
versions of torch don't have; and `torch.jit.script` reads a module without ever running it, so it
has a method of its own (`__prepare_scriptable__`), which such modules define with `refuse_script`.
`torch.compile` isn't one of them: at a cut it begins a new graph.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from splitfed.errors import UnsupportedError

UNBROKEN = (
    "the part that was cut out runs on a server, so a model with a cut is at least two graphs: "
    "compile without fullgraph=True, or compile or export the whole model, "
    "splitfed.join(client, store.load_weights(version))"
)
"""The reason that torch's compiler gives where it meets a cut and may not end its graph there."""

_MODES = torch._C._TorchDispatchModeKey
_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # since torch 2.7


def refuse_tracing() -> None:
    """Refuse while a tool records the model.

    Raises:
        UnsupportedError: one does.
    """
    tool = _tool_at_work()
    if tool is not None:
        raise no_whole_model(tool)


def refuse_script(module: Any) -> NoReturn:
    """What `torch.jit.script` calls of a module before it compiles it.

    Raises:
        UnsupportedError: always.
    """
    raise no_whole_model("torch.jit.script")


def no_whole_model(tool: str, besides: str = "") -> UnsupportedError:
    """The error for a tool that needs the model in one piece.

    Args:
        tool: Its name.
        besides: Another way out, if there is one.
    """
    return UnsupportedError(
        f"{tool} needs the whole model, and a part of this one was cut out and runs on a server: "
        "what it made would be a model without its body. Give it the model joined, "
        f"splitfed.join(client, store.load_weights(version)){besides}"
    )


def _tool_at_work() -> str | None:
    """The tool that records what runs now, by the name that its user knows."""
    if torch.compiler.is_dynamo_compiling():  # this is compiled, and not run: it says UNBROKEN
        return None
    if _exporting():
        return "torch.export"
    if torch._C._get_tracing_state() is not None:
        return "torch.onnx.export" if torch.onnx.is_in_onnx_export() else "torch.jit.trace"
    if torch._C._get_dispatch_mode(_MODES.PROXY) is not None:
        return "make_fx"
    if torch.fx._symbolic_trace._is_fx_tracing_flag:
        return "torch.fx.symbolic_trace"
    if torch._C._get_dispatch_mode(_MODES.FAKE) is not None:
        return "FakeTensorMode"
    return None
