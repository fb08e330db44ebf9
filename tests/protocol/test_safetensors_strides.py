"""The layout rule, worked by hand, and what a foreign layout can't do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitfed.errors import FormatError
from splitfed.protocol.safetensors import Layout, check_layout, contiguous_strides, layout_of, restored, stored

RULE: dict[str, tuple[list[int], list[int], Layout | None]] = {
    "scalar": ([], [], None),
    "contiguous": ([2, 3], [3, 1], None),
    "empty": ([0, 3], [1, 7], None),
    "transposed": ([3, 2], [1, 3], {"order": [1, 0]}),
    "channels_last": ([2, 3, 4, 5], [60, 1, 15, 3], {"order": [0, 2, 3, 1]}),
    "channels_last, one pixel": ([2, 3, 1, 1], [3, 1, 3, 3], {"order": [0, 2, 3, 1]}),
    "channels_last, one channel": ([2, 1, 4, 5], [20, 1, 5, 1], {"order": [0, 2, 3, 1]}),
    "odd stride of a size of 1": ([1, 3], [7, 1], {"strides": [7, 1]}),
    "stride 0 of a size of 1": ([1, 3], [0, 1], {"strides": [0, 1]}),
    "every second": ([4, 3], [6, 2], {"strides": [6, 2]}),
    "permuted with gaps": ([3, 4], [2, 6], {"strides": [2, 6]}),
    "expanded": ([4, 5], [0, 1], {"shape": [4, 5], "strides": [0, 1]}),
    "expanded with gaps": ([4, 5], [0, 2], {"shape": [4, 5], "strides": [0, 2]}),
    "windows that overlap": ([4, 3], [1, 1], None),
    "windows that touch": ([4, 3], [2, 1], None),
    "windows with gaps": ([4, 3], [4, 1], {"strides": [4, 1]}),
    "memory of 31 elements for 2": ([2], [30], {"strides": [30]}),
    "memory of 32 elements for 2": ([2], [31], {"strides": [31]}),
    "memory of 33 elements for 2": ([2], [32], None),
    "expanded to 256 MiB": ([1 << 26], [0], {"shape": [1 << 26], "strides": [0]}),
    "expanded beyond 256 MiB": ([(1 << 26) + 1], [0], None),
    "stride of a size of 1 beyond any memory": ([1, 3], [1 << 46, 1], None),
}


@pytest.mark.parametrize("name", RULE)
def test_rule(name: str) -> None:
    """A float32 tensor of this shape and strides is noted like this."""
    shape, strides, layout = RULE[name]
    assert layout_of(shape, strides, 4) == layout


@pytest.mark.parametrize("name", [name for name, (*_, layout) in RULE.items() if layout is not None])
def test_checked_layout_is_what_was_noted(name: str) -> None:
    """The stored shape and the layout give the shape and the strides back."""
    shape, strides, layout = RULE[name]
    if layout is not None:
        core = [size if stride else 1 for size, stride in zip(shape, strides, strict=True)]
        core = [core[dim] for dim in layout.get("order", range(len(core)))]
        assert check_layout("x", layout, core, 4) == (shape, strides)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 0, 3), (1, 4, 1)])
def test_contiguous_strides_are_those_of_torch(shape: tuple[int, ...]) -> None:
    """The strides are those that torch gives a new tensor."""
    assert tuple(contiguous_strides(shape)) == torch.empty(shape).stride()


def test_stored_is_a_view_unless_there_are_gaps() -> None:
    """Only a tensor with gaps is copied to be stored, and one that was expanded is stored once."""
    matrix = torch.rand(4, 6)
    row = matrix[0].expand(3, 6)
    assert stored(matrix.t(), {"order": [1, 0]}).data_ptr() == matrix.data_ptr()
    assert stored(row, layout_of(row.shape, row.stride(), 4)).data_ptr() == matrix.data_ptr()
    assert stored(row, layout_of(row.shape, row.stride(), 4)).shape == (1, 6)
    assert torch.equal(stored(matrix[:, ::2], {"strides": [6, 2]}), matrix[:, ::2])


anything = st.one_of(st.integers(-1, 40), st.sampled_from([1 << 40, 1 << 63, True, 1.0, None, "1"]))


@st.composite
def foreign_layouts(draw: st.DrawFn) -> tuple[list[int], object]:
    """A stored shape, and a layout that is right for it, nearly right or nonsense."""
    core = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    strides = [draw(st.sampled_from([0, 1, 2, 3, 4, 8, 12, 16, 40])) for _ in core]
    shape = [size if stride else draw(st.integers(0, 5)) for size, stride in zip(core, strides, strict=True)]
    core = [size if stride else 1 for size, stride in zip(core, strides, strict=True)]
    right = {"strides": strides} if shape == core else {"shape": shape, "strides": strides}
    wrong = st.dictionaries(st.sampled_from(["order", "strides", "shape"]), st.lists(anything, max_size=3))
    order = st.permutations(range(len(core))).map(lambda order: {"order": list(order)})
    return core, draw(st.one_of(st.just(right), order, wrong, anything))


@given(foreign_layouts())
def test_foreign_layouts_stay_within_their_tensor(foreign: tuple[list[int], object]) -> None:
    """A layout of anything is refused, or gives each stored element a place in at most 16 times their memory."""
    core, layout = foreign
    elements = torch.Size(core).numel()
    try:
        shape, strides = check_layout("x", layout, core, 1)
    except FormatError:
        return
    assert isinstance(layout, dict)
    result = restored(torch.arange(elements, dtype=torch.uint8), shape, strides, layout)
    assert (list(result.shape), list(result.stride())) == (shape, strides)
    assert result.untyped_storage().nbytes() <= 16 * elements
    assert set(result.flatten().tolist()) == set(range(elements))
