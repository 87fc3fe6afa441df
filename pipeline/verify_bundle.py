"""Check a takedown certificate without the software that made it.

In: the folder of a certificate. Out: one line per check, and exit status 0 (all hold), 1 (one does not) or 2 (wrong
use, or a file cannot be read). Never: a network, a write, trust in a size, a number or a name that the folder gives.

This one file needs Python 3.11 and the package ``cryptography``, nothing else, so that whoever receives a certificate
can read what the checks do before relying on them. It follows public documents: RFC 6962 (Merkle trees), C2SP
signed-note and tlog-checkpoint (the log's signature), DSSE and OpenSSF Model Signing 1.0 (the model's signature),
safetensors (``--model``).

    python verify_bundle.py DIR --log-key KEY_THAT_YOU_GOT_ANOTHER_WAY --model DIR_OF_WEIGHTS
"""

from __future__ import annotations

import argparse
import base64
import binascii
import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

FORMAT = "takedown-certificate-1"
GENESIS = "genesis:takedown-pipeline-ledger-1"
"""What the first entry of a log names as its predecessor."""

FILES = {
    "certificate.json": 1 << 24,
    "checkpoint": 1 << 20,
    "log.pub": 10_000,
    "model.pub": 10_000,
    "model.sig": 1 << 24,
}
"""Files of a bundle that are checked, each with the most bytes that are read: far above what is ever written."""
MAX_HEADER_BYTES = 100_000_000
"""Most bytes of a safetensors header, the limit of its reference reader."""
MAX_PROOF = 63
"""A Merkle tree is not deeper: sizes stay below 2^63."""

MAX_NUMBER = 1e15
"""No measurement or count comes near; a JSON integer may have more digits than a float can hold."""

CHUNK_BYTES = 1 << 20
ROUNDING = 1e-9
"""Slack for sums of float64, as the gate has it: a limit met exactly is met."""

ANSWERS = ("repeat", "folded", "empty", "not-memorised")
"""Answers that needed no new version."""
TAKEN_OUT_NOW = ("this", "folded", "repeat")
"""Roles of a text that a version is the first to exclude."""

UNSIGNED = (".git", ".gitattributes", ".github", ".gitignore", "model.sig")
"""Names that a model signature leaves out (OpenSSF Model Signing 1.0, section 6.2)."""
PAYLOAD_TYPE = "application/vnd.in-toto+json"

_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")
_HEX = re.compile(r"[0-9a-f]{64}")
_ROOT = re.compile(r"root-sha256:[0-9a-f]{64}")
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,18}")
_KEY_ID = re.compile(r"[0-9a-f]{8}")


class Refused(Exception):
    """A check failed; the message says which and what it means."""


class Unreadable(Exception):
    """A file cannot be read, so that nothing can be said."""


class Line(NamedTuple):
    """One line of the result: ``ok``, ``FAILED``, or ``note`` for what no check can show."""

    verdict: str
    text: str


class Entry(NamedTuple):
    """One entry of the log, as its leaf says."""

    seq: int
    at: str
    kind: str
    actor: str
    request_id: str | None
    version: int | None
    run_id: str | None
    data: dict[str, Any]
    previous: str
    digest: str


class Check(NamedTuple):
    """A measured text and its way up to the root over everything that was measured in that run."""

    comparison: dict[str, Any]
    place: int
    size: int
    proof: tuple[bytes, ...]


class Since(NamedTuple):
    """An older checkpoint of the log, and the proof that the log was only added to since.

    Attributes:
        note: The older checkpoint.
        size: How many entries it signs.
        proof: Merkle consistency proof.
    """

    note: bytes
    size: int
    proof: tuple[bytes, ...]


class LogKey(NamedTuple):
    """A parsed verifier key."""

    line: str
    name: str
    key_id: bytes
    public_key: Ed25519PublicKey


class Checkpoint(NamedTuple):
    """What a checkpoint signs: how many entries the log has, and the root over them."""

    size: int
    root: bytes


# --- reading ----------------------------------------------------------------------------------------------


def read_bounded(path: Path, limit: int) -> bytes:
    """Read a regular file of at most ``limit`` bytes.

    Raises:
        Unreadable: It is missing, no regular file, or longer.
    """
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(fd, "rb") as stream:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise Unreadable(f"{path}: is not a regular file.")
            data = stream.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise Unreadable(f"{path}: cannot be read ({error}).") from error
    if len(data) > limit:
        raise Unreadable(f"{path}: has more than {limit} bytes, too many for this file.")
    return data


