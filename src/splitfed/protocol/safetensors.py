"""Tensors and text to safetensors bytes and back: one format on the wire and on disk.

A replay is exact only if tensors enter compute as they were: same bits, same strides (channels_last
picks other kernels), and a 64-byte aligned address (another one changes the bits of a small
matmul). So `encode` writes a tensor in the order of its memory and notes its strides under the
metadata key `splitfed.layout`, `decode` gives them back, and `canonical` makes of any tensor what a
round trip would. What the format can't say of strides is the tensor's layout. The rule, for a
tensor with elements:

    in the order of its indices,         no layout; stored as it is
    without gaps
    another order (a transpose,          {"order": [...]}; stored permuted, which is the order
    channels_last)                       in memory
    gaps, or dimensions of stride 0      {"strides": [...]}, with "shape" if expanded; stored
    (expanded)                           once, dense
    windows that overlap; memory of      no layout; stored as a contiguous copy, and comes back
    more than 16 × the elements;         as one
    expanded beyond 256 MiB

The format has no code for complex128 either: it is stored as the float64 pairs that it is in
memory, one dimension more of size 2, which any reader can open, and named under the key
`splitfed.dtype`.

Foreign strides count only if they are what this rule gives for the tensor that they describe. So
whoever wrote them can't address memory outside of the tensor, nor make 100 bytes allocate more than
1,600.

Neither side copies what needs no copy, and that is the trap: the buffers of `encode` are the live
tensors, to be written before those change; the tensors of `decode` are the given buffer, which they
keep alive and write through to.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from splitfed.errors import ContainerError, FormatError, InputError
from splitfed.protocol import checksum
from splitfed.protocol import header as foreign
from splitfed.protocol.header import MAX_EXTENT, is_sizes, shown
from splitfed.protocol.kinds import CODES, PAIRED, fits, unfit

Layout = dict[str, list[int]]
MAX_SPREAD = 16
MAX_EXPANDED = 256 << 20
ALIGNMENT = 64
LAYOUT_KEY = "splitfed.layout"
DTYPE_KEY = "splitfed.dtype"
TAKEN = (LAYOUT_KEY, DTYPE_KEY, checksum.KEY)
"""The keys that no other metadata may have."""
# bfloat16, float8 and complex: numpy or memoryview can't show their bytes as they are.
_OPAQUE = {dtype for dtype, code in CODES.items() if code[:2] in ("BF", "F8", "C6")} | {PAIRED}
_PAIRED_NAME = "complex128"
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_quoted = json.encoder.encode_basestring


def encode(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> list[memoryview | bytes]:
    """Return safetensors bytes as buffers to be written one after another.

    The first is the header; the others are the tensors' own memory. CPU tensors without gaps aren't
    copied. Equal tensors and metadata give equal bytes, in whatever
    order they come.

    Raises:
        ContainerError: the name, kind or dtype of a tensor has no place in the format.
        InputError: the metadata aren't strings, or use one of the keys of this module.
    """
    items, layouts = _in_file_order(tensors)
    texts = _checked_metadata(metadata or {})
    if layouts:
        texts[LAYOUT_KEY] = _to_json(dict(sorted(layouts.items())))
    pairs = sorted(name for name, tensor in items if tensor.dtype is PAIRED)
    if pairs:
        texts[DTYPE_KEY] = _to_json(dict.fromkeys(pairs, _PAIRED_NAME))
    if len(texts) > foreign.MAX_METADATA:
        raise InputError(
            f"too much metadata: expected at most {foreign.MAX_METADATA} entries, "
            f"those for dtypes and layouts included, got {len(texts)}"
        )
    # The JSON is written by hand: a serializer takes several times as long, and a tiny batch is
    # mostly headers.
    fields: list[str] = []
    if texts:
        said = ",".join(f"{_quoted(key)}:{_quoted(text)}" for key, text in sorted(texts.items()))
        fields.append(f'"__metadata__":{{{said}}}')
    buffers: list[memoryview | bytes] = []
    cursor = 0
    for name, tensor in items:
        end = cursor + tensor.nbytes
        shape = ",".join(map(str, (*tensor.shape, 2) if tensor.dtype is PAIRED else tensor.shape))
        fields.append(
            f'{_quoted(name)}:{{"dtype":"{CODES[tensor.dtype]}","shape":[{shape}],'
            f'"data_offsets":[{cursor},{end}]}}'
        )
        if end > cursor:
            buffers.append(_memory(tensor))
        cursor = end
    try:
        header = f"{{{','.join(fields)}}}".encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"metadata isn't text: expected what UTF-8 can hold, got {error.reason}"
        ) from None
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    return [len(header).to_bytes(8, "little") + header, *buffers]


def decode(
    data: memoryview | bytes | bytearray,
    *,
    max_tensors: int = foreign.MAX_TENSORS,
    max_header: int = foreign.MAX_HEADER,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of safetensors bytes.

    They may come from anywhere, and are checked first.

    Tensors share the memory of `data` where it is writable and 64-byte aligned, and are copies
    elsewhere. One that was expanded occupies its stored bytes only, whatever its shape says (up to
    256 MiB; one with gaps, 16 × its bytes).

    Raises:
        FormatError: `data` isn't a well-formed body, has more than `max_tensors`, or a header above
            `max_header` bytes.
    """
    data = memoryview(data).cast("B")
    entries, metadata = foreign.parse_header(data, max_tensors=max_tensors, max_header=max_header)
    metadata.pop(checksum.KEY, None)  # compared by who has read the file
    layouts = {}
    if LAYOUT_KEY in metadata:
        layouts = foreign.parse_json(metadata.pop(LAYOUT_KEY), "the layout")
    if DTYPE_KEY in metadata:
        entries = _paired(entries, foreign.parse_json(metadata.pop(DTYPE_KEY), "the dtypes"))
    base = 0
    # A tensor may be written to by whoever gets it: over memory that may not, it needs a copy. One
    # copy of all data keeps the alignment that the writer gave to each tensor.
    if data.readonly and entries:
        base = entries[0].begin
        memory = aligned(len(data) - base)
        memory[:] = data[base:]
        data = memory
    tensors: dict[str, Tensor] = {}
    for name, dtype, core, begin, end in entries:
        layout = None
        shape = core
        strides = contiguous_strides(core)
        if name in layouts:
            layout = layouts.pop(name)
            shape, strides = check_layout(name, layout, core, dtype.itemsize)
        if begin == end:
            tensors[name] = torch.empty(core, dtype=dtype, device="cpu")
            continue
        if dtype is torch.bool:
            _check_bools(data[begin - base : end - base], name)
        tensor = torch.frombuffer(
            data, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=begin - base
        )
        if tensor.data_ptr() % ALIGNMENT:
            tensor = tensor.clone()
        tensors[name] = restored(tensor, shape, strides, layout)
    if layouts:
        raise FormatError(
            f"layout of a tensor that isn't there: expected none, got {next(iter(layouts))[:80]!r}"
        )
    return tensors, metadata


