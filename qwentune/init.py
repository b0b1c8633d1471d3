"""`qwentune init`: a first recipe for a model, a data file and a GPU, with settings that fit and suit."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwentune import console
from qwentune.errors import EXIT_OK, DataError, DoesNotFitError, Problem, UsageError, UserError, counted

if TYPE_CHECKING:
    from qwentune.facts.architecture import ModelSpec
    from qwentune.memory.alternatives import Kind
    from qwentune.memory.plan_request import Device
    from qwentune.memory.run_plan import RunPlan

TEMPLATE = Path(__file__).with_name("recipe.yaml.jinja")
KINDS: tuple[Kind, ...] = ("full", "lora", "qlora")
NUM_ROWS_LOOKED_AT = 20_000  # of each file
# Below, adapters learn as much from the rows and keep more of what the model knew (Biderman et al. 2024, "LoRA Learns
# Less and Forgets Less"); where the line is depends on the rows.
FEWEST_ROWS_FOR_FULL = 10_000
# Qwen's vocabulary takes 3 to 4.5 bytes of UTF-8 for a token of prose, code or Chinese; fewer bytes mean more tokens.
BYTES_PER_TOKEN = 3.0
TOKENS_PER_MEDIUM = 400  # a picture of 640×480 under Qwen2.5-VL has 391
LENGTH_STEP, LONGEST = 512, 32768
SHARES = (1.0, 0.99, 0.95)  # of the examples that are not longer; a smaller one only where the larger does not fit
BATCHES = (16, 8, 4, 2)
# Up to so many parameters: of full tuning and of adapters; for the last see the QLoRA paper, for the rest what Qwen's
# and peers' examples take.
LEARNING_RATES = ((4e9, 2e-5, 2e-4), (20e9, 1e-5, 2e-4), (math.inf, 5e-6, 1e-4))
RANDOM_LEARNING_RATE = 1e-3  # of weights that were never trained
EVAL_FRACTIONS = ((2000, 0.02), (200, 0.05), (20, 0.1), (0, None))  # from so many rows on


@dataclass(frozen=True, slots=True)
class Seen:
    """A data file: its format, the guessed tokens of the rows looked at, and whether there are more rows."""

    path: str
    format: str
    tokens: list[int]
    has_more: bool
    warnings: list[str]  # of keys that nothing reads, whatever the chat template

    @property
    def count(self) -> str:
        """How many rows, in words."""
        return ("more than " if self.has_more else "") + counted(len(self.tokens), "row{|s}")


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of each example, in ascending order; counted by the checkpoint's tokenizer, or guessed from bytes."""

    tokens: list[int]
    are_counted: bool

    def within(self, share: float, most: int) -> int:
        """The shortest round length that this share of the examples does not exceed, at most `most`."""
        wanted = self.tokens[math.ceil(share * len(self.tokens)) - 1]
        return min(math.ceil(wanted / LENGTH_STEP) * LENGTH_STEP, most, LONGEST)