def canonical(value: Any) -> bytes:
    """The one JSON text that digests are taken of: sorted keys, ASCII, no spaces."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a key occurs twice")
    return tree


def parse(where: str, data: bytes, is_canonical: bool = True) -> dict[str, Any]:
    """Read a JSON object with unique keys; it must be in canonical form unless said otherwise."""
    try:
        tree = json.loads(data.decode(), object_pairs_hook=_unique)
        sound = isinstance(tree, dict) and (not is_canonical or canonical(tree) == data)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{where}: is not JSON ({error}): it was changed.") from error
    if not sound:
        raise Refused(f"{where}: is not in the one form that is written: it was changed.")
    return dict(tree)


def fields(where: str, tree: Any, kinds: Mapping[str, type | tuple[type, ...]]) -> Any:
    """A JSON object that must have exactly these fields, of these types; ``bool`` is no number here."""
    if not isinstance(tree, dict) or tree.keys() != kinds.keys():
        raise Refused(f"{where}: needs exactly the fields {', '.join(kinds)}: it was changed.")
    for name, kind in kinds.items():
        if not isinstance(tree[name], kind) or (isinstance(tree[name], bool) and kind is not bool):
            raise Refused(f"{where}: {name} is of the wrong kind: it was changed.")
    return tree


def unbase64(where: str, text: Any) -> bytes:
    """Decode canonical base64."""
    try:
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise Refused(f"{where}: is not base64: it was changed.") from error
    if base64.b64encode(data).decode() != text:
        raise Refused(f"{where}: is not canonical base64: it was changed.")
    return data


def unproof(where: str, texts: Any) -> tuple[bytes, ...]:
    """Decode the hashes of a proof."""
    if not isinstance(texts, list) or len(texts) > MAX_PROOF:
        raise Refused(f"{where}: is no list of at most {MAX_PROOF} hashes: it was changed.")
    proof = tuple(unbase64(where, text) for text in texts)
    if any(len(node) != 32 for node in proof):
        raise Refused(f"{where}: holds something that is no hash: it was changed.")
    return proof


def number(where: str, value: Any) -> float:
    """A number of sensible size."""
    if not isinstance(value, bool) and isinstance(value, int | float) and -MAX_NUMBER < value < MAX_NUMBER:
        return value
    raise Refused(f"{where}: is not a number.")


def shown(value: Any) -> str:
    """Any value on one printable line."""
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:200]) + ("..." if len(text) > 200 else "")


# --- Merkle trees (RFC 6962) ------------------------------------------------------------------------------


def sha256(data: bytes) -> bytes:
    """SHA-256, 32 bytes."""
    return hashlib.sha256(data).digest()


def leaf_hash(leaf: bytes) -> bytes:
    """Hash of a leaf."""
    return sha256(b"\x00" + leaf)


def root_from(node: bytes, index: int, size: int, proof: Sequence[bytes]) -> bytes | None:
    """The root that a leaf hash and its proof lead to (RFC 9162, section 2.1.3.2); None where they fit no such tree."""
    last = size - 1
    if not 0 <= index <= last:
        return None
    for sibling in proof:
        if last == 0:
            return None
        if index % 2 or index == last:
            node = sha256(b"\x01" + sibling + node)
            while index and not index % 2:
                index, last = index // 2, last // 2
        else:
            node = sha256(b"\x01" + node + sibling)
        index, last = index // 2, last // 2
    return node if last == 0 else None


def continues(old: Checkpoint, new: Checkpoint, proof: Sequence[bytes]) -> bool:
    """Whether a log is an older one with entries added at its end (RFC 9162, section 2.1.4.2)."""
    if old.size == new.size:
        return old.root == new.root and not proof
    if not 0 < old.size < new.size:
        return False
    index, last = old.size - 1, new.size - 1
    while index % 2:  # the proof begins at the last full subtree of the older log
        index, last = index // 2, last // 2
    path = [old.root, *proof] if index == 0 else list(proof)
    if not path:
        return False
    before = after = path[0]
    for sibling in path[1:]:
        if last == 0:
            return False
        if index % 2 or index == last:
            before, after = sha256(b"\x01" + sibling + before), sha256(b"\x01" + sibling + after)
            while index and not index % 2:
                index, last = index // 2, last // 2
        else:
            after = sha256(b"\x01" + after + sibling)
        index, last = index // 2, last // 2
    return last == 0 and before == old.root and after == new.root


def merkle_root(leaves: Iterable[bytes]) -> bytes:
    """Root over leaves."""
    level = [leaf_hash(leaf) for leaf in leaves]
    if not level:
        return sha256(b"")
    # Pairing neighbours and carrying an odd last one up gives the same tree as splitting at powers of two.
    while len(level) > 1:
        paired = [sha256(b"\x01" + level[i] + level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = paired + level[len(paired) * 2 :]
    return level[0]


# --- the log's key and checkpoints (C2SP) -----------------------------------------------------------------


def parse_log_key(where: str, text: str) -> LogKey:
    """Read a verifier key: name+id+key."""
    line = text.removesuffix("\n")
    name, *parts = line.split("+", 2)
    if len(parts) != 2 or not name or any(c.isspace() or c < " " for c in name) or not _KEY_ID.fullmatch(parts[0]):
        raise Refused(f"{where}: is not a log key, name+id+key on one line.")
    data = unbase64(where, parts[1])
    if len(data) != 33 or data[0] != 1:
        raise Refused(f"{where}: is not an Ed25519 key.")
    key_id = sha256(name.encode() + b"\n" + data)[:4]
    if key_id.hex() != parts[0]:
        raise Refused(f"{where}: its id does not belong to its name and key: it was changed.")
    try:
        return LogKey(line, name, key_id, Ed25519PublicKey.from_public_bytes(data[1:]))
    except ValueError as error:
        raise Refused(f"{where}: is not an Ed25519 key.") from error


def read_checkpoint(where: str, note: bytes, key: LogKey) -> Checkpoint:
    """Check the signature of a checkpoint and read it."""
    try:
        text, found, tail = note.decode().rpartition("\n\n")
    except UnicodeDecodeError as error:
        raise Refused(f"{where}: is not text: it was changed.") from error
    lines = tail.split("\n")
    if not found or lines.pop() != "" or len(lines) > 100:
        raise Refused(f"{where}: is not a signed note: it was changed.")
    signed = False
    for line in lines:
        dash, _, rest = line.partition(" ")
        name, _, encoded = rest.partition(" ")
        data = unbase64(where, encoded)
        if dash != "—" or not name or len(data) < 5:
            raise Refused(f"{where}: has a line that is no signature: it was changed.")
        if (name, data[:4]) == (key.name, key.key_id):
            try:
                key.public_key.verify(data[4:], (text + "\n").encode())
            except InvalidSignature as error:
                raise Refused(f"{where}: its signature does not hold: the checkpoint was changed.") from error
            signed = True
    if not signed:
        raise Refused(f"{where}: is not signed by the key {shown(key.line)}: it belongs to another log, or is forged.")
    body = text.split("\n")
    if len(body) != 3 or body[0] != key.name or not _DECIMAL.fullmatch(body[1]) or int(body[1]) >= 1 << 63:
        raise Refused(f"{where}: signs something else than a checkpoint of this log.")
    root = unbase64(where, body[2])
    if len(root) != 32:
        raise Refused(f"{where}: signs something else than a checkpoint of this log.")
    return Checkpoint(int(body[1]), root)


# --- the document -----------------------------------------------------------------------------------------


def read_entry(where: str, leaf: str) -> Entry:
    """Read a leaf of the log."""
    data = leaf.encode("utf-8", "surrogatepass")
    tree = fields(where, parse(where, data), {"at": str, "event": dict, "previous": str, "seq": int})
    event = fields(
        f"{where}: event",
        tree["event"],
        {
            "actor": str, "data": dict, "kind": str, "request_id": (str, type(None)), "run_id": (str, type(None)),
            "version": (int, type(None)),
        },
    )  # fmt: skip
    if not _TIME.fullmatch(tree["at"]):
        raise Refused(f"{where}: has no time in the form that is written.")
    return Entry(
        tree["seq"], tree["at"], event["kind"], event["actor"], event["request_id"], event["version"], event["run_id"],
        event["data"], tree["previous"], f"sha256:{sha256(data).hex()}",
    )  # fmt: skip


class Document:
    """A certificate as it is read: what it says, and the entries and proofs that it rests on.

    Attributes:
        tree: The whole document.
        log: Its part with the log's checkpoint, key and entries.
        entries: The log's entries by number.
        proofs: The inclusion proof of each.
        checks: Measurements by version.
        since: An older checkpoint that the log continues; None where the certificate compares with none.
    """

    def __init__(self, data: bytes) -> None:
        where = "certificate.json"
        if not data.endswith(b"\n"):
            raise Refused(f"{where}: is not in the one form that is written: it was changed.")
        self.tree = parse(where, data[:-1])
        if self.tree.get("format") != FORMAT:
            raise Refused(f"{where}: has the format {shown(self.tree.get('format'))}, this file checks {FORMAT}.")
        self.entries: dict[int, Entry] = {}
        self.proofs: dict[int, tuple[bytes, ...]] = {}
        self.checks: dict[int, Check] = {}
        log = self.tree.get("log")
        kinds: dict[str, type | tuple[type, ...]] = {"checkpoint": str, "entries": list, "vkey": str}
        if isinstance(log, dict) and "since" in log:
            kinds["since"] = dict
        self.log = fields(f"{where}: log", log, kinds)
        self.since = _since(f"{where}: log.since", self.log["since"]) if "since" in kinds else None
        for place, item in enumerate(self.log["entries"]):
            here = f"{where}: log.entries[{place}]"
            fields(here, item, {"leaf": str, "proof": list})
            entry = read_entry(here, item["leaf"])
            if entry.seq <= max(self.entries, default=0):
                raise Refused(f"{here}: is not in the order of the log.")
            self.entries[entry.seq], self.proofs[entry.seq] = entry, unproof(here, item["proof"])
        checks = self.tree.get("checks")
        if not isinstance(checks, list):
            raise Refused(f"{where}: has no list of checks: it was changed.")
        for place, item in enumerate(checks):
            here = f"{where}: checks[{place}]"
            fields(here, item, {"comparison": dict, "index": int, "proof": list, "size": int, "version": int})
            if item["version"] <= max(self.checks, default=-1):
                raise Refused(f"{here}: is not in the order of the versions.")
            self.checks[item["version"]] = Check(
                item["comparison"], item["index"], item["size"], unproof(here, item["proof"])
            )

    def find(self, kind: str, **wanted: object) -> Entry:
        """The one entry of this kind with these fields."""
        found = [
            e for e in self.entries.values() if e.kind == kind and all(getattr(e, k) == v for k, v in wanted.items())
        ]
        if len(found) != 1:
            about = ", ".join(f"{k} {shown(v)}" for k, v in wanted.items())
            raise Refused(
                f"log: the certificate has {len(found)} entries {kind!r} with {about or 'any content'}, it rests on "
                "exactly one: an entry was left out or exchanged."
            )
        return found[0]


def _since(where: str, tree: Any) -> Since:
    fields(where, tree, {"checkpoint": str, "proof": list, "size": int})
    number(where, tree["size"])
    return Since(tree["checkpoint"].encode("utf-8", "surrogatepass"), tree["size"], unproof(where, tree["proof"]))


# --- what follows from the entries ------------------------------------------------------------------------


class Story(NamedTuple):
    """The entries that a certificate rests on, by the part that each plays.

    Attributes:
        start: Names the lineage, its keys and v0.
        received: The request came in.
        planned: The run that answered it was planned, with its limits.
        decision: The answer: ``verified`` where a version excludes the text.
        version: Published the version that the certificate is about.
        later: Published each version made from that one, up to the one in force.
        gates: The gate's acceptance by version, where the certificate has it.
        plans: The plan by version, likewise.
        erased: Says that the text is gone; None where it is not.
        reworked: Say that the step of a later version worked on the text again, by version.
        approval: Somebody approved the version; None where nobody was asked.
    """

    start: Entry
    received: Entry
    planned: Entry
    decision: Entry
    version: Entry
    later: tuple[Entry, ...]
    gates: dict[int, Entry]
    plans: dict[int, Entry]
    erased: Entry | None
    reworked: dict[int, Entry]
    approval: Entry | None

    @property
    def excluded(self) -> bool:
        """Whether a version was made without the text."""
        return self.decision.kind == "verified"


def tell(document: Document) -> Story:
    """Find the part of each entry, and check their order and how they hang together."""
    request_id = document.tree.get("request", {})
    request_id = request_id.get("request_id") if isinstance(request_id, dict) else None
    if not isinstance(request_id, str):
        raise Refused("certificate.json: names no request.")
    start = document.find("initialised")
    if start.seq != 1 or start.previous != GENESIS or start.version != 0:
        raise Refused("log: the entry that starts the lineage is not its first: it was exchanged.")
    received = document.find("received", request_id=request_id)
    kinds = ("verified", *ANSWERS)
    answers = [e for e in document.entries.values() if e.kind in kinds and e.request_id == request_id]
    if len(answers) != 1:
        raise Refused(f"log: the certificate has {len(answers)} answers to request {shown(request_id)}, expected one.")
    decision = answers[0]
    planned = document.find("planned", run_id=decision.run_id)
    published = {e.version: e for e in document.entries.values() if e.kind == "published"}
    version = start if decision.version == 0 else published.get(decision.version)
    if version is None or version.version is None:
        raise Refused("log: the version that the certificate is about was published by none of its entries.")
    path = [version]
    for number_ in sorted(v for v in published if v is not None and v > version.version):
        if published[number_].data.get("parent") != path[-1].version:
            raise Refused(f"log: v{number_} was not made from v{path[-1].version}: a version is left out or exchanged.")
        path.append(published[number_])
    for entry in path:
        if not isinstance(root := entry.data.get("root"), str) or not _ROOT.fullmatch(root):
            raise Refused(f"log: entry {entry.seq} gives v{entry.version} no root.")
    gates, plans = dict[int, Entry](), dict[int, Entry]()
    for entry in path:
        runs = [e for e in document.entries.values() if e.kind == "accepted" and e.run_id == entry.run_id]
        if entry.version is not None and runs:
            gates[entry.version] = document.find("accepted", run_id=entry.run_id)
            plans[entry.version] = document.find("planned", run_id=entry.run_id)
    asked = any(e.kind == "approved" for e in document.entries.values())
    approval = document.find("approved", run_id=version.run_id) if asked else None
    gone = "erased_at" in document.tree
    erased = document.find("erased", request_id=request_id) if gone else None
    reworked = _reworked(document, request_id, path[1:])
    story = Story(
        start, received, planned, decision, version, tuple(path[1:]), gates, plans, erased, reworked, approval
    )  # fmt: skip
    rows = (start, received, planned, decision, *path, *gates.values(), *plans.values(), *reworked.values())
    used = {e.seq for e in (*rows, *(e for e in (erased, approval) if e is not None))}
    if strangers := sorted(document.entries.keys() - used):
        raise Refused(f"log: entry {strangers[0]} has no part in this certificate: it was exchanged or mixed in.")
    _check_order(story, path)
    return story


def _reworked(document: Document, request_id: str, later: Sequence[Entry]) -> dict[int, Entry]:
    """The entries of later steps that worked on the text again, each of the run that published its version."""
    found = dict[int, Entry]()
    for entry in later:
        kind = {"request_id": request_id, "version": entry.version, "run_id": entry.run_id}
        if any(e.kind == "reworked" and e.version == entry.version for e in document.entries.values()):
            found[_number(entry)] = document.find("reworked", **kind)
    return found


def _check_order(story: Story, path: Sequence[Entry]) -> None:
    """What was fixed beforehand must stand before the result, and a result before what rests on it."""
    rows = [(story.received, story.planned, story.decision)]
    if story.erased is not None:
        rows.append((story.planned, story.decision, story.erased))
    if story.excluded:
        rows.append((story.planned, story.version, story.decision))
        if story.version.kind != "published" or story.version.run_id != story.decision.run_id:
            raise Refused("log: the version was published by another run than the one that was measured.")
    if story.approval is not None and _number(story.version) in story.gates:
        rows.append((story.planned, story.approval, story.gates[_number(story.version)]))
        if story.approval.data.get("root") != story.version.data.get("root"):
            raise Refused("log: other weights were approved than the version has.")
    for entry in path:
        number_ = entry.version
        if number_ in story.gates:
            gate, plan = story.gates[number_], story.plans[number_]
            rows.append((plan, gate, entry))
            if gate.data.get("reasons") != []:
                raise Refused(f"log: the gate accepted v{number_} with a limit broken.")
            if not gate.version == plan.version == entry.data.get("parent"):
                raise Refused(f"log: plan, gate and publication of v{number_} name different parents.")
        elif story.excluded:
            raise Refused(f"log: no gate accepted v{number_}: an entry is left out.")
    for row in rows:
        if [e.seq for e in row] != sorted({e.seq for e in row}):
            raise Refused(f"log: {', '.join(e.kind for e in row)} are not in this order: the limits prove nothing.")


def derive(document: Document, story: Story) -> dict[str, Any]:
    """What the certificate must say, from the log alone; the issuer's own words are taken over as they are."""
    said = document.tree
    known = dict.fromkeys(
        ("batch_id", "commitment", "received_at", "recorded_at", "request_id", "rights_holder", "title"), str
    )
    # Earlier releases committed to the text only.
    record = {"record": story.received.data["record"]} if "record" in story.received.data else {}
    words = fields("certificate.json: request", said.get("request"), known | dict.fromkeys(record, str))
    version, decision, data = story.version, story.decision, story.decision.data
    outcome = "excluded" if story.excluded else decision.kind
    expected: dict[str, Any] = {
        "answer": None,
        "checks": said["checks"],
        "current": (story.later[-1] if story.later else version).version,
        "decided_at": decision.at,
        "decided_by": decision.actor,
        "format": FORMAT,
        "gate": None,
        "issued_at": said.get("issued_at"),
        "later": [_later(document, story, entry) for entry in story.later],
        "lineage": story.start.data.get("lineage"),
        "log": said["log"],
        "measured": None,
        "outcome": outcome,
        "passages": said.get("passages"),
        "plan": {
            "code": story.planned.data.get("code"),
            "limits": story.planned.data.get("limits"),
            "planned_at": story.planned.at,
            "planned_by": story.planned.actor,
            "run_id": story.planned.run_id,
            "settings": story.planned.data.get("settings"),
        },
        "request": {
            "batch_id": story.received.data.get("batch_id"),
            "commitment": story.received.data.get("commitment"),
            "received_at": story.received.data.get("received_at"),
            "recorded_at": story.received.at,
            "request_id": story.received.request_id,
            "rights_holder": words["rights_holder"],
            "title": words["title"],
            **record,
        },
        "state": said.get("state"),
        "version": _published(version),
    }
    if story.erased is not None:
        expected["erased_at"] = story.erased.at
    if story.excluded:
        gate = story.gates[_number(version)]
        expected["measured"] = {name: data.get(name) for name in ("after", "before", "level", "limit")}
        expected["gate"] = {
            "accepted_at": gate.at,
            "accepted_by": gate.actor,
            "checks": gate.data.get("checks"),
            "reasons": gate.data.get("reasons"),
            "unchecked": gate.data.get("unchecked"),
        }
        if story.approval is not None:
            expected["gate"] |= {"approved_at": story.approval.at, "approved_by": story.approval.actor}
    else:
        names = ("covered", "exact_memorisation", "memorised", "passages")
        expected["answer"] = {name: data.get(name) for name in names}
    expected["statement"] = statement(expected)
    return expected


