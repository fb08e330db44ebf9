"""The codec: what goes in comes out with its bits, strides and alignment, and hostile bytes come out as FormatError."""

from __future__ import annotations

import mmap
import timeit
import zlib
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
from bodies import sample
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from splitfed.errors import ContainerError, FormatError, InputError
from splitfed.protocol import safetensors as codec
from splitfed.protocol.header import DTYPES


def body(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a body."""
    return b"".join(codec.encode(tensors, metadata))


def round_trip(tensor: Tensor) -> Tensor:
    """The tensor after a trip through bytes."""
    return codec.decode(body({"x": tensor}))[0]["x"]


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor in the order of its indices."""
    flat = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def mapped(parts: list[memoryview | bytes]) -> mmap.mmap:
    """Writable memory, aligned to a page, that holds these parts."""
    memory = mmap.mmap(-1, sum(map(len, parts)))
    memory.write(b"".join(parts))
    return memory


LAYOUTS: dict[str, tuple[Callable[[], Tensor], tuple[int, ...]]] = {
    "contiguous": (lambda: torch.rand(2, 3), (3, 1)),
    "scalar": (lambda: torch.rand(()), ()),
    "empty": (lambda: torch.rand(0, 3), (3, 1)),
    "empty with odd strides": (lambda: torch.rand(4, 6)[:0, ::2], (3, 1)),
    "transposed": (lambda: torch.rand(2, 3).t(), (1, 3)),
    "channels_last": (lambda: torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last), (60, 1, 15, 3)),
    "channels_last of one pixel": (lambda: torch.rand(2, 3, 1, 1).to(memory_format=torch.channels_last), (3, 1, 3, 3)),
    "one channel": (lambda: torch.rand(2, 1, 4, 5).to(memory_format=torch.channels_last), (20, 1, 5, 1)),
    "odd stride of a size of 1": (lambda: torch.rand(1, 6, 3)[:, -1:], (18, 3, 1)),
    "transposed with a size of 1": (lambda: torch.rand(5, 1, 3).transpose(0, 1), (3, 3, 1)),
    "every second": (lambda: torch.rand(4, 6)[:, ::2], (6, 2)),
    "cropped channels_last": (
        lambda: torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)[:, :2],
        (60, 1, 15, 3),
    ),
    "expanded scalar": (lambda: torch.rand(()).expand(4, 5), (0, 0)),
    "expanded row": (lambda: torch.rand(5).expand(4, 5), (0, 1)),
    "expanded with gaps": (lambda: torch.rand(3, 4)[:, ::2].unsqueeze(1).expand(3, 7, 2), (4, 0, 2)),
    "expanded once": (lambda: torch.rand(1, 5).expand(3, 5)[:1], (0, 1)),
    "one element of stride 0": (lambda: torch.ones(1, dtype=torch.bfloat16).expand(2)[:1], (0,)),
    "at an offset": (lambda: torch.rand(7)[3:], (1,)),
    "16 times its elements": (lambda: torch.rand(2, 32)[:, ::16], (32, 16)),
    "parameter": (lambda: torch.nn.Parameter(torch.rand(3, 2).t()), (1, 2)),
    # From here on the strides aren't kept.
    "overlapping windows": (lambda: torch.rand(6).unfold(0, 3, 1), (3, 1)),
    "overlapping diagonal": (lambda: torch.rand(9).as_strided((3, 3), (2, 2)), (3, 1)),
    "17 times its elements": (lambda: torch.rand(100, 17)[:, 0], (1,)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_strides_survive(name: str) -> None:
    """A round trip gives values, dtype and the worked strides, in memory aligned to 64 bytes; canonical agrees."""
    make, strides = LAYOUTS[name]
    tensor = make()
    for result in (round_trip(tensor), codec.canonical(tensor)):
        assert torch.equal(result, tensor)
        assert (result.dtype, result.shape, result.stride()) == (tensor.dtype, tensor.shape, strides)
        assert result.data_ptr() % 64 == 0


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.complex128], ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    """All dtypes of the format come back bit for bit: contiguous, as a scalar, empty and with every kind of layout."""
    tensor = sample(dtype)
    views = (tensor, tensor[0, 0, 1], tensor[:0], tensor.permute(2, 0, 1), tensor[:, ::2], tensor[:1].expand(5, 3, 4))
    for view in views:
        result = round_trip(view)
        assert (result.dtype, result.shape, result.stride()) == (
            dtype,
            view.shape,
            codec.canonical(view).stride(),
        )
        assert bits(result) == bits(view)


