"""LLaMA-Factory: data sets by name in `dataset_info.json`, templates by name, and what it trained with them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwentune.bounded import UnreadableError, read_text
from qwentune.errors import nearest
from qwentune.peers.configuration import Given
from qwentune.peers.translation import Translation, as_mapping, is_hybrid, is_off, joined, shown

INFO = "dataset_info.json"
MAX_BYTES = 20_000_000
TASKS = {"pt": "text", "sft": ""}
MEDIA = ("images", "videos", "audios")
INSTRUCTION = {  # their columns of the format alpaca: ours, and their names where none is given
    "prompt": ("instruction", "instruction"),
    "query": ("input", "input"),
    "response": ("output", "output"),
    "system": ("system", ""),
    "history": ("history", ""),
}
TAGS = {  # their tags of the format sharegpt: ours, and their values where none is given
    "role_tag": ("role", "from"),
    "content_tag": ("content", "value"),
    "user_tag": ("user", "human"),
    "assistant_tag": ("assistant", "gpt"),
    "observation_tag": ("tool", "observation"),
    "function_tag": ("function_call", "function_call"),
    "system_tag": ("system", "system"),
}
IN_CHAT = {name: name for name in ("role", "content", "user", "assistant", "system", "tool", "function_call")}


def translate_data(t: Translation) -> None:
    """Data, template and mask."""
    task = t.get("task")
    if task is not None and str(task.value) in TASKS:
        t.set("objective.kind", "sft", task)
    elif task is not None:
        fix = "Only sft and pt are translated; preferences, rewards and reinforcement are other tasks."
        t.refuse(task, f"the stage {shown(task.value)} is not here", fix)
    is_text = task is not None and task.value == "pt"
    info, folder = _read_info(t)
    for term, ours in (("data", "data.train"), ("eval_data", "data.eval")):
        given = t.written.get(term)
        if given is None:
            if term == "data":
                where = Given("dataset", "", str(t.configuration.path))
                t.refuse(where, "no data is named", "Give `dataset`, names of dataset_info.json.")
            continue
        found = [_source(t, given, name, info, folder, is_text) for name in t.words(term)]
        t.set(
            ours, [source for source in found if source], given, t.written.get("data_folder"), t.written.get("max_rows")
        )
    _media_folder(t, folder)
    packed = t.flag("packing") or t.flag("isolated") or (is_text and "packing" not in t.written)
    t.set("data.packing", packed, t.written.get("isolated") or t.get("packing"))
    if t.flag("last_turn"):
        t.set("data.turns", "last", t.get("last_turn"))
    _behaviour(t, is_text)


def _read_info(t: Translation) -> tuple[Mapping[str, Any] | None, Path]:
    """What dataset_info.json says, and the folder of its files; None for data of the hub by name."""
    given = t.written.get("data_folder") or Given("dataset_dir", "data", "")
    beside = t.configuration.path.parent
    name = Path(str(given.value))
    if str(name) == "ONLINE":
        return None, name
    # Its commands run in the tool's own folder, of which the configuration is a part as a rule.
    places = [name, *(folder / name for folder in (beside, *beside.absolute().parents)), beside]
    file = next((place / INFO for place in places if (place / INFO).is_file()), None)
    if file is None:
        where = t.written.get("data_folder") or t.written.get("data") or given
        fix = f"Copy it there, or beside {t.configuration.path.name}: it says which files the names stand for."
        t.refuse(where, f"there is no {INFO} in {name}, nor beside the configuration", fix)
        return {}, beside
    try:
        info = as_mapping(read_text(file, MAX_BYTES))
    except UnreadableError as error:
        t.refuse(Given(INFO, "", str(file)), str(error), "Correct the file.")
        return {}, beside
    if info is None:
        t.refuse(Given(INFO, "", str(file)), "it is no JSON of names and their files", "Is it the right file?")
        return {}, beside
    return info, Path(os.path.relpath(file.parent)) if beside in (Path("."), Path("")) else file.parent


def _media_folder(t: Translation, folder: Path) -> None:
    """Where its media lie: here they are looked for beside the data, then where the command is started."""
    given = t.written.get("media_folder")
    if given is None:
        return
    name = str(given.value)
    if os.path.abspath(name) in (os.path.abspath(folder), os.path.abspath(".")):
        if rows := t.settings.get("data.train"):
            t.set("data.train", rows.value, *rows.sources, given, remark=rows.remark)
        return
    why = f"media are looked for beside the data file, then where the command is started: put those of {name} there"
    t.leave_out(given, f"{why}, or write their paths into the rows", changes=True)


def _source(
    t: Translation, given: Given, name: str, info: Mapping[str, Any] | None, folder: Path, is_text: bool
) -> dict[str, Any]:
    """The source that a name stands for; empty after a problem."""
    if info is None:
        return {"path": name}
    entry = as_mapping(info.get(name))
    if entry is None:
        if info:
            t.refuse(given, f"'{name}' is not in {INFO}.{nearest(name, info)}", "Add it there, or leave it out.")
        return {}
    entry = {key: value for key, value in entry.items() if not is_off(value)}
    path = _path(t, given, name, entry, folder)
    columns = {key: str(value) for key, value in (as_mapping(entry.get("columns")) or {}).items()}
    if entry.get("ranking") or {"chosen", "rejected", "kto_tag"} & columns.keys():
        t.refuse(given, f"'{name}' has preferences, which are not trained yet", "Leave it out.")
    source: dict[str, Any] = {"path": path}
    if entry.get("formatting", "alpaca") == "alpaca":
        source |= _instruction(columns, is_text)
    else:
        source |= _dialogue(columns, as_mapping(entry.get("tags")) or {})
    if media := {kind: columns[kind] for kind in MEDIA if columns.get(kind, kind) != kind}:
        source["columns"] = {**source.get("columns", {}), **media}
    rows = [count for count in (entry.get("num_samples"), t.number("max_rows")) if count]
    if rows:
        source["max_rows"] = int(min(rows))
    return source


def _path(t: Translation, given: Given, name: str, entry: Mapping[str, Any], folder: Path) -> str:
    if "hf_hub_url" in entry:
        behind = [str(entry[key]) for key in ("subset", "split") if key in entry]
        if "subset" in entry and "split" not in entry:
            behind.append("train")
        return ":".join([str(entry["hf_hub_url"]), *behind])
    if "file_name" in entry and str(entry["file_name"]).endswith(".txt"):
        t.refuse(given, f"'{name}' is a .txt, each line a text", 'Write the lines as JSON: {"text": "…"}.')
    if "file_name" in entry:
        return os.path.normpath(folder / str(entry["file_name"]))
    kept = next((key for key in ("ms_hub_url", "om_hub_url", "script_url", "cloud_file_name") if key in entry), "")
    what = f"'{name}' is given by {kept or 'nothing'}, from where nothing is read"
    t.refuse(given, what, "Download it, and give its file as file_name.")
    return name


def _instruction(columns: Mapping[str, str], is_text: bool) -> dict[str, Any]:
    if is_text:
        column = columns.get("prompt", "instruction")
        return {"format": "text", **({"columns": {"text": column}} if column != "text" else {})}
    renamed = {ours: columns[theirs] for theirs, (ours, _) in INSTRUCTION.items() if columns.get(theirs, ours) != ours}
    return {"format": "instruction", **({"columns": renamed} if renamed else {})}


def _dialogue(columns: Mapping[str, str], tags: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of the format sharegpt with its own names of fields, or of the format chat with those that they have."""
    said = {ours: str(tags.get(theirs, usual)) for theirs, (ours, usual) in TAGS.items()}
    is_sharegpt = (said["role"], said["content"]) == ("from", "value")
    usual = dict(TAGS.values()) if is_sharegpt else IN_CHAT
    # Of the roles that are not named, only those that every dialogue has matter.
    named = {TAGS[theirs][0] for theirs in tags if theirs in TAGS} | {"role", "content", "user", "assistant"}
    own = "conversations" if is_sharegpt else "messages"
    names = {own: columns.get("messages", "conversations")}
    names |= {name: columns[name] for name in ("system", "tools") if name in columns}
    return {
        "format": "sharegpt" if is_sharegpt else "chat",
        **{
            key: found
            for key, found in (
                ("columns", {ours: theirs for ours, theirs in names.items() if ours != theirs}),
                ("tags", {ours: said[ours] for ours in usual if ours in named and said[ours] != usual[ours]}),
            )
            if found
        },
    }


