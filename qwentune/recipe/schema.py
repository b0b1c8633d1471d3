"""The typed recipe: every key with its type, its default and one line that says what it does.

Only `model`, `tuning.kind` and `data.train` have no default. A default that depends on another key
(`optimizer.learning_rate`, `output.dir`, each key of `EITHER`) is settled by the loader, so that no reader of a
recipe has to know the rule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

from qwentune.bounded import name_fault
from qwentune.row_formats import COLUMNS, MESSAGE_TAGS, ROLE_TAGS, ROW_FORMATS

# Every number has both ends: beyond any real run, and such that nothing the program does with it takes forever.
MOST_TOKENS = 2**22  # of an example; the longest window of a Qwen model is 2**20
MOST_STEPS = 10**9
MOST_ROWS = 10**9  # of a source


def _named(text: str) -> str:
    if fault := name_fault(text):
        raise ValueError(fault)
    return text


def _digits_as_text(value: object) -> object:
    return str(value) if type(value) is int else value


Auto = Literal["auto"]
Name = Annotated[str, MinLen(1), AfterValidator(_named)]  # every name may become a part of a path
CardName = Annotated[Name, BeforeValidator(_digits_as_text)]  # people say 4090
Steps = Annotated[int, Ge(1), Le(MOST_STEPS)]
Epochs = Annotated[float, Gt(0), Le(10_000)]
Rate = Annotated[float, Gt(0), Le(10)]
Share = Annotated[float, Ge(0), Le(1)]
ShareBelowOne = Annotated[float, Ge(0), Lt(1)]
Pixels = Annotated[int, Ge(1), Le(2**31)]
Dtype = Literal["auto", "bf16", "fp32"]
Part = Literal["language", "tower", "merger"]  # of a model that sees or hears
PartTuning = Literal["frozen", "trained", "adapters"]
# What `qwentune eval` scores; the first two need no answers.
ScoreName = Literal[
    "loss",
    "perplexity",
    "stopped",
    "exact_match",
    "valid_json",
    "tool_name",
    "tool_arguments",
    "fim_exact",
    "fim_similarity",
    "reasoning_as_asked",
]
LIKELIHOODS: tuple[ScoreName, ...] = ("loss", "perplexity")
Tracker = Literal["clearml", "comet_ml", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]
TemplateArgument = bool | int | float | str
if TYPE_CHECKING:
    Format = Column = Tag = str
else:
    Format = Literal["auto", *ROW_FORMATS]
    Column = Literal[COLUMNS]
    Tag = Literal[*MESSAGE_TAGS, *ROLE_TAGS]

FULL_LEARNING_RATE = 1.0e-5
LEARNING_RATE = 2.0e-4
EPOCHS = 3.0
DECAY_FRACTION = 0.1  # of the steps, in the schedule wsd

# Of two keys one decides; where neither is given, the first does, with its default.
EITHER = (
    ("optimizer.epochs", "optimizer.max_steps", "how long a run is"),
    ("optimizer.warmup_fraction", "optimizer.warmup_steps", "how long the learning rate rises"),
    ("output.save_every_steps", "output.save_every_epochs", "how often a checkpoint is written"),
    ("output.eval_every_steps", "output.eval_every_epochs", "how often is evaluated"),
)


def _key(default: Any, description: str, *, alias: str | None = None, shown: str | None = None) -> Any:
    """A key of the recipe; `shown` is the default in words where it depends on other keys."""
    return Field(default, description=description, alias=alias, examples=None if shown is None else [shown])


class Section(BaseModel):
    """A mapping of the recipe: frozen, no unknown keys, no conversion between types."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_by_name=True,
        validate_by_alias=True,
    )


