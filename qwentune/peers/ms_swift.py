"""ms-swift: data sets with `#` and `:` behind their names, loss scales, and what it trained with them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwentune.peers.configuration import Given
from qwentune.peers.translation import Translation, as_list, as_mapping, file_of, is_hybrid, is_off, shown

VERBS = {"sft": "", "pt": "text", "": ""}
TASKS = ("causal_lm",)
COLUMNS = {  # its standard names of columns: the format that reads them, and ours
    "messages": ("chat", "messages"),
    "conversations": ("chat", "messages"),
    "query": ("instruction", "instruction"),
    "instruction": ("instruction", "instruction"),
    "input": ("instruction", "input"),
    "response": ("instruction", "output"),
    "output": ("instruction", "output"),
    "history": ("instruction", "history"),
    "system": ("", "system"),
    "tools": ("", "tools"),
    **{kind: ("", kind) for kind in ("images", "videos", "audios")},
    **{kind: ("", f"{kind}s") for kind in ("image", "video", "audio")},
}
SUFFIXES = ("json", "jsonl", "csv", "parquet", "gz", "zst")
HEAD_BYTES = 65536
DATASET = re.compile(r"(?:(HF|MS|hf|ms)::)?(.+?)(?::([\w./-]+))?(?:#(\d+))?")
TURNS = {"default": "all", "last_round": "last"}
KNOWN_SCALES = {"default", "last_round", "ignore_empty_think"}


def translate_data(t: Translation) -> None:
    """Data, template and mask."""
    verb = t.configuration.verb
    if verb not in VERBS:
        where = Given(f"swift {verb}", "", str(t.configuration.path))
        t.refuse(where, "this command trains nothing that is here", "`swift sft` and `swift pt` are translated.")
    for term in ("task", "rlhf"):
        given = t.get(term)
        if given is not None and str(given.value) in TASKS:
            t.set("objective.kind", "sft", given)
        elif given is not None:
            fix = "Only supervised fine-tuning is translated; preferences, rewards and embeddings are other tasks."
            t.refuse(given, f"the task {shown(given.value)} is not here", fix)
    is_text = VERBS.get(verb) == "text" or _is_off(t, "use_chat_template")
    columns = _columns(t)
    given = t.written.get("data")
    if given is None:
        where = Given("dataset", "", str(t.configuration.path))
        t.refuse(where, "no data is named", "Give `dataset`, files or data sets of the hub.")
    t.set("data.train", _sources(t, given, columns, is_text), given, t.written.get("columns"), t.written.get("use_hf"))
    if evaluation := t.written.get("eval_data"):
        t.set("data.eval", _sources(t, evaluation, columns, is_text), evaluation)
    if t.get("max_tokens") is None:
        t.differs("rows were as long as the model's window", "longer ones than data.max_tokens are dropped: 4096")
    _too_long(t)
    _system(t)
    _thinking(t, is_text)
    method = t.get("method")
    t.defaults["optimizer.learning_rate"] = 1.0e-5 if method and method.value == "full" else 1.0e-4


def _is_off(t: Translation, key: str) -> bool:
    given = t.configuration.given.get(key)
    return given is not None and given.value is False


def _columns(t: Translation) -> Mapping[str, str]:
    """Their standard names to the names in the file; --columns says it the other way round."""
    given = t.written.get("columns")
    if given is None:
        return {}
    value = as_mapping(given.value)
    if value is None:
        t.refuse(given, f"{shown(given.value)} is given; a mapping is needed", 'As in {"question": "query"}.')
        return {}
    named = {str(theirs): name for name, theirs in value.items()}
    for unknown in sorted(named.keys() - COLUMNS.keys()):
        t.leave_out(given, f"the column {unknown}: no format here has one of that name", changes=True)
    return named


def _sources(t: Translation, given: Given | None, columns: Mapping[str, str], is_text: bool) -> list[dict[str, Any]]:
    """The sources of a list of data sets; one that holds no rows yet is left out."""
    if given is None:
        return []
    named = [str(item) for item in (given.value.split() if isinstance(given.value, str) else as_list(given.value))]
    found: list[dict[str, Any]] = []
    for name in named:
        if "self-cognition" in name:
            why = "its rows have placeholders for names: write them into a file of your own"
            t.leave_out(Given(given.key, name, given.where), why, changes=True)
            continue
        path, subset, rows = _parts(t, name)
        source: dict[str, Any] = {"path": f"{path}:{subset}:train" if subset and subset != "default" else path}
        found.append(source | ({"max_rows": int(rows)} if rows else {}) | _format(path, columns, is_text))
    if not found:
        t.refuse(given, "no data set of these can be read", "Name files of rows, or data sets of the hub.")
    return found


def _parts(t: Translation, name: str) -> tuple[str, str | None, str | None]:
    """Path, subset and number of rows of `HF::path:subset#rows`; a file may have these signs in its own name."""
    match = DATASET.fullmatch(name)
    if Path(name).exists() or match is None:
        return name, None, None
    hub, path, subset, rows = match.groups()
    path = file_of(t, path)
    is_file = Path(path).exists() or Path(path).suffix[1:] in SUFFIXES
    if not is_file and (hub or "").lower() != "hf" and not t.flag("use_hf"):
        t.differs(f"{path} came from ModelScope", "the data set of that name comes from Hugging Face, or a file")
    return path, subset, rows


def _format(path: str, columns: Mapping[str, str], is_text: bool) -> dict[str, Any]:
    """Format and columns of a source; a column that its file does not begin with is another one's."""
    if is_text:
        return {"format": "text"}
    head = _head(path)
    read = [(COLUMNS[theirs], name) for theirs, name in columns.items() if theirs in COLUMNS and name in (head or name)]
    formats = {format for (format, _), _ in read if format}
    renamed = {ours: name for (_, ours), name in read if ours != name}
    return {"format": formats.pop() if len(formats) == 1 else "auto", **({"columns": renamed} if renamed else {})}


