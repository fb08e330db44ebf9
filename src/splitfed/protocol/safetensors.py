"""Tensors and text to safetensors bytes and back: one format on the wire and on disk.

A replay is exact only if tensors enter compute as they were: same bits, same strides (channels_last picks other
kernels), and a 64-byte aligned address (another one changes the bits of a small matmul). So `encode` writes a tensor in
the order of its memory and notes its strides under the metadata key `splitfed.layout` (`strides.py` has the rule),
`decode` gives them back, and `canonical` makes of any tensor what a round trip would.

Neither side copies what needs no copy, and that is the trap: the buffers of `encode` are the live tensors, to be
written before those change; the tensors of `decode` are the given buffer, which they keep alive and write through to.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from splitfed.errors import ContainerError, FormatError, InputError
from splitfed.protocol import header as foreign
from splitfed.protocol.memory import aligned
from splitfed.protocol.strides import Layout, check_layout, contiguous_strides, layout_of, restored, stored

ALIGNMENT = 64
LAYOUT_KEY = "splitfed.layout"

_CODES = {dtype: code for code, dtype in foreign.DTYPES.items()}
_OPAQUE = {dtype for dtype, code in _CODES.items() if code[:2] in ("BF", "F8", "C6")}  # to numpy or memoryview
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_quoted = json.encoder.encode_basestring


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> list[memoryview | bytes]:
    """Return safetensors bytes as buffers to be written one after another: the header, then the tensors' own memory.

    CPU tensors without gaps aren't copied. Equal tensors and metadata give equal bytes, in whatever order they come.

    Raises:
        ContainerError: the name, kind or dtype of a tensor has no place in the format.
        InputError: the metadata aren't strings, or use the key `splitfed.layout`.
    """
    layouts: dict[str, Layout] = {}
    items: list[tuple[bool, int, str, Tensor]] = []
    for name, tensor in tensors.items():
        tensor = _checked(tensor, name)
        layout = _layout(tensor)
        if layout is not None:
            layouts[name] = layout
        tensor = stored(tensor, layout)
        # Whole multiples of 64 bytes come first and so are aligned; of the rest, large items first, aligned to those.
        ragged = tensor.nbytes % ALIGNMENT != 0
        items.append((ragged, -tensor.itemsize if ragged else 0, name, tensor))
    items.sort(key=lambda item: item[:3])
    fields: list[str] = []  # of a JSON object; a serializer takes several times as long
    texts = _checked_metadata(metadata or {})
    if layouts:
        texts[LAYOUT_KEY] = _to_json(dict(sorted(layouts.items())))
    if texts:
        pairs = ",".join(f"{_quoted(key)}:{_quoted(text)}" for key, text in sorted(texts.items()))
        fields.append(f'"__metadata__":{{{pairs}}}')
    buffers: list[memoryview | bytes] = []
    cursor = 0
    for _, _, name, tensor in items:
        end = cursor + tensor.nbytes
        shape = ",".join(map(str, tensor.shape))
        fields.append(
            f'{_quoted(name)}:{{"dtype":"{_CODES[tensor.dtype]}","shape":[{shape}],"data_offsets":[{cursor},{end}]}}'
        )
        if end > cursor:
            buffers.append(_memory(tensor))
        cursor = end
    try:
        header = f"{{{','.join(fields)}}}".encode()
    except UnicodeEncodeError as error:
        raise InputError(f"metadata isn't text: expected what UTF-8 can hold, got {error.reason}") from None
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    return [len(header).to_bytes(8, "little") + header, *buffers]


def decode(
    data: memoryview | bytes | bytearray,
    *,
    max_tensors: int = foreign.MAX_TENSORS,
    max_header: int = foreign.MAX_HEADER,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of safetensors bytes that may come from anywhere: they are checked first.

    Tensors share the memory of `data` where it is writable and 64-byte aligned, and are copies elsewhere. One that was
    expanded occupies its stored bytes only, whatever its shape says (up to 256 MiB; one with gaps, 16 × its bytes).

    Raises:
        FormatError: `data` isn't a well-formed body, has more than `max_tensors`, or a header above `max_header` bytes.
    """
    data = memoryview(data).cast("B")
    entries, metadata = foreign.parse_header(data, max_tensors=max_tensors, max_header=max_header)
    layouts = foreign.parse_json(metadata.pop(LAYOUT_KEY), "the layout") if LAYOUT_KEY in metadata else {}
    base = 0
    if data.readonly and entries:
        base = entries[0].begin
        memory = aligned(len(data) - base)
        memory[:] = data[base:]
        data = memory
    tensors: dict[str, Tensor] = {}
    for name, dtype, core, begin, end in entries:
        layout, shape, strides = None, core, contiguous_strides(core)
        if name in layouts:
            layout = layouts.pop(name)
            shape, strides = check_layout(name, layout, core, dtype.itemsize)
        if begin == end:
            tensors[name] = torch.empty(core, dtype=dtype, device="cpu")
            continue
        if dtype is torch.bool:
            _check_bools(data[begin - base : end - base], name)
        tensor = torch.frombuffer(data, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=begin - base)
        if tensor.data_ptr() % ALIGNMENT:
            tensor = tensor.clone()
        tensors[name] = restored(tensor, shape, strides, layout)
    if layouts:
        raise FormatError(f"layout of a tensor that isn't there: expected none, got {next(iter(layouts))[:80]!r}")
    return tensors, metadata