class Tuning(Section):
    kind: Literal["full", "lora", "qlora"] = _key(
        ..., "full: all weights; lora: adapters on a 16-bit base; qlora: adapters on a 4-bit base"
    )
    rank: Annotated[int, Ge(1), Le(2**14)] = _key(16, "rank of the adapters")
    alpha: Annotated[int, Ge(1), Le(2**20)] = _key(
        32, "adapter output is scaled by alpha / rank (rslora: alpha / sqrt(rank))"
    )
    dropout: ShareBelowOne = _key(0.0, "dropout on the adapters' input")
    targets: Literal["all-linear"] | Annotated[list[Name], MinLen(1)] = _key(
        "all-linear", "which linear modules get adapters, by name (q_proj, up_proj, ...)"
    )
    variant: Literal["plain", "rslora", "dora"] = _key("plain", "how the adapters are parametrised")
    start_from: Name | None = _key(
        None,
        "an adapter folder to continue from (a new run, no resume); keys that are left out are its",
    )
    towers: PartTuning = _key("frozen", "what sees and hears: frozen, trained, or with adapters")
    merger: PartTuning = _key("frozen", "what turns that into embeddings: frozen, trained, or with adapters")
    towers_learning_rate: Rate | None = _key(None, "of the towers; null: optimizer.learning_rate")
    merger_learning_rate: Rate | None = _key(None, "of the merger; null: optimizer.learning_rate")

    @property
    def trained_parts(self) -> tuple[Part, ...]:
        """Whose weights are not frozen."""
        asked: dict[Part, str] = {"tower": self.towers, "merger": self.merger}
        return ("language", *(part for part, how in asked.items() if how != "frozen"))

    @property
    def part_rates(self) -> dict[Part, float]:
        """The learning rates that are given for parts of a model."""
        given: dict[Part, float | None] = {"tower": self.towers_learning_rate, "merger": self.merger_learning_rate}
        return {part: rate for part, rate in given.items() if rate is not None}


TOWER_KEYS = ("towers", "merger", "towers_learning_rate", "merger_learning_rate")
ADAPTER_KEYS = tuple(name for name in Tuning.model_fields if name not in ("kind", *TOWER_KEYS))


class Objective(Section):
    kind: Literal["sft", "dpo", "embedding", "reranker"] = _key("sft", "what the model learns from a row")


class DataSource(Section):
    path: Name = _key(
        ..., "a file (.jsonl, .json, .parquet, .csv; also .gz, .zst) or a hub dataset (owner/name@revision:split)"
    )
    format: Format = _key("auto", "the row format; auto detects it from the first rows")
    repeat: Annotated[float, Gt(0), Le(1000)] = _key(
        1.0, "times that the rows are seen in one epoch; 0.5 is a seeded half"
    )
    max_rows: Annotated[int, Ge(1), Le(MOST_ROWS)] | None = _key(
        None, "only the first rows of the file, this many of those that can be read; null: all"
    )
    columns: dict[Column, Name] = _key({}, "columns that bear other names: {ours: theirs}, such as {output: answer}")
    tags: dict[Tag, Name | Annotated[list[Name], MinLen(1)]] = _key(
        {}, "fields and roles of messages that bear other names, such as {role: speaker, user: [human, customer]}"
    )


Sources = Annotated[list[DataSource], MinLen(1)]


class Fim(Section):
    rate: Share = _key(0.5, "share of the texts cut into prefix, middle and suffix; the rest stay plain text")
    spm_rate: Share = _key(0.5, "share of the cut texts written suffix first")
    cuts: Annotated[int, Ge(1), Le(1000)] = _key(
        3, "different cuts of each text; each epoch takes the next, then the first again"
    )
    loss: Literal["middle", "all"] = _key("middle", "what of a cut text is trained")


class MediaOptions(Section):
    max_pixels: Pixels | None = _key(
        None,
        "largest picture, in pixels; larger ones are scaled; of a video each frame, or (Qwen3-VL on) all of them "
        "max_frames times as many",
        shown="the checkpoint's",
    )
    min_pixels: Pixels | None = _key(None, "smallest picture, in pixels", shown="the checkpoint's")
    fps: Annotated[float, Gt(0), Le(1000)] | None = _key(
        None, "frames taken of a second of a video", shown="the checkpoint's"
    )
    max_frames: Annotated[int, Ge(2), Le(2**16)] | None = _key(
        None, "most frames taken of a video", shown="the checkpoint's"
    )
    max_seconds: Annotated[float, Gt(0), Le(10**6)] | None = _key(
        None, "longest video or clip of sound, in seconds; a longer one is a wrong row; null: what the model takes"
    )
    cache: Literal["none", "pixels"] = _key(
        "none", "keep pictures and videos as they are resized in the data cache, so that they are decoded once"
    )


