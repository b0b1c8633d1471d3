"""A finished run, as export, chat and eval see it."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwentune.bounded import refuse_name
from qwentune.data.media.limits import limits_if_needed
from qwentune.data.rendering.render import Renderer, RenderOptions
from qwentune.data.templates.chat_template import ChatTemplate
from qwentune.data.tokenizing.checkpoint_folder import checkpoint_folder
from qwentune.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from qwentune.durable import MANIFEST, read_json
from qwentune.errors import Problem, UsageError
from qwentune.exporting.processors import is_whole
from qwentune.facts.adapter_config import read_adapter_config
from qwentune.facts.media import FAMILIES
from qwentune.facts.weight_files import read_adapter, read_weights
from qwentune.recipe import DataOptions, load_recipe
from qwentune.training.run_folder import RunFolder


@dataclass(frozen=True)
class FinishedRun:
    """What a run left behind: its trained weights, what they stand on, and how they were trained."""

    folder: Path
    model: str
    revision: str | None
    tuning: str
    seed: int
    data: DataOptions
    report: dict[str, Any]
    trained: Path
    tokenizer: Tokenizer
    template: ChatTemplate | None
    four_bit: bool  # whether its base stood in 4 bits while it was trained

    @property
    def has_adapter(self) -> bool:
        """Whether the weights are adapters on the base."""
        return self.trained.name == "adapter"

    @property
    def checkpoint(self) -> Path:
        """The folder that says what the tuned model takes of media: its own, or the base's that adapters stand on."""
        stands_on_base = self.has_adapter and is_whole(self.trained)
        return checkpoint_folder(self.model, self.revision) if stands_on_base else self.trained

    @property
    def trained_data(self) -> str | None:
        """The hash of what the run was trained on; None where no checkpoint is left to tell."""
        with suppress(OSError, KeyError, TypeError):
            latest = (self.folder / "latest").read_text(encoding="utf-8").strip()
            return read_json(self.folder / latest / MANIFEST)["facts"]["run"]["data"]
        return None

    def renderer(self, base: Path, model_type: str) -> Renderer:
        """What renders prompts of any length for the run's model, whose type says which media it takes."""
        family = FAMILIES.get(model_type)
        limits = None if family is None else limits_if_needed(base, family, self.data.media)
        options = RenderOptions(max_tokens=sys.maxsize, unsupported_reasoning="drop", system=self.data.system)
        return Renderer(self.tokenizer, self.template, options, limits=limits)


def open_run(folder: Path) -> FinishedRun:
    """The run in `folder`; UsageError where it has not finished, ResumeError where a file of its weights is damaged."""
    refuse_name("RUN", folder)
    trained = RunFolder(folder).trained
    if trained is None:
        fix = "Train it to its end first: the same command continues it."
        raise UsageError(Problem(str(folder), "holds no finished run (no adapter/ or model/)", fix))
    report = RunFolder(folder).read_json("data_report.json")
    if not {"template", "modes", "stop_tokens"} <= report.keys():
        fix = f"`qwentune preview {folder}/recipe.resolved.yaml --json` prints it again, in data_report.json it counts."
        raise UsageError(Problem(str(folder / "data_report.json"), "is missing or cannot be read", fix))
    if trained.name == "adapter":
        read_adapter_config(trained)
        read_adapter(trained)
    else:
        read_weights(trained)
    recipe = load_recipe(folder / "recipe.resolved.yaml").recipe
    tokenizer = load_tokenizer(trained)
    text = tokenizer.chat_template
    return FinishedRun(
        folder=folder,
        model=recipe.model,
        revision=recipe.revision,
        tuning=recipe.tuning.kind,
        seed=recipe.seed,
        data=recipe.data,
        report=report,
        trained=trained,
        tokenizer=tokenizer,
        template=None if text is None else ChatTemplate(text, tokenizer.special_tokens, recipe.data.template_args),
        four_bit=recipe.tuning.kind == "qlora",
    )
