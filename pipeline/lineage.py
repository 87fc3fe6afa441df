"""Start a lineage.

In: a model folder and reference texts. Out: a workspace whose v0 is the untouched model. Never: a half-made workspace.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path

from pipeline.errors import InvalidInput, Problem, UsageError
from pipeline.files import explained_space, fsync_folder, write_atomic, write_json
from pipeline.keys import create_keys, load_model_key, log_vkey, model_public_key
from pipeline.ledger import Ledger
from pipeline.models import (
    HUB_FILES,
    check_folder,
    check_tokenizer,
    find_model,
    load_model,
    load_tokenizer,
    software,
    target_weights,
)
from pipeline.oms import model_signature
from pipeline.records import Event
from pipeline.seals import MARK, renew
from pipeline.settings import Settings
from pipeline.vault import Vault
from pipeline.versions import Sign, VersionStore
from pipeline.workspace import FORMAT, Workspace, open_workspace

SETTINGS_HEAD = """\
# Settings of this workspace. Every key has a default; `pipeline/settings.py` lists them all with their reasons.
# What is written here travels with every version that it made.
#
# [gate]
# forget_tolerance = 0.05   # exact memorisation allowed above never-seen text
# kept_share = 0.85         # share of the kept works' memorisation that must stay
# perplexity_rise = 0.10    # largest rise of held-out perplexity over v0
#
# [unlearn]
# parameterisation = "full" # or "lora"
"""


def start_lineage(
    root: Path, model: str, reference: Mapping[str, Path | None], actor: str, settings: Settings | None = None
) -> Workspace:
    """Make a workspace whose version v0 is the untouched model.

    Args:
        root: Folder to make; absent or empty.
        model: Folder or hub id.
        reference: ``retain``, ``kept`` and ``heldout`` → folder of ``*.txt`` files, or None.
        actor: Who does it, for the ledger.
        settings: Only used to choose the device of the check that the model runs.

    Raises:
        UsageError: The folder is in use.
        UnsupportedModel: See `pipeline.models`.
        InvalidInput: A reference folder is absent, empty or holds a file that is not UTF-8 text.
    """
    root = root.resolve()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UsageError(f"{root}: is not empty. Choose a new folder for the workspace.")
    texts = read_references(reference)
    source = find_model(model)
    check_folder(source)
    loaded = load_model(source, (settings or Settings()).runtime.device)
    check_tokenizer(loaded, load_tokenizer(source))
    target_weights(loaded)
    del loaded
    there = root.exists()
    root.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root if there else root.parent))
    try:
        _fill(Workspace(staging), source, texts, actor)
        if there:
            # The folder itself stays, since it may be a mount point or somebody's current one; the marker comes last.
            for path in sorted(staging.iterdir(), key=lambda p: p.name == Workspace(staging).marker.name):
                path.rename(root / path.name)
            staging.rmdir()
            fsync_folder(root)
        else:
            staging.replace(root)  # one rename makes the workspace appear whole
        fsync_folder(root.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return open_workspace(root)


def model_signer(keys: Path) -> Sign:
    """What signs the model folders of a lineage."""
    return lambda files, name: model_signature(files, name, load_model_key(keys))


def _fill(workspace: Workspace, source: Path, texts: Mapping[str, Mapping[str, str]], actor: str) -> None:
    workspace.root.chmod(0o755)
    with explained_space(workspace.root):
        for folder in workspace.folders():
            folder.mkdir(parents=True, mode=0o700 if folder in (workspace.index, workspace.inbox) else 0o755)
        for kind, documents in texts.items():
            for name, text in documents.items():
                write_atomic(workspace.reference / kind / name, text.encode())
        Vault(workspace.vault).create()
        model = workspace.runs / "v0"
        model.mkdir()
        for path in sorted(source.iterdir()):
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in HUB_FILES):
                shutil.copyfile(path, model / path.name)  # resolves the links of a hub cache
        now = datetime.now(UTC)
        lineage = f"takedown-pipeline/{secrets.token_hex(8)}"
        create_keys(workspace.keys, lineage)
        published = VersionStore(workspace.versions).publish(
            model, version=0, parent=None, created_at=now, run_id=None, requests=(), settings={}, report={},
            software=software(), sign=model_signer(workspace.keys),
        )  # fmt: skip
        shutil.rmtree(model)
        keys = {"log": log_vkey(workspace.keys), "model": model_public_key(workspace.keys).decode()}
        with Ledger.create(workspace.ledger) as ledger:
            data = published.facts() | {"lineage": lineage, "keys": keys} | MARK
            ledger.append(Event(kind="initialised", actor=actor, version=0, data=data), at=now)
        renew(workspace.root)
        write_atomic(workspace.settings_file, SETTINGS_HEAD.encode())
        write_json(workspace.marker, {"format": FORMAT})


def read_references(folders: Mapping[str, Path | None]) -> dict[str, dict[str, str]]:
    """Read the reference texts: kind → file name → text.

    Raises:
        InvalidInput: With every problem.
    """
    problems: list[Problem] = []
    texts: dict[str, dict[str, str]] = {}
    for kind, folder in folders.items():
        if folder is None:
            continue
        paths = sorted(folder.glob("*.txt")) if folder.is_dir() else []
        if not paths:
            problems.append(Problem(f"--{kind} {folder}", "holds no *.txt file", "Give a folder of UTF-8 text files."))
        for path in paths:
            try:
                texts.setdefault(kind, {})[path.name] = path.read_text(encoding="utf-8-sig")
            except (UnicodeDecodeError, OSError) as error:
                problems.append(Problem(str(path), f"cannot be read as UTF-8 text ({error})", "Convert or remove it."))
    if problems:
        raise InvalidInput(problems)
    return texts