def _number(entry: Entry) -> int:
    if entry.version is None:
        raise Refused(f"log: entry {entry.seq} names no version.")
    return entry.version


def _published(entry: Entry) -> dict[str, Any]:
    return {
        "manifest": entry.data.get("manifest"),
        "parent": entry.data.get("parent"),
        "published_at": entry.at,
        "published_by": entry.actor,
        "root": entry.data.get("root"),
        "signature": entry.data.get("signature"),
        "version": entry.version,
    }


def _later(document: Document, story: Story, entry: Entry) -> dict[str, Any]:
    check = document.checks.get(_number(entry))
    return {
        **({"reworked": True} if _number(entry) in story.reworked else {}),
        "measured": check.comparison.get("after") if check else None,
        "published_at": entry.at,
        "published_by": entry.actor,
        "root": entry.data.get("root"),
        "version": entry.version,
    }


def memorisation(where: str, score: Any) -> float:
    """Exact memorisation of a score: the share of tokens that the model predicts, in [0, 1]."""
    return number(where, score.get("exact_memorisation") if isinstance(score, dict) else None)


def statement(certificate: Mapping[str, Any]) -> list[str]:
    """What a certificate says in words, and what it does not; follows from the rest of it.

    Args:
        certificate: The document, or all of it but the statement.
    """
    version, request = certificate["version"]["version"], certificate["request"]["request_id"]
    lineage, outcome = certificate["lineage"], certificate["outcome"]
    share = "exact memorisation, the share of its tokens that the model predicts from the true text before them"
    if outcome == "excluded":
        measured = certificate["measured"]
        before = memorisation("measured.before", measured["before"])
        after = memorisation("measured.after", measured["after"])
        certified = [
            f"Version {version} of {lineage} is the first version that was made to exclude the text of request "
            f"{request}. On the passages of that text which the version before it reproduced, {share}, was "
            f"{before:.3f} before and {after:.3f} in version {version}, at or below the limit of "
            f"{number('measured.limit', measured['limit']):.3f} that follows from limits which were on record before "
            "the run began.",
        ]
        later = [
            f"version {v['version']} {memorisation('later', v['measured']):.3f}"
            + (" (its step worked on the text again)" if v.get("reworked") else "")
            for v in certificate["later"]
        ]  # fmt: skip
        last = "the last one before its text was erased" if "erased_at" in certificate else "the one in force"
        if later:
            certified.append(f"Measured again in every later version up to {last}: {', '.join(later)}.")
        elif "erased_at" in certificate:
            certified.append("No later version was measured before its text was erased.")
        else:
            certified.append(f"Version {version} was in force when this was issued.")
    else:
        found = certificate["answer"]
        why = {
            "repeat": "is covered by earlier takedowns",
            "folded": "is a near-copy of another text of its batch",
            "empty": "has no words left after normalisation",
            "not-memorised": "is not reproduced by the model",
        }[outcome]
        certified = [
            f"The text of request {request} {why}, so no version was made for it. On version {version} of {lineage}, "
            f"{share}, was {number('answer', found['exact_memorisation']):.3f} over the whole text; "
            f"{number('answer', found['memorised']):.0f} of its {number('answer', found['passages']):.0f} passages "
            "counted as memorised.",
            f"Version {certificate['current']}, in force when this was issued, is or was made from version {version}.",
        ]
    if "erased_at" in certificate:
        certified.append(
            f"The text, its contact, title and rights holder were erased at {certificate['erased_at']}. Versions made "
            "since then cannot be measured against the text, and nothing is certified of them."
        )
    since = certificate["log"].get("since")
    if since is not None:
        certified.append(
            "The log was only added to since an earlier checkpoint was signed, over its first "
            f"{number('since', since['size']):.0f} entries: none of them was changed, removed or put in since.",
        )
    return [
        "Certified is a process and a measurement, never absence.",
        *certified,
        "Not certified: that the information is absent from the weights; how the model behaves under other prompts, "
        "sampling or further training; that any of this suffices in law.",
        "The issuer's word alone: title and rights holder, which passages were measured, the state of the request and "
        "the version in force at the time of issue, and every clock. The log proves the entries given here and their "
        "order, not that no other entry concerns this request.",
    ]