def _paired(entries: list[foreign.Entry], dtypes: dict[str, object]) -> list[foreign.Entry]:
    """The entries of a header, those of named dtypes as what their pairs are."""
    found = []
    for entry in entries:
        if entry.name in dtypes:
            dtype = dtypes.pop(entry.name)
            is_pairs = entry.dtype is torch.float64 and entry.shape[-1:] == [2]
            if dtype != _PAIRED_NAME or not is_pairs:
                raise FormatError(
                    f"tensor {entry.name[:80]!r} has a bad dtype: expected {_PAIRED_NAME!r} of F64 "
                    f"in pairs, got {shown(dtype)} of {entry.dtype} {entry.shape}"
                )
            entry = entry._replace(dtype=PAIRED, shape=entry.shape[:-1])
        found.append(entry)
    if dtypes:
        raise FormatError(
            f"dtype of a tensor that isn't there: expected none, got {next(iter(dtypes))[:80]!r}"
        )
    return found


def read_metadata(data: memoryview | bytes | bytearray) -> dict[str, str]:
    """Return the metadata of safetensors bytes after the checks of their header; no tensor is made.

    Raises:
        FormatError: the header isn't well-formed, or isn't that of so many bytes.
    """
    _, metadata = foreign.parse_header(memoryview(data).cast("B"))
    for key in TAKEN:
        metadata.pop(key, None)
    return metadata


