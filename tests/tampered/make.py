"""Write every tampered store to disk, for people who test another reader.

    PYTHONPATH=tests python -m tampered.make DIR

Each case is a folder: ``store/`` the tampered store, ``kept/`` checkpoints kept elsewhere, ``batch.json`` a batch to
submit, ``expected.json`` what was done and, call by call, which exit code and which words must come out. The calls are
made in that folder, as ``takedown -w store CALL``, in the order given; ``sound/`` is the store before.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tampered.cases import CASES, SOUND, Case, expected
from tampered.scene import Scene, other_lineage, sound_scene


def copied_scene(scene: Scene, folder: Path) -> Scene:
    """A copy to tamper with; links and pipes that a case put there are no part of a sound one."""
    shutil.copytree(scene.folder, folder)
    return Scene(folder, scene.other)


def write_all(folder: Path, cases: Sequence[Case] = CASES) -> None:
    """Write a folder per case below a new folder."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as aside:
        sound = sound_scene(folder / "sound", other_lineage(Path(aside) / "lineage"))
        calls = [call._asdict() for call in SOUND.values()]
        answers = {"name": "sound", "done": "Nothing.", "calls": calls}
        (folder / "sound" / "expected.json").write_text(json.dumps(answers, indent=1) + "\n")
        for case in cases:
            scene = copied_scene(sound, folder / case.name)
            case.tamper(scene)
            (scene.folder / "expected.json").write_bytes(expected(case))


def main() -> None:
    """Run from the command line."""
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        sys.exit("usage: PYTHONPATH=tests python -m tampered.make DIR (a new folder)")
    write_all(Path(sys.argv[1]))
    print(f"Wrote {len(CASES)} tampered stores and a sound one to {sys.argv[1]}")


if __name__ == "__main__":
    main()