@st.composite
def strided(draw: st.DrawFn) -> Tensor:
    """A tensor of any dtype, shape, strides and offset that as_strided can make within 4 KB."""
    dtype = draw(st.sampled_from([*DTYPES.values(), torch.complex128]))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    strides = [draw(st.sampled_from([0, 1, 2, 3, 4, 8, 12, 48])) for _ in shape]
    if draw(st.booleans()):  # dense, in any order
        step, order = 1, draw(st.permutations(range(len(shape))))
        for dim in order:
            strides[dim], step = step, step * max(shape[dim], 1)
    memory = torch.arange(1024).remainder(251).to(torch.uint8).repeat(8)
    memory = memory % 2 == 0 if dtype is torch.bool else memory.view(dtype)
    return memory.as_strided(shape, strides, draw(st.integers(0, 3)))


@given(tensor=strided())
def test_canonical_is_the_round_trip(tensor: Tensor) -> None:
    """`canonical` and a trip through bytes agree in all, and both leave a canonical tensor alone."""
    once, trip = codec.canonical(tensor), round_trip(tensor)
    for result in (once, trip):
        assert (result.dtype, result.shape, bits(result)) == (tensor.dtype, tensor.shape, bits(tensor))
        assert result.data_ptr() % 64 == 0
        assert codec.canonical(result) is result
    assert once.stride() == trip.stride()
    assert body({"x": once}) == body({"x": trip}) == body({"x": tensor})
    assert codec.crc32(tensor) == zlib.crc32(bits(tensor))


# Some keys are taken; hypothesis also draws strings that stand in the sources, so they would be among them at times.
KEYS = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda key: key not in codec.TAKEN)


