"""Secrets of services in the data are counted, shown without their value, and refused where the recipe says so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from string import ascii_letters, ascii_uppercase, digits
from typing import Any

import pytest

from qwentune.data.dataset import Dataset, chat_template, prepare
from qwentune.data.rendering.credentials import FORMS, credentials
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.errors import DataError
from qwentune.recipe import DataOptions
from qwentune.redaction import redact

LETTERS = ascii_letters + digits


def drawn(count: int, letters: str = LETTERS) -> str:
    return "".join(Random(count).choices(letters, k=count - 2)) + "A7"


SECRETS = {
    f"AKIA{drawn(16, ascii_uppercase + digits)}": "AWS access key",
    f"ASIA{drawn(16, ascii_uppercase + digits)}": "AWS access key",
    f"ghp_{drawn(36)}": "GitHub token",
    f"ghs_{drawn(36)}": "GitHub token",
    f"github_pat_{drawn(22)}_{drawn(59)}": "GitHub token",
    f"hf_{drawn(34)}": "Hugging Face token",
    f"sk-{drawn(48)}": "OpenAI key",
    f"sk-proj-{drawn(40)}_-{drawn(40)}": "OpenAI key",
    f"sk-ant-api03-{drawn(93)}AA": "Anthropic key",
    f"AIza{drawn(35)}": "Google key",
    f"GOCSPX-{drawn(28)}": "Google key",
    f"xoxb-{drawn(12, digits)[:-2]}12-{drawn(24)}": "Slack token",
    f"xapp-1-{drawn(10)}-{drawn(30)}": "Slack token",
    f"https://hooks.slack.com/services/T{drawn(8)}/B{drawn(8)}/{drawn(24)}": "Slack webhook",
    f"-----BEGIN RSA PRIVATE KEY-----\n{drawn(64)}\n{drawn(64)}\n-----END RSA PRIVATE KEY-----": "private key",
    f"-----BEGIN OPENSSH PRIVATE KEY-----\\n{drawn(64)}": "private key",
    f"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES,1F\n\n{drawn(64)}": "private key",
}


@pytest.mark.parametrize(("secret", "kind"), SECRETS.items())
def test_a_secret_is_found_anywhere_in_a_text_and_its_value_stays_hidden(secret: str, kind: str) -> None:
    for before, after in (("", ""), ("key = '", "'\n"), ("用", "。"), ("(", ").")):
        (found,) = credentials(f"{before}{secret}{after}")
        assert found.kind == kind
        assert len(found.masked) < 30
        assert found.masked.removesuffix("…") in secret
    assert secret not in redact(f"it is {secret} .")  # what is a secret in data is one on the screen


@pytest.mark.parametrize(
    "text",
    [
        "hf_model_name_or_path_of_the_pretrained_checkpoint",
        "hf_...",
        f"hf_{'x' * 34}",
        "sk-your-key-here",
        f"sk-{'X' * 48}",
        "a task-oriented, risk-proportionate-and-well-understood-approach",
        "sk-learn-compatible-estimators-and-transformers",
        "ghp_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        "MALAYSIANSOUTHEASTASIAN",
        'if "-----BEGIN RSA PRIVATE KEY-----" in text: raise PrivateKeyFoundInTextError',
        "xoxo-gossip-girl-and-all-her-friends",
        f"the hash {drawn(64, '0123456789abcdef')}",
    ],
)
def test_words_placeholders_and_hashes_are_no_secrets(text: str) -> None:
    assert list(credentials(text)) == []


def test_every_form_has_a_source_and_an_example() -> None:
    assert {form.kind for form in FORMS} == set(SECRETS.values())
    assert all("." in form.source or "RFC" in form.source for form in FORMS)
    for form in FORMS:
        assert any(re.search(form.head, secret) for secret in SECRETS)


TOKEN = f"hf_{drawn(34)}"


def prepared(folder: Path, checkpoint: Path, *rows: dict[str, Any], **options: Any) -> Dataset:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataOptions.model_validate({"train": [{"path": str(file)}], "max_dropped_fraction": 1.0, **options})
    tokenizer = load_tokenizer(checkpoint)
    return prepare(data, tokenizer, chat_template(data, tokenizer), 0)


def chat(question: str, answer: str = "yes", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **fields}]}


CALL = {"name": "log_in", "arguments": {"token": TOKEN}}


def test_secrets_are_counted_wherever_they_stand_and_warned_about(tmp_path: Path, qwen3_folder: Path) -> None:
    rows = (chat("hi"), chat(f"{TOKEN} and {TOKEN}"), chat("go", "", tool_calls=[CALL]), chat(f"AKIA{'B7' * 8}"))
    dataset = prepared(tmp_path, qwen3_folder, *rows)
    file = str(tmp_path / "rows.jsonl")
    assert dataset.report["secrets"] == {
        "AWS access key": {"count": 1, "shown": ["AKIA…"], "first": [{"file": file, "line": 4}]},
        "Hugging Face token": {
            "count": 3,
            "shown": ["hf_…"],
            "first": [{"file": file, "line": 2}, {"file": file, "line": 3}],
        },
    }
    (warning,) = [said for said in dataset.report["warnings"] if "Hugging Face" in said]
    assert warning.startswith("3 × what looks like a secret, Hugging Face token (hf_…)")
    assert f"First: {file}:2, {file}:3" in warning
    assert TOKEN not in json.dumps(dataset.report)


@pytest.mark.parametrize("row", [chat(TOKEN), {"text": f"a {TOKEN}"}, {"instruction": "q", "output": TOKEN}])
def test_secrets_are_refused_by_place_and_kind_where_the_recipe_says_so(
    row: dict[str, Any], tmp_path: Path, qwen3_folder: Path
) -> None:
    with pytest.raises(DataError) as refused:
        prepared(tmp_path, qwen3_folder, row, row, secrets="refuse")
    assert [problem.where for problem in refused.value.problems] == [f"{tmp_path}/rows.jsonl:{n}" for n in (1, 2)]
    assert "what looks like a secret: Hugging Face token (hf_…)" in str(refused.value)
    assert TOKEN not in str(refused.value)
    assert refused.value.exit_code == 3


def test_rows_with_secrets_are_left_out_where_bad_rows_are_skipped(tmp_path: Path, qwen3_folder: Path) -> None:
    options = {"secrets": "refuse", "bad_rows": "skip"}
    dataset = prepared(tmp_path, qwen3_folder, chat("hi"), chat("ho", TOKEN), **options)
    assert dataset.report["rows"]["refused"] == 1
    assert [drop["source"]["line"] for drop in dataset.dropped] == [2]
    assert TOKEN not in json.dumps(dataset.dropped)
