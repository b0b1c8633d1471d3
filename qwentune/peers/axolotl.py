"""axolotl: data sets in its own words, and what it trained with them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwentune.errors import nearest
from qwentune.peers.configuration import Given
from qwentune.peers.key_tables import Dropped
from qwentune.peers.translation import Translation, as_list, as_mapping, file_of, is_hybrid, is_off, shown

TYPES = {  # the part before the first dot or colon: our format
    "chat_template": "chat",
    "alpaca": "instruction",
    "alpaca_chat": "instruction",
    "alpaca_w_system": "instruction",
    "sharegpt": "sharegpt",
    "completion": "text",
    "pretrain": "text",
}
SHAREGPT = {"from", "value"}
BUILDERS = ("json", "csv", "parquet", "text", "arrow")  # in place of a path: `data_files` are the files
TOO_LONG = {"drop": "drop", "truncate": "drop", "raise": "error"}
_PART = re.compile(r"([\w.-]+)\[(\d+%?)?:(\d+)(%)?\]")  # train[:20%]
FIELDS = {  # of a message, by keys of a data set: ours
    "message_field_role": "role",
    "message_field_content": "content",
    "message_field_training": "train",
    "field_thinking": "reasoning_content",
}
USUAL_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def translate_data(t: Translation) -> None:
    """Data, template and mask."""
    if (task := t.get("task")) is not None:
        t.refuse(task, f"the task {shown(task.value)} is not here", "Preferences and reinforcement are other tasks.")
    for key in ("reward_model", "process_reward_model", "ebft", "diffusion", "kd_trainer"):
        given = t.configuration.given.get(key)
        if given is not None and not is_off(given.value):
            t.refuse(given, "this task is not here", "Supervised fine-tuning (datasets) is translated.")
    if given := t.configuration.given.get("processor_type"):
        t.refuse(given, "models that see or hear are not trained yet", "Choose a model of text.")
    text = t.get("pretraining_data")
    train = [source for given in (t.get("data"), text) for source in _sources(t, given, is_text=given is text)]
    if t.get("data") is None and text is None:
        where = Given("datasets", "", str(t.configuration.path))
        t.refuse(where, "no data is named", "Give `datasets`, a list with a path each.")
    t.set("data.train", train, t.get("data") or text)
    if evaluation := t.get("eval_data"):
        t.set("data.eval", _sources(t, evaluation, is_text=False), evaluation)
    if given := t.get("too_long"):
        t.set("data.too_long", TOO_LONG.get(str(given.value), "drop"), given)
        if given.value == "truncate":
            t.differs("longer rows lost their end, and with it the token that ends the answer", "they are dropped")
    if given := t.get("template_file"):
        _template_file(t, given)
    if (given := t.get("template_arguments")) and (arguments := as_mapping(given.value)):
        thinking = arguments.pop("enable_thinking", None)
        if thinking is not None:
            t.set("data.thinking", "on" if thinking else "off", given)
        if arguments:
            t.set("data.template_args", arguments, given)
    _behaviour(t)


def _template_file(t: Translation, given: Given) -> None:
    if Path(str(given.value)).is_file():
        t.set("data.chat_template", str(given.value), given)
    else:
        t.leave_out(given, "a template as text: save it as a file, and name that in data.chat_template", changes=True)


def _sources(t: Translation, given: Given | None, *, is_text: bool) -> list[dict[str, Any]]:
    """The sources of a list of data sets; a wrong one is left out after a problem."""
    if given is None:
        return []
    found: list[dict[str, Any]] = []
    for number, item in enumerate(as_list(given.value)):
        entry = {"path": item} if isinstance(item, str) else as_mapping(item)
        if entry is None or is_off(entry.get("path")):
            t.refuse(given, f"item {number} has no path", "Each data set is a mapping with a path.")
            continue
        found.append(_source(t, given, entry, f"{given.key}[{number}]", is_text))
    return found


def _source(t: Translation, given: Given, entry: Mapping[str, Any], name: str, is_text: bool) -> dict[str, Any]:
    for key, value in entry.items():
        known = t.configuration.table.keys.get(f"datasets[].{key}")
        if isinstance(known, Dropped) and not is_off(value) and not _is_usual(key, value):
            t.leave_out(Given(f"{name}.{key}", value, given.where), known.why, changes=known.changes)
        elif known is None:
            others = [one.removeprefix("datasets[].") for one in t.configuration.table.own if "[]." in one]
            why = f"no key of {t.configuration.table.release}.{nearest(key, others)}"
            t.leave_out(Given(f"{name}.{key}", value, given.where), why, changes=True)
    entry, part = _whole_split(entry)
    if part is None:
        t.leave_out(Given(f"{name}.split", entry["split"], given.where), "a part that no key says", changes=True)
    source: dict[str, Any] = {"path": _path(t, given, entry), **(part or {})}
    kind: Any = entry.get("type") or ("pretrain" if is_text else "")
    if isinstance(kind, dict):
        return source | _columns_of_prompts(as_mapping(kind) or {})
    word = str(kind).replace(":", ".").partition(".")[0]
    format = TYPES.get(word, "")
    if not format:
        what = f"{name}.type: {shown(kind)} is not here; {', '.join(sorted(TYPES))} are"
        t.refuse(given, what, "Write the rows as messages, with type: chat_template.")
        return source
    if format == "text":
        column = str(entry.get("field") or entry.get("text_column") or "text")
        return source | {"format": "text"} | ({"columns": {"text": column}} if column != "text" else {})
    if format == "instruction":
        return source | {"format": format}
    return source | _dialogue(entry, format)


def _whole_split(entry: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any] | None]:
    """A data set with the split of which it names a beginning, and that part in our words; None where we have none."""
    match = _PART.fullmatch(str(entry.get("split", "")))
    if match is None:
        return entry, {}
    whole = {**entry, "split": match[1]}
    if match[2]:
        return whole, None
    return whole, {"repeat": int(match[3]) / 100} if match[4] else {"max_rows": int(match[3])}


def _path(t: Translation, given: Given, entry: Mapping[str, Any]) -> str:
    """A file as it is, one of `data_files`, or a data set of the hub with revision, configuration and split."""
    path = str(entry["path"])
    names = [] if is_off(entry.get("data_files")) else as_list(entry["data_files"])
    if len(names) > 1:
        t.refuse(given, f"{path}: several data_files are given", "Give each of them as a data set of its own.")
    if names:
        name = file_of(t, str(names[0]))
        return name if path in BUILDERS or Path(name).exists() else os.path.normpath(Path(path) / str(names[0]))
    path = file_of(t, path)
    if Path(path).exists() or Path(path).suffix[1:2].isalpha() or path.startswith((".", "/", "~")):
        return path
    behind = [str(entry[key]) for key in ("name", "split") if entry.get(key)]
    if entry.get("name") and not entry.get("split"):
        behind.append("train")
    revision = f"@{entry['revision']}" if entry.get("revision") else ""
    return ":".join([f"{path}{revision}", *(word for word in behind if word != "train" or len(behind) > 1)])


def _columns_of_prompts(kind: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        "instruction": "field_instruction",
        "input": "field_input",
        "output": "field_output",
        "system": "field_system",
    }
    columns = {ours: str(kind[theirs]) for ours, theirs in names.items() if kind.get(theirs) and kind[theirs] != ours}
    return {"format": "instruction", **({"columns": columns} if columns else {})}


def _dialogue(entry: Mapping[str, Any], format: str) -> dict[str, Any]:
    """Rows of the format sharegpt with its own names of fields, or of the format chat with those that they have."""
    usual = {"role": "from", "content": "value"} if format == "sharegpt" else {"role": "role", "content": "content"}
    older = {ours: entry.get(theirs) for theirs, ours in FIELDS.items()}
    mapped = {**usual, **older, **(as_mapping(entry.get("message_property_mappings")) or {})}
    fields = {ours: str(theirs or usual.get(ours, ours)) for ours, theirs in mapped.items()}
    is_sharegpt = (fields["role"], fields["content"]) == ("from", "value")
    if is_sharegpt:
        del fields["role"], fields["content"]
    tags: dict[str, Any] = {ours: theirs for ours, theirs in fields.items() if ours != theirs}
    for role, names in (as_mapping(entry.get("roles")) or {}).items():
        if others := [str(name) for name in as_list(names) if USUAL_ROLES.get(str(name)) != role]:
            tags[role] = others
    own = "conversations" if is_sharegpt else "messages"
    messages = "conversations" if format == "sharegpt" else "messages"
    names = {own: str(entry.get("field_messages") or messages), "tools": str(entry.get("field_tools") or "tools")}
    columns = {ours: theirs for ours, theirs in names.items() if ours != theirs}
    return {
        "format": "sharegpt" if is_sharegpt else "chat",
        **({"columns": columns} if columns else {}),
        **({"tags": tags} if tags else {}),
    }


def _is_usual(key: str, value: Any) -> bool:
    """Whether a key only says what is done here anyway."""
    return {
        "roles_to_train": lambda: set(value) <= {"assistant", "gpt"},
        "train_on_eos": lambda: value == "turn",
        "train_on_eot": lambda: value == "turn",
        "chat_template": lambda: value == "tokenizer_default",
        "template_thinking_key": lambda: value == "reasoning_content",
        "split_thinking": lambda: True,
    }.get(key, lambda: False)()


def _behaviour(t: Translation) -> None:
    """What its template strategy did with the rows (prompt_strategies/chat_template.py of the release)."""
    formats = {source.get("format") for source in t.settings["data.train"].value}
    if "chat" in formats or "sharegpt" in formats:
        if is_hybrid(t):
            t.differs(
                "a dialogue was rendered once: every turn but the last stood without the reasoning it was written with",
                "each turn is trained after the prompt that a server sends before it, with its own reasoning",
            )
        t.differs(
            "whether the token that ends a turn carried loss hung on train_on_eos and the tokenizer's eos_token",
            "the token that ends a turn always carries loss",
        )
    if "instruction" in formats:
        t.differs("instructions stood in alpaca's own prompt text", "they are turns of the checkpoint's chat template")
    if t.get("pretraining_data"):
        t.differs("text was streamed", "files are read once and kept; the length of the run is epochs or max_steps")
    given = t.configuration.given.get("chat_template")
    if given and str(given.value) not in ("tokenizer_default", "qwen3", "qwen3_5", "qwen_25", "chatml", "jinja"):
        t.differs(f"the template {shown(given.value)}", "the checkpoint's own, which servers apply")
