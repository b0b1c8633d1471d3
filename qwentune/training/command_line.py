"""What the command line asks of a run: the options of both commands that train, and what they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

RecipePath = Annotated[str, typer.Argument(help="The recipe, a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value: keys to change for this time.")]
Resume = Annotated[
    str, typer.Option(help="Where to go on: auto is the newest whole checkpoint, else the folder of one.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Move the old run folder aside and start at step 0.")]
AllowChange = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY",
        help="Go on though this differs from the checkpoint: a key or section of the recipe, or data, template, "
        "tokenizer, base (its weights), ranks, plan. Give it again for more.",
    ),
]
ForceMemory = Annotated[
    bool, typer.Option("--force-memory", help="Train even where the plan says that memory does not suffice.")
]


@dataclass(frozen=True)
class Request:
    """What the command line asks for beside the recipe."""

    recipe: str
    overrides: tuple[str, ...] = ()
    resume: str = "auto"
    fresh: bool = False
    allow_change: tuple[str, ...] = ()
    force_memory: bool = False

    @property
    def command(self) -> list[str]:
        """The command that continues this run."""
        flags = [flag for key in self.allow_change for flag in ("--allow-change", key)]
        return ["qwentune", "train", self.recipe, *self.overrides, *flags, *["--force-memory"] * self.force_memory]

    @property
    def arguments(self) -> list[str]:
        """What a trainer that is launched for this request is given."""
        return [*self.command[2:], "--resume", self.resume, *["--fresh"] * self.fresh]