def differences(expected: Any, found: Any, path: str = "") -> Iterator[str]:
    """Where two documents differ; compared as JSON, so that true is not 1."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name in sorted(expected.keys() | found.keys()):
            here = f"{path}.{name}" if path else name
            if name not in expected or name not in found:
                yield f"{here} {'does not belong there' if name in found else 'is missing'}"
            else:
                yield from differences(expected[name], found[name], here)
    elif canonical(expected) != canonical(found):
        yield f"{path} says {shown(found)}, the log {shown(expected)}"


def check_words(document: Document) -> None:
    """The form of what rests on the issuer's word alone."""
    issued, passages = document.tree.get("issued_at"), document.tree.get("passages")
    try:
        sound = isinstance(issued, str) and bool(_TIME.fullmatch(issued)) and bool(datetime.fromisoformat(issued))
    except ValueError:
        sound = False
    if not sound:
        raise Refused("certificate.json: issued_at is no time.")
    spans = passages if isinstance(passages, list) else [None]
    for span in spans:
        if not isinstance(span, list) or [type(place) for place in span] != [int] * 3 or span != sorted(span):
            raise Refused("certificate.json: passages are not ranges of tokens.")
    outcome, state = document.tree.get("outcome"), document.tree.get("state")
    if state not in ("verified" if outcome == "excluded" else outcome, "countered"):
        raise Refused(f"certificate.json: the state {shown(state)} is not one of a request that is {shown(outcome)}.")