@given(
    tensors=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), strided(), max_size=5),
    metadata=st.dictionaries(KEYS, st.text(st.characters(codec="utf-8"))),
)
def test_many_tensors_and_metadata(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Any names, tensors and texts come back, shared or copied, in bytes that depend on nothing else."""
    tensors = {name.replace("\0", "0").replace("..", "."): tensor for name, tensor in tensors.items()}
    data = body(tensors, metadata)
    assert data == body(dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert codec.read_metadata(data) == metadata
    for source in (data, bytearray(data)):
        results, texts = codec.decode(source)
        assert texts == metadata
        assert {name: bits(result) for name, result in results.items()} == {
            name: bits(tensor) for name, tensor in tensors.items()
        }


def test_hand_worked_bytes() -> None:
    """One body to the byte: whole multiples of 64 bytes first by name, the rest by item size, the header padded."""
    tensors = {
        "c": torch.tensor([7], dtype=torch.uint8),
        "b": torch.tensor([[1, 2]], dtype=torch.int16),
        "a": torch.tensor([3], dtype=torch.int16),
        "z": torch.arange(64, dtype=torch.uint8),
    }
    header = (
        b'{"__metadata__":{"k":"v"},"z":{"dtype":"U8","shape":[64],"data_offsets":[0,64]},'
        b'"a":{"dtype":"I16","shape":[1],"data_offsets":[64,66]},'
        b'"b":{"dtype":"I16","shape":[1,2],"data_offsets":[66,70]},'
        b'"c":{"dtype":"U8","shape":[1],"data_offsets":[70,71]}}'
    )
    expected = (248).to_bytes(8, "little") + header.ljust(248) + bytes(range(64)) + b"\3\0\1\0\2\0\7"
    parts = codec.encode(tensors, {"k": "v"})
    assert b"".join(parts) == expected
    assert len(expected) == 327


@pytest.mark.parametrize(
    "name", ["contiguous", "transposed", "channels_last", "expanded row", "at an offset", "parameter"]
)
def test_encode_shares_memory(name: str) -> None:
    """A buffer of `encode` is the tensor's own memory, read-only."""
    tensor = LAYOUTS[name][0]()
    _, buffer = codec.encode({"x": tensor})
    with torch.no_grad():
        tensor.zero_() if 0 not in tensor.stride() else tensor[0].zero_()
    assert isinstance(buffer, memoryview)
    assert buffer.readonly
    assert not any(buffer)


def test_decode_shares_writable_aligned_memory() -> None:
    """Tensors at multiples of 64 bytes are the given memory, in their layout; the rest are copies."""
    image = torch.rand(2, 4, 4, 4).to(memory_format=torch.channels_last)
    memory = mapped(codec.encode({"image": image, "odd": torch.ones(3), "ragged": torch.ones(5)}))
    tensors, _ = codec.decode(memory)
    memory[-600:] = bytes(600)
    assert torch.equal(tensors["image"], torch.zeros_like(image))
    assert tensors["image"].stride() == image.stride()
    assert tensors["ragged"].tolist() == [1, 1, 1, 1, 1]


def test_decode_copies_what_it_may_not_write() -> None:
    """Bytes stay as they are when a decoded tensor is written to, and nothing warns."""
    data = body({"x": torch.ones(16), "y": torch.ones(3)})
    before = bytes(bytearray(data))
    tensors, _ = codec.decode(data)
    tensors["x"].zero_()
    tensors["y"].zero_()
    assert data == before


def test_decoded_tensors_are_independent() -> None:
    """Two tensors of one body have version counters of their own, so that autograd doesn't take one for the other."""
    tensors, _ = codec.decode(body({"x": torch.ones(16), "y": torch.ones(16)}))
    version = tensors["y"]._version
    tensors["x"].add_(1)
    assert tensors["y"]._version == version
    assert not tensors["y"]._is_view()


def test_canonical_is_the_identity_to_autograd() -> None:
    """Gradients pass through a copy that `canonical` makes; a canonical tensor is returned itself."""
    weight = torch.rand(9, requires_grad=True)
    assert codec.canonical(weight) is weight
    for view in (weight[1:], weight.as_strided((2, 3), (1, 2), 1), weight.as_strided((2, 2), (4, 2), 1)):
        factors = torch.rand(view.shape)
        (expected,) = torch.autograd.grad((view * factors).sum(), weight, retain_graph=True)
        (gradient,) = torch.autograd.grad((codec.canonical(view) * factors).sum(), weight, retain_graph=True)
        assert codec.canonical(view) is not view
        assert torch.equal(gradient, expected)


def test_lazy_conjugates_are_resolved() -> None:
    """A conjugate or negated view, which torch computes lazily, is stored with its own values."""
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    assert round_trip(numbers.conj()).tolist() == [1 - 2j, 3 + 4j]
    assert round_trip(numbers.conj().imag).tolist() == [-2, 4]
    assert round_trip(numbers[:1].conj().imag).tolist() == [-2]
    assert codec.canonical(numbers.conj().imag).tolist() == [-2, 4]
    assert codec.crc32(numbers.conj()) == codec.crc32(torch.tensor([1 - 2j, 3 + 4j]))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_default_device_is_left_alone(device: str) -> None:
    """Decoded tensors are on the CPU whatever the default device is."""
    with torch.device(device):
        tensors, _ = codec.decode(
            body({"x": torch.ones(3, device="cpu").expand(2, 3), "y": torch.ones(0, device="cpu")})
        )
    assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "complex32": (
        lambda: torch.ones(2, dtype=torch.complex64).to(torch.complex32),
        r"expected a dtype of BOOL.*or complex128, got torch.complex32.*\.to\(torch.complex64\)",
    ),
    "a quarter of a byte": (
        lambda: torch.empty(2, dtype=torch.float4_e2m1fn_x2),
        r"got torch.float4_e2m1fn_x2.*\.view\(torch.uint8\)",
    ),
    "complex128 of 8 dimensions": (
        lambda: torch.ones([1] * 8, dtype=torch.complex128),
        r"at most 7 dimensions.*got torch.complex128.* 8 dimensions",
    ),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        r"got torch.qint8.*\.dequantize\(\)",
    ),
    "sparse": (lambda: torch.eye(2).to_sparse(), r"got torch.float32, torch.sparse_coo.*\.to_dense\(\)"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2)]), r"nested.*\.to_dense\(\)"),
    "meta": (lambda: torch.ones(2, device="meta"), r"got torch.float32.*load its values"),
    "9 dimensions": (lambda: torch.ones([1] * 9), r"at most 8 dimensions.*got torch.float32.* 9 dimensions"),
    "huge and empty": (lambda: torch.ones(0, 1 << 50), "an address can count"),
    "no tensor": (lambda: [1.0], "expected a torch.Tensor, got list"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_encode_refuses(kind: str) -> None:
    """A tensor that the format can't hold raises, with its name, its dtype and what to do."""
    make, message = REFUSED[kind]
    with pytest.raises(ContainerError, match="tensor 'bad' .*" + message):
        codec.encode({"good": torch.ones(1), "bad": make()})  # type: ignore[dict-item]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_canonical_refuses(kind: str) -> None:
    """The same tensors, at the cut."""
    make, message = REFUSED[kind]
    if kind != "no tensor":
        with pytest.raises(ContainerError, match=message):
            codec.canonical(make())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["__metadata__", "a\0b", "../a", "a/..", "..\\a", "a" * 1025, "\ud800"])
