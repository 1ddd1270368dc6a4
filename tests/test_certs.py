"""`fedpt certs`: what is made is private, is accepted by TLS and by Flower, and is never overwritten."""

import socket
import ssl
import stat
import threading
from argparse import Namespace
from pathlib import Path

import pytest
from cryptography import x509
from flwr.cli.supernode.register import try_load_public_key
from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication
from typer.testing import CliRunner

from fedpt_flwr.certs import make_certs
from fedpt_flwr.cli import app
from fedpt_flwr.errors import CertificateError, ConfigError

runner = CliRunner()


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def handshake(folder, server_name, ca):
    """One TLS connection from a client as strict as Python 3.13's; raises what the client raises."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(folder / "server.pem", folder / "server.key")
    client_context = ssl.create_default_context(cafile=ca)
    client_context.verify_flags |= ssl.VERIFY_X509_STRICT
    ours, theirs = socket.socketpair()

    def serve():
        try:
            with server_context.wrap_socket(theirs, server_side=True) as connection:
                connection.recv(1)
        except OSError:
            pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client_context.wrap_socket(ours, server_hostname=server_name) as connection:
            connection.send(b"x")
    finally:
        ours.close()
        thread.join()


def test_keys_and_folders_are_closed_to_other_users(tmp_path):
    made = make_certs(tmp_path / "certs", num_nodes=2)
    modes = {str(path.relative_to(made.folder)): mode(path) for path in made.created}
    assert modes == {
        "ca.key": 0o600,
        "ca.crt": 0o644,
        "server.key": 0o600,
        "server.pem": 0o644,
        "executor.secret": 0o600,
        "nodes/node-1": 0o600,
        "nodes/node-1.pub": 0o644,
        "nodes/node-2": 0o600,
        "nodes/node-2.pub": 0o644,
    }
    assert mode(made.folder) == mode(made.folder / "nodes") == 0o700
    assert made.kept == []


@pytest.mark.parametrize("name", ["superlink", "gpu-1.example.org", "192.168.1.5", "::1", "localhost", "127.0.0.1"])
def test_a_client_that_trusts_the_ca_accepts_the_server_under_each_name(tmp_path, name):
    folder = make_certs(tmp_path / "certs", names=["superlink", "GPU-1.example.org", "192.168.1.5", "::1"]).folder
    handshake(folder, name, folder / "ca.crt")


def test_a_client_refuses_another_name_and_another_ca(tmp_path):
    folder = make_certs(tmp_path / "certs").folder
    other = make_certs(tmp_path / "other").folder
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(folder, "superlink", folder / "ca.crt")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(folder, "localhost", other / "ca.crt")


def test_flower_reads_both_halves_of_a_nodes_key(tmp_path):
    nodes = make_certs(tmp_path / "certs", num_nodes=1).folder / "nodes"
    arguments = Namespace(auth_supernode_private_key=str(nodes / "node-1"), auth_supernode_public_key=None)
    _, public_key = _try_setup_client_authentication(arguments)
    assert public_key.curve.name == "secp384r1"
    assert try_load_public_key(nodes / "node-1.pub")


def test_devices_can_be_added_and_nothing_that_is_there_changes(tmp_path):
    folder = make_certs(tmp_path / "certs", names=["superlink"], num_nodes=1).folder
    before = contents(folder)
    made = make_certs(folder, num_nodes=3)
    assert [path.name for path in made.created] == ["node-2", "node-2.pub", "node-3", "node-3.pub"]
    assert {path.name for path in made.kept} == {
        "ca.crt",
        "ca.key",
        "server.pem",
        "server.key",
        "executor.secret",
        "node-1",
    }
    assert before.items() <= contents(folder).items()


def test_keys_that_have_gone_to_their_device_are_not_made_again(tmp_path):
    folder = make_certs(tmp_path / "certs", num_nodes=1).folder
    (folder / "nodes/node-1").unlink()
    (folder / "ca.key").unlink()
    (folder / "server.key").unlink()
    made = make_certs(folder, num_nodes=2)
    assert [path.name for path in made.created] == ["node-2", "node-2.pub"]


def test_a_lost_public_half_is_made_again_from_the_key(tmp_path):
    public = make_certs(tmp_path / "certs", num_nodes=1).folder / "nodes/node-1.pub"
    before = public.read_bytes()
    public.unlink()
    make_certs(tmp_path / "certs", num_nodes=1)
    assert public.read_bytes() == before


def test_a_server_certificate_that_was_removed_is_renewed_for_the_same_key_by_the_same_ca(tmp_path):
    folder = make_certs(tmp_path / "certs").folder
    before = contents(folder)
    (folder / "server.pem").unlink()
    make_certs(folder, names=["superlink"], days=30)
    after = contents(folder)
    assert {path.name for path in before if before[path] != after[path]} == {"server.pem"}
    handshake(folder, "superlink", folder / "ca.crt")


def test_validity_is_as_asked_and_ends_with_the_ca(tmp_path):
    folder = make_certs(tmp_path / "certs", days=30).folder
    ca, server = (x509.load_pem_x509_certificate((folder / name).read_bytes()) for name in ("ca.crt", "server.pem"))
    assert 29 <= (server.not_valid_after_utc - ca.not_valid_before_utc).days <= 30
    (folder / "server.pem").unlink()
    assert make_certs(folder, days=9000).server_until == ca.not_valid_after_utc


def test_other_names_are_refused_with_the_remedy(tmp_path):
    folder = make_certs(tmp_path / "certs", names=["superlink"]).folder
    make_certs(folder, names=["superlink"])
    with pytest.raises(CertificateError, match=r"for 10\.0\.0\.1, .* got 'superlink, .*remove .*server\.pem"):
        make_certs(folder, names=["10.0.0.1"])


@pytest.mark.parametrize(
    "name", ["https://superlink", "superlink:8000", "", "a b", "-x", "1.2.3", "1.2.3.4.5", "x" * 64, "a..b", "ä.org"]
)
def test_what_is_no_name_is_refused_before_anything_is_made(tmp_path, name):
    with pytest.raises(ConfigError, match="--name: must be a host name or an IP address"):
        make_certs(tmp_path / "certs", names=[name])
    assert not (tmp_path / "certs").exists()


def test_an_open_folder_or_key_is_refused(tmp_path):
    tmp_path.chmod(0o755)
    with pytest.raises(CertificateError, match=r"closed to other users; chmod 700 "):
        make_certs(tmp_path)
    folder = make_certs(tmp_path / "certs", num_nodes=1).folder
    for name in ("ca.key", "server.key", "executor.secret", "nodes/node-1"):
        (folder / name).chmod(0o640)
        with pytest.raises(CertificateError, match=rf"{name}: a key must be closed to other users; chmod 600 "):
            make_certs(folder, num_nodes=1)
        (folder / name).chmod(0o600)


@pytest.mark.parametrize("name", ["ca.crt", "ca.key", "server.pem", "server.key"])
def test_a_damaged_file_is_named_and_left_alone(tmp_path, name):
    folder = make_certs(tmp_path / "certs").folder
    (folder / name).write_text("-----BEGIN NOTHING-----\n")
    with pytest.raises(CertificateError, match=rf"{name}: must be a "):
        make_certs(folder)
    assert (folder / name).read_text() == "-----BEGIN NOTHING-----\n"


@pytest.mark.parametrize(("certificate", "key"), [("ca.crt", "ca.key"), ("server.pem", "server.key")])
def test_a_key_of_another_certificate_is_refused(tmp_path, certificate, key):
    folder, other = (make_certs(tmp_path / name).folder for name in ("certs", "other"))
    (folder / key).write_bytes((other / key).read_bytes())
    with pytest.raises(CertificateError, match=rf"{certificate}: the certificate must belong to {key}"):
        make_certs(folder)


def test_a_server_certificate_that_another_ca_signed_is_refused(tmp_path):
    folder = make_certs(tmp_path / "certs").folder
    (folder / "ca.key").unlink()
    (folder / "ca.crt").unlink()
    with pytest.raises(CertificateError, match=r"server\.pem: .* signed by ca\.crt, .*; remove .*server\.pem and call"):
        make_certs(folder)
    (folder / "server.pem").unlink()
    assert make_certs(folder).created == [folder / "server.pem"]


def test_a_damaged_certificate_behind_the_servers_own_is_named(tmp_path):
    folder = make_certs(tmp_path / "certs").folder
    with (folder / "server.pem").open("a") as file:
        file.write("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    with pytest.raises(CertificateError, match=r"server\.pem: must be certificates"):
        make_certs(folder)


def test_a_server_certificate_without_the_cas_key_is_refused(tmp_path):
    folder = make_certs(tmp_path / "certs").folder
    (folder / "ca.key").unlink()
    (folder / "server.pem").unlink()
    with pytest.raises(CertificateError, match=r"ca\.key: a server certificate needs the CA's key"):
        make_certs(folder)


def test_an_expired_certificate_is_named(tmp_path, monkeypatch):
    folder = make_certs(tmp_path / "certs", days=1).folder
    now = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes()).not_valid_after_utc
    monkeypatch.setattr("fedpt_flwr.certs._now", lambda: now)
    with pytest.raises(CertificateError, match=r"server\.pem: the certificate expired on .*; remove "):
        make_certs(folder)


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CertificateError, match="cannot be written or read"):
        make_certs(tmp_path / "file" / "certs")


def test_the_command_says_what_it_made_and_what_comes_next(tmp_path):
    folder = tmp_path / "certs"
    result = runner.invoke(app, ["certs", str(folder), "--name", "superlink", "--nodes", "1"])
    assert result.exit_code == 0, result.output
    assert f"made  {folder}/nodes/node-1\n" in result.output
    assert f"--ssl-certfile {folder}/server.pem" in result.output
    assert 'address = "superlink:8000"' in result.output
    assert f"flwr supernode register {folder}/nodes/node-1.pub prod" in result.output
    again = runner.invoke(app, ["certs", str(folder), "--name", "superlink", "--nodes", "1"])
    assert again.exit_code == 0
    assert "made" not in again.output
    assert f"kept  {folder}/nodes/node-1\n" in again.output


def test_without_nodes_the_command_says_how_to_add_them(tmp_path):
    result = runner.invoke(app, ["certs", str(tmp_path / "certs")])
    assert result.exit_code == 0
    assert "--nodes" in result.output
    assert not list(Path(tmp_path / "certs/nodes").iterdir())
