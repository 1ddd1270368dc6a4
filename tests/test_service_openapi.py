"""Requests that a tool makes up from the OpenAPI document, valid ones and not: no 5xx, and answers as documented."""

import subprocess
import sys

import pytest
from serving import make_run, serving

pytestmark = pytest.mark.slow

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "negative_data_rejection"
)


def test_no_request_makes_the_service_fail(tmp_path):
    with serving(make_run(tmp_path)) as service:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{service.url}/openapi.json", "--checks", CHECKS]
        ended = subprocess.run(
            [*command, "--max-examples", "60", "--seed", "1", "--suppress-health-check", "all"],
            capture_output=True,
            text=True,
            timeout=280,
            cwd=tmp_path,
        )
        assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
        assert "Tested: 7" in ended.stdout
        assert not any("Traceback" in line for line in service.log)
