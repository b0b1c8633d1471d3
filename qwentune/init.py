"""`qwentune init`: a first recipe for a model, a data file and a GPU, with settings that fit."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwentune import console
from qwentune.errors import EXIT_OK, DataError, DoesNotFitError, Problem, RecipeError, UsageError

if TYPE_CHECKING:
    from qwentune.facts.architecture import ModelSpec
    from qwentune.peers.translation import Translation

TEMPLATE = Path(__file__).with_name("recipe.yaml.jinja")
KINDS = ("full", "lora", "qlora")
NUM_ROWS_LOOKED_AT = 20_000  # of each file
# Qwen's vocabulary takes 3 to 4.5 bytes of UTF-8 for a token of prose, code or Chinese; fewer bytes mean more tokens.
BYTES_PER_TOKEN = 3.0
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
SHARES = (0.99, 0.95)  # of the rows that are not cut; the smaller only where the larger does not fit
BATCHES = (16, 8, 4)


@dataclass(frozen=True, slots=True)
class Seen:
    """A data file: its format, the guessed tokens of the rows looked at, and whether there are more rows."""

    path: str
    format: str
    tokens: list[int]
    has_more: bool

    @property
    def count(self) -> str:
        """How many rows, in words."""
        rows = "1 row" if len(self.tokens) == 1 else f"{len(self.tokens)} rows"
        return f"more than {rows}" if self.has_more else rows


def init(
    model: Annotated[str | None, typer.Option(help="A hub id, a local folder, or builtin:tiny-qwen3.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="A data file; give it again for more.")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="A configuration of LLaMA-Factory, axolotl or ms-swift instead.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="A name that `qwentune gpus` lists, or cpu; else what is here.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write.")] = Path("recipe.yaml"),
) -> None:
    """Look at data and GPU, write a commented recipe that fits; or turn a configuration of another tool into one."""
    if source is not None:
        console.end(console.run(lambda: run_from(source, model, data or [], gpu, output)))
    console.end(console.run(lambda: run(model or "", data or [], gpu, output)))


def run_from(source: Path, model: str | None, paths: Sequence[str], gpu: str | None, output: Path) -> int:
    """Writes the recipe that a configuration of another tool means; the exit code.

    Raises UsageError with everything that has no counterpart and without which there is no recipe.
    """
    from qwentune.durable import write_text
    from qwentune.peers.configuration import Given
    from qwentune.peers.draft import draft, table
    from qwentune.peers.translate import translate_file
    from qwentune.recipe import describe_keys, parse_recipe

    if model or paths:
        option = "--model" if model else "--data"
        raise UsageError(Problem(option, "--from names model and data already", "Change them in the recipe."))
    _refuse_output(output)
    translation = translate_file(source)
    if gpu is not None:
        translation.set("hardware.gpu", gpu, Given("--gpu", gpu, "--gpu"))
    problems = [*translation.problems, *_problems_of_model(translation)]
    defaults = {key.name: key.default for key in describe_keys()}
    made = draft(translation, str(output), defaults)
    try:
        parse_recipe(made.text, str(output))
    except RecipeError as error:
        for problem in error.problems:
            line = re.search(r":(\d+)(:\d+)?$", problem.where)
            given = made.sources.get(int(line[1])) if line else None
            if given is not None and given.where not in {one.where for one in problems}:
                problem = replace(problem, where=given.where or problem.where, what=f"{given.key}: {problem.what}")
                problems.append(problem)
            elif given is None and not problems:
                problems.append(problem)
    if problems:
        raise UsageError(list(dict.fromkeys(problems)), "Nothing was written.")
    write_text(output, made.text)
    for line in table(translation, defaults):
        console.say(line)
    console.say(f"\nwrote {output}; next: qwentune preview {output}")
    return EXIT_OK


def _problems_of_model(translation: Translation) -> list[Problem]:
    """Why a configuration's model is none to train here; a folder that is elsewhere becomes the hub id of its name."""
    from qwentune.facts.models import MODELS, model_spec, refuse_untrainable

    setting = translation.settings.get("model")
    if setting is None:
        return []
    name, where = setting.value, setting.sources[0].where
    last = Path(name).name
    published = next((known for known in MODELS if known.lower() == f"qwen/{last}".lower()), None)
    if published is not None and name != published and not Path(name).is_dir():
        remark = "" if name.lower() == published.lower() else f"{name} is not here: the hub id of that name"
        translation.set("model", published, *setting.sources, remark=remark)
        name = published
    try:
        refuse_untrainable(model_spec(name))
    except UsageError as error:
        if not any(word in name.lower() for word in ("qwen", "qwq", "qvq")) and not Path(name).is_dir():
            return [Problem(where, f"model: {name} is no Qwen, and only Qwen models are trained here")]
        return [replace(problem, where=where) for problem in error.problems]
    return []


def _refuse_output(output: Path) -> None:
    """Raises UsageError where no file can be written under that name."""
    from qwentune.bounded import refuse_name

    refuse_name("--output", output)
    if output.exists() or not output.absolute().parent.is_dir():
        what = "it exists" if output.exists() else "there is no such folder"
        raise UsageError(Problem(str(output), f"{what}; nothing is overwritten", "Name another file with -o."))


def run(model: str, paths: Sequence[str], gpu: str | None, output: Path) -> int:
    """Writes the recipe; the exit code. Raises UserError where data, model, GPU or file do not do."""
    from qwentune.bounded import refuse_name
    from qwentune.durable import write_text
    from qwentune.facts.models import model_spec, refuse_untrainable

    if not model or not paths:
        missing = " and ".join(option for option, given in (("--model", model), ("--data", paths)) if not given)
        fix = "Or --from FILE, a configuration of LLaMA-Factory, axolotl or ms-swift."
        raise UsageError(Problem(missing, "it is needed", fix))
    _refuse_output(output)
    for option, name in (("--model", model), *(("--data", path) for path in paths)):
        refuse_name(option, name)
    spec = model_spec(model)
    refuse_untrainable(spec)
    files = look_at(paths)
    text = draft(model, spec, files, gpu, str(output))
    write_text(output, text)
    console.say(f"wrote {output}; next: qwentune preview {output}")
    return EXIT_OK


