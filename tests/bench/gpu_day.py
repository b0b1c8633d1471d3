"""What only a GPU can tell, in pieces that go on where they were stopped: predictions first, then what is measured.

    python tests/bench/gpu_day.py --minutes 9 [--out FILE]     on a GPU; the same command again goes on
    python tests/bench/gpu_day.py --rehearse --out FILE        every piece on a CPU, with a tiny model: no figure counts

FILE gets a JSON row for each piece: what it found, or the error, with card, versions, commit and settings. A piece of
this commit that has its row is not run again. Each runs in a process of its own, which a time limit ends.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from qwentune.facts.gpus import GpuSpec, gpu_spec  # noqa: E402
from qwentune.facts.models import config_of, model_spec  # noqa: E402
from qwentune.facts.present import present_gpus  # noqa: E402
from qwentune.memory import PlanRequest, make_plan  # noqa: E402
from qwentune.memory.closed_form.limit import Limit  # noqa: E402
from qwentune.memory.closed_form.roofline import step_seconds  # noqa: E402
from qwentune.memory.rates import find_rates, keep_rates, with_rates  # noqa: E402
from tests.bench.memory_grid import Case, full_rows, network  # noqa: E402

TINY = "builtin:tiny-qwen3"
LIBRARIES = ("torch", "transformers", "peft", "trl", "unsloth", "liger-kernel", "bitsandbytes", "flash-attn")
STEPS, WARM_UP = 12, 4
PEERS = ("ours", "bare", "trl", "trl-tuned", "unsloth")


@dataclass(frozen=True)
class Day:
    """The sizes of a day: true ones on a GPU, or those of a rehearsal."""

    rehearses: bool

    @property
    def device(self) -> str:
        """What is measured."""
        return "cpu" if self.rehearses else "cuda"

    @property
    def card(self) -> GpuSpec:
        """The card that plans are made for; in a rehearsal none is measured by it."""
        found = None if self.rehearses else present_gpus()
        return gpu_spec("h200") if found is None else found.cards[0]

    def case(self, model: str, kind: str) -> Case:
        """The step that the plan chooses, 16k tokens of rows of 2,048 each; in a rehearsal a little one."""
        if self.rehearses:
            return Case(TINY, kind, 64, micro_batch=2, checkpointing=False, attention="sdpa")
        spec = model_spec(model)
        chosen = make_plan(spec, with_rates(self.card, spec.id), PlanRequest(kind, 2048, 8)).choices  # type: ignore[arg-type]
        return Case(
            model,
            kind,
            2048,
            micro_batch=chosen.micro_batch,
            accumulation=chosen.accumulation,
            checkpointing=chosen.gradient_checkpointing,
            attention=chosen.attention,
        )


def rates(day: Day) -> dict[str, Any]:
    """The card's rates, kept for the plans of the pieces that follow."""
    import torch

    from qwentune.training.card import measured_rates

    sizes: dict[str, Any] = {"square": 64, "tokens": 8, "row_lengths": (16,), "copied": 4096} if day.rehearses else {}
    spec = model_spec(TINY if day.rehearses else "Qwen/Qwen3-8B")
    name = "rehearsal" if day.rehearses else day.card.name
    found = measured_rates(name, spec, versions(), torch.device(day.device), **sizes)
    if not day.rehearses:
        keep_rates(found)
    return asdict(found)


