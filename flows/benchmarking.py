"""`takedown bench`: compare methods on a sequence of takedowns. Needs no workspace and changes none.

Exit 0 done, also where a method broke down: that is a result · 1 the model does not reproduce the texts · 2 wrong use ·
3 interrupted, the same command goes on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.progress import bars
from flows.terminal import Json, err, out, quiet_libraries, say, show_json, table
from pipeline.benchmark.overrides import AS_RELEASED, ROWS
from pipeline.display import plain
from pipeline.errors import UsageError
from pipeline.export import to_csv
from pipeline.files import write_atomic
from pipeline.method_defaults import DEFAULT_METHOD

if TYPE_CHECKING:
    from pipeline.benchmark.records import Results

verbs = typer.Typer(rich_markup_mode=None)


@verbs.command()
def bench(
    model: Annotated[str, typer.Argument(help="Model folder or hub id; with --recipe the folder to train it into.")],
    texts: Annotated[
        Path,
        typer.Argument(
            help="What is taken down: a folder with a sub-folder (or file) of *.txt per step, in the order of their "
            'names; or a .jsonl of passages {"split", "source", "text"}, whose split "takedown" has a source per step '
            "and whose splits keep_retain, keep_measured, heldout and unseen go to the options below.",
        ),
    ],
    folder: Annotated[Path, typer.Option("--out", help="Folder for results and finished work.")],
    methods: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(ROWS)}.")] = DEFAULT_METHOD,
    seeds: Annotated[str, typer.Option(help="Comma-separated; three or more give error bars.")] = "0,1,2",
    retain: Annotated[Path | None, typer.Option(help="Folder of *.txt that methods may hold the model to.")] = None,
    kept: Annotated[Path | None, typer.Option(help="Folder of *.txt to keep; only ever measured.")] = None,
    heldout: Annotated[Path | None, typer.Option(help="Folder of general *.txt that the model never saw.")] = None,
    unseen: Annotated[
        Path | None, typer.Option(help="Folder of *.txt of the same kind as what is taken down, never seen.")
    ] = None,
    passage_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Cut the passages of a .jsonl off after so many tokens, as they were in training."),
    ] = None,
    settings: Annotated[
        Path | None,
        typer.Option(
            help="A takedown.toml for every row, over its method's defaults; a table [methods.NAME] is for one row, "
            "and makes a row of its own where NAME is no method."
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="TOML of a training: the model is trained with the texts, and a reference without them."),
    ] = None,
    tasks: Annotated[str, typer.Option(help="Comma-separated tasks of lm-evaluation-harness.")] = "",
    as_json: Json = False,
) -> None:
    """Compare methods on a sequence of takedowns, measured after every step and under attack at the end.

    Writes results.json, results.csv and report.html into --out. Finished steps are kept there: a killed benchmark goes
    on, and one more method or seed costs only itself. Where the program itself was changed, name a new folder.

    A text counts where the untouched model reproduces it. Exit 1 where it reproduces nothing of a step.

    Example: takedown bench ./model ./steps --retain ./retain --kept ./kept --heldout ./heldout --unseen ./unseen
    --methods ssu,npo-kl --seeds 0,1,2 --out ./benchmark
    """
    quiet_libraries()
    from pipeline.benchmark.page import render
    from pipeline.benchmark.records import Inputs
    from pipeline.benchmark.runner import Benchmark, run_benchmark
    from pipeline.benchmark.summary import CSV_COLUMNS, csv_rows
    from pipeline.methods import METHODS
    from pipeline.methods.ssu_as_released import TITLE

    places = {"texts": texts, "retain": retain, "kept": kept, "heldout": heldout, "unseen": unseen}
    asked = Benchmark(
        model=model,
        inputs=Inputs.model_validate(
            {name: str(p.resolve()) for name, p in places.items() if p is not None} | {"passage_tokens": passage_tokens}
        ),
        methods=_listed(methods),
        seeds=_numbers(seeds),
        out=folder,
        settings=settings,
        recipe=recipe,
        tasks=_listed(tasks),
    )
    with bars(err, "benchmark"):
        results = run_benchmark(asked)
    titles: dict[str, str] = {name: method.title for name, method in METHODS.items()} | {AS_RELEASED: TITLE}
    tree = results.model_dump(mode="json")
    write_atomic(folder / "results.json", json.dumps(tree, indent=1).encode() + b"\n")
    write_atomic(folder / "results.csv", to_csv(CSV_COLUMNS, csv_rows(results)).encode())
    write_atomic(folder / "report.html", render(results, titles).encode())
    if as_json:
        show_json(tree)
    else:
        show(results, titles)
        say(f"Wrote {plain(str(folder), 2000)}/results.json, results.csv and report.html")


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[int, ...]:
    """Seeds.

    Raises:
        UsageError: One is no number from 0 on.
    """
    parts = _listed(text)
    wrong = [part for part in parts if not (part.isascii() and part.isdecimal() and len(part) < 10)]
    if wrong:
        raise UsageError(f"--seeds: {', '.join(map(plain, wrong))}: no number from 0 on. Write for example 0,1,2.")
    return tuple(int(part) for part in parts)


def show(results: Results, titles: dict[str, str]) -> None:
    """The main table after the last step."""
    from pipeline.benchmark.page import columns
    from pipeline.benchmark.summary import last_step, over_seeds, title_of

    shown = columns(results)
    rows = []
    for method in results.methods:
        step, cells = last_step(results, method), []
        for column in shown:
            found = over_seeds(results, method, step, column.read)
            deviation = f" ±{found.std:.{column.places}f}" if found and found.seeds > 1 else ""
            cells.append(f"{found.mean:.{column.places}f}{deviation}" if found else "–")
        rows.append((title_of(method, titles), step, *cells))
    level = results.screened.level.mean
    out.print(table(f"After the last step; never-seen text has EM {level:.3f}",
                    ("method", "step", *(c.title for c in shown)), rows))  # fmt: skip
    for stopped in results.stopped:
        say(f"{title_of(stopped.method, titles)}, seed {stopped.seed}, broke down in step {stopped.step}: "
            f"{plain(stopped.reason, 500)}")  # fmt: skip
