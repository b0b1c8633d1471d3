"""One run on this rank, from ranks that join to weights that are published."""

from __future__ import annotations

import shlex
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwentune import console
from qwentune.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_OK,
    LostRankError,
    NotFiniteError,
)
from qwentune.redaction import redact
from qwentune.training.signals import StoppedEarlyError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qwentune.data.dataset import Dataset
    from qwentune.data.layout.schedule import Schedule
    from qwentune.data.tokenizing.tokenizer import Tokenizer
    from qwentune.facts.architecture import ModelSpec
    from qwentune.memory.plan_request import Device
    from qwentune.memory.run_plan import RunPlan
    from qwentune.memory.settings import Settings
    from qwentune.recipe import LoadedRecipe
    from qwentune.training.checkpoints import Checkpoints
    from qwentune.training.command_line import Request
    from qwentune.training.ranks import Ranks
    from qwentune.training.run_folder import RunFolder, State
    from qwentune.training.start import Start


@dataclass(frozen=True)
class Run:
    """The part of the walk that needs torch; one object only so that its steps need not hand everything on."""

    request: Request
    loaded: LoadedRecipe
    ranks: Ranks
    folder: RunFolder
    spec: ModelSpec
    device: Device
    plan: RunPlan
    tokenizer: Tokenizer
    template: str | None
    dataset: Dataset
    schedule: Schedule
    publish: Callable[..., tuple[int, int]]  # of the layer below, which writes packages
    write_page: Callable[[], None]  # of the last layer

    def run(self) -> int:
        """Joins the ranks, finds where to begin, trains, publishes."""
        from qwentune.training.agreement import refuse_folder_that_is_not_shared, refuse_other_facts
        from qwentune.training.checkpoints import Checkpoints
        from qwentune.training.failures import explained
        from qwentune.training.heading import curve

        with console.busy("loading transformers"):
            base, facts = self._base()
        checkpoints = Checkpoints(self.folder.path, self.loaded.recipe.output.keep)
        with ExitStack() as held:
            try:
                with console.busy("looking at the run folder"):
                    refuse_other_facts(self.ranks, facts, library_versions())
                    start = self.ranks.agree(lambda: self._open(held, checkpoints, facts, base))
                    refuse_folder_that_is_not_shared(self.ranks, self.folder)
            except OSError as error:
                raise explained(error, self.ranks.num_ranks, self.folder.path) or error from None
            for message in start.messages:
                console.say(message)
            if start.complete:
                return EXIT_OK
            try:
                stopped = None if start.trained else self._train(start, base, checkpoints, facts)
                if stopped is not None:
                    return stopped
                self._publish(checkpoints, base)
            except Exception as error:
                failure = explained(error, self.ranks.num_ranks, self.folder.path)
                code = failure.exit_code if failure else EXIT_BUG
                reason = str(failure.problems[0]) if failure else f"{type(error).__name__}: {error}"
                if failure and not self.ranks.leads and not isinstance(failure, NotFiniteError | LostRankError):
                    # Rank 0 may know no more than that a rank was lost.
                    console.say(f"rank {self.ranks.rank}: {failure}", by_any_rank=True)
                with suppress(OSError):  # the disk may be full
                    self._status("failed", code, reason)
                raise failure or error from None
        folder = shlex.quote(str(self.folder.path))
        console.say(
            f"done: {folder}\n{curve(self.folder.losses())}try   qwentune chat {folder}\n      qwentune export {folder}"
        )
        return EXIT_OK

    @property
    def has_media(self) -> bool:
        """Whether its rows show media."""
        return self.dataset.media is not None

    def _base(self) -> tuple[Path, dict[str, Any]]:
        """The folder of the base weights, proved to be those of the plan, and the facts that decide this run."""
        from qwentune.data.tokenizing.checkpoint_folder import BUILTIN
        from qwentune.model.fingerprint import weights_fingerprint
        from qwentune.model.hollow import refuse_other_weights
        from qwentune.model.loading import silence_loading, weights_folder
        from qwentune.training.start import run_facts

        recipe = self.loaded.recipe
        silence_loading()
        if recipe.model.startswith(BUILTIN):  # transformers writes its random weights on rank 0 alone
            self.ranks.agree(lambda: weights_folder(recipe.model))
        base = weights_folder(recipe.model, recipe.revision)
        start_from = None if recipe.tuning.kind == "full" else recipe.tuning.start_from
        # Before an old run is moved aside; one rank looks for all.
        adapter = Path(start_from) if start_from else None
        self.ranks.agree(lambda: refuse_other_weights(base, adapter, has_media=self.has_media))
        facts = run_facts(
            recipe.model_dump(mode="json", by_alias=True),
            data=self.dataset.content,
            template=self.template,
            tokenizer=self.tokenizer.fingerprint,
            base=weights_fingerprint(base),
            num_ranks=self.ranks.num_ranks,
            choices=asdict(self.plan.choices),
        )
        return base, facts

    def _train(self, start: Start, base: Path, checkpoints: Checkpoints, facts: dict[str, Any]) -> int | None:
        """Trains until nothing is left to do; the exit code where a signal stopped it before that, else None."""
        from qwentune.memory.profile import keep_profile
        from qwentune.training.assembly import assembled
        from qwentune.training.card import limit_of
        from qwentune.training.failures import fills_a_gpu, ran_out
        from qwentune.training.heading import heading, speed, trained_share
        from qwentune.training.progress import Recorder

        recorder = None
        if self.ranks.leads:
            recorder = Recorder(self.folder, self.schedule.num_steps, start.step, self.write_page)
        trainer = None
        try:
            if self.ranks.leads:
                console.say(
                    heading(self.loaded.recipe, self.spec, self.plan, self.dataset, self.schedule, library_versions())
                )
            limit = limit_of(self.spec, self.settings(), self.device, library_versions()) if recorder else None
            with console.busy("loading the weights"):
                trainer, stop = assembled(self, base, start.checkpoint, checkpoints, facts, recorder, limit)
            console.say(trained_share(trainer.model))
            with recorder or nullcontext():
                trainer.train(resume_from_checkpoint=start.checkpoint and str(start.checkpoint.folder))
        except RuntimeError as error:  # whose traceback keeps alive what its frames hold
            if not fills_a_gpu(error):
                raise
            raise ran_out(self, trainer, error) from None
        if recorder is not None:
            said = speed([*recorder.latest], limit, self.spec, self.settings(), self.device)
            for line in filter(None, (trainer.times.told(), said)):
                console.say(line)
            keep_profile([*recorder.latest], self.spec, self.settings(), self.device, library_versions())
        step = trainer.state.global_step
        if stop.agreed and step < self.schedule.num_steps:
            self._status(_state(stop.exit_code), stop.exit_code, f"signal {stop.agreed}: saved at step {step}", step)
            console.say(f"saved step {step}; continue with: {shlex.join(self.request.command)}")
            return stop.exit_code
        return None

    def settings(self) -> Settings:
        """The settings of the step that the plan has chosen."""
        from qwentune.memory.judge import settings_of
        from qwentune.memory.media_use import tower_use

        recipe = self.loaded.recipe
        return settings_of(
            self.plan,
            self.spec,
            tuning=recipe.tuning,
            max_tokens=recipe.data.max_tokens,
            batch=recipe.batch,
            device=self.device,
            learns_chat=recipe.data.has_turns,
            towers=tower_use(
                self.spec,
                recipe.tuning,
                recipe.data.max_tokens,
                self.dataset.largest_media,
                has_media=self.has_media,
            ),
        )

    def _open(self, held: ExitStack, checkpoints: Checkpoints, facts: dict[str, Any], base: Path) -> Start:
        """Takes the run folder, finds where to begin and writes what is known before step 1; on rank 0 only."""
        from qwentune.memory.judge import changes_the_plan
        from qwentune.model.hollow import refuse_other_weights
        from qwentune.recipe import resolved_yaml
        from qwentune.training.run_folder import LOG
        from qwentune.training.start import choose_start, move_aside

        if self.request.fresh and (aside := move_aside(self.folder)) is not None:
            console.say(f"moved the old run to {aside}")
        held.enter_context(self.folder.lock())
        start = choose_start(
            self.folder,
            checkpoints,
            facts,
            resume=self.request.resume,
            allowed=[*self.request.allow_change, *(["plan"] if changes_the_plan(self.request.allow_change) else [])],
            num_steps=self.schedule.num_steps,
            patience=self.loaded.recipe.output.early_stopping,
            followed=self.loaded.recipe.output.followed,
            versions=library_versions(),
        )
        if start.checkpoint is not None and not start.trained:
            # A changed base may have been allowed.
            trained = start.checkpoint.folder
            whose = [trained] if self.loaded.recipe.tuning.kind == "full" else [base, trained]
            refuse_other_weights(*whose, has_media=self.has_media)
        if not start.complete:
            self.folder.rewind(start.step)
            console.log_to(self.folder.path / LOG)
            origins = {key: redact(where) for key, where in self.loaded.origins.items()}
            for key, steps in self.schedule.periods(self.loaded.recipe.output).items():
                origins[f"output.{key}"] += f": every {steps} steps"
            resolved = resolved_yaml(self.loaded.recipe, origins)
            self.folder.write("recipe.yaml", self.loaded.text)
            self.folder.write_clean("recipe.resolved.yaml", resolved)  # in its values secrets were refused
            self.folder.write_json("plan.json", self.plan.to_json())
            self.folder.write_json("data_report.json", self.dataset.report)
            self.folder.write_rows("dropped.jsonl", self.dataset.dropped)
            held.push(partial(self._tell_of_an_early_stop, start.step))  # a signal may come as soon as it runs
            self._status("running", None, "", start.step)
        return start

    def measured(self, peaks: dict[str, int]) -> None:
        """Says what the GPU's memory really took beside what the plan reckoned, and keeps it with the plan."""
        from qwentune.memory.shortage import compared

        if self.ranks.leads:
            console.say(compared(self.plan, peaks))
            self.folder.write_json("plan.json", {**self.plan.to_json(), "measured": peaks})

    def _publish(self, checkpoints: Checkpoints, base: Path) -> None:
        """Puts the trained weights into the run folder."""
        if not self.ranks.leads:
            return
        last, published = self.publish(
            self.folder,
            checkpoints,
            self.loaded.recipe,
            self.dataset.report,
            base=base,
            tokenizer=self.tokenizer,
            chat_template=self.template,
        )
        how = "all steps are done" if last >= self.schedule.num_steps else self._why_it_stopped
        self._status("finished", EXIT_OK, f"{how}; published step {published}", last)

    @property
    def _why_it_stopped(self) -> str:
        followed = self.loaded.recipe.output.followed
        return "the eval loss stopped falling" if followed == "loss" else f"{followed} no longer improved"

    def _tell_of_an_early_stop(self, step: int, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, StoppedEarlyError):
            with suppress(OSError):
                self._status(_state(error.exit_code), error.exit_code, "a signal, before the next step", step)

    def _status(self, state: State, code: int | None, reason: str, step: int | None = None) -> None:
        if not self.ranks.leads:
            return
        reached = self.folder.reached_step() if step is None else step
        self.folder.set_status(state, exit_code=code, reason=reason, step=reached, command=self.request.command)
        event = state if state != "running" else "resume" if reached else "start"
        self.folder.add_event(event, reached, steps=self.schedule.num_steps)
        self.write_page()


def _state(exit_code: int) -> State:
    return "interrupted" if exit_code == EXIT_INTERRUPTED else "preempted"


def library_versions() -> dict[str, str]:
    """The versions that a run is kept with."""
    return {name: version(name) for name in ("qwentune", "torch", "transformers", "peft", "accelerate")}
