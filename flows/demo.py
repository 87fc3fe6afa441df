"""``make demo``: the main job on real input, start to end, on two cores in some ten minutes.

Trains a small model that recites fourteen works, starts a lineage, and runs two batches through the flow that
production uses. ``--settings FILE`` does the same with other settings (see takedowns/demo/settings), for comparison.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ROOT / "takedowns" / "demo"
FOLDER = ROOT / ".demo"
TAKEN = ("quince-weather", "oyster-junction")

console = Console(highlight=False)


def texts() -> dict[str, list[Path]]:
    """The demo's files by role; every other kept work may be trained on as retain text."""
    kept = [p for p in sorted((TEXTS / "works").glob("*.txt")) if p.stem not in TAKEN]
    general = sorted((TEXTS / "general").glob("*.txt"))
    held_out = general[8::9]
    return {
        "works": sorted((TEXTS / "works").glob("*.txt")),
        "prose": [p for p in general if p not in held_out],
        "heldout": held_out,
        "retain": [*kept[::2], *(p for p in general if p not in held_out)],
        "kept": kept[1::2],
    }


def trained_model() -> Path:
    """Train the demo's model, or take it from the cache when texts and recipe are the same."""
    from flows.progress import bars
    from pipeline.files import digest_json
    from pipeline.progress import tell
    from pipeline.training import TrainingSettings, train

    roles, settings = texts(), TrainingSettings()
    recipe = [repr(settings), [p.read_text() for p in (*roles["works"], *roles["prose"])]]
    folder = FOLDER / f"model-{digest_json(recipe)[7:19]}"
    if (folder / "config.json").is_file():
        console.print(f"1. Model: trained before, {folder.relative_to(ROOT)}")
        return folder
    console.print(f"1. Model: training until it recites {len(roles['works'])} works")
    started, unfinished = time.monotonic(), FOLDER / "training"
    shutil.rmtree(unfinished, ignore_errors=True)
    with bars(Console(stderr=True), "training"):
        recited = train(
            [p.read_text() for p in roles["works"]], [p.read_text() for p in roles["prose"]], unfinished, settings,
            progress=lambda step, loss, least: tell(
                "train", step, settings.max_steps, f"loss {loss:.2f}, least recited work {least:.0%}"),
        )  # fmt: skip
    unfinished.rename(folder)
    seconds = time.monotonic() - started
    console.print(f"   the work recited worst: exact memorisation {recited:.3f}, {seconds:.0f} s")
    return folder


def reference_folders() -> dict[str, Path]:
    """Folders of retain, kept and held-out texts, laid out for ``init``."""
    folders = {}
    for kind in ("retain", "kept", "heldout"):
        folders[kind] = FOLDER / "texts" / kind
        shutil.rmtree(folders[kind], ignore_errors=True)
        folders[kind].mkdir(parents=True)
        for path in texts()[kind]:
            shutil.copyfile(path, folders[kind] / path.name)
    return folders


def run_batch(workspace_root: Path, batch: Path) -> None:
    """Submit a batch and run it through the flow; print what came of it."""
    from flows.progress import bars
    from flows.stepping import show_step
    from flows.takedown import takedown
    from flows.terminal import err
    from pipeline.history import step_view
    from pipeline.states import decisions
    from pipeline.submit import submit
    from pipeline.workspace import open_workspace, read_entries

    workspace, started = open_workspace(workspace_root), time.monotonic()
    requests = [r.request_id for r in submit(workspace, batch, "demo").requests]
    with bars(err, "Prefect"):
        takedown(str(workspace.root), requests, "demo")
    entries = read_entries(workspace)
    view = step_view(workspace, list(decisions(entries))[-1], entries)
    show_step(workspace, view)
    console.print(f"   {time.monotonic() - started:.0f} s\n")


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="python -m flows.demo", description=__doc__)
    parser.add_argument("--settings", type=Path, help="a takedown.toml to use instead of the defaults")
    options = parser.parse_args()
    started = time.monotonic()
    root = FOLDER / (f"workspace-{options.settings.stem}" if options.settings else "workspace")
    FOLDER.mkdir(exist_ok=True)
    shutil.rmtree(root, ignore_errors=True)

    from flows.server import some_server

    # Prefect's own database is kept between demos: making it anew costs ten seconds.
    os.environ.setdefault("PREFECT_HOME", str(FOLDER / "prefect"))
    some_server(root)
    from flows.terminal import quiet_libraries

    quiet_libraries()
    from pipeline.lineage import start_lineage
    from pipeline.workspace import open_workspace

    model = trained_model()
    console.print("2. takedown init: v0 is the untouched model")
    start_lineage(root, str(model), reference_folders(), "demo")
    if options.settings:
        shutil.copyfile(options.settings, root / "takedown.toml")
    for number, name in enumerate(("batch-1.json", "batch-2.json"), 3):
        console.print(f"{number}. takedown run {name}")
        run_batch(root, TEXTS / name)
    finish(root, time.monotonic() - started)
    if not options.settings:
        check(open_workspace(root).root)


def finish(root: Path, seconds: float) -> None:
    """Print the version history and write the report."""
    from flows.terminal import out, table
    from pipeline.files import write_atomic
    from pipeline.history import acknowledged_versions, lineage_view, version_views
    from pipeline.report import render
    from pipeline.verify import verify
    from pipeline.workspace import open_workspace, read_entries

    workspace = open_workspace(root)
    entries = read_entries(workspace)
    views = version_views(acknowledged_versions(workspace, entries), entries)
    rows = [
        (f"v{v.version}", v.status, ", ".join(v.requests), "" if v.changed is None else f"{v.changed:,}", v.root[12:28])
        for v in views
    ]
    out.print(table("Versions", ("version", "status", "excludes first", "entries changed", "tensor root"), rows))
    breaks = verify(workspace)
    path = workspace.report_page
    write_atomic(path, render(lineage_view(workspace, breaks)).encode())
    console.print(f"takedown verify: {len(breaks)} breaks")
    console.print(f"Report: {os.path.relpath(path)}\nWhole demo: {seconds:.0f} s")


def check(root: Path) -> None:
    """Fail the demo unless both batches were published: what it shows must be what it promises.

    Raises:
        SystemExit: A step was refused.
    """
    from pipeline.workspace import open_workspace, read_entries

    kinds = [e.event.kind for e in read_entries(open_workspace(root))]
    if kinds.count("published") != 2:
        raise SystemExit("The demo did not publish both steps.")


if __name__ == "__main__":
    main()