def correctness(day: Day) -> dict[str, Any]:
    """The tests that need a GPU; in a rehearsal they are collected alone."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-m", "gpu", "--disable-warnings", "--tb=line", "tests"]
    ran = subprocess.run(
        [*command, "--collect-only"] if day.rehearses else command, cwd=ROOT, capture_output=True, text=True
    )
    said = ran.stdout.strip().splitlines()
    if ran.returncode:
        raise RuntimeError("\n".join(said[-20:]))
    return {"said": said[-1]}


def attention(day: Day, tokens: int) -> dict[str, Any]:
    """Milliseconds of an attention layer, forward and backward, by kernel, over chains of a quarter of the row."""
    import torch

    from qwentune.data.layout.batch import collate
    from qwentune.data.layout.trie import lay_out
    from qwentune.model.attention import KERNELS, Visibility

    heads, kv_heads, width = (4, 2, 32) if day.rehearses else (32, 8, 128)
    tokens = 128 if day.rehearses else tokens
    import numpy as np

    weights = np.ones(tokens // 4, dtype=np.float32)
    weights[0] = 0
    chains = [[(np.zeros(tokens // 4, dtype=np.int32), weights)] for _ in range(4)]
    batch = collate([lay_out(chains)], 1.0)
    seen = Visibility.of({name: x if name == "trees" else x.to(day.device) for name, x in batch.items()})
    found: dict[str, Any] = {}
    for name in ["qwentune_sdpa"] if day.rehearses else sorted(KERNELS):
        q, k, v = (
            torch.randn(1, count, tokens, width, device=day.device, dtype=torch.bfloat16, requires_grad=True)
            for count in (heads, kv_heads, kv_heads)
        )
        kernel = partial(KERNELS[name], q, k, v, seen, None, scale=width**-0.5, dropout_p=0.0)
        try:
            times = [timed(lambda kernel=kernel: kernel().sum().backward(), day) for _ in range(8)]
        except Exception as error:  # of one kernel; the others are worth having
            found[name] = f"{type(error).__name__}: {str(error)[:300]}"
        else:
            found[name] = 1000 * min(times[2:])
    return found


def timed(run: Callable[[], object], day: Day) -> float:
    """Seconds until the device has done it."""
    import torch

    wait: Callable[[], None] = (lambda: None) if day.device == "cpu" else torch.cuda.synchronize
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


class Steps:
    """Optimizer steps of a case as qwentune takes them: its head, its optimizer, its attention."""

    def __init__(self, day: Day, case: Case, *, compiled: bool = False, model: Any = None) -> None:
        from qwentune.model.adamw import AdamW
        from qwentune.model.head import LossHead

        self.case = case
        self.model = network(case, day.device) if model is None else model
        if compiled:
            for layer in self.model.get_decoder().layers:
                layer.compile(dynamic=True, fullgraph=True)
        self.head = LossHead(self.model, "supervised", is_compiled=compiled)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = AdamW([{"params": trained, "eight_bit": case.kind == "full"}], lr=1e-5)
        self.batch = full_rows(case, day.device)

    def step(self) -> Any:
        """The loss of the last micro-batch, still on the device."""
        loss = None
        for _ in range(self.case.accumulation):
            loss = self.head.loss(self.model, self.batch)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def waits(day: Day) -> dict[str, Any]:
    """Of 0.6B LoRA: places where the host waits for the device, and the kernels of a step by their time."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    steps = Steps(day, day.case("Qwen/Qwen3-0.6B", "lora"))
    for _ in range(2):
        steps.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not day.rehearses:
            torch.cuda.set_sync_debug_mode("warn")
        steps.step()
        if not day.rehearses:
            torch.cuda.set_sync_debug_mode("default")
    on_gpu = [] if day.rehearses else [ProfilerActivity.CUDA]
    with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiled:
        timed(steps.step, day)
    events = profiled.key_averages()

    def took(event: Any) -> float:
        return event.self_cpu_time_total if day.rehearses else event.self_device_time_total

    launches = sum(event.count for event in events if "LaunchKernel" in event.key)
    longest = {event.key[:80]: took(event) for event in sorted(events, key=took, reverse=True)[:15]}
    synchronizing = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    return {"waits": synchronizing, "launches": launches, "microseconds": longest}


def speed(day: Day, kind: str, compiled: bool) -> dict[str, Any]:
    """Tokens per second and peak of 8B beside the plan's; seconds of the first step, which compiles."""
    import torch

    case = day.case("Qwen/Qwen3-8B", kind)
    on_gpu = day.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    steps = Steps(day, case, compiled=compiled)
    first = timed(steps.step, day)
    taken = [timed(steps.step, day) for _ in range(3 if day.rehearses else STEPS)]
    best = median(taken[1 if day.rehearses else WARM_UP :])
    tokens = case.settings.forward_tokens * case.accumulation
    return {
        "case": case.name,
        "compiled": compiled,
        "first_step_seconds": first,
        "step_seconds": best,
        "tokens_per_second": tokens / best,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "predicted": predicted(day, kind),
    }


def predicted(day: Day, kind: str) -> dict[str, Any]:
    """Seconds of a step, its peak and its share of the limit, as the plan has them."""
    from qwentune.memory.closed_form.phases import phases
    from qwentune.memory.settings import device_overheads

    case = day.case("Qwen/Qwen3-8B", kind)
    settings = case.settings
    if kind == "full":
        settings = replace(settings, optimizer_state="8bit")
    gpu = with_rates(day.card, case.spec.id)
    seconds = step_seconds(case.spec, settings, gpu)
    tokens = settings.forward_tokens * settings.accumulation
    kept = find_rates(gpu.name)
    limit = Limit.of(case.spec, settings, day.card, kept and kept.product_tflops)
    peak = phases(case.spec, settings, device_overheads(gpu), False)["train_step"].allocated
    share = limit and limit.share(tokens, tokens // case.tokens, seconds)
    return {"case": case.name, "step_seconds": seconds, "peak_bytes": peak, "limit_share": share}


def peers(day: Day) -> dict[str, Any]:
    """Tokens per second of each on the same rows and weights, A-B-B-A; void where first losses differ by 1 %."""
    installed = [name for name in PEERS if name != "unsloth" or find_spec("unsloth") is not None]
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in installed}
    with tempfile.TemporaryDirectory(prefix="gpu-day-") as folder:
        write_peer_model(day, Path(folder))
        for name in [*installed, *reversed(installed)]:
            turns[name].append(asked([f"turn:{name}", "--model", folder], day, 240))
    losses = [turn["first_loss"] for each in turns.values() for turn in each if "first_loss" in turn]
    apart = (max(losses) - min(losses)) / min(losses) if losses else None
    absent = [name for name in PEERS if name not in installed]
    return {"turns": turns, "absent": absent, "losses_apart": apart, "void": apart is None or apart > 0.01}