def _behaviour(t: Translation, is_text: bool) -> None:
    """What its template code did with the rows (data/template.py, processor/supervised.py of the release)."""
    template = t.configuration.given.get("template")
    name = str(template.value) if template else ""
    given = t.written.get("thinking")
    thinks = name.startswith("qwen3") and not name.endswith("nothink")
    if template and not name.startswith(("qwen", "chatml")):
        t.differs(f"the template {name}", "the checkpoint's own, which servers apply")
    if given is not None and given.value is False and thinks:
        t.set("data.thinking", "off", given)
        t.differs("reasoning was cut from every answer", "a row with reasoning is an error under data.thinking: off")
    elif given is not None and given.value is not False:
        t.set("data.thinking", "auto", given)
    if thinks and (given is None or given.value is True):
        t.differs(
            "answers without reasoning began with an empty think block that carried loss",
            "the block is part of the prompt, without loss: the model does not forget to think",
        )
    if name.endswith("nothink") and is_hybrid(t):
        t.differs(
            "no think block stood before an answer, neither in training nor in its own server",
            "the empty block stands in the prompt, as servers put it there with enable_thinking=False",
        )
    if thinks and not t.flag("last_turn"):
        t.differs(
            "the reasoning of earlier turns stayed in the context",
            "each turn follows the history that a server sends, which the checkpoint's template strips",
        )
    if not is_text:
        t.differs(
            "arguments of calls that were JSON text (OpenAI's) were encoded twice",
            "they are objects, as in the model's own template",
        )
        t.differs("longer rows were cut in the middle, or lost their last turns", "they are dropped (data.too_long)")
    else:
        joined(t)
    if t.flag("packing") and not t.flag("isolated"):
        t.differs("packed examples attended to each other", "they are isolated, as with neat_packing")
