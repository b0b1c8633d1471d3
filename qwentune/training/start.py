"""How a run begins: anew, or from its newest whole checkpoint; and what must not have changed in between."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qwentune import durable
from qwentune.bounded import refuse_name
from qwentune.errors import Problem, ResumeError, UsageError, counted, nearest
from qwentune.memory.run_plan import Choices
from qwentune.recipe import ScoreName, describe_keys
from qwentune.recipe.keys import is_key
from qwentune.training.best import best_step, evaluated_steps, has_stopped_improving
from qwentune.training.checkpoints import Checkpoint, Checkpoints, open_checkpoint
from qwentune.training.run_folder import RunFolder

# Keys of a recipe that do not reach the weights: how often to save and log, and where to run.
INERT_KEYS = (
    "output.",
    "hardware.",
    "memory.headroom",
    "data.train",
    "data.eval",
    "data.chat_template",
    "data.media.cache",
)

# What a change would mean for the steps that are left, by the beginning of a key.
EFFECTS = {
    "tuning.alpha": "the adapter is scaled otherwise from here on",
    "tuning.dropout": "other dropout from here on",
    "data": "other batches from here on, some rows again or never",
    "seed": "another order of the rows",
    "batch.": "other batches from here on, some rows again or never",
    "optimizer.": "another path of the weights from here on",
    "model": "the trained weights belong to other ones",
    "base": "the trained weights belong to other ones",
    "revision": "the trained weights may belong to other ones",
    "tuning.": "other weights would be trained",
    "precision.": "other rounding from here on",
    "memory.": "other rounding from here on",
    "plan.": "other rounding from here on",
    "ranks": "other rounding and other random numbers from here on",
    "template": "other prompts than those trained so far",
    "tokenizer": "other tokens than those trained so far",
}

# What decides a run beside its recipe and `plan.*`; as manifests and commands called it once, which still counts.
FACTS = ("data", "template", "tokenizer", "base", "ranks")
RENAMED = {"chat template": "template", "base weights": "base", "number of ranks": "ranks"}

# What the tensors of a checkpoint decide, and what counts only before the first step.
FIXED_KEYS = ("tuning.rank", "tuning.targets", "tuning.variant", "tuning.start_from")
NOT_ANY_MORE = "cannot be changed in a run that has begun"


@dataclass(frozen=True)
class Start:
    """Where a run begins. `checkpoint` is None for a new run.

    `trained` says that no step is left to do, `complete` that the trained weights are published as well.
    """

    checkpoint: Checkpoint | None
    trained: bool = False
    complete: bool = False
    messages: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Optimizer steps done already."""
        return 0 if self.checkpoint is None else self.checkpoint.step


def refuse_unknown_changes(allowed: Sequence[str]) -> None:
    """Raises UsageError for each name in `allowed` that is no key, section or fact of a run."""
    choices = [f"plan.{field.name}" for field in fields(Choices)]
    keys = [*FACTS, "plan", *choices, *(key.name for key in describe_keys())]
    known = list(dict.fromkeys(".".join(parts[:n]) for key in keys if (parts := key.split(".")) for n in (1, 2, 3)))
    fix = f"Name {', '.join(FACTS)}, plan, or a key of the recipe or its section, as `qwentune keys` lists them."
    problems = [
        Problem("--allow-change", f"'{name}' is nothing that can change.{nearest(name, known)}", fix)
        for name in allowed
        if name not in known and name not in RENAMED and not is_key(name)
    ]
    if problems:
        raise UsageError(problems)


def choose_start(
    run: RunFolder,
    checkpoints: Checkpoints,
    facts: Mapping[str, Any],
    *,
    resume: str,
    allowed: Sequence[str],
    num_steps: int,
    patience: int | None,
    followed: ScoreName,
    versions: Mapping[str, str],
) -> Start:
    """The newest checkpoint that verifies, or the one named by `resume`, or a new run where there is none.

    `patience` is the number of evaluations that are no better by what is `followed` after which a run is done,
    `versions` are those of the libraries.

    Raises ResumeError where checkpoints exist but none verifies, and where the run's facts differ from the
    checkpoint's in a key that is not in `allowed`.
    """
    allowed = [RENAMED.get(name, name) for name in allowed]
    aside = checkpoints.sweep()
    skipped: list[Problem] = []
    if resume == "auto":
        checkpoint, skipped = checkpoints.newest()
    else:
        refuse_name("--resume", resume)
        checkpoint = open_checkpoint(Path(resume))
    if checkpoint is None and skipped:
        raise ResumeError(skipped, "No usable checkpoint. --fresh moves the run aside and starts anew.")
    messages = [f"moved {path.name}, which no run wrote, aside" for path in aside]
    messages += [f"skipped {problem.where}: {problem.what}" for problem in skipped]
    if checkpoint is None:
        return Start(None, messages=tuple(messages))
    messages += _accepted_drift(checkpoint, facts, allowed)
    if skipped:
        checkpoints.point_latest_at(checkpoint.folder)
    if resume != "auto":
        messages += [f"moved a later checkpoint to {folder}" for folder in checkpoints.set_aside(checkpoint.step)]
    step = checkpoint.step
    if step > num_steps:
        what = f"is after the {counted(num_steps, 'step{|s}')} that the recipe asks for"
        fix = "Ask for more steps, name an earlier checkpoint with --resume PATH, or start anew with --fresh."
        raise ResumeError(Problem(str(checkpoint.folder), what, fix))
    best = best_step(checkpoint, followed)
    trained = step >= num_steps or has_stopped_improving(evaluated_steps(checkpoint), best, patience)
    complete = trained and run.finished_step() == step
    if complete:
        messages.append(f"already complete: {run.path} was trained for {counted(step, 'step{|s}')}")
    else:
        messages += _other_versions(checkpoint.facts.get("versions", {}), versions)
        messages.append(f"resuming {run.path} from step {step}")
    return Start(checkpoint, trained, complete, tuple(messages))


