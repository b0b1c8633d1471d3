"""Nothing that a run reads can run code, and no secret reaches what a run writes."""

from __future__ import annotations

import json
import shutil
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import pytest

from qwentune.data.dataset import chat_template, prepare
from qwentune.data.templates.chat_template import ChatTemplate, TemplateRefusalError
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.errors import DataError, RecipeError
from qwentune.recipe import DataOptions, load_recipe
from qwentune.redaction import HIDDEN
from tests.checkpoints import add_weights, write_checkpoint
from tests.faults.test_save import killed_at
from tests.runs import write_recipe
from tests.test_redaction import SECRET_NAMES
from tests.warm import Warm

TRAPS = {
    "a dunder chain": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ lipsum.__globals__['os'].system('touch sprung') }}",
    "attr": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "a file": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}",
    "a list changed": "{{ messages.append('x') }}",
    "an endless range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "a recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
}


@pytest.mark.fault("J72", "a template runs in a sandbox: what reaches out of it is an error of the template")
@pytest.mark.parametrize("trap", TRAPS)
def test_a_template_reaches_nothing_outside_its_sandbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    monkeypatch.chdir(tmp_path)
    messages: list[dict[str, object]] = [{"role": "user", "content": "hi"}]
    template = ChatTemplate(TRAPS[trap], {}, {})
    try:
        text = template.render([messages])[0]  # type: ignore[list-item]
    except TemplateRefusalError:
        text = ""
    assert "class" not in text
    assert "root:" not in text
    assert messages == [{"role": "user", "content": "hi"}]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("J72", "a template that writes without end is stopped")
def test_what_a_template_writes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwentune.data.templates.bounds.LONGEST_TEXT", 10_000)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}xx{% endfor %}{% endfor %}"
    with pytest.raises(TemplateRefusalError, match="writes more than 10000 characters"):
        ChatTemplate(loops, {}, {}).render([[{"role": "user", "content": "hi"}]])
    assert ChatTemplate("{{ 'x' * 9999 }}", {}, {}).render([[]]) == ["x" * 9999]


# --- the cache of rendered data


def data_of(folder: Path) -> DataOptions:
    return load_recipe(write_recipe(folder, "builtin:tiny-qwen3", data={"max_tokens": 256})).recipe.data


def contents(data: DataOptions, folder: Path) -> tuple[str, int]:
    tokenizer = load_tokenizer(folder)
    dataset = prepare(data, tokenizer, chat_template(data, tokenizer), seed=1)
    return dataset.content, len(dataset.train)


@pytest.mark.slow
@pytest.mark.fault("A07", "killed at any file operation while data is rendered: the next start has all of it")
def test_data_that_was_being_rendered_is_never_short(
    tmp_path: Path, qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(tmp_path)
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "whole"))
    whole = contents(data, qwen3_folder)
    kills = 0
    for operation in count(0, 5):
        cache = tmp_path / str(operation)
        monkeypatch.setenv("QWENTUNE_CACHE", str(cache))
        if not killed_at(operation, lambda: contents(data, qwen3_folder)):
            break
        kills += 1
        assert contents(data, qwen3_folder) == whole
        shutil.rmtree(cache)
    assert kills >= 5


def _contents_there(data: DataOptions, folder: Path, _: int) -> tuple[str, int]:
    return contents(data, folder)


@pytest.mark.fault("K80", "two preparations of the same data at once: one renders, both have the same")
def test_two_preparations_at_once_agree(tmp_path: Path, qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    data = data_of(tmp_path)
    with get_context("fork").Pool(2) as pool:
        first, second = pool.starmap(_contents_there, [(data, qwen3_folder, rank) for rank in range(2)])
    assert first == second
    folders = [path for path in (tmp_path / "cache" / "data").iterdir() if path.is_dir()]
    assert len(folders) == 1


@pytest.mark.fault("G45", "data in which nothing is trained: refused, exit 3")
def test_data_that_trains_nothing_is_refused(
    tmp_path: Path, qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError):
        contents(data_of(tmp_path), qwen3_folder)


# --- remote code


@pytest.mark.fault("J73", "no key of a recipe lets a checkpoint's code run: an unknown key, exit 2")
@pytest.mark.parametrize("section", ["", "tuning", "data", "hardware"])
def test_remote_code_cannot_be_asked_for(tmp_path: Path, section: str) -> None:
    override = f"{section}.trust_remote_code=true".removeprefix(".")
    with pytest.raises(RecipeError, match="trust_remote_code"):
        load_recipe(write_recipe(tmp_path, "builtin:tiny-qwen3"), [override])


# --- whole runs


@pytest.mark.slow
@pytest.mark.fault("J73", "code beside a checkpoint (`auto_map`) is not imported; weights only as safetensors")
def test_no_code_of_a_checkpoint_runs_and_no_pickle_is_an_adapter(tmp_path: Path, warm: Warm) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    lora = {"kind": "lora", "rank": 4}
    recipe = write_recipe(tmp_path, model, tuning=lora, optimizer={"max_steps": 1})
    trained = warm.train(recipe)
    assert trained.code == 0, trained.said
    adapter = tmp_path / "run" / "adapter"
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused = warm.train(recipe, f"tuning.start_from={adapter}", f"output.dir={tmp_path / 'other'}")
    assert (refused.code, "adapter_model.safetensors" in refused.said) == (2, True), refused.said
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused = warm.train(recipe, f"output.dir={tmp_path / 'third'}")
    assert (refused.code, "holds no weights" in refused.said) == (2, True), refused.said
    assert not (tmp_path / "sprung").exists()


@pytest.mark.slow
@pytest.mark.fault("J75", "tokens of the environment and of dropped rows are in no file of the run and on no screen")
def test_no_secret_is_in_a_run_folder_or_on_the_screen(tmp_path: Path, warm: Warm) -> None:
    secrets = {"HF_TOKEN": "hf_" + "aB1" * 11, "WANDB_API_KEY": "0123456789abcdef" * 2}
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    recipe = write_recipe(
        tmp_path, model, data={"bad_rows": "skip"}, optimizer={"max_steps": 2}, tuning={"kind": "lora", "rank": 4}
    )
    token = "sk-live-" + "cD2" * 11
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"messages": [{"role": token, "content": token}]}) + "\n")
    recipe.write_text(recipe.read_text() + f"# login with {secrets['HF_TOKEN']}\n")
    trained = warm.train(recipe, **secrets)
    assert trained.code == 0, trained.said
    dropped = (tmp_path / "run" / "dropped.jsonl").read_text()
    assert "[secret]" in dropped, "the row is named, its token is not"
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    for secret in (*secrets.values(), token):
        assert secret not in trained.said
        assert not [path for path in files if secret.encode() in path.read_bytes()]


