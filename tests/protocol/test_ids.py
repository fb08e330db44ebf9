"""Ids: what may become a key of the store, and what never does."""

from __future__ import annotations

from typing import Any

import pytest
from hostile import HOSTILE
from hypothesis import example, given
from hypothesis import strategies as st

from splitfed.checks import positive
from splitfed.errors import IdError, InputError
from splitfed.protocol.ids import MAX_NUMBER, BatchId, check_client_id, check_lineage, check_number


@pytest.mark.parametrize("client_id", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_client_id_is_refused(client_id: Any) -> None:
    """It can't leave the store's root, glob, query or hide; the message shows its start and what is expected."""
    with pytest.raises(IdError, match=r"client id .*expected 1 to 64") as caught:
        check_client_id(client_id)
    assert len(str(caught.value)) < 250
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("client_id", ["a", "7", "hospital-a", "A.b_c-9", "a..b", "a" * 64])
def test_an_ordinary_client_id_is_returned(client_id: str) -> None:
    """Letters, digits and `_ . -`, up to 64 of them."""
    assert check_client_id(client_id) == client_id


@given(st.text(max_size=70))
@example("a/../b")
def test_what_passes_is_one_harmless_path_component(text: str) -> None:
    """Whatever text is tried, an accepted id is ASCII and has no separator, wildcard or leading dot."""
    try:
        found = check_client_id(text)
    except IdError:
        return
    assert found == text
    assert text.isascii()
    assert not set(text) & set("/\\:*?%#&\0 ")
    assert not text.startswith(".")


@pytest.mark.parametrize("lineage", ["body", "client", "body@hospital-a", "body@" + "a" * 64])
def test_an_ordinary_lineage_is_returned(lineage: str) -> None:
    """The server's line, the clients', and one for each client."""
    assert check_lineage(lineage) == lineage


@pytest.mark.parametrize(
    "lineage",
    [
        "",
        "Body",
        "body@",
        "body@..",
        "body@a/b",
        "body@a%00",
        "head",
        "../body",
        "body/x",
        "client@a",
        "body\n",
        None,
        5,
    ],
    ids=repr,
)
def test_a_foreign_lineage_is_refused(lineage: Any) -> None:
    """A lineage is a folder, and only these three kinds of them exist."""
    with pytest.raises(IdError, match="expected 'body', 'client' or 'body@<client id>'"):
        check_lineage(lineage)


@pytest.mark.parametrize("number", [0, 1, MAX_NUMBER])
def test_a_number_within_its_range_is_returned(number: int) -> None:
    """Versions, incarnations, sequence and call numbers: 0 to 10¹² − 1."""
    assert check_number("version", number) == number


@pytest.mark.parametrize(
    "number", [-1, MAX_NUMBER + 1, 10**400, True, 1.0, "1", None, float("nan")], ids=lambda n: repr(n)[:12]
)
def test_what_isnt_a_plain_number_is_refused(number: Any) -> None:
    """It would not sort as text does, or not be a number at all."""
    with pytest.raises(IdError, match=r"seq .*expected an integer from 0 to 999999999999"):
        check_number("seq", number)


def test_batch_ids_sort_as_numbers_do_and_print_as_they_are_written() -> None:
    """By client, then process, then sequence number: 10 comes after 9."""
    ids = [BatchId("b", 1, 0), BatchId("a", 2, 0), BatchId("a", 1, 10), BatchId("a", 1, 9)]
    assert [str(batch) for batch in sorted(ids)] == ["a/1/9", "a/1/10", "a/2/0", "b/1/0"]


@pytest.mark.parametrize("value", [1, 0.25, 5e-324, 1e308])
def test_a_weight_is_any_finite_number_above_zero(value: float) -> None:
    """Examples, tokens, or fractions of them."""
    assert positive("num_samples", value) == value


@pytest.mark.parametrize(
    "value", [0, -1, 0.0, float("nan"), float("inf"), True, "1", None, 10**400], ids=lambda v: repr(v)[:9]
)
def test_what_weighs_nothing_is_refused(value: Any) -> None:
    """It could undo other batches, or be no number at all."""
    with pytest.raises(InputError, match=r"num_samples is .*: expected a finite number above 0"):
        positive("num_samples", value)