def write_peer_model(day: Day, folder: Path) -> None:
    """Random weights that every peer loads from a folder, and a tokenizer that none of them needs."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qwentune.data.tokenizing.vocabulary import write_tokenizer

    case = day.case("Qwen/Qwen3-8B", "lora")
    torch.manual_seed(0)
    with torch.device(day.device):
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config_of(case.spec)), dtype=torch.bfloat16
        )
    model.save_pretrained(str(folder))
    write_tokenizer(folder, "qwen3", 1000, "<|im_end|>")


def turn(day: Day, name: str, folder: str) -> dict[str, Any]:
    """One peer's first loss, speed and peak. Rows are documents of the full length, so that no layout differs."""
    import torch

    case = day.case("Qwen/Qwen3-8B", "lora")
    rows = full_rows(replace(case, micro_batch=case.micro_batch * case.accumulation), "cpu")["input_ids"]
    rows = rows.view(-1, case.tokens)
    losses, seconds = {"ours": own_turn, "bare": bare_turn}.get(name, trl_turn)(day, case, rows, name, folder)
    skipped = 1 if day.rehearses else WARM_UP
    return {
        "first_loss": losses,
        "tokens_per_second": rows.numel() / median(seconds[skipped:]),
        "seconds": seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if day.device == "cuda" else None,
    }


def own_turn(day: Day, case: Case, rows: Any, name: str, folder: str) -> tuple[float, list[float]]:
    """As qwentune trains."""
    from qwentune.model.adapters import add_adapters
    from qwentune.model.attention import IMPLEMENTATIONS
    from qwentune.model.loading import load_model, recompute_layers
    from qwentune.recipe import Tuning

    model = load_model(Path(folder), dtype="bf16", attention=IMPLEMENTATIONS[case.attention])
    recompute_layers(model, case.checkpointing)
    tuning = Tuning.model_validate({"kind": "lora", "rank": 16})
    steps = Steps(day, case, model=add_adapters(model, tuning, "bf16").to(day.device).train())
    first = float(steps.step()) * case.tokens / (case.tokens - 1)  # the mean over what is trained
    return first, [timed(steps.step, day) for _ in range(3 if day.rehearses else STEPS)]