def _head(path: str) -> str:
    """The beginning of a file of text, in which its columns stand; empty where there is none."""
    if Path(path).suffix not in (".json", ".jsonl", ".csv") or not Path(path).is_file():
        return ""
    with open(path, "rb") as file:
        return file.read(HEAD_BYTES).decode(errors="replace")


def _too_long(t: Translation) -> None:
    given = t.get("too_long")
    if given is None or given.value == "delete":
        t.set("data.too_long", "drop", given)
        return
    name = str(given.value)
    ours = "drop_old_turns" if name == "left" else "error" if name == "raise" else "drop"
    t.set("data.too_long", ours, given)
    if name in ("left", "right"):
        t.differs(
            f"longer rows lost tokens on the {name}, in the middle of a turn",
            "whole old turns are left out" if name == "left" else "they are dropped",
        )


def _system(t: Translation) -> None:
    """A system text may stand in a file."""
    given = t.get("system")
    if given is not None and (file := Path(file_of(t, str(given.value)))).suffix == ".txt" and file.is_file():
        t.set("data.system", file.read_text(encoding="utf-8").strip(), given)


def _thinking(t: Translation, is_text: bool) -> None:
    """Modes, loss scales, and what its template code did with the rows (template/, loss_scale/ of the release)."""
    given = t.written.get("thinking")
    if given is not None:
        t.leave_out(given, "it only held for inference there; data.thinking: auto takes the mode from each turn")
    scales = t.written.get("loss_scale")
    names = set(str(scales.value).split("+")) if scales else {"default"}
    if turns := next((TURNS[name] for name in names if name in TURNS), None):
        t.set("data.turns", turns, scales)
    if scales and (rest := names - KNOWN_SCALES):
        why = "weights of parts of an answer: a message takes a `weight` of its own"
        t.leave_out(Given(scales.key, "+".join(sorted(rest)), scales.where), why, changes=True)
    template = t.configuration.given.get("template")
    if template and not is_off(template.value) and not str(template.value).startswith(("qwen", "chatml")):
        t.differs(f"the template {shown(template.value)}", "the checkpoint's own, which servers apply")
    if is_text and t.flag("packing"):
        t.differs("a longer text was dropped, or split", "it goes on in the next row")
    if is_text or not is_hybrid(t):
        return
    if "ignore_empty_think" not in names and not _is_off(t, "add_non_thinking_prefix"):
        t.differs(
            "answers without reasoning began with an empty think block that carried loss",
            "the block is part of the prompt, without loss: the model does not forget to think",
        )
    preserved = t.configuration.given.get("preserve_thinking")
    if "last_round" not in names and (preserved is None or not is_off(preserved.value)):
        t.differs(
            "the reasoning of earlier turns stayed in the context",
            "each turn follows the history that a server sends, which the checkpoint's template strips",
        )
