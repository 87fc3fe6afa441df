"""Unpacking gzip and Zstandard streams in bounded memory.

In: an open file and how it is packed. Out: a reader of what is inside. Never: a frame that is cut short without a word,
or more memory than was planned for, whatever the file says.
"""

from __future__ import annotations

import gzip
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Final, Protocol

import zstandard

READ_BYTES: Final = 1 << 20
"""Bytes read at once."""
MOST_UNPACKED: Final = 64
"""A packed Parquet file, which has to be unpacked whole, may be this many times as large unpacked: it is compressed
inside already."""
_ZSTANDARD_STEP_BYTES = 1 << 10
"""Compressed bytes decoded at once: a block of 4 bytes may stand for 128 KiB, so this makes at most 32 MiB."""
_ZSTANDARD_WINDOW_BYTES = 1 << 27
"""Most memory that a Zstandard frame may ask for; what `zstd -d` grants."""


class _Reader(Protocol):
    """Anything that gives up to so many bytes, and none at its end."""

    def read(self, size: int, /) -> bytes: ...


class _Told:
    """A stored file that tells how far it was read."""

    def __init__(self, stored: BinaryIO, tell: Callable[[int], None]) -> None:
        self._stored, self._tell = stored, tell

    def read(self, size: int = -1) -> bytes:
        data = self._stored.read(size)
        self._tell(self._stored.tell())
        return data


class _Zstandard:
    """Unpacks Zstandard frames in bounded memory; unlike the library's own reader it notices a frame cut short."""

    def __init__(self, stored: _Reader) -> None:
        self._stored = stored
        self._decoder = zstandard.ZstdDecompressor(max_window_size=_ZSTANDARD_WINDOW_BYTES)
        self._frame = self._decoder.decompressobj()
        self._packed, self._inside = b"", False

    def read1(self, size: int) -> bytes:
        """The next bytes, however many a step gives; none at the end.

        Raises:
            EOFError: The last frame is not whole.
            zstandard.ZstdError: This is no frame, or one that asks for too much memory.
        """
        while packed := self._packed or self._stored.read(_ZSTANDARD_STEP_BYTES):
            data = self._frame.decompress(packed)
            self._packed, self._inside = b"", not self._frame.eof
            if self._frame.eof:
                self._packed = self._frame.unused_data
                self._frame = self._decoder.decompressobj()
            if data:
                return data
        if self._inside:
            raise EOFError("ends inside a Zstandard frame")
        return b""


class _Gathered:
    """Reads in blocks from what gives any number of bytes; an error comes after what could be read in front of it."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._ready = bytearray()
        self._error: Exception | None = None

    def read(self, size: int) -> bytes:
        while len(self._ready) < size and self._error is None:
            try:
                data = self._source.read1(size)
            except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
                self._error = error
                break
            if not data:
                break
            self._ready += data
        if self._error is not None and not self._ready:
            raise self._error
        data = bytes(self._ready[:size])
        del self._ready[:size]
        return data


@contextmanager
def unpacked(stored: BinaryIO, packing: str, seekable: bool, tell: Callable[[int], None]) -> Iterator[Any]:
    """A reader of the unpacked bytes."""
    told = _Told(stored, tell)
    if not packing:
        yield stored if seekable else told
        return
    packed = _Zstandard(told) if packing == ".zst" else gzip.GzipFile(fileobj=told, mode="rb")  # type: ignore[call-overload]
    reader = _Gathered(packed)
    if not seekable:
        yield reader
        return
    with tempfile.TemporaryFile() as whole:
        most = MOST_UNPACKED * max(os.fstat(stored.fileno()).st_size, READ_BYTES)
        while block := reader.read(READ_BYTES):
            if whole.tell() + len(block) > most:
                raise ValueError(f"unpacks to more than {most:,} bytes, which no file of its size should")
            whole.write(block)
        whole.seek(0)
        yield whole
