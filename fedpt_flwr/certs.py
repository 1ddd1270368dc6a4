"""Keys and certificates for a federation on real machines: a CA, the SuperLink's certificate, a key for each device.

    FOLDER/                   0700
    ├── ca.crt                goes to every machine: whom to trust
    ├── ca.key          0600  signs server certificates; may be kept elsewhere afterwards
    ├── server.pem            the SuperLink's certificate
    ├── server.key      0600  its key
    ├── executor.secret 0600  lets the ServerApp's executor take work; stays on the server
    └── nodes/
        ├── node-1      0600  a device's key: goes to that device, and can be removed here
        └── node-1.pub        what `flwr supernode register` takes

Nothing that is there is ever written again. What is missing is made, so that calling this once more adds devices,
and renews a server certificate that was removed. Node keys are ECDSA P-384 in OpenSSH's form, which Flower reads.
"""

from __future__ import annotations

import dataclasses
import datetime
import ipaddress
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpt_flwr.errors import CertificateError, ConfigError

LOCAL_NAMES = ("localhost", "127.0.0.1")
"""Always in the server's certificate: executors, proxies and health checks on its own machine use them."""

CA_DAYS = 3650
"""How long a CA is valid. Replacing it means copying the new one to every machine."""

_HOST = re.compile(r"(\*\.)?([a-z0-9_]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.IGNORECASE)
_CLOCK_SKEW = datetime.timedelta(hours=1)  # devices' clocks may be behind the one that signs


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a call of :func:`make_certs` did.

    Attributes:
        folder: Where everything lies.
        created: Files that were written, in that order.
        kept: Keys and certificates that were there already and were left alone.
        server_until: When the server's certificate expires.
    """

    folder: Path
    created: list[Path]
    kept: list[Path]
    server_until: datetime.datetime


def make_certs(folder: Path, *, names: Sequence[str] = (), num_nodes: int = 0, days: int = 365) -> Made:
    """Make what is missing in a folder: a CA, a server certificate, and keys for nodes ``1`` to ``num_nodes``.

    Args:
        folder: Is made if it is not there.
        names: Host names and addresses under which clients reach the SuperLink, besides :data:`LOCAL_NAMES`.
        num_nodes: Devices that there are to be in all.
        days: How long a new server certificate is valid; never longer than its CA.

    Raises:
        ConfigError: A name is none.
        CertificateError: What is there cannot be used: it has other names, has expired, does not belong together, or
            is open to others.
    """
    wanted = list(dict.fromkeys([*map(_checked_name, names), *LOCAL_NAMES]))
    nodes = folder / "nodes"
    with _reporting(folder):
        for part in (folder, nodes):
            part.mkdir(mode=0o700, parents=True, exist_ok=True)
            if part.stat().st_mode & 0o077:
                raise CertificateError(
                    "a folder of keys must be closed to other users",
                    place=str(part),
                    remedy=f"chmod 700 {part}",
                )
        desk = _Desk()
        ca_certificate, ca_key = _ca(desk, folder)
        server = _server(desk, folder, ca_certificate, ca_key, wanted if names else None, days)
        _secret(desk, folder / "executor.secret")
        for number in range(1, num_nodes + 1):
            _node(desk, nodes / f"node-{number}")
    return Made(folder=folder, created=desk.created, kept=desk.kept, server_until=server.not_valid_after_utc)


class _Desk:
    """Writes new files and remembers them."""

    def __init__(self) -> None:
        self.created: list[Path] = []
        self.kept: list[Path] = []

    def write(self, path: Path, content: bytes, *, secret: bool = False) -> None:
        # O_EXCL: a key that somebody else put there in the meantime is not overwritten either. The mode is given when
        # the file is made, so that a key is at no time open to others.
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
        with os.fdopen(file, "wb") as stream:
            stream.write(content)
        self.created.append(path)

    def key(self, path: Path) -> ec.EllipticCurvePrivateKey:
        """The key in a file, made if it is not there."""
        if path.exists():
            self.kept.append(path)
            _check_closed(path)
            with _parsing(path, "a private key"):
                key = serialization.load_pem_private_key(path.read_bytes(), None)
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise CertificateError("must be an ECDSA key", place=str(path))
            return key
        key = ec.generate_private_key(ec.SECP384R1())
        form = serialization.PrivateFormat.PKCS8
        self.write(path, _private_bytes(key, form), secret=True)
        return key


def _ca(desk: _Desk, folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey | None]:
    """The CA; its key is None where it is kept elsewhere."""
    path, key_path = folder / "ca.crt", folder / "ca.key"
    if not path.exists():
        key = desk.key(key_path)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedpt-flwr CA")])
        builder = _builder(name, name, key.public_key(), key.public_key(), _now() + datetime.timedelta(days=CA_DAYS))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        certificate = builder.sign(key, hashes.SHA384())
        desk.write(path, certificate.public_bytes(serialization.Encoding.PEM))
        return certificate, key
    desk.kept.append(path)
    certificate = _read_certificate(path)
    _check_valid(certificate, path, "move the folder away and make a new CA; every machine needs the new ca.crt")
    if not key_path.exists():
        return certificate, None
    key = desk.key(key_path)
    _check_pair(certificate, key, path, key_path)
    return certificate, key


def _server(
    desk: _Desk,
    folder: Path,
    ca_certificate: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey | None,
    names: Sequence[str] | None,
    days: int,
) -> x509.Certificate:
    """The SuperLink's certificate; ``names`` is None where none are asked for, so that those that it has will do."""
    path, key_path = folder / "server.pem", folder / "server.key"
    remedy = f"remove {path} and call this again with all names, then restart the SuperLink"
    if path.exists():
        desk.kept.append(path)
        certificate = _read_certificate(path)
        _check_valid(certificate, path, remedy)
        found = _names_of(certificate)
        if names is not None and not set(names) <= set(found):
            raise CertificateError(
                f"the server's certificate must be for {', '.join(names)}",
                value=", ".join(found),
                place=str(path),
                remedy=remedy,
            )
        if key_path.exists():
            _check_pair(certificate, desk.key(key_path), path, key_path)
        _check_signed(path, ca_certificate, folder / "ca.crt", remedy)
        return certificate
    if ca_key is None:
        raise CertificateError(
            "a server certificate needs the CA's key to sign it",
            place=str(folder / "ca.key"),
            remedy="bring it back for this",
        )
    key = desk.key(key_path)
    until = min(_now() + datetime.timedelta(days=days), ca_certificate.not_valid_after_utc)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedpt-flwr SuperLink")])
    builder = _builder(subject, ca_certificate.subject, key.public_key(), ca_key.public_key(), until)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(digital_signature=True), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(
        x509.SubjectAlternativeName([_general_name(name) for name in names or LOCAL_NAMES]), critical=False
    )
    certificate = builder.sign(ca_key, hashes.SHA384())
    desk.write(path, certificate.public_bytes(serialization.Encoding.PEM))
    return certificate


def _secret(desk: _Desk, path: Path) -> None:
    """A shared secret: without one, whoever reaches the SuperLink's port may take the server's work and do it."""
    if path.exists():
        desk.kept.append(path)
        _check_closed(path)
        return
    desk.write(path, secrets.token_hex(32).encode(), secret=True)


def _node(desk: _Desk, path: Path) -> None:
    """A node's key pair. Where one half is there, the other is not made anew: the key may be on its device already."""
    public_path = path.with_suffix(".pub")
    if path.exists():
        desk.kept.append(path)
        _check_closed(path)
        if public_path.exists():
            return
        with _parsing(path, "an OpenSSH private key"):
            key = serialization.load_ssh_private_key(path.read_bytes(), None)
    elif public_path.exists():
        desk.kept.append(public_path)
        return
    else:
        key = ec.generate_private_key(ec.SECP384R1())
        desk.write(path, _private_bytes(key, serialization.PrivateFormat.OpenSSH), secret=True)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    desk.write(public_path, public + f" {path.name}\n".encode())


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    until: datetime.datetime,
) -> x509.CertificateBuilder:
    """What every certificate has; from Python 3.13 on, one without key identifiers is refused."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - _CLOCK_SKEW)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _usage(**granted: bool) -> x509.KeyUsage:
    every = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{name: granted.get(name, False) for name in every})


def _private_bytes(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _checked_name(name: str) -> str:
    """A host name in lower case, or an address in its usual form."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        pass
    if len(name) > 253 or not _HOST.fullmatch(name) or name.replace(".", "").isdigit():
        raise ConfigError(
            "must be a host name or an IP address",
            value=name,
            place="--name",
            remedy="leave out scheme, port and path: superlink.example.org, 192.168.1.5",
        )
    return name.lower()


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _names_of(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def _read_certificate(path: Path) -> x509.Certificate:
    with _parsing(path, "a certificate"):
        return x509.load_pem_x509_certificate(path.read_bytes())


def _check_valid(certificate: x509.Certificate, path: Path, remedy: str) -> None:
    if certificate.not_valid_after_utc <= _now():
        until = certificate.not_valid_after_utc.date()
        raise CertificateError(f"the certificate expired on {until}", place=str(path), remedy=remedy)


def _check_pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, path: Path, key_path: Path) -> None:
    if certificate.public_key() != key.public_key():
        raise CertificateError(
            f"the certificate must belong to {key_path.name}", place=str(path), remedy="bring the right one back"
        )


def _check_signed(path: Path, ca_certificate: x509.Certificate, ca_path: Path, remedy: str) -> None:
    """Behind a server's certificate may follow intermediate ones; the CA has signed the last."""
    with _parsing(path, "certificates"):
        last = x509.load_pem_x509_certificates(path.read_bytes())[-1]
    try:
        last.verify_directly_issued_by(ca_certificate)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise CertificateError(
            f"the certificate must be signed by {ca_path.name}, or no device trusts it", place=str(path), remedy=remedy
        ) from error


def _check_closed(path: Path) -> None:
    if path.stat().st_mode & 0o077:
        raise CertificateError("a key must be closed to other users", place=str(path), remedy=f"chmod 600 {path}")


@contextmanager
def _parsing(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError) as error:  # TypeError: it has a passphrase
        raise CertificateError(f"must be {what} without a passphrase ({error})", place=str(path)) from error


@contextmanager
def _reporting(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CertificateError(
            f"cannot be written or read ({error.strerror or error})",
            place=str(error.filename or folder),
            remedy="name a folder that can be made or written to",
        ) from error
