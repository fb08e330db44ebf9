"""What crosses between processes: errors keep their class, unforeseen ones keep their secrets."""

from __future__ import annotations

import pytest
import torch

from splitfed import errors
from splitfed.errors import ExpiredError, FormatError, SplitFedError
from splitfed.protocol import packing, transport
from splitfed.protocol.messages import ForwardRequest, LossRequest, PullAnswer, PullRequest
from splitfed.protocol.packing import pack, pack_tree
from splitfed.protocol.safetensors import encode
from splitfed.protocol.transport import Transport

TREE = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SplitFedError)]


def joined(parts: list[memoryview | bytes]) -> bytes:
    """The bytes as they arrive."""
    return b"".join(parts)


def forward(client_id: str) -> ForwardRequest:
    """Any forward request of a client."""
    return ForwardRequest(
        client_id, None, "p", 0, "", ((torch.ones(1),), {}), (False,), True, True, 1, None, None, 0, None
    )


def test_every_method_of_a_transport_is_in_the_table() -> None:
    """The table has the methods of `Transport`, and each finds its way back from the kind of its request."""
    assert set(transport.VERBS) == {name for name in vars(Transport) if not name.startswith("_")}
    for method, (request, _) in transport.VERBS.items():
        assert transport.verb_of(request.__name__) == method


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_an_error_arrives_as_its_class(kind: type[SplitFedError]) -> None:
    """Class and message are those that were raised."""
    found = packing.unpack_error(joined(packing.pack_error(kind("expected 3, got 4"))))
    assert type(found) is kind
    assert str(found) == "expected 3, got 4"


def test_an_unforeseen_error_tells_its_class_and_no_more() -> None:
    """The text of a foreign exception may hold anything, so it stays."""
    found = packing.unpack_error(joined(packing.pack_error(KeyError("/secret/path"))))
    assert type(found) is SplitFedError
    assert "KeyError" in str(found)
    assert "secret" not in str(found)


@pytest.mark.parametrize("name", ["NewerError", "os", "Mapping", "annotations", ""])
def test_a_name_that_is_no_error_of_ours_becomes_the_base(name: str) -> None:
    """An error of a newer server is still an error of splitfed; nothing else of the module can be named."""
    found = packing.error_from({"error": name, "message": "what it said"})
    assert type(found) is SplitFedError
    assert name in str(found)
    assert "what it said" in str(found)


def test_a_long_message_is_cut() -> None:
    """A body that quotes its input doesn't fill the packing."""
    assert len(packing.error_fields(ExpiredError("x" * 10_000))["message"]) == 4_000


def test_the_status_travels() -> None:
    """410 for what has expired, as HTTP has it."""
    assert packing.error_fields(ExpiredError("gone"))["status"] == 410


def test_an_answer_is_unpacked_by_its_method() -> None:
    """The answer of a pull comes back as one."""
    answer = packing.unpack_answer("pull", joined(pack(PullAnswer(-1, None, {}))))
    assert answer.version == -1


def test_an_error_in_place_of_an_answer_is_raised() -> None:
    """The client's caller sees what the server raised."""
    with pytest.raises(ExpiredError, match="gone"):
        packing.unpack_answer("pull", joined(packing.pack_error(ExpiredError("gone"))))


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", joined(encode({})), joined(pack(PullRequest("a"))), joined(pack_tree("Error", [1]))],
    ids=["empty", "short", "no kind", "another message", "no fields"],
)
def test_what_is_neither_answer_nor_error_is_refused(data: bytes) -> None:
    """Bytes of any other kind are a FormatError."""
    with pytest.raises(FormatError):
        packing.unpack_answer("pull", data)


def test_a_kind_that_is_no_request_is_refused() -> None:
    """Only requests are taken as requests."""
    with pytest.raises(FormatError, match="expected one of ForwardRequest"):
        transport.verb_of("PullAnswer")


def test_the_owner_of_a_loss_is_that_of_its_forward() -> None:
    """The id that access is checked against is the one that is acted on."""
    assert PullRequest("a").client_id == "a"
    assert forward("b").client_id == "b"
    assert LossRequest(forward("c"), 0, torch.ones(1), 1.0).client_id == "c"