def test_encode_refuses_names(name: str) -> None:
    """A name that decode would refuse is refused on the way out."""
    with pytest.raises(ContainerError, match=r"name|text"):
        codec.encode({name: torch.ones(1)})


@pytest.mark.parametrize(
    "metadata", [{"a": 1}, {1: "a"}, {"splitfed.layout": "{}"}, {"splitfed.dtype": "{}"}, {"a": "\ud800"}], ids=repr
)
def test_encode_refuses_metadata(metadata: dict[str, str]) -> None:
    """Metadata that aren't text, or take the place of the layout, are refused."""
    with pytest.raises(InputError, match="metadata"):
        codec.encode({}, metadata)


def test_safetensors_reads_ours() -> None:
    """The library itself loads what `encode` writes."""
    known = [dtype for code, dtype in DTYPES.items() if code in safetensors.torch._TYPES]
    tensors = {str(dtype): sample(dtype) for dtype in known} | {"scalar": torch.tensor(1.5), "empty": torch.ones(0, 3)}
    loaded = safetensors.torch.load(body(tensors, {"a": "ü"}))
    assert {name: bits(tensor) for name, tensor in loaded.items()} == {name: bits(tensors[name]) for name in loaded}
    assert loaded.keys() == tensors.keys()
    assert len(known) == len(DTYPES)


def test_ours_reads_safetensors() -> None:
    """`decode` reads what the library's own `save` writes, and aligns it."""
    tensors = {str(dtype): sample(dtype) for dtype in DTYPES.values()} | {"scalar": torch.tensor(1.5)}
    loaded, metadata = codec.decode(safetensors.torch.save(tensors, {"a": "ü"}))
    assert metadata == {"a": "ü"}
    assert {name: bits(tensor) for name, tensor in loaded.items()} == {name: bits(tensors[name]) for name in tensors}
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.values())


def test_safetensors_reads_a_layout_permuted() -> None:
    """To a reader that knows no layouts, a transpose is stored as the matrix that it is the transpose of."""
    matrix = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(safetensors.torch.load(body({"x": matrix.t()}))["x"], matrix)