# --- the checks, one line each ----------------------------------------------------------------------------


def check_chain(document: Document) -> str:
    """Each entry has a digest; where two are neighbours, the later names it."""
    for seq, entry in document.entries.items():
        before = document.entries.get(seq - 1)
        if before is not None and entry.previous != before.digest:
            raise Refused(f"log: entry {seq} does not name entry {seq - 1} as its predecessor: one was exchanged.")
    return f"log: {len(document.entries)} entries are well-formed, and neighbours are chained by digest"


def check_inclusion(document: Document, checkpoint: Checkpoint) -> str:
    """Every entry is in the log that the checkpoint signs."""
    items = document.log["entries"]
    for item, (seq, proof) in zip(items, document.proofs.items(), strict=True):
        if root_from(leaf_hash(item["leaf"].encode()), seq - 1, checkpoint.size, proof) != checkpoint.root:
            raise Refused(f"log: entry {seq} is not in the log that the checkpoint signs: it was changed or invented.")
    return f"log: all {len(items)} entries are in the log of {checkpoint.size} that the checkpoint signs"


def check_since(since: Since, checkpoint: Checkpoint, key: LogKey) -> str:
    """The log that the certificate is from is the one of an older checkpoint, with entries added at its end."""
    old = read_checkpoint("log.since", since.note, key)
    if old.size != since.size:
        raise Refused(f"log.since: signs {old.size} entries, the certificate says {since.size}: it was changed.")
    if not continues(old, checkpoint, since.proof):
        raise Refused(
            f"log.since: the log of {checkpoint.size} entries is not shown to continue the one of {old.size} that was "
            "signed earlier: the history was rewritten, or the proof was changed."
        )
    return f"since: the first {old.size} entries are those signed earlier, {checkpoint.size - old.size} were added"


