"""`qwentune serve`, and the server of the day on what `export` writes: both give the answers that were taught."""

from __future__ import annotations

import json
import multiprocessing
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from transformers import AutoTokenizer

from qwentune import serve as command
from qwentune.errors import DoesNotFitError, UsageError
from qwentune.exporting import cached
from qwentune.exporting import folder as exporting
from qwentune.exporting.cached import served_folder
from qwentune.exporting.finished import open_run
from qwentune.exporting.serving import Address, commands, request
from qwentune.facts.servers import IN_TAGS, response_template
from qwentune.serve import run_serve
from tests.checkpoints import add_weights, write_checkpoint
from tests.finished import finished_run, write_rows
from tests.media.checkpoints import add_media_weights, write_media_checkpoint
from tests.runs import ENVIRONMENT, in_a_fork, write_recipe
from tests.test_eval import LIGHT, row
from tests.test_servers import MERGED
from tests.warm import Warm

NUM_TAUGHT = 8  # calls, JSON, reasoning and plain answers, two of each
# The head too, or random weights are never sure of a token; servers take no such adapter as it is.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
LONGEST_START = 300  # seconds, for torch is loaded beside other tests


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with random weights. Do not write into it."""
    return add_weights(write_checkpoint(tmp_path_factory.mktemp("model") / "qwen3", "qwen3"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ------------------------------------------------------------------------------------------------- what is asked for


def test_where_it_listens_is_part_of_every_command_and_of_the_request() -> None:
    address = Address("0.0.0.0", 9000)
    for server, said in commands(MERGED, address).items():
        assert shlex.split(said)[-4:] == ["--host", "0.0.0.0", "--port", "9000"], server
        assert shlex.split(request(MERGED, server, "Hi", address))[1] == "http://127.0.0.1:9000/v1/chat/completions"
    assert Address("::1", 80).url == "http://[::1]:80"


def test_transformers_knows_a_model_by_its_folder_alone() -> None:
    asked = {server: json.loads(shlex.split(request(MERGED, server, "Hi"))[-1]) for server in commands(MERGED)}
    assert {server: body["model"] for server, body in asked.items()} == {
        **{"vLLM": "mine", "SGLang": "mine"},
        "transformers": "out",
    }


def test_a_port_that_is_taken_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port  {port} cannot be used on 127.0.0.1"):
            run_serve(tmp_path, "127.0.0.1", port)
    with pytest.raises(UsageError, match="--host"):
        run_serve(tmp_path, "no.such.host.invalid", free_port())
    with pytest.raises(UsageError, match="--host"):
        run_serve(tmp_path, "..", free_port())


def test_what_a_server_has_started_ends_with_it() -> None:
    script = "sleep 300 & echo $!; exec sleep 300"
    server = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    assert server.stdout is not None
    engine = psutil.Process(int(server.stdout.readline()))
    command._kill(server)
    server.wait(10)
    psutil.wait_procs([engine], timeout=10)
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
    command._kill(server)  # once more is no error


def test_a_server_whose_starter_was_killed_ends_what_it_has_started(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM's, which holds the card in processes of its own."""
    run = finished_run(tmp_path / "run", model, data={"train": "rows.jsonl"})
    stand_in = tmp_path / "server"
    stand_in.write_text(f"#!/bin/sh\ntrap 'kill $!; exit' TERM\nsleep 300 &\necho $! > {tmp_path}/engine\nwait\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(command, "_program", lambda _: str(stand_in))
    monkeypatch.setattr(command, "_server", lambda _: "transformers")
    starter = multiprocessing.get_context("fork").Process(target=run_serve, args=(run, "127.0.0.1", free_port()))
    starter.start()
    while not (tmp_path / "engine").exists() or not (number := (tmp_path / "engine").read_text().strip()):
        assert starter.is_alive()
        time.sleep(0.1)
    engine = psutil.Process(int(number))
    starter.kill()
    starter.join()
    psutil.wait_procs([engine], timeout=10)
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE


def test_missing_packages_are_named_with_their_extra(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(finished_run(tmp_path / "run", model, data={"train": "rows.jsonl"}))
    monkeypatch.setattr(command, "PACKAGES", ("json", "no_such_package"))
    with pytest.raises(
        UsageError, match=r"needs no_such_package, not installed here\n.*pip install 'qwentune\[serve\]'\n"
    ):
        command._server(run)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_of_a_model_that_sees_torchvision_is_asked_for(tmp_path: Path) -> None:
    sees = write_media_checkpoint(tmp_path / "model", "qwen2_5_vl")
    run = open_run(finished_run(tmp_path / "run", add_media_weights(sees), data={"train": "rows.jsonl"}))
    with pytest.raises(UsageError, match=r"needs torchvision, not installed here\n.*the one that belongs to torch"):
        command._server(run)


def test_of_a_card_vllm_is_taken_where_it_is_installed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(finished_run(tmp_path / "run", model, data={"train": "rows.jsonl"}))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(command, "_program", lambda name: f"/bin/{name}")
    assert command._server(run) == "vLLM"


def test_an_adapter_is_merged_once_and_again_when_it_has_changed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    folder = finished_run(tmp_path / "run", model, lora=True, data={"train": "rows.jsonl"})
    first = served_folder(open_run(folder), merge=True)
    assert (first / "model.safetensors").stat().st_size > 0
    assert f"merging the adapter into its base, once, in {first}" in capsys.readouterr().err
    written = (first / "model.safetensors").stat()
    assert served_folder(open_run(folder), merge=True) == first
    assert (first / "model.safetensors").stat() == written, "reused"

    whole = (first / "model.safetensors").read_bytes()
    (first / "model.safetensors").write_bytes(whole[:-100])
    assert served_folder(open_run(folder), merge=True) == first
    assert (first / "model.safetensors").read_bytes() == whole, "a damaged one is made anew"

    config = folder / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 1}))
    assert served_folder(open_run(folder), merge=True) == first
    assert (first / "model.safetensors").read_bytes() != whole

    monkeypatch.setattr(exporting, "free_disk_bytes", lambda *_, **__: 1000)
    monkeypatch.setattr(cached, "__version__", "another")
    with pytest.raises(DoesNotFitError, match="another disk with the variable QWENTUNE_CACHE"):
        served_folder(open_run(folder), merge=True)
    assert not first.exists(), "what it would have replaced went first"


