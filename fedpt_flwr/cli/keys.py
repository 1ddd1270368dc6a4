"""``fedpt certs``: keys and certificates, and the commands that use them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from fedpt_flwr.cli.console import say


def certs(
    folder: Annotated[Path, typer.Argument(help="Where keys and certificates lie; made if it is not there.")],
    name: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name or address under which devices reach the SuperLink; repeat it for more. localhost and "
            "127.0.0.1 are always in the certificate."
        ),
    ] = None,
    nodes: Annotated[
        int, typer.Option(min=0, max=10_000, help="Devices that there are to be in all; existing keys stay.")
    ] = 0,
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long the server's certificate is valid.")] = 365,
) -> None:
    """Make keys and certificates for a federation on real machines, where they are missing.

    A CA, the SuperLink's certificate, and a key for each device: `fedpt certs certs --name superlink.example.org
    --nodes 3`. Nothing that is there is overwritten, so the same command with `--nodes 5` adds two devices. To renew
    the server's certificate, or to give it other names, remove `server.pem` and call this again with all `--name`s.
    """
    from fedpt_flwr.certs import make_certs

    made = make_certs(folder.absolute(), names=name or (), num_nodes=nodes, days=days)
    where = shlex.quote(str(made.folder))

    for path in made.created:
        say(f"made  {path}")
    for path in made.kept:
        say(f"kept  {path}")
    say(f"The server's certificate is valid until {made.server_until:%Y-%m-%d}.")
    address = f"[{name[0]}]" if name and ":" in name[0] else (name or ["127.0.0.1"])[0]
    say("\nOn the server:")
    say(
        f"  flower-superlink --host 0.0.0.0 --port 8000 --ssl-ca-certfile {where}/ca.crt "
        f"--ssl-certfile {where}/server.pem --ssl-keyfile {where}/server.key "
        "--enable-supernode-auth --database superlink.db --isolation process "
        f"--superexec-auth-secret-file {where}/executor.secret"
    )
    say(
        f"  flower-superexec --root-certificates {where}/ca.crt --runtime-api-address 127.0.0.1:8000 "
        f"--superexec-auth-secret-file {where}/executor.secret"
    )
    say("In $FLWR_HOME/config.toml (by default ~/.flwr/config.toml) of who starts runs:")
    say(f'  [superlink.prod]\n  address = "{address}:8000"\n  root-certificates = "{made.folder}/ca.crt"')
    if not nodes:
        say("Add keys for devices with --nodes.")
        return
    say("Then, for each device, before it starts:")
    say(f"  flwr supernode register {where}/nodes/node-1.pub prod --name node-1")
    say("On device 1, which needs copies of ca.crt and nodes/node-1 and nothing else:")
    say(
        f"  flower-supernode --superlink {address}:8000 --root-certificates ca.crt "
        "--auth-supernode-private-key node-1 --node-config 'device-id=1 data-path=\"/absolute/path.jsonl\"'"
    )