def check_values(document: Document, story: Story) -> str:
    """Everything that people read follows from the entries."""
    check_words(document)
    found = list(differences(derive(document, story), document.tree))
    if found:
        raise Refused(f"certificate.json: {'; '.join(found[:5])}: the certificate was changed.")
    return "certificate: every value follows from the entries, but for what is on the issuer's word"


def check_limit(document: Document, story: Story) -> str:
    """The limit is the one fixed beforehand, and the measurement is at or below it."""
    data = story.decision.data
    if not story.excluded:
        if data.get("memorised") != 0:
            raise Refused("log: passages were memorised, but no version was made without them.")
        return f"answer: {story.decision.kind}, no passage of the text was memorised by v{story.decision.version}"
    limits, level = story.planned.data.get("limits"), data.get("level")
    tolerance = number("log: the tolerance", limits.get("forget_tolerance") if isinstance(limits, dict) else None)
    mean = number("log: the never-seen level", level.get("mean") if isinstance(level, dict) else None)
    limit = number("log: the limit", data.get("limit"))
    after = memorisation("log: the measurement", data.get("after"))
    if limit != mean + tolerance:
        raise Refused(
            f"limit: {limit} is not the level {mean} and the tolerance {tolerance} that was on record before."
        )
    if after > limit + ROUNDING:
        raise Refused(f"limit: v{story.version.version} was measured at {after:.4f}, above the limit {limit:.4f}.")
    return (
        f"limit: {limit:.4f} was on record before the run (entry {story.planned.seq} before "
        f"{story.gates[_number(story.version)].seq}), v{story.version.version} was measured at {after:.4f}"
    )


def check_measurements(document: Document, story: Story) -> str:
    """Each measurement is among those that the gate of its run decided on, and none is above the limit."""
    path = [story.version, *story.later]
    if story.excluded and list(document.checks) != [entry.version for entry in path]:
        raise Refused("measurements: a version has none, or one too many.")
    for version, check in document.checks.items():
        if version not in story.gates:
            raise Refused(f"measurements: no entry decided on the one of v{version}.")
        root = story.gates[version].data.get("checks")
        found = root_from(leaf_hash(canonical(check.comparison)), check.place, check.size, check.proof)
        if found is None or root != f"root-sha256:{found.hex()}":
            raise Refused(f"measurements: that of v{version} is not among those that its gate decided on.")
        if check.comparison.get("name") != story.received.request_id:
            raise Refused(f"measurements: that of v{version} is about another text.")
        _check_measured(story, version, check.comparison)
    return f"measurements: those of {len(document.checks)} versions are among what their gates decided on"


def _check_measured(story: Story, version: int, comparison: Mapping[str, Any]) -> None:
    if not story.excluded:
        return
    data, role = story.decision.data, comparison.get("role")
    if version == story.version.version:
        if role not in TAKEN_OUT_NOW or canonical([comparison.get("before"), comparison.get("after")]) != canonical(
            [data.get("before"), data.get("after")]
        ):
            raise Refused(f"measurements: the gate of v{version} decided on another one than the certificate states.")
    elif role not in (*TAKEN_OUT_NOW, "earlier"):
        raise Refused(f"measurements: v{version} was not measured as one that excludes the text.")
    after = memorisation(f"measurements: v{version}", comparison.get("after"))
    if after > number("log: the limit", data.get("limit")) + ROUNDING:
        raise Refused(f"measurements: v{version} was measured at {after:.4f}, above the limit of this certificate.")


