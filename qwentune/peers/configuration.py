"""A configuration of another tool as it was written: YAML, JSON, or a command line in a script."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from qwentune.bounded import UnreadableError, read_text
from qwentune.errors import Problem, UsageError
from qwentune.peers.key_tables import PEERS, KeyTable, key_table

MAX_BYTES = 1_000_000
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::?-([^}]*))?\})")
_SUM = re.compile(r"\$\((?:\(|expr\0)\0*(\d{1,9})\0*([-+*/])\0*(\d{1,9})\0*\)?\)")  # between words is a \0
_PROGRAM = re.compile(
    r"(?:swift|megatron|llamafactory-cli|lmf|axolotl(?:\.cli\.train)?)|.*\b(sft|pt|rlhf|train|train_bash)\.py"
)
_PROCESSES = ("NPROC_PER_NODE", "--nproc_per_node", "--nproc-per-node", "--num_processes")
_OWN = frozenset({"model", "tuning", "data"})  # the sections that no recipe lacks


@dataclass(frozen=True, slots=True)
class Given:
    """A value with its key and the place where it stands; `where` is empty for a default."""

    key: str
    value: Any
    where: str


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a file says to which tool; `verb` is the word after the program's name, `gpus` what its command tells."""

    path: Path
    table: KeyTable
    name: str
    given: Mapping[str, Given]
    verb: str
    gpus: int | None


def read_configuration(path: Path) -> Configuration:
    """The configuration in a file. Raises UsageError where it is none of a tool that is known."""
    try:
        text = read_text(path, MAX_BYTES)
    except UnreadableError as error:
        raise UsageError(Problem(str(path), str(error), "Name a configuration, a text file of some lines.")) from None
    given, verb, gpus = _mapping(text, path), "", None
    if given is None:
        command = _command(text)
        if command is None:
            what = "a configuration is a mapping of keys, or a script with a command such as `swift sft --model …`"
            raise UsageError(Problem(str(path), what, "Is it the right file?"))
        _refuse_named_file(command, path)
        given, verb, gpus = _flags(command, text, path), command.verb, command.gpus
    name = _peer(given, path)
    return Configuration(path, key_table(name), name, given, verb, gpus)


def _peer(given: Mapping[str, Given], path: Path) -> str:
    """Which tool takes these keys: the one whose telling keys are the most, then the one that knows the most."""
    keys = set(given)
    if keys >= _OWN:
        what, fix = "this is a recipe of qwentune already", f"Use it: qwentune preview {path}"
        raise UsageError(Problem(str(path), what, fix))
    second = key_table("llama_factory").second_schema & keys
    if second:
        first = min((given[key] for key in second), key=lambda one: int(one.where.rpartition(":")[2] or 0))
        what = f"{first.key}: this is LLaMA-Factory's second schema (v1), which is not translated"
        fix = (
            "Give the configuration in its first schema (model_name_or_path, finetuning_type, …), or use `init --data`."
        )
        raise UsageError(Problem(first.where, what, fix))
    scores = {
        name: (len(keys & table.known_by), len(keys & table.own)) for name in PEERS for table in [key_table(name)]
    }
    name = max(scores, key=lambda name: scores[name])
    if scores[name][0] == 0:
        peers = ", ".join(key_table(name).peer for name in PEERS)
        what = f"this is no configuration of {peers}: it has none of the keys by which they are known"
        known = "; ".join(" ".join(sorted(key_table(name).known_by)) for name in PEERS)
        raise UsageError(Problem(str(path), what, f"These are: {known}."))
    return name


def _mapping(text: str, path: Path) -> dict[str, Given] | None:
    """The keys of YAML or JSON at the top, as PyYAML reads them; None where it is none.

    Raises UsageError where it is one that is damaged.
    """
    loader: Any = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        tree: Any = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if path.suffix not in (".yaml", ".yml", ".json"):
            return None
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        reason = getattr(error, "problem", None) or str(error)
        reason = "it is nested too deep" if isinstance(error, RecursionError) else reason
        raise UsageError(Problem(where, f"this is neither YAML nor JSON: {reason}", "Correct the file.")) from None
    if not isinstance(node, yaml.MappingNode):
        return None
    lines = {str(key.value): key.start_mark.line + 1 for key, _ in node.value}
    values: dict[Any, Any] = tree
    return {str(key): Given(str(key), value, f"{path}:{lines.get(str(key), 1)}") for key, value in values.items()}