def canonical(tensor: Tensor) -> Tensor:
    """Return the tensor as it would come back from a round trip: same values, 64-byte aligned.

    It stays on its device.
    Strides are kept where the rule at the top of this module keeps them. A canonical tensor is
    returned as it is; autograd sees the identity.

    Raises:
        ContainerError: the kind or dtype of the tensor has no place in the format.
    """
    if is_plain(tensor) and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    tensor = _checked(tensor)
    layout, shape = _layout(tensor), list(tensor.shape)
    strides = contiguous_strides(shape) if layout is None else list(tensor.stride())
    if list(tensor.stride()) == strides and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    copy = stored(tensor, layout).clone(memory_format=torch.contiguous_format)
    return restored(copy, shape, strides, layout)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor fits the format and is contiguous beyond doubt.

    A dimension of 1 may have any stride, so it leaves a doubt.
    """
    # Asked first: a nested tensor has no shape to ask for.
    if tensor.is_nested or tensor.layout is not torch.strided or tensor.dtype not in CODES:
        return False
    if not 0 < tensor.dim() <= foreign.MAX_DIMS or not tensor.numel() or 1 in tensor.shape:
        return False
    return tensor.is_contiguous() and not (tensor.is_meta or tensor.is_conj() or tensor.is_neg())


def crc32(tensor: Tensor) -> int:
    """Return the CRC-32 of the tensor's bytes in the order of its indices, whatever its strides.

    Raises:
        ContainerError: the kind or dtype of the tensor has no place in the format.
    """
    return zlib.crc32(_memory(stored(_checked(tensor), None)))


def content(tensor: Tensor) -> tuple[str, memoryview]:
    """Return what tells a tensor from others: dtype, shape and layout as text, and its bytes.

    Both are as `encode` would have them.

    Raises:
        ContainerError: the kind or dtype of the tensor has no place in the format.
    """
    tensor = _checked(tensor)
    layout = _layout(tensor)
    return f"{tensor.dtype} {list(tensor.shape)} {layout}", _memory(stored(tensor, layout))


def _in_file_order(
    tensors: Mapping[str, Tensor],
) -> tuple[list[tuple[str, Tensor]], dict[str, Layout]]:
    """The tensors as they are stored, in the order of the file, and the layouts of those with one.

    Whole multiples of 64 bytes come first, and so each is aligned. Of the rest, those with large
    elements come first, each aligned to its own.
    """
    layouts: dict[str, Layout] = {}
    items: list[tuple[bool, int, str, Tensor]] = []
    for name, tensor in tensors.items():
        tensor = _checked(tensor, name)
        layout = _layout(tensor)
        if layout is not None:
            layouts[name] = layout
        tensor = stored(tensor, layout)
        ragged = tensor.nbytes % ALIGNMENT != 0
        items.append((ragged, -tensor.itemsize if ragged else 0, name, tensor))
    items.sort()  # by no tensor: names differ
    return [(name, tensor) for _, _, name, tensor in items], layouts


def _checked(tensor: Tensor, name: str | None = None) -> Tensor:
    if not isinstance(tensor, Tensor) or not fits(tensor):
        raise unfit(tensor, "the tensor" if name is None else f"tensor {name[:80]!r}")
    if name is not None:
        try:
            foreign.check_name(name)
        except FormatError as error:
            raise ContainerError(str(error)) from None
    if tensor.is_conj() or tensor.is_neg():
        return tensor.resolve_conj().resolve_neg()
    return tensor


def _checked_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    for key, value in metadata.items():
        if type(key) is not str or type(value) is not str or key in TAKEN:
            raise InputError(
                f"metadata {key!r} isn't allowed: expected text to text, "
                f"got a {type(value).__name__}"
            )
    return dict(metadata)


def _layout(tensor: Tensor) -> Layout | None:
    # Most are contiguous and leave here. Strides of a size of 1 may be anything, even then.
    if tensor.is_contiguous() and 1 not in tensor.shape:
        return None
    return layout_of(tensor.shape, tensor.stride(), tensor.itemsize)


def _check_bools(data: memoryview, name: str) -> None:
    if torch.frombuffer(data, dtype=torch.uint8).max().item() > 1:
        raise FormatError(
            f"tensor {name[:80]!r} isn't boolean: expected bytes 0 and 1 only, got others"
        )


def _memory(tensor: Tensor) -> memoryview:
    if tensor.requires_grad:
        tensor = tensor.detach()
    if not tensor.is_cpu:
        tensor = tensor.cpu()
    if not tensor.numel():
        return memoryview(b"")
    if tensor.dtype in _OPAQUE:
        tensor = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    array: Any = tensor.numpy()
    return memoryview(array).cast("B").toreadonly()


# --------------------------------------------------------------------------------- strides


def layout_of(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> Layout | None:
    """Return the layout of a tensor by its shape, strides and bytes per element.

    `None` if it is stored contiguous.
    """
    shape, strides = list(shape), list(strides)
    if 0 in shape or strides == contiguous_strides(shape):
        return None
    order = sorted(range(len(shape)), key=lambda dim: (-strides[dim], shape[dim] == 1))
    if [strides[dim] for dim in order] == contiguous_strides([shape[dim] for dim in order]):
        return {"order": order}
    core = _core(shape, strides)
    last = _farthest(core, strides, order)
    if last is None:
        return None
    # Whoever reads this allocates that much: what is spread too wide is stored as a copy instead.
    if last >= MAX_SPREAD * math.prod(core) or max(last, *strides) * itemsize > MAX_EXTENT:
        return None
    if core == shape:
        return {"strides": strides}
    if math.prod(shape) * itemsize > MAX_EXPANDED:
        return None
    return {"shape": shape, "strides": strides}


def _farthest(core: list[int], strides: list[int], order: list[int]) -> int | None:
    """The offset of the farthest element, in elements; `None` if two indices share one.

    From the innermost dimension outwards, each step has to leap over all that lies within.
    """
    last = 0
    for dim in reversed(order):
        if core[dim] > 1:
            if strides[dim] <= last:
                return None
            last += (core[dim] - 1) * strides[dim]
    return last


def contiguous_strides(shape: Sequence[int]) -> list[int]:
    """Return the strides of a contiguous tensor of this shape, as torch counts them."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size or 1
    strides.reverse()
    return strides