def signed_files(bundle: bytes, pem: bytes) -> dict[str, str]:
    """Check a model signature; returns what it covers, file → hex SHA-256."""
    where = "model.sig"
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm, InternalError) as error:
        raise Refused("model.pub: is not a public key: it was changed.") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Refused("model.pub: is not an ECDSA P-256 key.")
    tree = parse(where, bundle, is_canonical=False)
    envelope = fields(
        where, tree.get("dsseEnvelope"), {"payload": str, "payloadType": str, "signatures": list}
    )  # fmt: skip
    if len(envelope["signatures"]) != 1 or not isinstance(envelope["signatures"][0], dict):
        raise Refused(f"{where}: has not exactly one signature.")
    payload, kind = unbase64(where, envelope["payload"]), envelope["payloadType"].encode("utf-8", "surrogatepass")
    try:
        key.verify(
            unbase64(where, envelope["signatures"][0].get("sig")),
            b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload),
            ec.ECDSA(hashes.SHA256()),
        )
    except InvalidSignature as error:
        raise Refused(f"{where}: its signature does not hold under model.pub: one of them was changed.") from error
    said = parse(where, payload, is_canonical=False)
    predicate = said.get("predicate")
    resources = predicate.get("resources") if isinstance(predicate, dict) else None
    if kind != PAYLOAD_TYPE.encode() or not isinstance(resources, list) or not resources:
        raise Refused(f"{where}: signs something else than a list of files.")
    files: dict[str, str] = {}
    for item in resources:
        name, digest = (item.get("name"), item.get("digest")) if isinstance(item, dict) else (None, None)
        if not isinstance(name, str) or name in files or not isinstance(digest, str) or not _HEX.fullmatch(digest):
            raise Refused(f"{where}: lists a file twice or without its SHA-256.")
        files[name] = digest
    return files


def check_signature(story: Story, bundle: bytes, pem: bytes) -> str:
    """The model signature is the one that was on record, made with the lineage's key."""
    keys = story.start.data.get("keys")
    named = keys.get("model") if isinstance(keys, dict) else None
    if not isinstance(named, str) or named.encode("utf-8", "surrogatepass") != pem:
        raise Refused("model.pub: is not the key that the first entry of the log names: it was exchanged.")
    if story.version.data.get("signature") != f"sha256:{sha256(bundle).hex()}":
        raise Refused("model.sig: is not the signature that was published with the version: it was exchanged.")
    files = signed_files(bundle, pem)
    return f"model.sig: covers {len(files)} files of v{story.version.version}, signed by the key that the log names"


# --- a folder of weights ----------------------------------------------------------------------------------


def _pieces(stream: BinaryIO, length: int) -> Iterator[bytes]:
    while length:
        piece = stream.read(min(length, CHUNK_BYTES))
        if not piece:
            raise Refused("model: a file ends too early.")
        length -= len(piece)
        yield piece


