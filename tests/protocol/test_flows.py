"""What compression has done, as it adds up from calls to rounds; hand-worked."""

from __future__ import annotations

from typing import Any

import pytest

from splitfed.errors import FormatError, InputError
from splitfed.protocol.flows import Flow, added, checked, entry, errors, from_plain, to_plain

CODED = Flow(tensors=2, coded=1, exact_bytes=4000, sent_bytes=1000, squared_error=1.0, squared_norm=100.0)
PLAIN = Flow(tensors=1, exact_bytes=500, sent_bytes=500)


def test_errors_add_up_by_their_squares() -> None:
    """√(1/100) of one client and √(8/200) of another are √(9/300) together."""
    other = Flow(1, 1, 4000, 1000, 8.0, 200.0)
    total = added([{"activations": CODED}, {"activations": other, "outputs": PLAIN}])
    assert total == {"activations": Flow(3, 2, 8000, 2000, 9.0, 300.0), "outputs": PLAIN}
    assert errors(total) == {"activations_error": pytest.approx(0.03**0.5)}
    assert entry(total)["compression"] == {
        "activations": {"exact_bytes": 8000, "sent_bytes": 2000, "ratio": 0.25, "error": pytest.approx(0.03**0.5)},
        "outputs": {"exact_bytes": 500, "sent_bytes": 500, "ratio": 1.0, "error": 0.0},
    }


def test_where_nothing_was_coded_a_row_says_nothing() -> None:
    """Nor of a flow that is empty."""
    assert entry({"outputs": PLAIN}) == entry({}) == {}
    assert "outputs" not in entry({"activations": CODED, "outputs": Flow()})["compression"]
    assert Flow().ratio == 1.0
    assert Flow().relative_error == 0.0


def test_plain_numbers_come_back_as_flows() -> None:
    """As they travel with a push, and lie in the record of a commit."""
    flows = {"activations": CODED, "outputs": Flow()}
    assert to_plain(flows) == {"activations": [2, 1, 4000, 1000, 1.0, 100.0]}
    assert from_plain(to_plain(flows)) == {"activations": CODED}


@pytest.mark.parametrize(
    "plain",
    [
        {"activation": [0] * 6},
        {"outputs": [0] * 5},
        {"outputs": None},
        *({"outputs": [0, 0, 0, 0, number, 0]} for number in (-1, float("nan"), float("inf"), 1e300, "1", True)),
    ],
)
def test_what_can_t_be_added_up_is_refused(plain: Any) -> None:
    """One client's infinity would be everybody's."""
    with pytest.raises(FormatError, match="isn't a flow"):
        from_plain(plain)
    with pytest.raises(InputError, match="the flows of a push aren't ones"):
        checked(plain)