def stored(tensor: Tensor, layout: Layout | None) -> Tensor:
    """Return the contiguous tensor that stands for `tensor` in a file: a view, where it can be."""
    if layout is None:
        return tensor.contiguous()
    if "order" in layout:
        return tensor.permute(layout["order"])
    return tensor.as_strided(_core(tensor.shape, tensor.stride()), tensor.stride()).contiguous()


def restored(memory: Tensor, shape: list[int], strides: list[int], layout: Layout | None) -> Tensor:
    """Return the tensor of this shape and strides from the stored elements.

    `memory` may be reshaped in place.
    """
    if layout is not None and "strides" in layout:
        core = _core(shape, strides)
        steps = contiguous_strides(core)
        sized = [dim for dim, size in enumerate(core) if size > 1]
        if any(strides[dim] != steps[dim] for dim in sized):
            # With gaps the elements have to be spread; merely expanded, a view of them will do.
            spread = torch.empty_strided(core, strides, dtype=memory.dtype, device=memory.device)
            memory = spread.copy_(memory.as_strided_(core, steps))
    return memory.as_strided_(shape, strides)


def check_layout(
    name: str, layout: object, core: list[int], itemsize: int
) -> tuple[list[int], list[int]]:
    """Return the shape and strides that a foreign layout gives to a stored tensor of shape `core`.

    Raises:
        FormatError: it is no permutation, or not what `layout_of` gives to a tensor of that shape
            and those strides.
    """
    if type(layout) is dict and 0 not in core and _fits(layout, len(core)):
        if layout.keys() == {"order"} and sorted(layout["order"]) == list(range(len(core))):
            inverse = sorted(range(len(core)), key=layout["order"].__getitem__)
            steps = contiguous_strides(core)
            return [core[dim] for dim in inverse], [steps[dim] for dim in inverse]
        if layout.keys() in ({"strides"}, {"strides", "shape"}):
            shape = layout.get("shape", core)
            strides = layout["strides"]
            # Not "is it safe?" but "is it what we would have written?": there is one rule only.
            if _core(shape, strides) == core and layout_of(shape, strides, itemsize) == layout:
                return shape, strides
    raise FormatError(
        f"tensor {name[:80]!r} has a bad layout: expected an order or strides that fit its stored "
        f"shape {core}, got {shown(layout)}"
    )


def _fits(layout: dict[Any, Any], dims: int) -> bool:
    return all(is_sizes(sizes) and len(sizes) == dims for sizes in layout.values())


def _core(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The shape without what is only expanded: a dimension of stride 0 is stored once."""
    return [size if stride else 1 for size, stride in zip(shape, strides, strict=True)]


def aligned(num_bytes: int) -> memoryview:
    """Memory for so many bytes, not set to anything.

    It is aligned as torch aligns its own, so that it may become tensors.
    """
    array: Any = torch.empty(num_bytes, dtype=torch.uint8, device="cpu").numpy()
    return memoryview(array)
