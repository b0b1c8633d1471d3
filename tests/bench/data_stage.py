"""What the data stage costs beside the least that any data stage does.

    python tests/bench/data_stage.py [--chats 20000] [--messages N] [--large GB]

CPU seconds of the whole stage (read, render, encode, mask, write, pack), its processes included, divided by those of a
bare loop that parses each row, renders it once with the compiled template and encodes it once, in batches, before the
stage and after it; those of a second start divided by the first one's; and the wall time of two processes on two cores
divided by that of one on one. Each is a process of its own, net of its start. Beside other work wall time says little:
what the processes would take with both cores for themselves is told by the CPU seconds of each. With `--large`,
instead: the peak memory of the stage with two workers on a file of that size, as the sum of proportional set sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import psutil

from tests.checkpoints import write_checkpoint

BATCH_SIZE = 256
TEMPLATES = {"qwen2_5": "keeps what it wrote", "qwen3": "rewrites history"}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up and returns what the dictionary says of it.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}, "limit": {"type": "integer"}}},
    },
}


def library_lines() -> list[str]:
    """The lines of Python's standard library: code and English, the same on every machine with this Python."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text("utf-8", "replace") for path in sorted(folder.glob("*.py"))]
    return [line for text in texts for line in text.splitlines() if line.strip()]


