"""The index for others: a copy of its signatures in Redis, as datasketch's own `MinHashLSH` keeps them there.

In: the index and the address of a Redis. Out: keys in it. Never: a value that is read back from there, a text, or a
pickle: keys are JSON and are kept with ``prepickle=False``, since datasketch otherwise runs what it finds.

Every copy has keys of its own. When all are there, the entry of the copy's name points to them, and the copies before
are removed: whoever begins at the entry finds all of one state of the index. It is JSON: ``basename``, for datasketch's
``storage_config``; ``parameters``, with which a query must be signed; and the number of ``takedowns``.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from pipeline.errors import Interrupted, UsageError
from pipeline.files import canonical_json
from pipeline.index import DedupeIndex
from pipeline.records import Record
from pipeline.shingles import to_lean

if TYPE_CHECKING:
    from redis import Redis

WARNING: Final = (
    "Whoever can write to this Redis decides what is found in it, and datasketch's default runs code that is planted "
    "there: open it with prepickle=False. takedown itself never reads it."
)
_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")
_REMOVED_AT_ONCE = 1000


class SharedIndex(Record):
    """A copy of the index in Redis.

    Attributes:
        name: Entry that points to it.
        basename: What its keys begin with.
        takedowns: How many takedowns it holds.
        windows: How many signatures.
    """

    name: str
    basename: str
    takedowns: int
    windows: int


def share_index(index: DedupeIndex, url: str, name: str) -> SharedIndex:
    """Copy the index into Redis in the place of an earlier copy of this name.

    Args:
        index: The index.
        url: ``redis://[[user]:password@]host[:port][/db]``, or ``rediss://`` with TLS.
        name: Entry that will point to the copy.

    Raises:
        UsageError: The address or name is none, or the client library is missing.
        Interrupted: Redis cannot be reached, or failed; the copy before is still there.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r}: is no name for a copy. Use letters, digits, dots, dashes and underscores.")
    with _client(url) as (client, options):
        from datasketch import MinHashLSH

        parameters, names, windows = index.parameters, index.ids(), 0
        basename = f"{name}:{secrets.token_hex(8)}"
        storage = {"type": "redis", "basename": basename.encode(), "redis": options}
        bands = (parameters.bands, parameters.rows)
        lsh = MinHashLSH(num_perm=parameters.num_perm, params=bands, storage_config=storage, prepickle=False)
        with lsh.insertion_session() as session:
            for request_id in names:
                for number, sketch in enumerate(to_lean(index.signatures(request_id), parameters)):
                    session.insert(canonical_json([request_id, number]), sketch, check_duplication=False)
                    windows += 1
        pointer = {"basename": basename, "parameters": parameters.model_dump(), "takedowns": len(names)}
        client.set(name, canonical_json(pointer))
        _remove_others(client, name, basename)
    return SharedIndex(name=name, basename=basename, takedowns=len(names), windows=windows)


@contextmanager
def _client(url: str) -> Iterator[tuple[Redis, dict[str, Any]]]:
    """A client, and its options as datasketch takes them; errors name the host, never the password."""
    try:
        from redis import Redis, RedisError
        from redis.connection import parse_url
    except ImportError as error:
        raise UsageError("Redis needs its client: pip install 'takedown-pipeline[redis]'") from error
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("redis", "rediss") or not parts.hostname:
            raise ValueError
        options: dict[str, Any] = {**parse_url(url), "ssl": parts.scheme == "rediss"}  # type: ignore[no-untyped-call]
    except ValueError:
        raise UsageError("The address of Redis is none. Give redis://HOST:PORT/DB, or rediss:// for TLS.") from None
    options.pop("connection_class", None)
    try:
        try:
            made = Redis(**options)  # with some options it connects here already
        except TypeError as error:  # an option behind the question mark that there is not
            raise UsageError(f"The address of Redis has an option that its client does not know ({error}).") from error
        with made as client:
            yield client, options
    except RedisError as error:
        raise Interrupted(
            f"Redis at {parts.hostname}: failed ({type(error).__name__}). The copy before is still in use; run the "
            "same command again when it answers and has memory."
        ) from error


def _remove_others(client: Redis, name: str, basename: str) -> None:
    """Delete the keys of earlier copies, finished or not."""
    some: list[bytes] = []
    for key in client.scan_iter(match=f"{name}:*", count=_REMOVED_AT_ONCE):
        if not key.startswith(basename.encode()):
            some.append(key)
        if len(some) >= _REMOVED_AT_ONCE:
            client.delete(*some)
            some.clear()
    if some:
        client.delete(*some)
