"""One run on this rank, from ranks that join to weights that are published."""

from __future__ import annotations

import shlex
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from qwentune import console
from qwentune.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_OK,
    DoesNotFitError,
    LostRankError,
    NotFiniteError,
    Problem,
    ResumeError,
    UserError,
    machine_error,
)
from qwentune.redaction import redact
from qwentune.training.signals import StoppedEarlyError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qwentune.data.dataset import Dataset
    from qwentune.data.layout.schedule import Schedule
    from qwentune.data.tokenizing.tokenizer import Tokenizer
    from qwentune.facts.architecture import ModelSpec
    from qwentune.memory.plan_request import Device
    from qwentune.memory.run_plan import RunPlan
    from qwentune.memory.settings import Settings
    from qwentune.recipe import LoadedRecipe
    from qwentune.training.checkpoints import Checkpoint, Checkpoints
    from qwentune.training.command_line import Request
    from qwentune.training.progress import Recorder
    from qwentune.training.ranks import Ranks
    from qwentune.training.run_folder import RunFolder, State
    from qwentune.training.start import Start
    from qwentune.training.stop import StopOnSignal
    from qwentune.training.trainer import SftTrainer

# What torch, Triton, NCCL and NVIDIA's libraries say where the driver or an allocator gave none.
SIGNS_OF_A_FULL_GPU = ("out of memory", "CUBLAS_STATUS_ALLOC", "CUDNN_STATUS_ALLOC")
# What gloo says on the ranks that are left; NCCL ends their processes itself.
SIGNS_OF_A_LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")


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
        from qwentune.training.heading import curve

        with console.busy("loading transformers"):
            base, facts = self._base()
        checkpoints = Checkpoints(self.folder.path, self.loaded.recipe.output.keep)
        with ExitStack() as held:
            try:
                with console.busy("looking at the run folder"):
                    refuse_other_facts(self.ranks, facts, _library_versions())
                    start = self.ranks.agree(lambda: self._open(held, checkpoints, facts, base))
                    refuse_folder_that_is_not_shared(self.ranks, self.folder)
            except OSError as error:
                raise self._explained(error) or error from None
            for message in start.messages:
                console.say(message)
            if start.complete:
                return EXIT_OK
            try:
                stopped = None if start.trained else self._train(start, base, checkpoints, facts)
                if stopped is not None:
                    return stopped
                self._publish(checkpoints, base)
            except StoppedEarlyError as stopped:
                with suppress(OSError):
                    code = stopped.exit_code
                    self._status(_state(code), code, "a signal, before the next step", start.step)
                raise
            except Exception as error:
                failure = self._explained(error)
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
    def _has_media(self) -> bool:
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
        self.ranks.agree(lambda: refuse_other_weights(base, adapter, has_media=self._has_media))
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

    def _explained(self, error: Exception) -> UserError | None:
        """The error in words for the user; None for a bug."""
        from qwentune.training.disk import disk_error, is_about

        if isinstance(error, UserError):
            return error
        if self.ranks.num_ranks > 1 and any(sign in str(error) for sign in SIGNS_OF_A_LOST_RANK):
            return LostRankError(Problem("", "another rank was lost; the last checkpoint is kept"))
        if isinstance(error, UnpicklingError):
            what = f"a checkpoint holds a pickle of something else than numbers: {str(error).splitlines()[0]}"
            return ResumeError(Problem(str(self.folder.path), what, "It was not run. Take an earlier checkpoint."))
        if is_about(error, self.folder.path):
            return disk_error(error, self.folder.path, "the run folder cannot be written")
        return machine_error(error)

    def _train(self, start: Start, base: Path, checkpoints: Checkpoints, facts: dict[str, Any]) -> int | None:
        """Trains until nothing is left to do; the exit code where a signal stopped it before that, else None."""
        from torch import OutOfMemoryError

        from qwentune.memory.profile import keep_profile
        from qwentune.training.heading import heading, trained_share
        from qwentune.training.progress import Recorder

        recorder = None
        if self.ranks.leads:
            recorder = Recorder(self.folder, self.schedule.num_steps, start.step, self.write_page)
        trainer = None
        try:
            if self.ranks.leads:
                console.say(
                    heading(self.loaded.recipe, self.spec, self.plan, self.dataset, self.schedule, _library_versions())
                )
            with console.busy("loading the weights"):
                trainer, stop = self._trainer(base, start.checkpoint, checkpoints, facts, recorder)
            console.say(trained_share(trainer.model))
            with recorder or nullcontext():
                trainer.train(resume_from_checkpoint=start.checkpoint and str(start.checkpoint.folder))
        except RuntimeError as error:  # whose traceback keeps alive what its frames hold
            if not isinstance(error, OutOfMemoryError) and not any(sign in str(error) for sign in SIGNS_OF_A_FULL_GPU):
                raise
            closing = "Training ended; the last checkpoint is kept."
            raise DoesNotFitError(self._ran_out(trainer, error), closing) from None
        if recorder is not None:
            keep_profile([*recorder.latest], self.spec, self._settings(), self.device, _library_versions())
        step = trainer.state.global_step
        if stop.agreed and step < self.schedule.num_steps:
            self._status(_state(stop.exit_code), stop.exit_code, f"signal {stop.agreed}: saved at step {step}", step)
            console.say(f"saved step {step}; continue with: {shlex.join(self.request.command)}")
            return stop.exit_code
        return None

    def _settings(self) -> Settings:
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
                has_media=self._has_media,
            ),
        )

    def _ran_out(self, trainer: SftTrainer | None, error: Exception) -> Problem:
        """Out of memory in words, with what this rank holds of it at that moment; without a trainer it still loads."""
        from qwentune.facts.continued import continued
        from qwentune.memory.judge import judge_recipe
        from qwentune.memory.shortage import ran_out
        from qwentune.recipe import parse_recipe
        from qwentune.training.held import held_bytes

        request, loaded, recipe, ranks = self.request, self.loaded, self.loaded.recipe, self.ranks
        model: Any = None if trainer is None else trainer.model
        where, phase = "loading", "load"
        if trainer is not None:
            where = f"step {trainer.state.global_step + 1}"
            evaluating = [name for name in ("evaluate", "answer") if name in self.plan.phases]
            worst = max(evaluating, key=lambda name: self.plan.phases[name].total)
            phase = "train_step" if model.training else worst

        def judged(overrides: Sequence[str]) -> RunPlan:
            # Of the text that this run began with: the file may have been edited since.
            changed = continued(parse_recipe(loaded.text, loaded.path, [*request.overrides, *overrides]), self.spec)[0]
            is_counted = changed.recipe.data == recipe.data
            return judge_recipe(
                self.spec,
                changed.recipe,
                device=self.device,
                num_ranks=ranks.num_ranks,
                sharding=ranks.sharding,
                fresh=request.fresh,
                longest_row=self.dataset.longest_row if is_counted else None,
                media=self.dataset.largest_media if is_counted else None,
            )

        return ran_out(
            self.plan,
            where,
            str(error),
            max_tokens=min(recipe.data.max_tokens, self.dataset.longest_row),
            headroom=recipe.memory.headroom,
            phase=phase,
            held=held_bytes(model, None if trainer is None else trainer.optimizer, ranks.device),
            judged=judged,
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
            versions=_library_versions(),
        )
        if start.checkpoint is not None and not start.trained:
            # A changed base may have been allowed.
            trained = start.checkpoint.folder
            whose = [trained] if self.loaded.recipe.tuning.kind == "full" else [base, trained]
            refuse_other_weights(*whose, has_media=self._has_media)
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
            self._status("running", None, "", start.step)
        return start

    def _trainer(
        self,
        base: Path,
        checkpoint: Checkpoint | None,
        checkpoints: Checkpoints,
        facts: dict[str, Any],
        recorder: Recorder | None,
    ) -> tuple[SftTrainer, StopOnSignal]:
        """The trainer over the model, new or from the checkpoint."""
        from qwentune.data.layout.batch import EvalBatches, TrainBatches
        from qwentune.facts.generation_config import as_trained, read_generation_config
        from qwentune.facts.launch import uses_deepspeed
        from qwentune.model.head import LossHead
        from qwentune.training.arguments import training_arguments
        from qwentune.training.held_out import HeldOut
        from qwentune.training.learning_rate import learning_rate_of
        from qwentune.training.network import network_to_train
        from qwentune.training.probe import Probe
        from qwentune.training.shards import configure
        from qwentune.training.stop import StopOnSignal
        from qwentune.training.trackers import continue_record
        from qwentune.training.trainer import SftTrainer

        recipe, ranks, choices = self.loaded.recipe, self.ranks, self.plan.choices
        evaluation = self.dataset.evaluation
        batches = TrainBatches(
            self.dataset.train, self.schedule, choices.micro_batch, choices.accumulation, ranks.rank, ranks.num_ranks
        )
        counts = self.dataset.report["stop_tokens"]
        stops = {name: self.tokenizer.control_ids[name] for name in counts}
        every = sum(counts.values()) == self.dataset.report["trained_spans"]
        batches.prove_first(0 if checkpoint is None else checkpoint.step, stops, every)
        generation = as_trained(read_generation_config(base), stops.values(), self.tokenizer.end_of_text_id)
        held_out = HeldOut.of(self.dataset, self.tokenizer, generation, recipe.output)
        if recipe.output.report_to and ranks.leads:
            continue_record(self.folder, recipe.output)
        arguments = training_arguments(
            recipe.optimizer,
            recipe.output,
            name=redact(recipe.output.run_name or self.folder.path.name),  # trackers get it
            periods=self.schedule.periods(recipe.output),
            staging=checkpoints.folder,
            num_steps=self.schedule.num_steps,
            micro_batch=choices.micro_batch,
            accumulation=choices.accumulation,
            evaluates=len(evaluation) > 0,
            deepspeed_bf16=uses_deepspeed(ranks.sharding) and choices.weights == "bf16",
            shards_weights=ranks.shards_weights,
            seed=recipe.seed,
            on_gpu=ranks.device.type == "cuda",
        )
        model, shards = network_to_train(
            base,
            checkpoint and checkpoint.folder,
            spec=self.spec,
            tuning=recipe.tuning,
            choices=choices,
            ranks=ranks,
            seed=recipe.seed,
            untaught_tokens=self._untaught_tokens(),
            has_media=self._has_media,
        )
        adds_in_fp32 = self._settings().adds_in_fp32
        minutes = recipe.output.save_every_minutes
        stop = StopOnSignal(None if minutes is None else minutes * 60)
        stop.install()
        trainer = SftTrainer(
            model=model,
            args=arguments,
            callbacks=[stop],
            batches=batches,
            eval_batches=EvalBatches(evaluation, ranks.rank, ranks.num_ranks) if len(evaluation) else None,
            loss_head=LossHead(model, choices.loss),
            learning_rate_factor=learning_rate_of(recipe.optimizer, self.schedule.num_steps),
            checkpoints=checkpoints,
            checkpoint_facts={"run": facts, "plan": self.plan.to_json(), "versions": _library_versions()},
            recorder=recorder,
            held_out=held_out,
            followed=recipe.output.followed,
            patience=recipe.output.early_stopping,
            lora_plus_ratio=recipe.optimizer.lora_plus_ratio or 1.0,
            part_rates=recipe.tuning.part_rates,
            eight_bit=choices.optimizer_state == "8bit",
            fp32_sums=adds_in_fp32,
            shards=shards,
        )
        configure(trainer.accelerator, model, adds_in_fp32=adds_in_fp32)
        trainer.add_callback(Probe(trainer, self._measured))
        return trainer, stop

    def _untaught_tokens(self) -> list[int]:
        """The control tokens of the data whose rows a base model never learnt; none for one that was taught to chat."""
        eos = self.tokenizer.eos_token
        stops = self.dataset.report["stop_tokens"]
        if self.dataset.report["trained_turns"] == 0 or eos in stops:
            return []
        return list(self.dataset.control_ids_used)

    def _measured(self, peaks: dict[str, int]) -> None:
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


def _library_versions() -> dict[str, str]:
    return {name: version(name) for name in ("qwentune", "torch", "transformers", "peft", "accelerate")}