def test_complex128_is_stored_as_pairs() -> None:
    """To the library a complex128 tensor is float64 with one dimension more, whose two are its parts."""
    numbers = torch.tensor([[1 + 2j], [3 - 4j]], dtype=torch.complex128)
    data = body({"z": numbers, "x": torch.ones(1, dtype=torch.float64)}, {"k": "v"})
    loaded = safetensors.torch.load(data)
    assert loaded["z"].tolist() == [[[1.0, 2.0]], [[3.0, -4.0]]]
    assert b'"splitfed.dtype":"{\\"z\\":\\"complex128\\"}"' in data
    assert codec.read_metadata(data) == {"k": "v"}
    assert codec.decode(data)[0]["x"].dtype is torch.float64


@pytest.mark.parametrize(
    ("tensor", "dtypes", "message"),
    [
        (torch.ones(3, 2, dtype=torch.float64), '{"x":"complex64"}', "bad dtype"),
        (torch.ones(3, 2, dtype=torch.float64), '{"x":["complex128"]}', "bad dtype"),
        (torch.ones(2, 3, dtype=torch.float64), '{"x":"complex128"}', "bad dtype"),
        (torch.ones((), dtype=torch.float64), '{"x":"complex128"}', "bad dtype"),
        (torch.ones(3, 2, dtype=torch.float32), '{"x":"complex128"}', "bad dtype"),
        (torch.ones(3, 2, dtype=torch.float64), '{"y":"complex128"}', "isn't there"),
        (torch.ones(3, 2, dtype=torch.float64), '{"x":"complex128","x":"complex128"}', "duplicate"),
        (torch.ones(3, 2, dtype=torch.float64), "[]", "isn't a JSON object"),
        (torch.ones(3, 2, dtype=torch.float64).t(), '{"x":"complex128"}', "bad layout"),
    ],
)
def test_foreign_dtypes_are_checked(tensor: Tensor, dtypes: str, message: str) -> None:
    """What is said to be complex128 must be float64 in pairs, and be there."""
    data = safetensors.torch.save({"x": tensor.contiguous()}, {"splitfed.dtype": dtypes})
    if not tensor.is_contiguous():
        data = safetensors.torch.save(
            {"x": torch.ones(3, 2, dtype=torch.float64)},
            {"splitfed.dtype": dtypes, "splitfed.layout": '{"x":{"order":[1,0]}}'},
        )
    with pytest.raises(FormatError, match=message):
        codec.decode(data)


def test_crc32_by_hand() -> None:
    """CRC-32 is over the values in the order of their indices: the check value of "123456789", also transposed."""
    digits = torch.tensor(list(b"123456789"), dtype=torch.uint8).reshape(3, 3)
    assert codec.crc32(digits) == 0xCBF43926
    assert codec.crc32(digits.t().contiguous().t()) == 0xCBF43926
    assert codec.crc32(torch.ones(0)) == 0
    assert codec.crc32(torch.tensor(True)) == zlib.crc32(b"\1")


def test_boolean_bytes() -> None:
    """A byte of 2 in a boolean tensor is refused, in memory that is shared or copied."""
    data = bytearray(body({"x": torch.tensor([True, False, True])}))
    data[-1] = 2
    for source in (bytes(data), data):
        with pytest.raises(FormatError, match="'x' isn't boolean: expected bytes 0 and 1"):
            codec.decode(source)


def test_speed() -> None:
    """Sizes don't cost element by element: 16 MB out and 64 MB in take milliseconds, not the seconds of a loop."""
    large = {"x": torch.rand(4 << 20)}
    memory = mapped(codec.encode({f"x{i}": torch.rand(4 << 20) for i in range(4)}))
    assert min(timeit.repeat(lambda: codec.encode(large), number=1, repeat=5)) < 0.01
    assert min(timeit.repeat(lambda: codec.decode(memory), number=1, repeat=5)) < 0.01