@dataclass(frozen=True, slots=True)
class _Command:
    words: list[str]
    verb: str
    gpus: int | None


def _command(text: str) -> _Command | None:
    """The last command of a script that trains, its variables filled in; None where there is none."""
    variables: dict[str, str] = {}
    found = None
    for words in _commands(text):
        if words[:1] == ["export"]:
            words = words[1:]
        while words and (match := _ASSIGNMENT.fullmatch(words[0])):
            variables[match[1]] = _filled(match[2], variables)
            words = words[1:]
        words = _calculated([_filled(word, variables) for word in words])
        programs = [(place, _PROGRAM.fullmatch(os.path.basename(word))) for place, word in enumerate(words)]
        place, program = next(((place, match) for place, match in programs if match), (0, None))
        if program is not None:
            rest = words[place + 1 :]
            verb = program[1] or (rest.pop(0) if rest and not rest[0].startswith("-") else "")
            found = _Command(rest, verb, _num_gpus(program[0], variables, words[:place]))
    return found


def _commands(text: str) -> Iterator[list[str]]:
    """The commands of a script as words, as far as its quotes can be read."""
    without_comments = re.sub(r"(?m)(^|(?<=\s))#.*$", "", text)
    lexer = shlex.shlex(re.sub(r"\\\r?\n", " ", without_comments), posix=True, punctuation_chars=";|&\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    words: list[str] = []
    try:
        for word in lexer:
            if set(word) <= set(";|&\n"):
                yield words
                words = []
            else:
                words.append(word)
    except ValueError:
        return
    yield words


def _filled(word: str, variables: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda match: variables.get(match[1] or match[2], match[3] or match[0]), word)


def _calculated(words: list[str]) -> list[str]:
    """Words in which `$(expr 16 / 2)` and `$((16 / 2))` are their results; nothing else is run."""
    return _SUM.sub(lambda match: str(_result(int(match[1]), match[2], int(match[3]))), "\0".join(words)).split("\0")


def _result(left: int, sign: str, right: int) -> int:
    return {"*": left * right, "+": left + right, "-": left - right, "/": left // (right or 1)}[sign]


def _num_gpus(program: str, variables: Mapping[str, str], launcher: list[str]) -> int | None:
    """How many processes a command starts; None where it does not say."""
    said = {**variables, **dict(pairwise(" ".join(launcher).replace("=", " ").split()))}
    usual = "1" if program == "swift" else ""
    processes = next((said[name] for name in _PROCESSES if name in said), usual)
    machines = said.get("NNODES", "1")
    return int(processes) * int(machines) if processes.isdecimal() and machines.isdecimal() else None


def _flags(command: _Command, text: str, path: Path) -> dict[str, Given]:
    """The values of `--key value …` and `--key=value`; several values make a list, none stands for true."""
    values = dict[str, list[str]]()
    key = ""
    for word in command.words:
        if match := re.fullmatch(r"--([A-Za-z]\w*(?:-\w+)*)(?:=(.*))?", word, re.DOTALL):
            key = match[1].replace("-", "_")
            values[key] = [] if match[2] is None else [match[2]]
        elif key:
            values[key].append(word)
    lines = text.splitlines()
    places = {
        key: next((number for number, line in enumerate(lines, start=1) if re.search(rf"--{key}\b", line)), 1)
        for key in values
    }
    return {key: Given(key, _value(words), f"{path}:{places[key]}") for key, words in values.items()}


def _refuse_named_file(command: _Command, path: Path) -> None:
    """Raises UsageError where a command takes its keys from a file of its own."""
    words = command.words[command.words[:1] == ["--config"] :]
    if words and words[0].endswith((".yaml", ".yml", ".json")):
        what = f"its command reads {words[0]}"
        raise UsageError(Problem(str(path), what, f"Give that file: qwentune init --from {words[0]}"))


def _value(words: list[str]) -> Any:
    if not words:
        return True
    if len(words) > 1:
        return words
    if words[0] in ("None", ""):
        return None
    try:
        value = yaml.safe_load(words[0])
    except (yaml.YAMLError, ValueError, RecursionError):
        return words[0]
    return words[0] if value is None else value
