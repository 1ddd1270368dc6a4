"""Make the demo's keys and certificates, and hand every role its own and no other.

Each folder below is a volume that one role mounts, read-only: ``/trust`` (the CA's certificate and the nodes' public
keys) goes to everybody, ``/keys/superlink`` to the SuperLink and its executor, ``/keys/node-N`` to SuperNode N. The
CA's own key stays in ``/keys/authority``. Run again, it changes nothing that is valid.
"""

import os
import sys
from pathlib import Path

from fedpt_flwr.certs import make_certs

KEYS, TRUST = Path("/keys"), Path("/trust")
authority = KEYS / "authority"


def hand_out(source: Path, target: Path, mode: int) -> None:
    """Copy a file in one step; its reader sees the old one or the new one."""
    temporary = target.with_name(f".{target.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(source.read_bytes())
    temporary.replace(target)


nodes = int(sys.argv[1])
made = make_certs(authority, names=["superlink"], num_nodes=nodes)
sys.stdout.write(f"{len(made.created)} keys and certificates made, {len(made.kept)} kept\n")
hand_out(authority / "ca.crt", TRUST / "ca.crt", 0o644)
for name in ("server.pem", "server.key", "executor.secret"):
    hand_out(authority / name, KEYS / "superlink" / name, 0o600)
for number in range(1, nodes + 1):
    hand_out(authority / "nodes" / f"node-{number}", KEYS / f"node-{number}" / "key", 0o600)
    hand_out(authority / "nodes" / f"node-{number}.pub", TRUST / f"node-{number}.pub", 0o644)