class DataOptions(Section):
    train: Sources = _key(..., "where the training rows are; a bare path is a source too")
    evaluation: Sources | None = _key(None, "where the eval rows are", alias="eval")
    eval_fraction: ShareBelowOne = _key(0.0, "share of the dialogues of `train` held out for evaluation")
    max_tokens: Annotated[int, Ge(1), Le(MOST_TOKENS)] = _key(
        4096, "longest example, in tokens; also the length of a packed row"
    )
    too_long: Literal["drop", "drop_old_turns", "error"] = _key("drop", "what happens to a longer example")
    max_dropped_fraction: Share = _key(0.05, "largest share of the turns that may be dropped")
    packing: bool = _key(True, "put several examples into one row, isolated from each other")
    thinking: Literal["auto", "on", "off"] = _key(
        "auto", "the prompt before a turn; auto: the thinking one where the turn has reasoning"
    )
    turns: Literal["all", "last"] = _key("all", "which assistant turns of a dialogue are trained")
    template_args: dict[str, TemplateArgument] = _key({}, "arguments for the chat template")
    bad_rows: Literal["error", "skip"] = _key("error", "refuse the run, or leave wrong rows out with a record")
    secrets: Literal["warn", "refuse"] = _key("warn", "keys and tokens of services in rows: count them, or refuse rows")
    unsupported_reasoning: Literal["refuse", "drop", "inline"] = _key(
        "refuse", "what happens to reasoning that the chat template cannot carry"
    )
    system: str | None = _key(None, "system text for dialogues that have none")
    chat_template: Name | None = _key(None, "a template file instead of the checkpoint's own")
    fim: Fim = _key(Fim(), "how texts are cut for fill-in-the-middle")
    media: MediaOptions = _key(MediaOptions(), "what pictures, videos and sounds may cost")

    @property
    def sources(self) -> list[DataSource]:
        """Where all rows are, those for training first."""
        return [*self.train, *(self.evaluation or ())]

    @property
    def has_turns(self) -> bool:
        """Whether a source may hold dialogues, as far as its format says."""
        return any(source.format == "auto" or ROW_FORMATS[source.format].has_turns for source in self.train)


class BatchOptions(Section):
    sequences_per_step: Annotated[int, Ge(1), Le(2**20)] = _key(
        16, "rows (packed rows, or examples when packing is off) per optimizer step over all GPUs"
    )
    micro_batch: Auto | Annotated[int, Ge(1), Le(2**16)] = _key("auto", "rows per GPU per forward; auto: the plan's")


class OptimizerOptions(Section):
    kind: Literal["adamw"] = _key("adamw", "the optimizer")
    learning_rate: Rate = _key(
        LEARNING_RATE,
        "the highest, after the warm-up",
        shown=f"{LEARNING_RATE}; {FULL_LEARNING_RATE} for tuning.kind full",
    )
    lora_plus_ratio: Annotated[float, Ge(1), Le(1000)] | None = _key(
        None, "LoRA+: the learning rate of the adapters' B matrices is this many times as high; null: the same"
    )
    min_learning_rate: Annotated[float, Ge(0), Le(10)] = _key(0.0, "where the schedules cosine, linear and wsd end")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = _key(
        "cosine", "how the learning rate falls; wsd: not at all, then linearly in the last decay_fraction of the steps"
    )
    decay_fraction: Annotated[float, Gt(0), Le(1)] | None = _key(
        None,
        "share of the steps in which the learning rate falls, with schedule wsd",
        shown=f"{DECAY_FRACTION} for schedule wsd, else null",
    )
    warmup_fraction: ShareBelowOne | None = _key(
        0.03,
        "share of the steps in which the learning rate rises from 0",
        shown="0.03; null where warmup_steps is given",
    )
    warmup_steps: Annotated[int, Ge(0), Le(MOST_STEPS)] | None = _key(
        None, "optimizer steps in which the learning rate rises from 0, instead of warmup_fraction"
    )
    weight_decay: Annotated[float, Ge(0), Le(10)] = _key(0.0, "decoupled weight decay")
    betas: Annotated[tuple[ShareBelowOne, ShareBelowOne], Strict(False)] = _key(
        (0.9, 0.999), "decay of the averages of the gradient and of its square"
    )
    max_grad_norm: Annotated[float, Gt(0), Le(10**9)] = _key(1.0, "gradients are scaled down to this norm")
    epochs: Epochs | None = _key(EPOCHS, "passes over the data", shown=f"{EPOCHS}; null where max_steps is given")
    max_steps: Steps | None = _key(None, "optimizer steps, instead of epochs")


class Precision(Section):
    weights: Dtype = _key("auto", "of the base weights; auto: bf16 where the hardware has it")
    adapters: Dtype = _key("auto", "of the adapters; auto: bf16 where base and hardware have it; fp32 for DoRA")
    optimizer_state: Literal["auto", "fp32", "8bit"] = _key(
        "auto", "of the optimizer's averages; auto: fp32; weights trained in bf16 always have 16 more bits there"
    )


REASONS_AGAINST = {  # values that were taken once, or that look as if they were: why they are not, and what to do
    ("precision.optimizer_state", "bf16"): (
        "A step takes 0.1 % off the average of the squares (beta2 is 0.999), which rounding to bf16 undoes: it would "
        "never fall. Leave it at auto (fp32), or take 8bit, which takes less memory than bf16."
    ),
}