def lora() -> Any:
    """The adapters that all peers train."""
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def bare_turn(day: Day, case: Case, rows: Any, name: str, folder: str) -> tuple[float, list[float]]:
    """Plain transformers and PEFT, the rows of our micro-batch."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model: Any = get_peft_model(plain.to(day.device), lora(), autocast_adapter_dtype=False).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    given = rows.to(day.device)
    losses: list[Any] = []

    def step() -> None:
        for micro in given.split(case.micro_batch):
            loss = model(input_ids=micro, labels=micro).loss / case.accumulation
            loss.backward()
            losses.append(loss.detach() * case.accumulation)
        optimizer.step()
        optimizer.zero_grad()

    timed(step, day)
    return float(losses[0]), [timed(step, day) for _ in range(3 if day.rehearses else STEPS)]


def trl_turn(day: Day, case: Case, rows: Any, name: str, folder: str) -> tuple[float, list[float]]:
    """TRL with its defaults, or tuned: bf16, no recomputing, our micro-batch; Unsloth's model under TRL's trainer."""
    model: Any = folder
    options: dict[str, Any] = {"peft_config": lora()}
    if name == "unsloth":
        from unsloth import FastLanguageModel  # type: ignore[import-not-found]  # before trl, which it changes

        model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=case.tokens, load_in_4bit=False)
        targets = [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]
        model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, target_modules=targets)
        options = {}
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            timed(lambda: None, day)
            marks.append(time.perf_counter())

    tuned: dict[str, Any] = {}
    if name == "trl-tuned":
        tuned = {"gradient_checkpointing": False, "model_init_kwargs": {"dtype": "bfloat16"}}
    micro_batch = case.micro_batch if name == "trl-tuned" else 1
    with tempfile.TemporaryDirectory() as output:
        arguments = SFTConfig(
            output_dir=output,
            max_steps=4 if day.rehearses else STEPS + 1,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=len(rows) // micro_batch,
            max_length=case.tokens,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=day.rehearses,
            bf16=not day.rehearses,
            disable_tqdm=True,
            **tuned,
        )
        data = Dataset.from_dict({"input_ids": rows.tolist() * (STEPS + 2)})
        tokenizer = AutoTokenizer.from_pretrained(folder)
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()], **options
        )
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses[0], [after - before for before, after in pairwise(marks)]


# Seconds that each may take on a GPU at most, in the order of what is wanted most.
PIECES: dict[str, tuple[int, Callable[[Day], dict[str, Any]]]] = {
    "rates": (60, rates),
    "attention-2048": (60, lambda day: attention(day, 2048)),
    "attention-16384": (60, lambda day: attention(day, 16384)),
    "waits-0.6b-lora": (60, waits),
    "8b-lora-eager": (90, lambda day: speed(day, "lora", False)),
    "8b-lora-compiled": (150, lambda day: speed(day, "lora", True)),
    "8b-qlora-eager": (90, lambda day: speed(day, "qlora", False)),
    "8b-full-eager": (90, lambda day: speed(day, "full", False)),
    "peers": (600, peers),
    "8b-qlora-compiled": (150, lambda day: speed(day, "qlora", True)),
    "8b-full-compiled": (150, lambda day: speed(day, "full", True)),
    "correctness": (600, correctness),
}


def versions() -> dict[str, str]:
    """Those of the libraries that are installed."""

    def each() -> Iterator[tuple[str, str]]:
        for name in LIBRARIES:
            try:
                yield name, version(name)
            except PackageNotFoundError:
                continue

    return dict(each())


def commit() -> str:
    """The tree's commit, and whether it was changed since."""
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def asked(what: list[str], day: Day, limit: float) -> dict[str, Any]:
    """What a process of its own answers for a piece; its error where it has none."""
    command = [sys.executable, __file__, "--piece", *what, *(["--rehearse"] if day.rehearses else [])]
    try:
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"it took more than {limit:.0f} s"}
    answers = [line for line in ran.stdout.splitlines() if line.startswith("ANSWER ")]
    if ran.returncode or not answers:
        return {"error": "\n".join(re.sub(r"\x1b\[[0-9;]*m", "", ran.stderr).strip().splitlines()[-5:])}
    return json.loads(answers[-1].removeprefix("ANSWER "))


def run(day: Day, minutes: float, out: Path, only: list[str]) -> int:
    """Runs what has no row yet, while there is time; the number of pieces that failed."""
    deadline = time.monotonic() + 60 * minutes
    facts = {"card": "cpu" if day.rehearses else day.card.name, "versions": versions(), "commit": commit()}
    facts["rehearsal"] = day.rehearses
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {row["piece"] for row in rows if row["commit"] == facts["commit"] and "error" not in row["found"]}

    def keep(piece: str, found: dict[str, Any], seconds: float) -> None:
        with out.open("a") as stream:
            stream.write(json.dumps({"piece": piece, **facts, "seconds": round(seconds, 1), "found": found}) + "\n")
        print(f"{piece}: {json.dumps(found)[:300]}", flush=True)

    failed = 0
    for piece, (limit, _) in PIECES.items():
        if only and piece not in only:
            continue
        if piece != "rates" and "predictions" not in done:  # by the card's rates, before anything else is measured
            done.add("predictions")
            keep("predictions", {kind: predicted(day, kind) for kind in ("lora", "qlora", "full")}, 0.0)
        left = deadline - time.monotonic()
        if piece in done or left < 20:
            continue
        began = time.monotonic()
        found = asked([piece], day, min(left, 1200 if day.rehearses else limit))
        failed += "error" in found
        keep(piece, found, time.monotonic() - began)
    return failed


def main() -> int:
    """The whole day, or one piece of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=Path("gpu_day.jsonl"))
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--only", nargs="*", default=[], choices=[*PIECES])
    parser.add_argument("--piece", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    asked_for = parser.parse_args()
    day = Day(asked_for.rehearse)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if asked_for.piece is None:
        if not day.rehearses and present_gpus() is None:
            parser.error("there is no GPU here; --rehearse runs every piece on a CPU, and measures nothing")
        return 1 if run(day, asked_for.minutes, asked_for.out, asked_for.only) else 0
    name = asked_for.piece
    found = turn(day, name.removeprefix("turn:"), asked_for.model) if ":" in name else PIECES[name][1](day)
    print(f"ANSWER {json.dumps(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
