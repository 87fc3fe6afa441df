"""Authenticated encryption of small contents: AES-256-GCM (NIST SP 800-38D) under a key and a label.

In: bytes. Out: bytes. Never: a file, a key that is kept, a nonce that is chosen by the caller.
"""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16


def new_key() -> bytes:
    """A random key of 256 bits."""
    return os.urandom(KEY_BYTES)


def seal(key: bytes, data: bytes, label: bytes) -> bytes:
    """Encrypt and authenticate.

    Args:
        key: 32 bytes.
        data: What to keep secret.
        label: What it is of; not kept, and `unseal` needs the same.

    Returns:
        Nonce (12 bytes, random), ciphertext, tag (16 bytes). Random nonces may not be drawn more than 2³² times under
        one key; a key of a request is used once, a master key once for each request and rotation.
    """
    nonce = os.urandom(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, data, label)


def unseal(key: bytes, sealed: bytes, label: bytes) -> bytes | None:
    """The inverse of `seal`; None where key, label or any bit is another one."""
    if len(sealed) < NONCE_BYTES + TAG_BYTES:
        return None
    try:
        return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], label)
    except InvalidTag:
        return None