def read_metadata(data: memoryview | bytes | bytearray) -> dict[str, str]:
    """Return the metadata of safetensors bytes after the checks of their header; no tensor is made.

    Raises:
        FormatError: the header isn't well-formed, or isn't that of so many bytes.
    """
    _, metadata = foreign.parse_header(memoryview(data).cast("B"))
    metadata.pop(LAYOUT_KEY, None)
    return metadata


def canonical(tensor: Tensor) -> Tensor:
    """Return the tensor as it would come back from a round trip, on its own device: same values, 64-byte aligned.

    Strides are kept where the rule in `strides.py` keeps them. A canonical tensor is returned as it is; autograd sees
    the identity.

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
    """Whether a tensor fits the format and is contiguous beyond doubt (a dimension of 1 may have any stride)."""
    if tensor.is_nested or tensor.layout is not torch.strided or tensor.dtype not in _CODES:  # the first has no shape
        return False
    sized = 0 < tensor.dim() <= foreign.MAX_DIMS and tensor.numel() > 0 and 1 not in tensor.shape
    return sized and tensor.is_contiguous() and not (tensor.is_meta or tensor.is_conj() or tensor.is_neg())


def crc32(tensor: Tensor) -> int:
    """Return the CRC-32 of the tensor's bytes in the order of its indices, whatever its strides and its device.

    Raises:
        ContainerError: the kind or dtype of the tensor has no place in the format.
    """
    return zlib.crc32(_memory(stored(_checked(tensor), None)))


def content(tensor: Tensor) -> tuple[str, memoryview]:
    """Return what tells a tensor from others: dtype, shape and layout, and its bytes, both as `encode` would have them.

    Raises:
        ContainerError: the kind or dtype of the tensor has no place in the format.
    """
    tensor = _checked(tensor)
    layout = _layout(tensor)
    return f"{tensor.dtype} {list(tensor.shape)} {layout}", _memory(stored(tensor, layout))


def _checked(tensor: Tensor, name: str | None = None) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.dtype not in _CODES:
        raise _unfit(tensor, name)
    if tensor.is_nested or tensor.is_meta or tensor.dim() > foreign.MAX_DIMS:
        raise _unfit(tensor, name)
    if not tensor.numel() and foreign.extent(tensor.shape, tensor.itemsize) > foreign.MAX_EXTENT:
        raise _unfit(tensor, name)
    if name is not None:
        try:
            foreign.check_name(name)
        except FormatError as error:
            raise ContainerError(str(error)) from None
    if tensor.is_conj() or tensor.is_neg():
        return tensor.resolve_conj().resolve_neg()
    return tensor


def _unfit(tensor: object, name: str | None) -> ContainerError:
    expected, hint = "a torch.Tensor", "turn it into one, or keep it on its side of the cut"
    got = type(tensor).__name__
    if isinstance(tensor, Tensor):
        got = f"{tensor.dtype}, {'nested' if tensor.is_nested else tensor.layout}, of {tensor.dim()} dimensions"
        if tensor.is_nested or tensor.layout is not torch.strided:
            expected, hint = "a dense one", "call .to_dense() or pad it first"
        elif tensor.is_meta:
            expected, hint = "one with memory, not on the device meta", "load its values first"
        elif tensor.is_quantized:
            expected, hint = "one that isn't quantized", "call .dequantize() first"
        elif tensor.dtype not in _CODES:
            expected, hint = f"a dtype of {', '.join(_CODES.values())}", "convert it by .to() first"
        else:
            expected, hint = f"at most {foreign.MAX_DIMS} dimensions that an address can count", "reshape it first"
    which = "the tensor" if name is None else f"tensor {name[:80]!r}"
    return ContainerError(f"{which} doesn't fit in a body: expected {expected}, got {got}; {hint}")


def _checked_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    for key, value in metadata.items():
        if type(key) is not str or type(value) is not str or key == LAYOUT_KEY:
            raise InputError(f"metadata {key!r} isn't allowed: expected text to text, got a {type(value).__name__}")
    if len(metadata) >= foreign.MAX_METADATA:  # one is for the layout
        raise InputError(f"too much metadata: expected fewer than {foreign.MAX_METADATA} entries, got {len(metadata)}")
    return dict(metadata)


def _layout(tensor: Tensor) -> Layout | None:
    if tensor.is_contiguous() and 1 not in tensor.shape:  # most are; strides of a size of 1 may still be anything
        return None
    return layout_of(tensor.shape, tensor.stride(), tensor.itemsize)


def _check_bools(data: memoryview, name: str) -> None:
    if torch.frombuffer(data, dtype=torch.uint8).max().item() > 1:
        raise FormatError(f"tensor {name[:80]!r} isn't boolean: expected bytes 0 and 1 only, got others")


def _memory(tensor: Tensor) -> memoryview:
    if not tensor.is_cpu or tensor.requires_grad:
        tensor = tensor.detach().cpu()
    if not tensor.numel():
        return memoryview(b"")
    if tensor.dtype in _OPAQUE:
        tensor = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    array: Any = tensor.numpy()
    return memoryview(array).cast("B").toreadonly()