def look_at(paths: Sequence[str]) -> list[Seen]:
    """What the first rows of each file are. Raises DataError with every problem of all files."""
    from qwentune.data.formats import detect
    from qwentune.data.formats.samples import read_samples, refuse_untrained
    from qwentune.data.reading.files import read_rows
    from qwentune.recipe import DataSource

    problems: list[Problem] = []
    found: list[Seen] = []
    for path in paths:
        try:
            first = [row.value for row in islice(read_rows(path, []), 20)]
            format = detect(first) or "auto"
            refuse_untrained([DataSource(path=path, format=format)])
            samples = read_samples(path, format, problems)
            tokens = [_guessed_tokens(asdict(sample)) for sample in islice(samples, NUM_ROWS_LOOKED_AT)]
            found.append(Seen(path, format, tokens, next(samples, None) is not None))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return found


def draft(model: str, spec: ModelSpec, files: Sequence[Seen], gpu: str | None, path: str) -> str:
    """The text of the recipe: the richest kind of tuning that the GPUs alone hold, at a length that few rows exceed.

    Raises:
        DoesNotFitError: not even 4-bit weights fit.
    """
    from qwentune.facts.launch import offloads
    from qwentune.facts.packing import packing_problems
    from qwentune.memory.judge import device_of, judge
    from qwentune.memory.shortage import refusal
    from qwentune.recipe import BatchOptions, Hardware, MemoryOptions, OutputOptions, Precision, Tuning
    from qwentune.recipe.schema import EPOCHS, FULL_LEARNING_RATE, LEARNING_RATE
    from qwentune.row_formats import ROW_FORMATS

    can_pack = not packing_problems(spec.checkpoint_type)
    tokens = sorted(number for file in files for number in file.tokens)
    device, ranks, sharding = device_of(Hardware(gpu=gpu or "auto"), here=False)
    sharding = "none" if ranks == 1 else sharding
    folder = f"runs/{Path(path).stem}"
    plan = None
    for max_tokens in dict.fromkeys(_length(tokens, share, spec.max_positions) for share in SHARES):
        kept = [number for number in tokens if number <= max_tokens]
        packing, batch, steps = _batch(kept, max_tokens, ranks, EPOCHS, can_pack)
        needs: list[str] = []
        for kind in KINDS:
            plan = judge(
                spec, tuning=Tuning(kind=kind), max_tokens=max_tokens, batch=BatchOptions(sequences_per_step=batch),
                precision=Precision(), memory=MemoryOptions(), output=OutputOptions(dir=folder),
                device=device, num_ranks=ranks, sharding=sharding,
                learns_chat=any(file.format == "auto" or ROW_FORMATS[file.format].has_turns for file in files),
            )  # fmt: skip
            needs.append(f"{kind} ({plan.peak_bytes / 2**30:.1f} GiB)")
            if plan.fits and not offloads(plan.choices.sharding):
                many = len(tokens)
                return _render(
                    model=model, recipe=path, kind=kind, files=files, max_tokens=max_tokens, packing=packing,
                    shorter=len(kept) / many, sequences_per_step=batch, steps=steps, gpu=gpu, folder=folder,
                    device=plan.gpu if ranks == 1 else f"{ranks} × {plan.gpu}", needs=", ".join(needs),
                    peak=f"{plan.peak_bytes / 2**30:.1f}", usable=f"{plan.usable_bytes / 2**30:.1f}",
                    learning_rate=FULL_LEARNING_RATE if kind == "full" else LEARNING_RATE, epochs=EPOCHS,
                    eval_fraction=0.02 if many >= 2000 else 0.05 if many >= 200 else None,
                )  # fmt: skip
    assert plan is not None
    raise DoesNotFitError(refusal(plan))


def _guessed_tokens(sample: object) -> int:
    return math.ceil(len(json.dumps(sample, ensure_ascii=False).encode()) / BYTES_PER_TOKEN)


def _length(tokens: Sequence[int], share: float, most: int) -> int:
    """The shortest usual length that this share of the rows does not exceed."""
    wanted = tokens[math.ceil(share * len(tokens)) - 1]
    return min(next((length for length in LENGTHS if length >= wanted), LENGTHS[-1]), most)


def _batch(tokens: Sequence[int], max_tokens: int, ranks: int, epochs: float, can_pack: bool) -> tuple[bool, int, int]:
    """Whether to pack, rows per step and steps: the largest usual batch that still makes the fewest useful steps."""
    from qwentune.memory.run_plan import FEWEST_USEFUL_STEPS

    sizes = [size for size in BATCHES if size % ranks == 0] or [ranks]
    packed_rows = math.ceil(sum(tokens) / max_tokens)
    for packing, rows in ((True, packed_rows), (False, len(tokens)))[not can_pack :]:
        for size in sizes:
            steps = math.ceil(rows * epochs / size)
            if steps >= FEWEST_USEFUL_STEPS:
                return packing, size, steps
    return False, sizes[-1], math.ceil(len(tokens) * epochs / sizes[-1])


def _render(**values: object) -> str:
    import jinja2
    import yaml

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["scalar"] = lambda value: yaml.safe_dump(
        [value], default_flow_style=True, width=10**6, allow_unicode=True
    )[1:-2]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(values) + "\n"
