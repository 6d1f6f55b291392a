"""Tests with Schemathesis that the server's responses always match its OpenAPI document."""

import os
import subprocess
import sys

import pytest

from lib.served import Server, write_place

pytestmark = pytest.mark.acceptance

CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance"),
    *("response_headers_conformance", "response_schema_conformance", "unsupported_method"),
    "negative_data_rejection",
)


#: Routes that accept the same fields as /api/finetune/submit. The boundary values of these fields
#: are tested only once, with that route.
ALIKE = ("/api/finetune/plan", "/api/finetune/evaluate")


def test_every_route_does_what_it_says(tmp_path):
    """Sends EXAMPLES random requests to each route, and requests with the schema's boundary
    values."""
    place = write_place(tmp_path)
    alike = [word for path in ALIKE for word in ("--exclude-path", path)]
    with Server(place, place / "model") as server:
        for more in (["--phases", "fuzzing,stateful"], ["--phases", "coverage", *alike]):
            command = [sys.executable, "-m", "schemathesis.cli", "run"]
            command += [f"{server.url}/openapi.json", "--checks", ",".join(CHECKS), *more]
            command += ["--seed", "1", "--no-color", "--request-timeout", "60"]
            command += ["--max-examples", os.environ.get("EXAMPLES", "3")]
            found = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=1200,
                cwd=tmp_path,
            )
            assert found.returncode == 0, found.stdout[-20_000:] + server.said[-5000:]
        assert server.http.get("/healthz").status_code == 200
        assert "Traceback" not in server.said, server.said[-5000:]
