"""The benchmark's own models: one that recites the texts, and one trained in the same way that never saw them.

In: texts and a recipe (`pipeline.training`). Out: two model folders with one tokenizer. The second is the ideal: what a
takedown would be worth if retraining were affordable.
"""

from __future__ import annotations

import dataclasses
import shutil
import tomllib
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerFast

from pipeline.benchmark.texts import BenchTexts
from pipeline.errors import InvalidInput, Problem, UsageError
from pipeline.files import digest_json, read_json, write_json
from pipeline.models import load_tokenizer
from pipeline.progress import tell
from pipeline.training import TrainingSettings, train

MADE = "recipe.json"
"""In a model folder made here: what it was made from, and in how many steps."""


def read_recipe(path: Path) -> TrainingSettings:
    """Read a recipe: TOML with fields of `TrainingSettings`, defaults for the others.

    Raises:
        InvalidInput: Not TOML, an unknown key, a value of the wrong type; every problem is listed.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput([Problem(str(path), f"is no TOML file ({error})", "Correct the file.")]) from error
    known = {field.name for field in dataclasses.fields(TrainingSettings)}
    see = "See TrainingSettings in pipeline/training.py."
    problems = [Problem(f"{path}: {key}", "is no field of a recipe", see) for key in sorted(tree.keys() - known)]
    try:
        recipe = TypeAdapter(TrainingSettings).validate_python({k: v for k, v in tree.items() if k in known})
    except ValidationError as error:
        problems += [Problem(f"{path}: {'.'.join(map(str, e['loc']))}", e["msg"], see) for e in error.errors()]
    if problems:
        raise InvalidInput(problems)
    return recipe


def train_both(texts: BenchTexts, recipe: TrainingSettings, model: Path, reference: Path) -> None:
    """Train what is not there yet.

    Args:
        texts: The model recites all steps, kept texts and passages among the retain texts; the rest of the retain
            text is general prose. The reference sees the same but for the steps.
        recipe: Size and length.
        model: Folder of the model.
        reference: Folder of the reference, trained for as many steps with the model's tokenizer.

    Raises:
        UsageError: A folder is there and was not made from these texts by this recipe; or there is no prose.
    """
    kept = [item.text for item in (*texts.kept.values(), *texts.retain.values()) if item.whole]
    kept += [item.text for item in texts.kept.values() if not item.whole]
    prose = [item.text for item in texts.retain.values() if not item.whole]
    if not prose:
        raise UsageError("A recipe needs general prose to learn the language from. Give a folder of it with --retain.")
    made = digest_json([dataclasses.asdict(recipe), texts.works(), kept, prose])
    steps = _train_one("train", model, made, [*texts.works(), *kept], prose, recipe)
    _train_one("retrain", reference, made, kept, prose, recipe, load_tokenizer(model), steps)


def _train_one(
    stage: str,
    folder: Path,
    made: str,
    works: list[str],
    prose: list[str],
    recipe: TrainingSettings,
    tokenizer: PreTrainedTokenizerFast | None = None,
    stop_after: int | None = None,
) -> int:
    """Train into a folder that appears when it is whole; returns the number of steps that it took."""
    if folder.exists():
        found = read_json(folder / MADE) if (folder / MADE).is_file() else {}
        if found.get("made") != made:
            raise UsageError(
                f"{folder}: is there, and was not trained by this recipe on these texts. Name a new folder, or leave "
                "--recipe out to use it as it is."
            )
        return int(found["steps"])
    done = 0

    def told(step: int, loss: float, recited: float) -> None:
        nonlocal done
        done = step
        tell(stage, step, stop_after or recipe.max_steps, f"loss {loss:.2f}, least recited work {recited:.0%}")

    unfinished = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    train(works, prose, unfinished, recipe, progress=told, tokenizer=tokenizer, stop_after=stop_after)
    write_json(unfinished / MADE, {"made": made, "steps": done})
    unfinished.rename(folder)
    return done