def init(
    model: Annotated[
        str | None, typer.Option(help="The checkpoint to tune: a hub id, a local folder, or builtin:tiny-qwen3.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="A file of training rows; give it again for more.")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="A configuration of LLaMA-Factory, axolotl or ms-swift instead.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="What will train: a name of `qwentune gpus`, 24GiB, or cpu; else what is here.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="full, lora or qlora; else what suits the rows and fits.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write.")] = Path("recipe.yaml"),
) -> None:
    """Look at data and GPU, write a commented recipe that fits; or turn a configuration of another tool into one."""
    if source is not None:
        console.end(console.run(lambda: run_from(source, model, data or [], gpu, output)))
    console.end(console.run(lambda: run(model or "", data or [], gpu, output, kind)))


def run_from(source: Path, model: str | None, paths: Sequence[str], gpu: str | None, output: Path) -> int:
    """Writes the recipe that a configuration of another tool means; the exit code.

    Raises UsageError with everything that has no counterpart and without which there is no recipe.
    """
    from qwentune.conversion import recipe_from
    from qwentune.durable import write_text

    if model or paths:
        option = "--model" if model else "--data"
        raise UsageError(Problem(option, "--from names model and data already", "Change them in the recipe."))
    _refuse_output(output)
    text, lines = recipe_from(source, str(output), gpu)
    write_text(output, text)
    for line in lines:
        console.say(line)
    console.say(f"\nwrote {output}; next: qwentune preview {output}")
    return EXIT_OK


def _refuse_output(output: Path) -> None:
    """Raises UsageError where no file can be written under that name."""
    from qwentune.bounded import refuse_name

    refuse_name("--output", output)
    if output.exists() or not output.absolute().parent.is_dir():
        what = "it exists" if output.exists() else "there is no such folder"
        raise UsageError(Problem(str(output), f"{what}; nothing is overwritten", "Name another file with -o."))


def run(model: str, paths: Sequence[str], gpu: str | None, output: Path, kind: str | None = None) -> int:
    """Writes the recipe; the exit code. Raises UserError where data, model, GPU, kind or file do not do."""
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
    kinds: list[Kind] = [each for each in KINDS if each == kind]
    if kind is not None and not kinds:
        raise UsageError(Problem("--kind", f"'{kind}' is no kind of tuning", f"It is {', '.join(KINDS)}."))
    spec = model_spec(model)
    refuse_untrainable(spec)
    files = look_at(paths)
    gpu = which_gpu(gpu)
    text = draft(model, spec, files, measured(model, files), gpu, str(output), kinds)
    write_text(output, text)
    console.say(f"wrote {output}; next: qwentune preview {output}")
    return EXIT_OK


def look_at(paths: Sequence[str]) -> list[Seen]:
    """What the first rows of each file are. Raises DataError with every problem of all files."""
    from qwentune.data.formats import detect
    from qwentune.data.formats.samples import read_samples, refuse_untrained
    from qwentune.data.reading.files import read_rows
    from qwentune.data.reading.unread import UnreadKeys
    from qwentune.data.sample import Conversation
    from qwentune.recipe import DataSource

    problems: list[Problem] = []
    found: list[Seen] = []
    for path in paths:
        try:
            first = [row.value for row in islice(read_rows(path, []), 20)]
            format = detect(first) or "auto"
            refuse_untrained([DataSource(path=path, format=format)])
            samples = read_samples(path, format, problems)
            tokens, unread = list[int](), UnreadKeys()
            for sample in islice(samples, NUM_ROWS_LOOKED_AT):
                tokens.append(_guessed_tokens(asdict(sample)))
                if isinstance(sample, Conversation):
                    unread.add(sample.unread, sample.source)
            found.append(Seen(path, format, tokens, next(samples, None) is not None, unread.warnings()))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return found


def which_gpu(gpu: str | None) -> str | None:
    """The GPU to plan for, by its name in the table; None for the one that is here. On a terminal it is asked for.

    Raises:
        UsageError: no GPU is here and none is named, or the name is not known.
    """
    from qwentune.facts.gpus import gpu_spec
    from qwentune.facts.present import present_gpus

    if gpu not in (None, "auto"):
        return "cpu" if gpu == "cpu" else gpu_spec(gpu).name
    if present_gpus() is not None:
        return None
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        fix = "Name the one that will train: --gpu rtx-4090, --gpu 24GiB (any card by its memory), or --gpu cpu."
        raise UsageError(Problem("--gpu", "no GPU is here, and what fits depends on it", fix))
    while True:
        try:
            answer: str = typer.prompt(
                "No GPU is here. Which one will train? (a name such as rtx-4090, its memory such as 24GiB, or cpu)",
                err=True,
            )
        except typer.Abort:
            raise KeyboardInterrupt from None
        try:
            return which_gpu(answer.strip())
        except UsageError as error:
            console.say(str(error.problems[0]))


def measured(model: str, files: Sequence[Seen]) -> Lengths:
    """How long the examples are, by the checkpoint's tokenizer and template where they are at hand.

    What is to be said of the data is said: the warnings of the preview, and what it will refuse.
    """
    from qwentune.data.dataset import chat_template, prepare
    from qwentune.data.tokenizing.checkpoint_folder import checkpoint_folder
    from qwentune.data.tokenizing.tokenizer import load_tokenizer
    from qwentune.recipe import DataOptions, DataSource
    from qwentune.recipe.schema import MOST_TOKENS

    guessed = Lengths(sorted(number for file in files for number in file.tokens), are_counted=False)
    try:
        tokenizer = load_tokenizer(checkpoint_folder(model, None, fetches=False))
    except UserError:  # it was not fetched yet
        for warning in (warning for file in files for warning in file.warnings):
            console.say(f"warning: {warning}")
        return guessed
    sources = [DataSource.model_validate(_source(file) | {"max_rows": NUM_ROWS_LOOKED_AT}) for file in files]
    data = DataOptions(train=sources, max_tokens=MOST_TOKENS, max_dropped_fraction=1.0)
    try:
        dataset = prepare(data, tokenizer, chat_template(data, tokenizer), 0)
    except UserError as error:
        console.say(f"The preview will refuse this data:\n{error}")
        return guessed
    for warning in dataset.report["warnings"]:
        console.say(f"warning: {warning}")
    return Lengths(sorted(map(int, dataset.examples.lengths)), are_counted=True)


def draft(
    model: str,
    spec: ModelSpec,
    files: Sequence[Seen],
    lengths: Lengths,
    gpu: str | None,
    path: str,
    kinds: Sequence[Kind] = (),
) -> str:
    """The text of the recipe: the richest kind of tuning that suits the rows and that the GPUs alone hold.

    Of `kinds` it is, where any are given. The length is that of the longest example, or, where that does not fit, one
    that few exceed.

    Raises:
        DoesNotFitError: not even 4-bit weights fit, or not the kind that is asked for.
    """
    from qwentune.facts.launch import offloads
    from qwentune.facts.packing import packing_problems
    from qwentune.memory.alternatives import alternatives
    from qwentune.memory.device_remarks import rates_remark
    from qwentune.memory.judge import device_of, judge_recipe
    from qwentune.memory.run_plan import plan_warnings
    from qwentune.memory.shortage import refusal
    from qwentune.recipe import BatchOptions, DataOptions, Hardware, OutputOptions, Recipe, Tuning
    from qwentune.recipe.schema import EPOCHS

    can_pack = not packing_problems(spec.checkpoint_type)
    num_rows, has_more = sum(len(file.tokens) for file in files), any(file.has_more for file in files)
    kinds, why = (kinds, "as asked for") if kinds else _suitable(spec, num_rows)
    eval_fraction = next(fraction for fewest, fraction in EVAL_FRACTIONS if num_rows >= fewest)
    device, ranks, sharding = device_of(Hardware(gpu=gpu or "auto"), here=False)
    sharding = "none" if ranks == 1 else sharding
    folder = f"runs/{Path(path).stem}"
    if remark := rates_remark(device):
        console.say(remark)
    train = [_source(file) for file in files]
    asked: dict[str, Any] = {}
    optimizer_steps = None

    def judged(spec: ModelSpec, kind: Kind, on: Device) -> RunPlan:
        """The plan as it is `asked` for; another card than the one here stands alone."""
        shared = {"num_ranks": ranks, "sharding": sharding} if on is device else {"num_ranks": 1, "sharding": "none"}
        recipe = Recipe(model=model, tuning=Tuning(kind=kind), output=OutputOptions(dir=folder), **asked)
        return judge_recipe(spec, recipe, device=on, optimizer_steps=optimizer_steps, **shared)

    plan = None
    for max_tokens in dict.fromkeys(lengths.within(share, spec.max_positions) for share in SHARES):
        kept = [number for number in lengths.tokens if number <= max_tokens]
        packing, batch, steps = _batch(kept, max_tokens, ranks, EPOCHS * (1 - (eval_fraction or 0)), can_pack)
        data = DataOptions.model_validate({"train": train, "max_tokens": max_tokens, "packing": packing})
        asked = {"data": data, "batch": BatchOptions(sequences_per_step=batch)}
        optimizer_steps = None if has_more else steps
        needs: list[str] = []
        for kind in kinds:
            plan = judged(spec, kind, device)
            needs.append(f"{kind} ({plan.peak_bytes / 2**30:.1f} GiB)")
            if plan.fits and not offloads(plan.choices.sharding):
                for warning in plan_warnings(plan):
                    console.say(f"warning: {warning}")
                return _render(
                    model=model, recipe=path, kind=kind, files=[(_source(file), file.count) for file in files],
                    why=f"{why}; the first that fits of {', '.join(needs)}" if len(needs) > 1 else why,
                    max_tokens=max_tokens, packing=packing, longest=lengths.tokens[-1], is_counted=lengths.are_counted,
                    shorter=len(kept) / len(lengths.tokens), sequences_per_step=batch, steps=steps, has_more=has_more,
                    gpu=gpu, folder=folder, device=plan.gpu if ranks == 1 else f"{ranks} × {plan.gpu}",
                    peak=f"{plan.peak_bytes / 2**30:.1f}", usable=f"{plan.usable_bytes / 2**30:.1f}",
                    learning_rate=_learning_rate(spec, kind), epochs=EPOCHS, eval_fraction=eval_fraction,
                )  # fmt: skip
    assert plan is not None
    mends = alternatives(spec, device, KINDS[KINDS.index(kinds[-1]) :], judged)
    reasons = tuple(reason for reason in plan.reasons if "=" not in reason)  # which name keys, that init does not take
    several = ("No single card holds it: `qwentune keys` says how a recipe shares it among GPUs (hardware.launch).",)
    raise DoesNotFitError(refusal(replace(plan, mends=mends, reasons=reasons if mends else reasons + several)))


def _suitable(spec: ModelSpec, num_rows: int) -> tuple[Sequence[Kind], str]:
    """The kinds of tuning that suit model and rows, the richest first, and why."""
    if _is_random(spec):
        return KINDS[:1], "its weights are random, and all are to learn"
    if num_rows < FEWEST_ROWS_FOR_FULL:
        return KINDS[
            1:
        ], f"{counted(num_rows, 'row{|s}')} are few for full tuning, which suits {FEWEST_ROWS_FOR_FULL:,} and more"
    return KINDS, f"{counted(num_rows, 'row{|s}')} suit full tuning"


def _learning_rate(spec: ModelSpec, kind: Kind) -> float:
    if _is_random(spec):
        return RANDOM_LEARNING_RATE
    of_full, of_adapters = next(rates for most, *rates in LEARNING_RATES if spec.parameters <= most)
    return of_full if kind == "full" else of_adapters


def _is_random(spec: ModelSpec) -> bool:
    return spec.id.startswith("builtin:")


def _source(file: Seen) -> dict[str, Any]:
    return {"path": file.path, "format": file.format}


def _guessed_tokens(sample: object) -> int:
    medium = " " * int(TOKENS_PER_MEDIUM * BYTES_PER_TOKEN)  # in the place of its path or bytes
    return math.ceil(len(json.dumps(sample, ensure_ascii=False, default=lambda _: medium).encode()) / BYTES_PER_TOKEN)


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
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(values).rstrip() + "\n"