def move_aside(run: RunFolder) -> Path | None:
    """Renames the run's folder so that a new run can take its place; None where there is none.

    Raises RunInUseError where another process holds it.
    """
    if not run.path.exists() or durable.is_empty(run.path):
        return None
    with run.lock():
        return durable.move_aside(run.path, f"{run.path.name}.{time.strftime('%Y%m%d-%H%M%S')}")


def run_facts(
    recipe: Mapping[str, Any],
    *,
    data: str,
    template: str | None,
    tokenizer: str,
    base: str,
    num_ranks: int,
    choices: Mapping[str, Any],
) -> dict[str, Any]:
    """What decides a run's weights, by key: the recipe flattened, fingerprints, ranks and the plan's choices."""
    facts = {key: value for key, value in _flattened(recipe) if not key.startswith(INERT_KEYS)}
    facts |= {"data": data, "template": _sha256(template), "tokenizer": tokenizer, "base": base}
    facts |= {"ranks": num_ranks}
    facts |= {f"plan.{key}": value for key, value in choices.items()}
    return facts  # without secrets, for a recipe that holds one is refused


def _flattened(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, item in value.items():
        if isinstance(item, dict) and item:
            pairs += _flattened(item, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", item))
    return pairs


def _accepted_drift(checkpoint: Checkpoint, facts: Mapping[str, Any], allowed: Sequence[str]) -> list[str]:
    """The changes since the checkpoint, each in words; ResumeError where one is not allowed or cannot be applied."""
    written: dict[str, Any] = checkpoint.facts["run"]
    then = {RENAMED.get(key, key): value for key, value in written.items()}
    changed = [key for key in sorted({*then, *facts}) if then.get(key) != facts.get(key)]
    fixed = [key for key in changed if _is_fixed(key, then.get(key), facts.get(key), then)]
    refused = [key for key in changed if key in fixed or not _is_allowed(key, allowed)]
    if not refused:
        return [f"changed {key}: then {_short(then.get(key))}, now {_short(facts.get(key))}" for key in changed]
    rows = [
        (key, _short(then.get(key)), _short(facts.get(key)), NOT_ANY_MORE if key in fixed else _effect(key))
        for key in refused
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    problems = [
        Problem(key.ljust(widths[0]), f"then {old:<{widths[1]}}  now {new:<{widths[2]}}  {effect}")
        for key, old, new, effect in rows
    ]
    accept = ", accept it with --allow-change KEY" if len(fixed) < len(refused) else ""
    raise ResumeError(
        problems,
        f"{checkpoint.folder} belongs to another run. Undo the change{accept}, or start anew with --fresh (the old "
        "folder is moved aside).",
    )


def _other_versions(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    others = [f"{name} {then[name]}, now {now[name]}" for name in now if name in then and then[name] != now[name]]
    return [f"the checkpoint was written with {'; '.join(others)}: rounding may differ"] if others else []


def _is_fixed(key: str, then: Any, now: Any, facts: Mapping[str, Any]) -> bool:
    """Whether the tensors of a checkpoint decide a key, so that no permission could make its change count."""
    if key == "tuning.kind":
        return "full" in (then, now)
    if key == "plan.optimizer_state":
        return "8bit" in (then, now)
    if key == "optimizer.lora_plus_ratio":
        return None in (then, now)
    if key in ("plan.sharding", "ranks"):
        shardings = {facts.get("plan.sharding"), *[then, now] * (key == "plan.sharding")}
        # Moments in 8 bits share scales by blocks of what a rank held.
        in_blocks = "fsdp2" in shardings and facts.get("plan.optimizer_state") == "8bit"
        return in_blocks or not shardings <= {"none", "ddp", "fsdp2"}
    return key in FIXED_KEYS


def _effect(key: str) -> str:
    return next((effect for prefix, effect in EFFECTS.items() if key.startswith(prefix)), "another run")


def _is_allowed(key: str, allowed: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


def _sha256(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:21] + "…"
