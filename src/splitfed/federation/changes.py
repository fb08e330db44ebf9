"""What a client's own body has learned since it last began anew: start − end, as a gradient.

A line of commits begins ('initial', 'begin'), moves, and is closed ('end'). A rollback in between undoes what was
folded: the trap is to count the samples of a fold whose effect is gone, so the walk back follows what was restored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from splitfed.model.numerics import same_bits
from splitfed.model.skeleton import Fingerprint
from splitfed.protocol.messages import BufferUpdate, GradientRecord
from splitfed.store.commit import Commit
from splitfed.store.lineage import Lineage

BEGUN = ("initial", "begin")


def since(line: Lineage, head: int) -> tuple[Commit, float]:
    """The commit that a line last began with, and the samples folded since; what a rollback undid left out."""
    samples, commit = 0.0, line.commit(head)
    while commit.kind not in BEGUN:
        samples += commit.num_samples if commit.kind == "fold" else 0.0
        commit = line.commit(commit.version - 1 if commit.restored is None else commit.restored)
    return commit, samples


def change(
    record: GradientRecord, fingerprint: Fingerprint, start: Mapping[str, Tensor], end: Mapping[str, Tensor]
) -> GradientRecord:
    """`record` with start − end of the parameters, and the buffers that changed."""
    roles = {name: entry.get("role") for name, entry in fingerprint.items()}
    changed = [name for name, role in roles.items() if role == "buffer" and not same_bits(start[name], end[name])]
    update = BufferUpdate(
        values={name: end[name] for name in changed},
        bases={name: start[name] for name in changed},
        num_samples=record.num_samples,
    )
    gradients = {name: start[name] - end[name] for name, role in roles.items() if role == "trainable"}
    return replace(record, gradients=gradients, buffers=[update])