def hash_weights(path: Path) -> tuple[str, list[tuple[str, Any, Any, str]]]:
    """Digest a safetensors file and every tensor in it; the tensors must fill it without a gap."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise Refused(f"model: {shown(path.name)} is not a safetensors file.")
        header = stream.read(length)
        whole = hashlib.sha256(prefix + header)
        rows = parse(f"model: {shown(path.name)}", header, is_canonical=False)
        rows.pop("__metadata__", None)
        place, tensors = 0, []
        for name, row in rows.items():
            fields(f"model: tensor {shown(name)}", row, {"dtype": str, "shape": list, "data_offsets": list})
            if [type(offset) for offset in row["data_offsets"]] != [int, int]:
                raise Refused(f"model: tensor {shown(name)} lies nowhere.")
        for name, row in sorted(rows.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = row["data_offsets"]
            if start != place or end < start or end > size:
                raise Refused(f"model: {shown(path.name)} has bytes that belong to no tensor, or to two.")
            hasher = hashlib.sha256()
            for piece in _pieces(stream, end - start):
                whole.update(piece)
                hasher.update(piece)
            tensors.append((name, row["dtype"], row["shape"], hasher.hexdigest()))
            place = end
        if 8 + length + place != size:
            raise Refused(f"model: {shown(path.name)} has bytes that belong to no tensor.")
    return whole.hexdigest(), tensors


def hash_model(folder: Path) -> tuple[dict[str, str], str]:
    """Digest every file of a model folder, and the root over all its tensors.

    Raises:
        Refused: It holds a link, a folder, or a tensor twice.
        Unreadable: It cannot be read.
    """
    files: dict[str, str] = {}
    tensors: list[tuple[str, Any, Any, str]] = []
    try:
        for path in sorted(folder.iterdir()):
            if path.name in UNSIGNED:
                continue
            if not stat.S_ISREG(path.lstat().st_mode):
                raise Refused(f"model: {shown(path.name)} is a link, a folder or a device; no signature covers it.")
            if path.suffix == ".safetensors":
                files[path.name], found = hash_weights(path)
                tensors += found
            else:
                hasher = hashlib.sha256()
                with path.open("rb") as stream:
                    for piece in _pieces(stream, path.stat().st_size):
                        hasher.update(piece)
                files[path.name] = hasher.hexdigest()
    except OSError as error:
        raise Unreadable(f"{folder}: cannot be read ({error}).") from error
    names = {tensor[0] for tensor in tensors}
    if not tensors or len(names) != len(tensors):
        raise Refused("model: the folder holds no safetensors weights, or a tensor twice.")
    try:
        root = merkle_root(canonical(list(tensor)) for tensor in sorted(tensors, key=lambda t: t[0]))
    except (ValueError, RecursionError) as error:
        raise Refused("model: a tensor has no proper shape.") from error
    return files, f"root-sha256:{root.hex()}"


def check_model(story: Story, signed: Mapping[str, str], folder: Path) -> Line:
    """The folder holds a version that the certificate is about."""
    files, root = hash_model(folder)
    versions = {entry.data.get("root"): entry.version for entry in (story.version, *story.later)}
    if root not in versions:
        raise Refused("model: its weights are none of the versions that this certificate is about.")
    if versions[root] != story.version.version:
        return Line(
            "ok",
            f"model: its weights are v{versions[root]}, made from v{story.version.version}; its other files are "
            "covered by no signature here",
        )
    wrong = sorted(n for n in files.keys() | signed.keys() if files.get(n) != signed.get(n))
    if wrong:
        raise Refused(f"model: {', '.join(map(shown, wrong[:5]))}: missing, changed, or not covered by model.sig.")
    return Line("ok", f"model: all {len(files)} files are those of v{story.version.version} that model.sig covers")


# --- all of it --------------------------------------------------------------------------------------------


def check_outside(path: Path, key: LogKey, checkpoint: Checkpoint, since: Since | None) -> Line:
    """Compare with a checkpoint of the same log that was kept elsewhere."""
    where = f"checkpoint {shown(path.name)}"
    outside = read_checkpoint(where, read_bounded(path, FILES["checkpoint"]), key)
    known = {checkpoint.size: checkpoint}
    if since is not None and continues(old := read_checkpoint("log.since", since.note, key), checkpoint, since.proof):
        known[old.size] = old
    if outside.size not in known:
        return Line(
            "note",
            f"{where}: signed by the same key over {outside.size} entries, the certificate's over {checkpoint.size}; "
            "that one continues the other is not shown here, ask the issuer for `takedown certificate --since` with "
            "this checkpoint",
        )
    if outside.root != known[outside.size].root:
        raise Refused(f"{where}: signs another history of the same length: the issuer shows different ones.")
    if outside.size == checkpoint.size:
        return Line("ok", f"{where}: signs the same history")
    return Line("ok", f"{where}: signs the first {outside.size} entries of this history; it was only added to since")


def check_bundle(
    folder: Path, log_key: str | None = None, model: Path | None = None, checkpoints: Sequence[Path] = ()
) -> list[Line]:
    """Read a bundle and check it.

    Args:
        folder: The bundle; hostile.
        log_key: The log's key as obtained independently: the line itself.
        model: A folder of weights to compare.
        checkpoints: Checkpoints of the same log, kept elsewhere.

    Returns:
        One line per check; the bundle holds if none of them is ``FAILED``.

    Raises:
        Unreadable: A file cannot be read.
    """
    files = {name: read_bounded(folder / name, limit) for name, limit in FILES.items()}
    return check_files(files, log_key, model, checkpoints)


def check_files(
    files: Mapping[str, bytes], log_key: str | None = None, model: Path | None = None, checkpoints: Sequence[Path] = ()
) -> list[Line]:
    """Check the contents of a bundle's files; see `check_bundle`."""
    lines: list[Line] = []

    def attempt(check: Callable[[], Line | str]) -> bool:
        try:
            found = check()
        except (Refused, RecursionError) as error:
            lines.append(Line("FAILED", str(error)))
            return False
        lines.append(found if isinstance(found, Line) else Line("ok", found))
        return True

    try:
        given = files["log.pub"].decode("utf-8", "replace")
        key = parse_log_key("log.pub", given)
        if log_key is not None and parse_log_key("--log-key", log_key).line != key.line:
            raise Refused("log.pub: is not the key that you gave: this bundle is another log's, or forged.")
        checkpoint = read_checkpoint("checkpoint", files["checkpoint"], key)
        document = Document(files["certificate.json"])
        if document.log["checkpoint"].encode("utf-8", "surrogatepass") != files["checkpoint"]:
            raise Refused("checkpoint: is not the one in certificate.json: files of two certificates were mixed.")
        if document.log["vkey"] != key.line:
            raise Refused("log.pub: is not the key in certificate.json: files of two certificates were mixed.")
        story = tell(document)
        keys = story.start.data.get("keys")
        if not isinstance(keys, dict) or keys.get("log") != key.line or story.start.data.get("lineage") != key.name:
            raise Refused("log.pub: is not the key that the first entry of the log names: it was exchanged.")
    except (Refused, RecursionError) as error:  # a tree that the parser still takes may be too deep to walk
        return [Line("FAILED", str(error)), Line("note", "Nothing further was checked.")]
    lines.append(Line("ok", f"checkpoint: signed by {key.name} with key {key.key_id.hex()}"))
    attempt(lambda: check_chain(document))
    attempt(lambda: check_inclusion(document, checkpoint))
    if (since := document.since) is not None:
        attempt(lambda: check_since(since, checkpoint, key))
    attempt(lambda: check_values(document, story))
    attempt(lambda: check_limit(document, story))
    if document.checks or story.excluded:
        attempt(lambda: check_measurements(document, story))
    signed = attempt(lambda: check_signature(story, files["model.sig"], files["model.pub"]))
    if model is not None and signed:
        attempt(lambda: check_model(story, signed_files(files["model.sig"], files["model.pub"]), model))
    for path in checkpoints:
        attempt(lambda path=path: check_outside(path, key, checkpoint, document.since))  # type: ignore[misc]
    return lines + _notes(document, log_key is not None, model is not None)


def _notes(document: Document, own_key: bool, model: bool) -> list[Line]:
    request = document.tree["request"]
    notes = [] if own_key else [
        "the log's key came with the bundle, so this shows only that the bundle agrees with itself. Get the key "
        "another way and give it with --log-key"
    ]  # fmt: skip
    if not model:
        notes.append("no weights were compared; give a model folder with --model")
    if isinstance(request, dict):
        title, holder = shown(request.get("title")), shown(request.get("rights_holder"))
        notes.append(f"on the issuer's word: title {title!r}, rights holder {holder!r}, passages, state, clocks")
    notes.append("certificate.html is for people and was not checked; certificate.json was")
    return [Line("note", text) for text in notes]


def _log_key(given: str) -> str:
    """A key as given on the command line: the line itself, or a file that holds it."""
    if "+" in given and not Path(given).is_file():
        return given
    return read_bounded(Path(given), FILES["log.pub"]).decode("utf-8", "replace")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Check a takedown certificate, offline, without the issuer's software."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the certificate")
    parser.add_argument(
        "--log-key", metavar="KEY", help="the log's key as you got it independently: the line or a file"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="model folder that should be a certified version")
    parser.add_argument(
        "--checkpoint", type=Path, nargs="+", default=[], metavar="FILE", help="checkpoints kept elsewhere"
    )
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        key = None if options.log_key is None else _log_key(options.log_key)
        lines = check_bundle(options.folder, key, options.model, options.checkpoint)
    except Unreadable as error:
        print(shown(str(error)), file=sys.stderr)
        return 2
    for line in lines:
        print(f"{line.verdict:<7} {line.text}")
    failed = sum(line.verdict == "FAILED" for line in lines)
    print("The certificate does NOT hold." if failed else "Every check passed.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
