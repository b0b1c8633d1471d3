"""What counts as a secret, and that hiding one changes nothing else."""

from __future__ import annotations

import ast
import html
import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qwentune
from qwentune.errors import RecipeError
from qwentune.recipe import load_recipe
from qwentune.redaction import HIDDEN, SHORTEST_SECRET, holds_a_token, names_a_secret, redact, redacted, variable_in
from qwentune.training.run_folder import RunFolder
from tests.runs import write_recipe

SECRET_NAMES = (
    "HF_TOKEN TOKEN GITHUB_PAT DB_PASSWD DB_PASSWORD PGPASSWORD MYSQL_PWD DB_PASS DBPASS SSHPASS SSH_PASSPHRASE SECRET "
    "CLIENT_SECRET DJANGO_SECRET_KEY OPENAI_KEY OPENAI_API_KEY WANDB_API_KEY API_KEY_2 APIKEY AWS_SECRET_ACCESS_KEY "
    "AWS_ACCESS_KEY_ID AZURE_STORAGE_KEY SSH_PRIVATE_KEY ENCRYPTION_KEY KEY REDIS_AUTH BASIC_AUTH SENTRY_DSN JWT "
    "GOOGLE_CREDENTIALS CREDS npm_config__authToken VAULT_SECRET_ID COMPANY_TOKEN_PROD"
)
ORDINARY_NAMES = (
    "KEYBOARD PATH TOKENIZERS_PARALLELISM PASSES SSH_AUTH_SOCK XAUTHORITY MAX_TOKENS COMPASS BYPASS MONKEY PWD OLDPWD "
    "HF_TOKEN_PATH PGPASSFILE DB_PASSWORD_FILE SSH_KEY_PATH PUBLIC_KEY SORT_KEY COMET_EXPERIMENT_KEY PATTERN AUTHOR "
    "SECRETARY TOKENIZER TOKEN_LIMIT KEYMAP LS_COLORS SECRET_NAME HOME USER LANG"
)
TOKENS = (
    *("hf_{a34}", "sk-proj-{m40}", "sk-ant-api03-{m60}", "ghp_{a36}", "github_pat_{a22}_{a59}", "glpat-{m20}"),
    *("xoxb-{d12}-{d12}-{a24}", "xapp-1-{a40}", "AKIA{u16}", "ASIA{u16}", "AIza{m35}", "ya29.{m60}", "npm_{a36}"),
    *("pypi-AgEIcHlwaS5vcmc{m60}", "dckr_pat_{m27}", "dapi{h32}", "sk_live_{a24}", "rk_test_{a24}", "shpat_{h32}"),
    *(
        "SG.{m22}.{m43}",
        "hvs.{m60}",
        "nvapi-{m60}",
        "gsk_{a52}",
        "r8_{a37}",
        "xai-{a80}",
        "tvly-{a32}",
        "lsv2_pt_{h32}",
    ),
    *(
        "glsa_{a32}_{h8}",
        "dop_v1_{h64}",
        "eyJ{m30}.eyJ{m60}.{m43}",
        "Bearer {a40}",
        "AccountKey={a86}==",
        "GOCSPX-{m28}",
    ),
    "-----BEGIN RSA PRIVATE KEY-----\n{a64}\n{a64}\n-----END RSA PRIVATE KEY-----",
)
ALPHABETS = {"a": "aB3dE5fG", "m": "a-B_3dE5", "d": "0123456789", "u": "AB3DE5FG", "h": "0123456789abcdef"}
values = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=SHORTEST_SECRET
).filter(
    lambda text: (
        len(text.strip()) >= SHORTEST_SECRET and text.strip() not in HIDDEN and not os.path.exists(text.strip())
    )
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def example(pattern: str) -> str:
    """A token of a pattern in which `{a34}` stands for 34 letters and digits."""
    for kind, letters in ALPHABETS.items():
        for length in range(100, 1, -1):
            pattern = pattern.replace(f"{{{kind}{length}}}", (letters * length)[:length])
    return pattern


@given(name=st.sampled_from(SECRET_NAMES.split()), secret=values, around=st.text())
def test_the_value_of_a_variable_that_names_a_secret_is_hidden_however_it_is_written(
    name: str, secret: str, around: str
) -> None:
    with environment(**{name: secret}):
        secret = secret.strip()
        forms = [secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]]
        forms += [html.escape(secret), quote(secret, safe=""), shlex.quote(f"'{secret}")]
        for form in forms:
            hidden = redact(f"<{form}>")
            assert secret not in hidden.replace(HIDDEN, "")
            assert form not in hidden.replace(HIDDEN, "")
        row = {"text": f"{around}{secret}", "list": [secret, 1], f"key {secret}": {"deep": secret}}
        stored = redacted(row)
        written = json.dumps(stored)
        assert json.loads(written) == stored
        assert not [text for text in texts(stored) if secret in text.replace(HIDDEN, "")]


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from texts(list(value))
        yield from texts(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)


