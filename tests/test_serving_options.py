"""What options of ``fedpt serve`` come to."""

import pytest
from test_versions import make_run
from typer.testing import CliRunner

from fedpt_flwr import cli
from fedpt_flwr.service import server

LOOPBACK = {"127.0.0.1", "localhost", "::1"}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], LOOPBACK),
        (["--allow-host", "Demo.Example"], LOOPBACK | {"demo.example"}),
        (["--api-key", "k"], set()),
        (["--api-key", "k", "--allow-host", "demo.example"], set()),
        (["--host", "0.0.0.0", "--allow-host", "demo.example"], set()),
    ],
)
def test_a_name_that_is_allowed_is_never_the_only_one(tmp_path, monkeypatch, options, names):
    found = []
    monkeypatch.setattr(server, "serve", lambda _run, _loader, _server, service, *_, **__: found.append(service.hosts))
    monkeypatch.delenv("FEDPT_API_KEY", raising=False)
    result = CliRunner().invoke(cli.app, ["serve", str(make_run(tmp_path)), *options], catch_exceptions=False)
    assert (result.exit_code, found) == (0, [names]), result.output