def chats(seed: int, num_messages: int | None, *, reasoning: bool) -> Iterator[dict[str, Any]]:
    """Random chats without end: short and long, every third with calls of a tool, some in Chinese."""
    rng, lines = Random(seed), library_lines()

    def text(num_lines: int) -> str:
        start = rng.randrange(len(lines) - 2 * num_lines)
        said = "\n".join(lines[start : start + rng.randint(1, 2 * num_lines)])
        return said + "今天天气怎么样？我想去公园走走。" * (rng.random() < 0.1)

    while True:
        has_tools = rng.random() < 0.33
        messages: list[dict[str, Any]] = []
        if rng.random() < 0.3:
            messages.append({"role": "system", "content": text(3)})
        for _ in range((num_messages or 2 * rng.randint(1, 6)) // 2):
            messages.append({"role": "user", "content": text(4)})
            if has_tools and rng.random() < 0.3:
                call = {"name": "look_up", "arguments": {"word": text(1), "limit": rng.randint(1, 9)}}
                messages.append({"role": "assistant", "content": "", "tool_calls": [{"function": call}]})
                messages.append({"role": "tool", "content": text(3)})
            answer = {"role": "assistant", "content": text(10)}
            messages.append(answer | ({"reasoning_content": text(10)} if reasoning and rng.random() < 0.5 else {}))
        yield {"messages": messages} | ({"tools": [TOOL]} if has_tools else {})


def write_chats(path: Path, rows: Iterator[dict[str, Any]], *, count: int = 0, num_bytes: int = 0) -> None:
    """Writes so many chats, or as many as make so many bytes."""
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            if number >= count and file.tell() >= num_bytes:
                return
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


# --- what runs in a process of its own, and prints numbers


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


@contextmanager
def watched(look: Callable[[Sequence[psutil.Process]], None]) -> Generator[None]:
    """Looks at this process and those that it began, ten times a second."""
    done, this = threading.Event(), psutil.Process()

    def watch() -> None:
        while not done.wait(0.1):
            with suppress(psutil.Error):
                look([this, *this.children(recursive=True)])

    watching = threading.Thread(target=watch)
    watching.start()
    yield
    done.set()
    watching.join()


def stage(folder: Path, data: Path, clock: Callable[[], float] = cpu_seconds) -> float:
    """CPU seconds of the data stage of a run on this checkpoint, with whatever its cache holds."""
    from qwentune.data.dataset import chat_template, prepare
    from qwentune.data.tokenizing.tokenizer import load_tokenizer
    from qwentune.recipe import DataOptions

    options = DataOptions.model_validate({"train": [{"path": str(data)}], "max_tokens": 32768, "eval_fraction": 0})
    tokenizer = load_tokenizer(folder)
    template = chat_template(options, tokenizer)
    assert tokenizer.backend  # read before either is timed
    start = clock()
    dataset = prepare(options, tokenizer, template, 0)
    assert len(dataset.train)
    return clock() - start


def wall(folder: Path, data: Path) -> list[float]:
    """Wall seconds of the same, and CPU seconds of each of its processes, of which this one is the first."""
    seconds: dict[int, float] = {}

    def look(processes: Sequence[psutil.Process]) -> None:
        for one in processes:
            times = one.cpu_times()
            seconds[one.pid] = times.user + times.system

    with watched(look):
        start = time.process_time()
        elapsed = stage(folder, data, time.perf_counter)
        seconds[os.getpid()] = time.process_time() - start
    return [elapsed, seconds.pop(os.getpid()), *seconds.values()]


def bare_loop(folder: Path, data: Path) -> float:
    """CPU seconds of parsing and rendering each dialogue once, and of encoding them many at a time."""
    from tokenizers import Tokenizer
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    template = _compile_jinja_template((folder / "chat_template.jinja").read_text("utf-8"))
    start = time.process_time()
    with data.open(encoding="utf-8") as file:
        rows = (json.loads(line) for line in file)
        texts = (template.render(messages=row["messages"], tools=row.get("tools")) for row in rows)
        while batch := list(islice(texts, BATCH_SIZE)):
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                assert encoding.ids
    return time.process_time() - start


def large(folder: Path, data: Path) -> float:
    """Peak memory of the data stage and its workers in GB."""
    peak = 0

    def look(processes: Sequence[psutil.Process]) -> None:
        nonlocal peak
        peak = max(peak, sum(one.memory_full_info().pss for one in processes))

    with watched(look):
        stage(folder, data)
    return peak / 1e9


MEASURES = {"stage": stage, "wall": wall, "bare": bare_loop, "large": large}


def measured(name: str, folder: Path, data: Path, workers: int = 2) -> list[float]:
    """What the measure says in a process of its own with so many cores, whose cache stands beside the data."""
    command = [sys.executable, __file__, "--measure", name, str(folder), str(data)]
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:workers]))
    environment = {
        **os.environ,
        "QWENTUNE_CACHE": str(data.parent / f"cache-{name}-{workers}"),
        "QWENTUNE_WORKERS": str(workers),
        "TOKENIZERS_PARALLELISM": "false",
    }
    run = subprocess.run(
        ["taskset", "-c", cores, *command], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return list(map(float, run.stdout.split()))


def main() -> None:
    """Prints a line for each template."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chats", type=int, default=20_000)
    parser.add_argument("--messages", type=int, help="in each chat; default: 2 to 12")
    parser.add_argument("--large", type=float, metavar="GB", help="peak memory on a file of this size")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, folder, data = arguments.measure
        numbers = MEASURES[name](Path(folder), Path(data))
        print(*(numbers if isinstance(numbers, list) else [numbers]))
        return
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for template, kind in TEMPLATES.items():
            folder = write_checkpoint(root / template, "qwen3", num_ranks=None, template=template)
            data = root / "rows.jsonl"
            rows = chats(0, arguments.messages, reasoning=template == "qwen3")
            if arguments.large:
                write_chats(data, rows, num_bytes=int(arguments.large * 1e9))
                (peak,) = measured("large", folder, data)
                print(f"{template:8} {data.stat().st_size / 1e9:.2f} GB, peak {peak:.2f} GB")
                continue
            write_chats(data, rows, count=arguments.chats)
            order = ("bare", "stage", "stage", "bare")
            (before,), (first,), (second,), (after,) = (measured(measure, folder, data) for measure in order)
            bare = (before + after) / 2
            (one, cpu), (two, *cpus) = (measured("wall", folder, data, workers) for workers in (1, 2))
            megabytes, alone = data.stat().st_size / 1e6, max(*cpus, sum(cpus) / 2) / cpu
            of_two = " + ".join(f"{each:.2f}" for each in cpus)
            print(f"{template:8} ({kind}): {arguments.chats} chats, {megabytes:.0f} MB")
            print(f"{'':8} bare loop {before:.2f} and {after:.2f} s; stage {first:.2f} s, {first / bare:.2f}")
            print(f"{'':8} second start {second:.3f} s, {second / first:.3f}")
            print(f"{'':8} wall time: one core {one:.2f} s, two {two:.2f} s, {two / one:.2f}")
            print(f"{'':8} CPU seconds: one core {cpu:.2f}, two {of_two}; both cores for them alone: {alone:.2f}")


if __name__ == "__main__":
    main()