@given(value=json_values)
def test_what_holds_no_secret_stays_as_it_is(value: Any) -> None:
    variables = dict.fromkeys(ORDINARY_NAMES.split(), "a value of some length")
    with environment(DB_PASSWD="12345678", **variables):
        assert redacted(value) == value
        assert redacted({"a": 12345678, "b": 1.5, "c": None}) == {"a": 12345678, "b": 1.5, "c": None}


def test_names_are_told_apart_by_their_parts() -> None:
    assert [name for name in SECRET_NAMES.split() if not names_a_secret(name)] == []
    assert [name for name in ORDINARY_NAMES.split() if names_a_secret(name)] == []


@pytest.mark.parametrize("pattern", TOKENS)
def test_tokens_are_known_by_their_prefixes(pattern: str) -> None:
    token = example(pattern)
    assert holds_a_token(token)
    assert redact(f"use '{token}', she said") == f"use '{HIDDEN}', she said"


def test_a_password_in_the_address_of_any_variable_is_hidden() -> None:
    with environment(DATABASE_URL="postgres://me:p%40ssw0rd!!@host/db"):
        assert redact("it said p@ssw0rd!!, and redis://:other@host") == f"it said {HIDDEN}, and redis://{HIDDEN}@host"


def test_a_path_that_exists_is_no_secret(tmp_path: Path) -> None:
    with environment(GOOGLE_CREDENTIALS=str(tmp_path), SSH_KEY="/no/such/file/0123456789"):
        assert redact(f"{tmp_path}/x /no/such/file/0123456789") == f"{tmp_path}/x {HIDDEN}"


def test_a_secret_is_hidden_before_a_message_is_cut() -> None:
    from qwentune.data.reading.faults import described

    with environment(OPENAI_KEY="x" * 100):
        assert "xxxxxxxx" not in described("x" * 100) + described(["x" * 100]) + described({"a": "x" * 100})


@pytest.mark.fault(
    "J75", "the value of a variable that names a secret, in a recipe: refused by place and variable, exit 2"
)
def test_a_recipe_that_holds_the_value_of_a_secret_variable_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "builtin:tiny-qwen3", data={"system": "my 'quoted\" word\nlike this"})
    load_recipe(recipe)
    with environment(DB_PASSWD="'quoted\" word\nlike"):
        with pytest.raises(RecipeError, match=r"data\.system holds the value of the variable DB_PASSWD") as error:
            load_recipe(recipe)
        assert "quoted" not in str(error.value)
    with environment(PGPASSWORD="correct-horse"), pytest.raises(RecipeError, match=r"output\.dir holds the value"):
        load_recipe(recipe, ["output.dir=runs/correct-horse", "data.system=null"])


