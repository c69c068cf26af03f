"""Damage to files that every format can suffer: flips, cuts, doublings, strange bytes."""

from __future__ import annotations

import random

STRANGE = (
    b"", b"\0", b"\xff" * 8, b"{}", b"PK\x05\x06" + b"\0" * 18, b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"%PDF-1.4\n%%EOF\n", "Ω\u202e\0".encode(),
)  # fmt: skip


def damaged(data: bytes, rng: random.Random, head: int = 0) -> tuple[bytes, str]:
    """`data` with one fault, and its name; half of the flips lie in the first `head` bytes, where formats are read."""
    kinds = {"flip": 6, "bits": 2, "cut": 2, "double": 1, "insert": 1, "delete": 1, "zero": 1, "swap": 1, "strange": 1}
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    return globals()[f"_{kind}"](data, rng, head), kind


def _place(data: bytes, rng: random.Random, head: int) -> int:
    near = head and rng.random() < 0.5
    return rng.randrange(max(1, min(head, len(data)) if near else len(data)))


def _flip(data: bytes, rng: random.Random, head: int) -> bytes:
    """One bit."""
    at = _place(data, rng, head)
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _bits(data: bytes, rng: random.Random, head: int) -> bytes:
    """Several bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(2, 20)):
        changed[_place(data, rng, head)] = rng.randrange(256)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random, head: int) -> bytes:
    return data[: _place(data, rng, head)]


def _double(data: bytes, rng: random.Random, head: int) -> bytes:
    at = _place(data, rng, head)
    return data[:at] + data[at : at + rng.randint(1, 4096)] + data[at:]


def _insert(data: bytes, rng: random.Random, head: int) -> bytes:
    at = _place(data, rng, head)
    return data[:at] + rng.randbytes(rng.randint(1, 64)) + data[at:]


def _delete(data: bytes, rng: random.Random, head: int) -> bytes:
    at = _place(data, rng, head)
    return data[:at] + data[at + rng.randint(1, 512) :]


def _zero(data: bytes, rng: random.Random, head: int) -> bytes:
    at, size = _place(data, rng, head), rng.choice((4, 512, 4096))
    return data[:at] + bytes(min(size, len(data) - at)) + data[at + size :]


def _swap(data: bytes, rng: random.Random, _head: int) -> bytes:
    """Two halves of a stretch change places."""
    at, size = rng.randrange(max(1, len(data))), rng.choice((2, 8, 512))
    return data[:at] + data[at + size : at + 2 * size] + data[at : at + size] + data[at + 2 * size :]


def _strange(data: bytes, rng: random.Random, _head: int) -> bytes:
    """Another file's content, alone or before this one's."""
    return rng.choice(STRANGE) + rng.choice((b"", data))
