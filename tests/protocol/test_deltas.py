"""Deltas: hand-worked rows, parts that don't fit each other, and what travels in place of what is lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from splitfed.errors import FormatError, InputError, ReferenceLostError
from splitfed.protocol.deltas import Delta, kept_rows, name_of, restore_all, restored

OLD = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
OTHER = torch.tensor([[7.0, 8.0]])
KEPT = {"a" * 16: OLD, "b" * 16: OTHER}


def delta(starts: list[int], travel: list[bool], **changes: Any) -> Delta:
    """A delta of rows of two features, from both files."""
    made = Delta(
        place=0,
        codec="delta/1",
        dtype="float32",
        shape=(len(starts), 2),
        strides=(2, 1),
        references=tuple(KEPT),
        rows=torch.tensor(starts, dtype=torch.int32),
        sent=torch.tensor(travel),
        adds=True,
        keeps=True,
    )
    return replace(made, **changes)


def test_what_travels_is_added_to_the_row_that_it_began_from() -> None:
    """Rows of several files in any order; one that begins from none, and one that hasn't changed."""
    made = delta([3, -1, 1, 1], [True, True, False, True])
    payload = torch.tensor([[0.5, 0.0], [9.0, 9.0], [-1.0, 1.0]])
    found = restored(payload, made, KEPT.get)
    assert found.tolist() == [[7.5, 8.0], [9.0, 9.0], [3.0, 4.0], [2.0, 5.0]]
    assert kept_rows([found], [made])[0].tolist() == [[7.5, 8.0], [9.0, 9.0], [2.0, 5.0]]


def test_without_loss_it_takes_the_place_of_the_row() -> None:
    """A sum would round."""
    made = delta([0, 2], [True, False], adds=False)
    found = restored(torch.tensor([[0.1, 0.2]]), made, KEPT.get)
    assert torch.equal(found, torch.tensor([[0.1, 0.2], [5.0, 6.0]]))


def test_strides_are_those_of_the_client() -> None:
    """A body computes other bits on another layout."""
    rows = torch.randn(2, 3, 4, 4)
    x = rows.to(memory_format=torch.channels_last)
    made = delta([0, 1], [False, False], references=("a" * 16,), shape=(2, 3, 4, 4), strides=x.stride())
    found = restored(torch.empty(0, 3, 4, 4), made, {"a" * 16: rows}.get)
    assert torch.equal(found, x)
    assert found.stride() == x.stride()


def test_a_reference_that_is_lost_is_named() -> None:
    """Before anything else is done with it."""
    with pytest.raises(ReferenceLostError, match="reference 'bbbbbbbbbbbbbbbb' of a delta isn't in the store"):
        restored(torch.zeros(1, 2), delta([0], [True]), {"a" * 16: OLD}.get)


def test_a_name_tells_content_dtype_and_shape() -> None:
    """So what lies under one can't change."""
    others = [OLD + 1, OLD.double(), OLD.view(2, 3)]
    assert name_of(OLD) == name_of(OLD.clone())
    assert len({name_of(rows) for rows in (OLD, *others)}) == 4


MISFITS: dict[str, dict[str, Any]] = {
    "rows beyond": {"rows": torch.tensor([4, 0], dtype=torch.int32)},
    "rows before": {"rows": torch.tensor([-2, 0], dtype=torch.int32)},
    "rows of floats": {"rows": torch.tensor([0.0, 0.0])},
    "too few rows": {"rows": torch.tensor([0], dtype=torch.int32)},
    "sent of numbers": {"sent": torch.tensor([1, 0])},
    "too many sent": {"sent": torch.tensor([True, True])},
    "no shape": {"shape": (), "strides": ()},
    "another shape": {"shape": (2, 3), "strides": (3, 1)},
    "negative strides": {"strides": (2, -1)},
    "gaps": {"strides": (4, 1)},
    "another dtype": {"dtype": "float64"},
    "an unknown dtype": {"dtype": "int8"},
    "a huge shape": {"shape": (2, 2**62), "strides": (2**62, 1)},
}


@pytest.mark.parametrize("changes", MISFITS.values(), ids=MISFITS)
def test_parts_that_don_t_fit_raise_an_error_of_ours(changes: dict[str, Any]) -> None:
    """They may come from anywhere."""
    with pytest.raises(FormatError):
        restored(torch.zeros(1, 2), delta([0, 1], [True, False], **changes), KEPT.get)


def test_files_of_another_shape_are_refused() -> None:
    """A name of one's own rows, for another tensor."""
    with pytest.raises(FormatError, match="references of"):
        restored(torch.zeros(1, 2), delta([0], [True], references=("c",)), {"c": torch.zeros(4, 3)}.get)


def test_an_end_that_lacks_it_names_both() -> None:
    """A later version of deltas isn't half understood."""
    with pytest.raises(InputError, match="travels as 'delta/2', and this end has 'delta/1'"):
        restored(torch.zeros(1, 2), delta([0], [True], codec="delta/2"), KEPT.get)


def test_one_row_can_t_become_the_memory_of_a_server() -> None:
    """A row on file that is named a million times takes a few bytes to ask for."""
    count = 2**20
    rows = torch.zeros(count, dtype=torch.int32)
    made = delta([0], [False], rows=rows, sent=torch.zeros(count, dtype=torch.bool), shape=(count, 256))
    with pytest.raises(FormatError, match="bytes for 1073741824"):
        restored(
            torch.empty(0, 256), replace(made, strides=(256, 1), references=("c",)), {"c": torch.zeros(1, 256)}.get
        )


@pytest.mark.parametrize("place", [-1, 1])
def test_a_tensor_that_isn_t_there_is_an_error_of_ours(place: int) -> None:
    """As for codecs."""
    tensors: list[Tensor] = [torch.zeros(1, 2)]
    with pytest.raises(FormatError, match=f"has no tensor {place} that could be a delta"):
        restore_all(tensors, [delta([0], [True], place=place)], KEPT.get)
