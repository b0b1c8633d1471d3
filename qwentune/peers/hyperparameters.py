"""Terms that all tools share: which rows and weights, how far and for how long they move, what is written."""

from __future__ import annotations

from pathlib import Path

from qwentune.peers.configuration import Given
from qwentune.peers.translation import Translation, as_mapping, shown

OPTIMIZERS = {  # by name: the state that AdamW has there; every other name is another optimizer
    **dict.fromkeys(("adamw", "adam", "adamw_hf", "adamw_torch", "adamw_torch_fused", "adamw_anyprecision"), "auto"),
    **dict.fromkeys(("adamw_torch_xla", "adamw_apex_fused", "paged_adamw", "paged_adamw_32bit"), "auto"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), "8bit"),
}
SCHEDULES = {
    "linear": "linear",
    **dict.fromkeys(("cosine", "cosine_with_min_lr", "cosine_warmup_with_min_lr"), "cosine"),
    **dict.fromkeys(("constant", "constant_with_warmup"), "constant"),
    **dict.fromkeys(("warmup_stable_decay", "wsd", "WSD"), "wsd"),
}
WITHOUT_WARMUP = "constant"
TRACKERS = ("clearml", "comet_ml", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")  # also terms: switches
KINDS = ("full", "lora", "qlora")
NUMBERS = ("optimizer.learning_rate", "optimizer.weight_decay", "optimizer.min_learning_rate", "seed")


def translate_hyperparameters(t: Translation) -> None:
    """Every term that is no tool's own; the data come first, as without eval rows nothing is evaluated."""
    _rows(t)
    if given := t.written.get("model"):
        t.set("model", str(given.value), given)
    if (given := t.get("revision")) and given.value not in ("main", "master", "default"):
        t.set("revision", str(given.value), given)
    _tuning(t)
    for name in NUMBERS:
        given = t.get(name)
        if given is not None and (value := t.number(name)) is not None:
            t.set(name, value if name == "seed" else float(value), given)
    _length_of_the_run(t)
    _schedule(t)
    _batch(t)
    _adamw(t)
    _precision(t)
    _output(t)
    t.leave_out(t.written.get("launch"), "hardware.launch: auto takes the plan's file (ddp, fsdp2, zero1 to zero3)")
    t.leave_out(t.written.get("attention"), "memory.attention: auto takes the plan's kernel")


def _rows(t: Translation) -> None:
    share = t.number("eval_share")
    if share and "data.eval" not in t.settings:
        if share < 1:
            t.set("data.eval_fraction", float(share), t.get("eval_share"))
        else:
            t.leave_out(t.get("eval_share"), "a number of rows: data.eval_fraction is a share of them", changes=True)
    if (tokens := t.number("max_tokens")) is not None:
        t.set("data.max_tokens", int(tokens), t.get("max_tokens"))
    if "data.packing" not in t.settings:
        t.set("data.packing", t.flag("packing"), t.get("packing"))
    if (given := t.get("system")) and "data.system" not in t.settings:
        t.set("data.system", str(given.value), given)


def _tuning(t: Translation) -> None:
    method, bits = t.get("method"), _bits(t)
    name = str(method.value).lower() if method else "full"
    kind = name if name in KINDS else "lora"
    if method and kind != name:
        t.refuse(method, f"{shown(method.value)} is not here; full, lora and qlora are", "Choose one of them there.")
    if kind == "lora" and bits and bits[1] == 4:
        kind = "qlora"
    sources = [method, bits[0] if bits and kind == "qlora" else None]
    t.set("tuning.kind", kind, *sources)
    if bits and bits[1] != 4:
        t.leave_out(bits[0], f"a base in {bits[1]} bits: it is held in 16 bits, or in 4 (tuning.kind: qlora)")
    if kind == "full":
        for term in ("rank", "alpha", "dropout", "targets", "all_linear", "start_from", "lora_plus", "dora", "rslora"):
            t.leave_out(t.written.get(term), "adapters, which full tuning does not have")
        return
    rank, alpha = t.number("rank"), t.number("alpha")
    if rank is not None:
        t.set("tuning.rank", int(rank), t.get("rank"))
        if alpha is None:
            alpha = 2 * rank
        t.set("tuning.alpha", round(alpha), t.get("alpha") or Given("lora_alpha", f"{alpha:g}", ""))
    if (dropout := t.number("dropout")) is not None:
        t.set("tuning.dropout", float(dropout), t.get("dropout"))
    _targets(t)
    dora, rslora = t.flag("dora"), t.flag("rslora")
    if dora and rslora:
        t.refuse(t.written["dora"], f"{t.written['rslora'].key} is on too, and an adapter is one of them", "Keep one.")
    elif dora or rslora:
        t.set("tuning.variant", "dora" if dora else "rslora", t.get("dora" if dora else "rslora"))
    if (given := t.written.get("start_from")) and (folders := t.words("start_from")):
        if len(folders) > 1:
            t.refuse(given, f"{len(folders)} adapters are given; a run goes on from one", "Merge the others first.")
        t.set("tuning.start_from", folders[-1], given, remark="a new run that starts from it")
    if (ratio := t.number("lora_plus")) is not None and "lora_plus" in t.written:
        t.set("optimizer.lora_plus_ratio", float(ratio), t.written["lora_plus"])


def _bits(t: Translation) -> tuple[Given, int] | None:
    if given := t.written.get("bits"):
        return given, int(t.number("bits") or 0)
    if t.flag("bits4"):
        return t.written["bits4"], 4
    return (t.written["bits8"], 8) if t.flag("bits8") else None


def _targets(t: Translation) -> None:
    given, names = t.get("targets"), t.words("targets")
    if (
        given is not None
        and not t.flag("all_linear")
        and not {"all", "all-linear", "all_linear"} & {name.lower() for name in names}
    ):
        t.set("tuning.targets", names, given)
    else:
        t.set("tuning.targets", "all-linear", t.written.get("all_linear") or given)


def _length_of_the_run(t: Translation) -> None:
    steps = t.number("max_steps")
    if steps is not None and steps > 0:
        t.set("optimizer.max_steps", int(steps), t.get("max_steps"))
        t.leave_out(t.written.get("epochs"), "the number of steps decides how long the run is")
    elif (epochs := t.number("epochs")) is not None:
        t.set("optimizer.epochs", float(epochs), t.get("epochs"))


def _schedule(t: Translation) -> None:
    given = t.get("schedule")
    name = "linear" if given is None else str(given.value)
    ours = SCHEDULES.get(name, SCHEDULES.get(name.lower(), ""))
    if not ours:
        ours = "cosine" if name.startswith("cosine") or name in ("one_cycle", "rex") else "linear"
        t.differs(f"the schedule {name}", f"{ours}: the nearest that is here")
    t.set("optimizer.schedule", ours, given)
    if ours == "constant" and (lowest := t.settings.pop("optimizer.min_learning_rate", None)):
        t.leave_out(lowest.sources[0], "a constant learning rate does not fall")
    _schedule_arguments(t, ours)
    steps, share = t.number("warmup_steps"), t.number("warmup_ratio")
    if name == WITHOUT_WARMUP:
        t.set("optimizer.warmup_fraction", 0.0, given, remark="this schedule had no warm-up there")
    elif steps and steps >= 1:
        t.set("optimizer.warmup_steps", int(steps), t.get("warmup_steps"))
    elif steps and steps > 0:
        t.set("optimizer.warmup_fraction", float(steps), t.get("warmup_steps"))
    elif "warmup_steps" in t.written and t.written["warmup_steps"].value is not False and not share:
        t.set("optimizer.warmup_fraction", 0.0, t.get("warmup_steps"))
    elif share is not None:
        t.set("optimizer.warmup_fraction", float(share), t.get("warmup_ratio"))


def _schedule_arguments(t: Translation, schedule: str) -> None:
    rate = t.settings.get("optimizer.learning_rate")
    if (share := t.number("min_rate_share")) is not None and rate and schedule == "cosine":
        t.set("optimizer.min_learning_rate", _rounded(share * rate.value), t.get("min_rate_share"))
    given = t.written.get("schedule_arguments")
    if given is None:
        return
    rest = as_mapping(given.value)
    if rest is None:
        t.refuse(given, f"{shown(given.value)} is given; a mapping is needed", "Correct it there first.")
        return
    least, share = rest.pop("min_lr", None), rest.pop("min_lr_rate", None)
    lowest = least if least is not None else share * rate.value if share is not None and rate else None
    if lowest is not None:
        t.set("optimizer.min_learning_rate", _rounded(float(lowest)), given)
    steps = t.settings.get("optimizer.max_steps")
    if (decay := rest.pop("num_decay_steps", None)) and schedule == "wsd" and steps:
        t.set("optimizer.decay_fraction", _rounded(decay / steps.value), given)
        rest.pop("num_stable_steps", None)
    if rest:
        t.leave_out(Given(given.key, rest, given.where), "arguments of a schedule that is not here", changes=True)


def _batch(t: Translation) -> None:
    whole = t.number("rows_per_step")
    if whole:
        t.set("batch.sequences_per_step", int(whole), t.get("rows_per_step"), remark="over all GPUs")
        return
    rows, parts, gpus = t.number("rows_per_gpu") or 1, t.number("accumulation"), t.configuration.gpus or 1
    if parts is None:
        parts = max(1, -(-16 // (int(rows) * gpus)))  # ms-swift's rule
    remark = f"{rows} × {parts} × {gpus} GPU{'s' if gpus > 1 else ''}"
    if t.configuration.gpus is None:
        remark += "; multiply by the number of GPUs there"
    total = int(rows) * int(parts) * gpus
    t.set("batch.sequences_per_step", total, t.get("rows_per_gpu"), t.get("accumulation"), remark=remark)


def _adamw(t: Translation) -> None:
    given = t.get("optimizer")
    if given is not None:
        name = str(given.value)
        state = OPTIMIZERS.get(name)
        if state is None:
            why = "AdamW with averages in fp32 or 8 bits is here" if name.startswith("adamw") else "AdamW is here"
            t.leave_out(given, f"another optimizer: {why}", changes=True)
        else:
            t.set("optimizer.kind", "adamw", given)
        if state == "8bit":
            t.set("precision.optimizer_state", "8bit", given)
    plugin = t.written.get("optimizer_plugin")
    if plugin is not None and str(plugin.value) not in OPTIMIZERS:
        t.leave_out(plugin, "another optimizer: AdamW is here", changes=True)
    first, second = t.number("beta1"), t.number("beta2")
    if first is not None or second is not None:
        betas = [0.9 if first is None else float(first), 0.999 if second is None else float(second)]
        if betas != [0.9, 0.999]:
            t.set("optimizer.betas", betas, t.get("beta1"), t.get("beta2"))
    norm = t.number("max_grad_norm")
    if norm is not None and norm > 0:
        t.set("optimizer.max_grad_norm", float(norm), t.get("max_grad_norm"))
    elif norm is not None:
        t.set("optimizer.max_grad_norm", 1.0e9, t.get("max_grad_norm"), remark="no clipping, as there")


def _precision(t: Translation) -> None:
    if t.flag("fp16") and str(t.written["fp16"].value) != "auto":
        t.leave_out(t.written["fp16"], "fp16, in which Qwen models overflow: bf16 or fp32 is taken", changes=True)
    if t.flag("fp32"):
        t.set("precision.weights", "fp32", t.get("fp32"))
    given = t.written.get("dtype")
    if given is not None:
        name = str(given.value).removeprefix("torch.")
        if name == "float32":
            t.set("precision.weights", "fp32", given)
        elif name == "float16":
            t.leave_out(given, "fp16, in which Qwen models overflow: bf16 or fp32 is taken", changes=True)
        else:
            t.leave_out(given, "precision.weights: auto is bf16 where the hardware has it")
    t.leave_out(t.written.get("bf16"), "precision.weights: auto is bf16 where the hardware has it")


def _output(t: Translation) -> None:
    if given := t.get("output_dir"):
        folder = Path(str(given.value))
        if folder.is_dir() and any(folder.iterdir()):
            t.leave_out(given, "that folder holds files already: the run takes one of its own")
        else:
            t.set("output.dir", str(folder), given)
    _intervals(t, "save")
    if {"data.eval", "data.eval_fraction"} & t.settings.keys():
        _evaluation(t)
    else:
        for term in ("eval_strategy", "eval_steps", "evals_per_epoch", "early_stopping", "best"):
            t.leave_out(t.written.get(term), "there are no eval rows (data.eval, data.eval_fraction)")
    if (keep := t.number("keep")) and keep >= 1:
        t.set("output.keep", int(keep), t.get("keep"))
    elif "keep" not in t.written:
        t.differs("every checkpoint was kept", "the newest three are (output.keep)")
    steps = t.number("logging_steps") if "logging_steps" in t.written else None
    if steps and steps >= 1:
        t.set("output.log_every_steps", int(steps), t.get("logging_steps"))
    _trackers(t)


def _evaluation(t: Translation) -> None:
    _intervals(t, "eval")
    patience = t.number("early_stopping")
    if patience and patience >= 1:
        t.set("output.early_stopping", int(patience), t.get("early_stopping"))
    if t.flag("best"):
        t.set("output.best", "loss", t.get("best"))


def _trackers(t: Translation) -> None:
    project = t.written.get("output.project")
    named = t.words("report_to") + [term for term in TRACKERS if t.flag(term)]
    named += [project.key.partition("_")[0]] if project else []  # a project of W&B switches it on
    trackers = list(dict.fromkeys(name for name in named if name in TRACKERS))
    if trackers:
        said = [t.written[term] for term in ("report_to", *TRACKERS, "output.project") if term in t.written]
        t.set("output.report_to", trackers, *said)
    for name in ("output.project", "output.run_name"):
        given = t.written.get(name)
        if given is not None and set(trackers) - {"tensorboard"}:
            t.set(name, str(given.value), given)
        else:
            t.leave_out(given, "no tracker is on that shows it (output.report_to)")


def _intervals(t: Translation, what: str) -> None:
    """When checkpoints are saved, or evaluations made: each so many steps or epochs."""
    strategy, steps, per_epoch = t.get(f"{what}_strategy"), t.number(f"{what}_steps"), t.number(f"{what}s_per_epoch")
    name = str(strategy.value) if strategy else "steps"
    if per_epoch:
        t.set(f"output.{what}_every_epochs", _rounded(1 / per_epoch), t.get(f"{what}s_per_epoch"))
    elif name in ("epoch", "best"):
        t.set(f"output.{what}_every_epochs", 1.0, strategy)
    elif name == "no":
        t.leave_out(strategy, f"here {'checkpoints' if what == 'save' else 'evaluations'} are made every 100 steps")
    elif steps and steps >= 1:
        t.set(f"output.{what}_every_steps", int(steps), t.get(f"{what}_steps"), strategy)
    elif steps and (epochs := t.settings.get("optimizer.epochs")):
        t.set(f"output.{what}_every_epochs", _rounded(steps * epochs.value), t.get(f"{what}_steps"), strategy)
    elif steps and (whole := t.settings.get("optimizer.max_steps")):
        t.set(f"output.{what}_every_steps", max(1, round(steps * whole.value)), t.get(f"{what}_steps"), strategy)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
