"""The contract: errors as JSON, each as its class, and a document that says what is served."""

from __future__ import annotations

import inspect
import json
import uuid
from typing import Any

import hypothesis
import pytest
from harness_http import serving
from harness_requests import ahead

from splitfed import errors
from splitfed.errors import InputError, SplitFedError
from splitfed.service.http.contract import decode_error, document, encode_error
from splitfed.service.http.limits import Limits

CLASSES = [found for _, found in inspect.getmembers(errors, inspect.isclass) if found.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_arrives_as_its_class_with_its_message(kind: type[SplitFedError]) -> None:
    """Every class of the tree, in any script."""
    found = decode_error(encode_error(kind("expected ḡ, got g")))
    assert type(found) is kind
    assert str(found) == "expected ḡ, got g"


def test_an_unforeseen_exception_tells_its_class_only() -> None:
    """Its text may quote a path or a secret."""
    found = decode_error(encode_error(KeyError("secret")))
    assert type(found) is SplitFedError
    assert "KeyError" in str(found)
    assert "secret" not in str(found)


def test_names_from_outside_the_tree_are_only_text() -> None:
    """A hostile server can't choose what is raised, beyond our own errors."""
    found = decode_error(b'{"error": "KeyboardInterrupt", "message": "x"}')
    assert type(found) is SplitFedError
    assert "KeyboardInterrupt" in str(found)


@pytest.mark.parametrize(
    "data", [b"", b"<html>", b"[]", b"3", b'{"error": "IdError"}', b"\xff", b"[" * 100_000], ids=lambda data: data[:8]
)
def test_what_isn_t_an_error_of_ours_is_none(data: bytes) -> None:
    """A proxy's page, for one."""
    assert decode_error(data) is None


def test_every_path_of_the_document_is_served_and_no_other() -> None:
    """Each by its method; the statuses that were answered stand in it."""
    with serving(f"memory://{uuid.uuid4()}") as (_, service):
        status, found, _ = service.ask("/openapi.json")
        assert status == 200
        assert found == json.loads(json.dumps(document(Limits(), secured=False)))
        for path, operations in found["paths"].items():
            for method, operation in operations.items():
                status, _, _ = service.ask(path, b"nonsense" if method == "post" else None, method.upper())
                assert str(status) in operation["responses"], (path, status)
        assert service.send("forward", ahead())[0] == 200


def test_tokens_stand_in_the_document_where_they_are_asked_for() -> None:
    """Under /v1 only."""
    paths = document(Limits(), secured=True)["paths"]
    secured = {path for path, operations in paths.items() for found in operations.values() if "security" in found}
    assert secured == {path for path in paths if path.startswith("/v1/")}
    assert not any(
        "security" in found for path in document(Limits(), secured=False)["paths"].values() for found in path.values()
    )


def test_the_schema_of_errors_is_what_errors_are() -> None:
    """Required are the fields that each has."""
    schema: dict[str, Any] = document(Limits(), secured=False)["components"]["schemas"]["Error"]
    assert set(schema["required"]) == set(schema["properties"]) == set(json.loads(encode_error(InputError("x"))))


def test_schemathesis_finds_nothing() -> None:
    """Made-up requests of every operation: no failure, no status, header or type that the document doesn't have."""
    import schemathesis  # here, and not as a plugin of pytest: half a second in each process

    with serving(f"memory://{uuid.uuid4()}", Limits(body=1 << 20)) as (_, service):
        schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        assert {found.path for found in operations} | {"/openapi.json"} == set(
            document(Limits(), secured=False)["paths"]
        )
        for operation in operations:
            fuzz(operation)


def fuzz(operation: Any) -> None:
    """15 requests of one operation, all checks."""
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    # What the document can only call binary has a form, so that bytes at random are rightly refused.
    opaque = [positive_data_acceptance] if operation.method == "post" else []

    @hypothesis.settings(max_examples=15, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(case=operation.as_strategy())
    def run(case: Any) -> None:
        case.call_and_validate(excluded_checks=opaque)

    run()
