"""What the command line asks of a run."""

from __future__ import annotations

from dataclasses import dataclass


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