def odd_secrets(names: list[str]) -> dict[str, str]:
    """A value for each name, drawn from what texts, JSON, YAML, shells and patterns treat in ways of their own."""
    pieces = [
        "'",
        '"',
        "\\",
        "\n",
        "\t",
        "${x}",
        ".*",
        "(?:",
        "[a-z]+",
        "ü",
        "🙂",
        "你好",
        "&amp;",
        "<b>",
        "%41",
        "#",
        ": ",
        "{{",
        "é",
    ]
    random = Random(19)
    print("seed 19")
    return {name: "".join(random.choices([*pieces, "aB3dE", "x9_Q"], k=9)).strip() + name[:3] for name in names}


@pytest.mark.slow
@pytest.mark.fault("J75", "secrets of any name and any characters are in no file of the run, plain or escaped")
def test_odd_secrets_are_in_no_file_of_a_run_and_on_no_screen(tmp_path: Path, warm: Warm) -> None:
    secrets = odd_secrets(SECRET_NAMES.split())
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    settings = {"bad_rows": "skip", "max_dropped_fraction": 1.0}
    recipe = write_recipe(tmp_path, model, data=settings, optimizer={"max_steps": 2}, output={"save_every_steps": 1})
    with (tmp_path / "rows.jsonl").open("a") as file:
        for secret in secrets.values():
            call = {"type": "function", "function": {"name": secret, "arguments": secret}}
            bad: list[dict[str, Any]] = [
                {"messages": [{"role": secret, "content": secret}]},
                {"messages": {secret: [secret]}},
                {
                    "messages": [
                        {"role": "user", "content": {secret: secret}},
                        {"role": "assistant", "content": [secret]},
                    ]
                },
                {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]},
                {secret: secret},
            ]
            file.writelines(json.dumps(row) + "\n" for row in bad)
    plain = [secret for secret in secrets.values() if secret.isprintable()]
    recipe.write_text(recipe.read_text() + "".join(f"# {secret}\n" for secret in plain))
    trained = warm.train(recipe, **secrets)
    assert trained.code == 0, trained.said
    assert (tmp_path / "run" / "dropped.jsonl").read_text().count(HIDDEN) >= len(secrets)
    again = warm.train(recipe, "optimizer.max_steps=3", "--allow-change", "optimizer", **secrets)
    assert again.code == 0, again.said
    stored = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for secret in secrets.values():
        for form in (
            secret,
            json.dumps(secret)[1:-1],
            json.dumps(secret, ensure_ascii=False)[1:-1],
            repr(secret)[1:-1],
        ):
            assert form not in trained.said + again.said
            assert not [path for path, content in stored.items() if form.encode() in content]


@pytest.mark.slow
@pytest.mark.fault("J75", "words of templates, tokenizers and weights that a secret happens to equal stay as they are")
def test_data_of_training_is_never_altered(tmp_path: Path, warm: Warm) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen3"))
    word = "assistant\n"  # of the template
    assert word.strip() in (model / "chat_template.jinja").read_text() + (model / "tokenizer_config.json").read_text()
    recipe = write_recipe(tmp_path, model, optimizer={"max_steps": 2})
    runs = [tmp_path / "with", tmp_path / "without"]
    secrets = {
        "SECRET": "assistant",
        "DB_PASSWD": "add_generation_prompt",
        "OPENAI_KEY": "<|im_start|>",
        "X_PAT": "merges",
    }
    for run, environment in zip(runs, (secrets, {}), strict=True):
        trained = warm.train(recipe, f"output.dir={run}", **environment)
        assert trained.code == 0, trained.said
    for path in sorted((runs[0] / "model").iterdir()):
        assert path.read_bytes() == (runs[1] / "model" / path.name).read_bytes(), path
    # What names a secret now and did not at the start, or no longer, is no change of the run.
    again = warm.train(
        recipe, f"output.dir={runs[1]}", "optimizer.max_steps=3", "--allow-change", "optimizer", **secrets
    )
    assert again.code == 0, again.said
