"""The copy of the index in Redis: datasketch finds the same in it, whole or not at all, and no pickle is in it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from histories import array_model, make_step, start_history
from tampered.calls import takedown
from workspaces import draw_text

from pipeline.errors import Interrupted, UsageError
from pipeline.index import DedupeIndex
from pipeline.segments import sign_texts
from pipeline.sharing import WARNING, share_index
from pipeline.shingles import shingle, to_lean

WORKS = {name: draw_text(name, 250) for name in ("TD-1", "TD-2", "Ünï 3")}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Redis of our own."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--requirepass", "secret"]
    child = subprocess.Popen(command, cwd=tmp_path_factory.mktemp("redis"), stdout=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"redis://:secret@127.0.0.1:{port}/2"
    finally:
        child.kill()
        child.wait()


@pytest.fixture
def client(server: str) -> Iterator[Any]:
    redis = pytest.importorskip("redis")
    with redis.Redis.from_url(server) as connected:
        connected.flushall()
        yield connected
        connected.config_set("maxmemory", 0)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[DedupeIndex]:
    with DedupeIndex.open(tmp_path / "index") as opened:
        opened.add_many(WORKS.items())
        yield opened


def found_by_datasketch(client: Any, index: DedupeIndex, text: str, name: str = "takedown") -> set[str]:
    """What another program finds that has only the entry."""
    from datasketch import MinHashLSH

    entry = json.loads(client.get(name))
    parameters = entry["parameters"]
    options = {
        k: v for k, v in client.connection_pool.connection_kwargs.items() if k in ("host", "port", "db", "password")
    }
    lsh = MinHashLSH(
        num_perm=parameters["num_perm"],
        params=(parameters["bands"], parameters["rows"]),
        storage_config={"type": "redis", "basename": entry["basename"].encode(), "redis": options},
        prepickle=False,
    )
    windows = sign_texts([shingle(text, index.parameters)], index.parameters)
    return {json.loads(key)[0] for sketch in to_lean(windows.of(0), index.parameters) for key in lsh.query(sketch)}


def test_datasketch_finds_in_it_what_the_index_finds(server: str, client: Any, index: DedupeIndex) -> None:
    made = share_index(index, server, "takedown")
    assert made.takedowns == 3 and made.windows == sum(len(index.signatures(name)) for name in WORKS)
    for text in (
        *WORKS.values(),
        " ".join(WORKS["TD-1"].split()[60:] + WORKS["TD-2"].split()[:90]),
        draw_text("x", 99),
    ):
        expected = set(index.candidates(shingle(text, index.parameters)))
        assert found_by_datasketch(client, index, text) == expected
    assert found_by_datasketch(client, index, WORKS["Ünï 3"]) == {"Ünï 3"}


def test_nothing_in_it_is_a_pickle_or_a_text(server: str, client: Any, index: DedupeIndex) -> None:
    share_index(index, server, "takedown")
    words = {word.encode() for text in WORKS.values() for word in text.split() if len(word) > 3}
    kept = list(client.scan_iter())
    for key in kept:
        kind = client.type(key)
        read = {b"hash": client.hgetall, b"set": client.smembers, b"string": client.get}
        value = read[kind](key) if kind in read else client.lrange(key, 0, -1)
        parts = [key, *(value.values() if isinstance(value, dict) else [value] if kind == b"string" else value)]
        assert not any(part.startswith(b"\x80") and part.endswith(b".") for part in parts), "the form of a pickle"
        assert not any(word in part for part in parts for word in words)
    assert len(kept) > 100


def test_a_new_copy_takes_the_place_of_the_one_before(server: str, client: Any, index: DedupeIndex) -> None:
    client.set("takedown:mine", "rest of a copy that was never finished")
    client.set("other", "not ours")
    first = share_index(index, server, "takedown")
    count = client.dbsize()
    index.add("TD-4", draw_text("TD-4", 250))
    assert index.remove("TD-1")
    second = share_index(index, server, "takedown")
    assert second.basename != first.basename
    assert found_by_datasketch(client, index, WORKS["TD-1"]) == set()
    assert found_by_datasketch(client, index, draw_text("TD-4", 250)) == {"TD-4"}
    assert abs(client.dbsize() - count) < 0.1 * count and client.get("other") == b"not ours"
    assert not client.exists("takedown:mine")
    share_index(index, server, "takedown2")
    assert found_by_datasketch(client, index, draw_text("TD-4", 250)) == {"TD-4"}, "another name is another copy"


def test_a_copy_that_fails_leaves_the_one_before(server: str, client: Any, index: DedupeIndex) -> None:
    share_index(index, server, "takedown")
    before = client.dbsize()
    index.add_many((f"N-{n}", draw_text(n, 300)) for n in range(40))
    client.config_set("maxmemory", 1)  # every write fails; when a limit above what is used is met depends on buffers
    with pytest.raises(Interrupted, match="copy before is still in use") as caught:
        share_index(index, server, "takedown")
    assert "secret" not in str(caught.value)
    assert found_by_datasketch(client, index, WORKS["TD-2"]) == {"TD-2"}
    client.config_set("maxmemory", 0)
    assert share_index(index, server, "takedown").takedowns == 43
    expected = set(index.candidates(shingle(draw_text(7, 300), index.parameters)))
    assert "N-7" in expected and found_by_datasketch(client, index, draw_text(7, 300)) == expected
    assert client.dbsize() > before


@pytest.mark.parametrize(
    "url", ["", "http://127.0.0.1", "redis://", "redis://:secret@h:port", "unix:///tmp/x", "redis://:secret@h?secret=1"]
)
def test_an_address_that_is_none_is_wrong_use(index: DedupeIndex, url: str) -> None:
    with pytest.raises(UsageError, match="address of Redis"):
        share_index(index, url, "takedown")


def test_a_mistake_of_the_program_is_not_told_as_one_of_the_address(
    index: DedupeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DedupeIndex, "ids", mock.Mock(side_effect=TypeError("of the program")))
    with pytest.raises(TypeError, match="of the program"):
        share_index(index, "redis://127.0.0.1:1", "takedown")


def test_a_server_that_is_asked_at_once_and_does_not_answer_is_told_as_such(index: DedupeIndex) -> None:
    with pytest.raises(Interrupted, match="ConnectionError"):
        share_index(index, "redis://127.0.0.1:1?single_connection_client=1", "takedown")


def test_a_name_that_would_match_others_is_wrong_use(index: DedupeIndex) -> None:
    for name in ("", "*", "a:b", "a[b]", "a\n"):
        with pytest.raises(UsageError, match="no name for a copy"):
            share_index(index, "redis://127.0.0.1", name)


def test_without_the_client_it_says_what_to_install(index: DedupeIndex) -> None:
    with mock.patch.dict(sys.modules, {"redis": None}), pytest.raises(UsageError, match=r"takedown-pipeline\[redis\]"):
        share_index(index, "redis://127.0.0.1", "takedown")


def test_the_verb_asks_for_trust_and_warns(server: str, client: Any, tmp_path: Path) -> None:
    workspace = start_history(tmp_path / "ws", array_model(tmp_path / "model"))
    make_step(workspace, "TD-1")
    call = ("-w", str(workspace.root), "share-index", "--redis")
    refused = takedown(*call, server, folder=tmp_path)
    assert refused.code == 2 and "prepickle=False" in refused.err and client.dbsize() == 0
    done = takedown(*call, server, "--trusted", "--json", folder=tmp_path)
    assert done.code == 0 and WARNING in done.err and json.loads(done.out)["takedowns"] == 1
    nobody = takedown(*call, "redis://:secret@127.0.0.1:1/0", "--trusted", folder=tmp_path)
    assert nobody.code == 3 and "Redis at 127.0.0.1: failed (ConnectionError)" in nobody.err
    assert "secret" not in refused.text + done.text + nobody.text