@given(rows=st.lists(st.dictionaries(st.text(), json_values, max_size=3), max_size=3), secret=values)
def test_what_is_stored_is_json_whatever_was_hidden(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], secret: str
) -> None:
    run = RunFolder(tmp_path_factory.mktemp("run"))
    with environment(DB_PASSWD=secret):
        run.write_json("data_report.json", {"rows": rows, "reason": f"it is {secret!r} {json.dumps(secret)}"})
        run.write_rows("dropped.jsonl", [*rows, {"reason": secret}])
    assert json.loads((run.path / "data_report.json").read_text())["rows"] is not None
    lines = (run.path / "dropped.jsonl").read_text().split("\n")
    assert len([json.loads(line) for line in lines if line]) == len(rows) + 1


# --- one door

PACKAGE = Path(qwentune.__file__).parent
# What writes files, and why no secret of a run can be in them.
WRITERS = {
    "durable.py": "the hand of those below",
    "console.py": "say, log and show redact",
    "preview.py": "--jsonl and --html: token ids and the page, whose texts are redacted",
    "init.py": "a recipe, in which secrets are refused",
    "training/run_folder.py": "the door of the run folder",
    "training/checkpoints.py": "manifests, of facts of a recipe, in which secrets are refused",
    "training/trainer.py": "numbers of a checkpoint",
    "training/reports.py": "numbers for the supervisor",
    "training/once.py": "a plan in the user's cache",
    "memory/profile.py": "measured times in the user's cache",
    "memory/rates.py": "measured rates of a card in the user's cache",
    "model/loading.py": "random weights in the user's cache",
    "exporting/cached.py": "what a folder in the cache was made of: hashes",
    "exporting/package.py": "the model's own files, which are data and must not be changed",
    "exporting/tensors.py": "weights",
    "exporting/whole.py": "weights, and the model's own files",
    "model/part_names.py": "an adapter, and its own configuration",
    "exporting/gguf_run.py": "the name of a file of weights",
    "exporting/processors.py": "limits of pictures in the base's own files",
    "data/layout/media_table.py": "the user's data in the user's cache",
    "data/media/look.py": "the user's data in the user's cache",
    "data/media/pixels.py": "the user's data in the user's cache",
    "data/layout/sums.py": "sums of the user's files in the user's cache",
    "export.py": "commands, without a value of the recipe that may be secret, in the model card",
    "data/layout/store.py": "the user's data in the user's cache",
    "data/reading/hub.py": "the user's data in the user's cache",
    "data/tokenizing/checkpoint_folder.py": "a built-in model in the user's cache",
    "data/tokenizing/vocabulary.py": "a built-in model in the user's cache",
}


def writes(path: Path) -> bool:
    """Whether a module calls what writes a text into a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("write_text", "write_bytes", "save_pretrained") or ast.unparse(node.func) == "json.dump":
            return True
        modes = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
        if name in ("open", "fdopen") and any(
            isinstance(mode, ast.Constant) and isinstance(mode.value, str) and set(mode.value) & set("wax+")
            and set(mode.value) <= set("rwaxbt+") for mode in modes
        ):  # fmt: skip
            return True
    return False


def test_only_listed_modules_write_files() -> None:
    found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if writes(path)}
    assert found <= set(WRITERS), "write through RunFolder, or say here why no secret can be in it"
    assert set(WRITERS) <= found


@pytest.mark.parametrize(
    "text",
    [
        "data/sk-2024-chat-sft-v2-final.jsonl",
        "runs/fw_finetuningexperiment",
        "Basic mathematics_2024_problems_v1",
        "r8_abcdefghijklmnopq",
        "stop at <|im_end|>",
    ],
)
def test_names_of_files_and_control_tokens_are_no_secrets(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EOS_TOKEN", "PAD_TOKEN", "STOP_TOKEN"):
        monkeypatch.setenv(name, "<|im_end|>")
    monkeypatch.setenv("TEXT_KEY", "mathematics")
    assert redact(text) == text
    assert variable_in(text) is None


def test_only_the_console_prints() -> None:
    for path in PACKAGE.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        prints = [node for node in calls if ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")]
        # A model's answer is its own words.
        assert not prints or path.relative_to(PACKAGE).name in ("console.py", "chat.py"), path