class Hardware(Section):
    gpu: CardName = _key(
        "auto", "a name that `qwentune gpus` lists, a card's memory as in 24GiB, cpu, or auto: what is present"
    )
    count: Auto | Annotated[int, Ge(1), Le(4096)] = _key(
        "auto", "number of GPUs of each machine; auto: what the launch file says, else all that are present"
    )
    machines: Auto | Annotated[int, Ge(1), Le(1024)] = _key(
        "auto", "number of machines; auto: what Slurm, torchrun's variables or NNODES say, else 1"
    )
    launch: Name = _key("auto", "a file of launch/ without its ending, such as zero2-offload; auto: the plan's")


class MemoryOptions(Section):
    gradient_checkpointing: Auto | bool | Annotated[int, Ge(0), Le(1000)] = _key(
        "auto", "recompute activations: true, false, or the number of layers; auto: the plan's"
    )
    loss: Literal["auto", "full", "supervised"] = _key(
        "auto", "logits of all positions, or of the supervised ones in chunks; auto: the plan's"
    )
    attention: Literal["auto", "sdpa", "eager", "flex_attention", "flash_attention_2"] = _key(
        "auto", "the attention kernel; auto: the plan's; with flash_attention_2 examples share no beginnings"
    )
    headroom: ShareBelowOne = _key(0.03, "share of the memory that the plan leaves free")

    @property
    def shares_prefixes(self) -> bool:
        """Whether the attention kernel takes rows in which examples share their beginnings."""
        return self.attention != "flash_attention_2"


class OutputOptions(Section):
    dir: Name = _key("runs/recipe", "the run folder", shown="runs/<name of the recipe file>")
    save_every_steps: Steps | None = _key(
        100, "optimizer steps between checkpoints", shown="100; null where save_every_epochs is given"
    )
    save_every_epochs: Epochs | None = _key(
        None, "passes over the data between checkpoints, instead of save_every_steps; rounded up to whole steps"
    )
    save_every_minutes: Annotated[float, Gt(0), Le(10**6)] | None = _key(
        None, "minutes between checkpoints, besides the steps"
    )
    keep: Annotated[int, Ge(1), Le(10**6)] = _key(3, "newest checkpoints kept")
    eval_every_steps: Steps | None = _key(
        100,
        "optimizer steps between evaluations, where there are eval rows",
        shown="100; null where eval_every_epochs is given",
    )
    eval_every_epochs: Epochs | None = _key(
        None, "passes over the data between evaluations, instead of eval_every_steps; rounded up to whole steps"
    )
    log_every_steps: Steps = _key(1, "optimizer steps between two rows of metrics.jsonl")
    best: ScoreName | None = _key(
        None,
        "also keep the checkpoint with the lowest eval loss, or with the best of a score of `qwentune eval`, for which "
        "each evaluation answers the first held-out rows of each source, 64 at most",
    )
    early_stopping: Steps | None = _key(
        None, "evaluations in a row that are no better by output.best (null: by the loss) before the run ends"
    )
    samples: Annotated[int, Ge(0), Le(1000)] = _key(
        0, "held-out prompts that each evaluation answers, greedily; kept in samples.jsonl"
    )
    report_to: list[Tracker] = _key([], "experiment trackers")
    project: Name | None = _key(None, "the trackers' project (MLflow's experiment); null: theirs, as of WANDB_PROJECT")
    run_name: Name | None = _key(None, "the run's name in the trackers; null: the name of the run folder")

    @property
    def followed(self) -> ScoreName:
        """What tells which evaluation was the best, and when to wait no longer for a better one."""
        return self.best or "loss"

    @property
    def answers(self) -> bool:
        """Whether evaluations answer held-out prompts."""
        return self.samples > 0 or self.followed not in LIKELIHOODS


class Recipe(Section):
    model: Name = _key(..., "hub id, local folder, or builtin:tiny-qwen3")
    revision: Name | None = _key(None, "commit, tag or branch of the hub id")
    tuning: Tuning = _key(..., "which weights are trained")
    objective: Objective = _key(Objective(), "what is learnt")
    data: DataOptions = _key(..., "what is learnt from")
    batch: BatchOptions = _key(BatchOptions(), "rows per step")
    optimizer: OptimizerOptions = _key(OptimizerOptions(), "how the weights move")
    precision: Precision = _key(Precision(), "number formats")
    hardware: Hardware = _key(Hardware(), "what it runs on")
    memory: MemoryOptions = _key(MemoryOptions(), "what is traded for memory")
    output: OutputOptions = _key(OutputOptions(), "what is written, and when")
    seed: Annotated[int, Ge(0), Lt(2**32)] = _key(17, "of everything that is drawn at random")