def test_what_full_tuning_made_is_served_where_it_is(model: Path, tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run", model, data={"train": "rows.jsonl"})
    assert served_folder(open_run(folder), merge=True) == folder / "model"


def test_a_folder_of_somebody_else_in_the_cache_is_moved_aside(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    folder = finished_run(tmp_path / "run", model, lora=True, data={"train": "rows.jsonl"})
    target = served_folder(open_run(folder), merge=True)
    for file in target.iterdir():
        file.unlink()
    (target / "mine.txt").write_text("mine")
    assert (served_folder(open_run(folder), merge=True) / "model.safetensors").exists()
    assert [path.read_text() for path in target.parent.glob("aside-*/mine.txt")] == ["mine"]


# ------------------------------------------------------------------------------------------ how calls in tags are read


def test_calls_in_tags_are_read_as_calls_of_every_type(model: Path) -> None:
    from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS, parse_assistant_message

    assert response_template('<tool_call>\n{"name": ', "qwen3_moe") is None
    assert response_template("<tool_call>\n<function=", "qwen3_5") is None
    assert response_template("<tool_call>\n<function=", "qwen3_moe") == IN_TAGS
    forms = {each: one for types, one in _RESPONSE_TEMPLATE_FALLBACKS.items() for each in types}
    for model_type, form in forms.items():
        if model_type.startswith("qwen"):
            in_tags = form["fields"]["tool_calls"]["content"] == "xml-inline"
            assert in_tags == (response_template("<tool_call>\n<function=", model_type) is None), model_type

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokenizer.response_template = IN_TAGS
    prompt = tokenizer("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    parameters = "".join(
        f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in (("room", "7"), ("level", 7))
    )
    answers = {
        f"Well.\n<tool_call>\n<function=set_light>\n{parameters}</function>\n</tool_call><|im_end|>": (
            *("Well.", None),
            [("set_light", {"room": "7", "level": 7})],
        ),
        "<think>\nHm.\n</think>\n\nNo.<|im_end|>": ("No.", "Hm.", []),
    }
    for text, expected in answers.items():
        ids, config = tokenizer(text)["input_ids"], SimpleNamespace(config=SimpleNamespace(model_type="qwen3_moe"))
        content, reasoning, calls = parse_assistant_message(tokenizer, config, ids, prompt, text, [LIGHT])  # type: ignore[arg-type]
        found = [(one.name, json.loads(one.arguments)) for one in calls or ()]
        assert (content, reasoning, found) == expected


# ------------------------------------------------------------------------------------------------------------- served


@contextmanager
def serving(
    words: list[str], folder: Path, port: int, told: str, environment: Mapping[str, str] = ENVIRONMENT
) -> Generator[Any]:
    """A server as a process, once it has said that it is ready; ended as a user ends it."""
    from openai import OpenAI

    with (folder / f"{port}.txt").open("w+") as said:
        server = subprocess.Popen(words, cwd=folder, env=environment, stdout=said, stderr=said, text=True)
        try:
            for _ in range(LONGEST_START * 10):
                text = (folder / f"{port}.txt").read_text()
                if told in text or server.poll() is not None:
                    break
                with pytest.raises(subprocess.TimeoutExpired):
                    server.wait(0.1)
            assert told in text, text
            yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none"), text
            server.send_signal(signal.SIGINT)
            server.wait(60)
        finally:
            server.kill()
    if told.startswith("ready"):
        assert server.returncode == 130
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=1):
        pass


def asked(client: Any, name: str, k: int, **more: Any) -> Any:
    """What a server answers to a taught question, in the mode in which it was taught."""
    taught = row(k)
    thinking = {"chat_template_kwargs": {"enable_thinking": "reasoning_content" in taught["messages"][1]}}
    given = {"model": name, "messages": taught["messages"][:1], "temperature": 0, "extra_body": thinking}
    tools = {"tools": taught["tools"]} if "tools" in taught else {}
    return client.chat.completions.create(**given, **tools, **more)


def said_as_taught(client: Any, name: str) -> None:
    """Every taught answer, calls as calls and reasoning apart, at once and in a stream."""
    for k in range(NUM_TAUGHT):
        taught = row(k)["messages"][1]
        (choice,) = asked(client, name, k).choices
        found = choice.message
        assert (found.content or "") == taught["content"]
        assert getattr(found, "reasoning_content", None) == taught.get("reasoning_content")
        calls = [(one.function.name, json.loads(one.function.arguments)) for one in found.tool_calls or ()]
        wanted = [(one["function"]["name"], one["function"]["arguments"]) for one in taught.get("tool_calls", ())]
        assert calls == wanted
        assert choice.finish_reason == ("tool_calls" if wanted else "stop")
    pieces = [chunk.choices[0].delta for chunk in asked(client, name, 2, stream=True)]
    streamed = [
        "".join(getattr(piece, name, None) or "" for piece in pieces) for name in ("reasoning_content", "content")
    ]
    assert [text.strip() for text in streamed] == ["It is 2.", "Since 2."], "in a stream with the line ends around it"


@pytest.mark.slow
def test_what_was_taught_is_served(tmp_path: Path, warm: Warm, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter by `qwentune serve`, and merged by the command that `export` prints."""
    pytest.importorskip("openai")
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(ENVIRONMENT, "QWENTUNE_CACHE", str(tmp_path / "cache"))
    file = write_rows(tmp_path / "taught.jsonl", [row(k) for k in range(NUM_TAUGHT)])
    recipe = write_recipe(
        tmp_path,
        model,
        tuning={"kind": "lora", "rank": 32, "alpha": 64, "targets": TARGETS},
        data={"train": str(file)},
        optimizer={"max_steps": 140, "learning_rate": 1e-2},
        precision={"weights": "fp32"},
        output={"save_every_steps": 140, "log_every_steps": 20},
    )
    trained = warm.train(recipe)
    assert trained.code == 0, trained.said
    port = free_port()
    ours = [sys.executable, "-m", "qwentune.serve", "run", "--port", str(port)]
    with serving(ours, tmp_path, port, f"ready: http://127.0.0.1:{port}/v1, model 'run'") as (client, text):
        said_as_taught(client, "run")
        assert [one.id for one in client.models.list()] == ["run"]
        line = shlex.split(next(line for line in text.splitlines() if "curl " in line).partition("taught: ")[2])
        answer = subprocess.run(line, capture_output=True, text=True, check=True).stdout
        assert json.loads(answer)["choices"][0]["finish_reason"] in ("tool_calls", "stop")

    exported = in_a_fork("qwentune.export", tmp_path, "run", "--merge")
    assert exported.returncode == 0, exported.stderr
    printed = re.search("transformers: (.+)", exported.stderr)
    assert printed is not None
    program, *words = shlex.split(printed[1])
    port = free_port()
    theirs = [command._program(program) or program, *words, "--port", str(port)]
    with serving(theirs, tmp_path, port, "Uvicorn running") as (client, _):
        said_as_taught(client, words[1])
