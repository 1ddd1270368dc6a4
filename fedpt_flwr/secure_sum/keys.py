"""The cryptography of a secure sum: agreement on keys, sealing, masks. All primitives are those of ``cryptography``.

X25519 (RFC 7748) for agreement, HKDF with SHA-256 (RFC 5869) for keys of one purpose each, AES-256-GCM for sealing,
and the stream of ChaCha20 (RFC 8439) for masks. Private keys come from the operating system, never from a seed.
"""

from __future__ import annotations

import os

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedpt_flwr.secure_sum.ring import Words

KEY_BYTES = 32
_NONCE_BYTES, _TAG_BYTES = 12, 16
SEAL_BYTES = _NONCE_BYTES + _TAG_BYTES
"""Bytes that sealing adds."""

_PIECE_BYTES = 1 << 20
_ZEROS = memoryview(bytes(_PIECE_BYTES))


def new_private_key() -> bytes:
    """A private key of X25519, :data:`KEY_BYTES` bytes."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_key(private: bytes) -> bytes:
    """The public key of a private one, :data:`KEY_BYTES` bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, purpose: bytes, secret: bytes = b"") -> bytes:
    """A key that only the holders of two private keys can make.

    Args:
        private: One's own.
        public: The other's.
        purpose: Another purpose, another key.
        secret: Something else that both must know, or nothing.

    Raises:
        ValueError: The public key is none.
    """
    shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    return derive(shared, purpose, secret)


def derive(key: bytes, purpose: bytes, secret: bytes = b"") -> bytes:
    """A key of one purpose out of another key, :data:`KEY_BYTES` bytes."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=secret or None, info=purpose).derive(key)


def seal(key: bytes, text: bytes, about: bytes) -> bytes:
    """Encrypt, so that only who has the key can read it, and only together with ``about``, which is not in it."""
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, text, about)


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """The inverse of :func:`seal`.

    Raises:
        ValueError: It was sealed with another key or about something else, or was changed on its way.
    """
    try:
        return AESGCM(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], about)
    except InvalidTag as error:
        raise ValueError("this was sealed with another key") from error


def add_mask(key: bytes, sign: int, *parts: Words) -> None:
    """Add the mask of a key to words, in place, or subtract it.

    Args:
        key: For this mask alone.
        sign: 1 or -1.
        parts: One after the other they get the whole mask; contiguous.
    """
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    for part in parts:
        step = _PIECE_BYTES // part.itemsize
        for begin in range(0, part.size, step):
            piece = part[begin : begin + step]
            mask = np.frombuffer(stream.update(_ZEROS[: piece.nbytes]), piece.dtype)
            if sign > 0:
                piece += mask
            else:
                piece -= mask
