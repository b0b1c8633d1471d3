"""What must be trained, from first principles: a few calls of `apply_chat_template` per assistant turn.

Slow, literal, and free of qwentune, so that it can disagree with it. The input is one valid row of the `chat`
format, the output is what `qwentune preview --jsonl` prints for it, without the source.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

Row: TypeAlias = dict[str, Any]
Thinking: TypeAlias = Literal["auto", "on", "off"]
Turns: TypeAlias = Literal["all", "last"]
Unsupported: TypeAlias = Literal["refuse", "drop", "inline"]
ReasoningForm: TypeAlias = Literal["field", "inline"]

UNTRAINED = -100
TEXT_PART_SEPARATOR = ""
SERVER_ROLES = {"developer": "system", "function": "tool"}
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")


class UntrainableError(ValueError):
    """The row cannot be trained with this template and these options."""


def expected_examples(
    row: Row,
    tokenizer: PreTrainedTokenizerFast,
    *,
    thinking: Thinking = "auto",
    turns: Turns = "all",
    unsupported_reasoning: Unsupported = "refuse",
    template_args: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The examples of a row in order: `turns`, `input_ids`, `labels` and `weights`.

    `weights` is None where every trained token counts 1, else it has one number per token, 0 without loss.
    """
    args = dict(template_args or {})
    form = reasoning_form(tokenizer, args)
    passed_on = [normalised(message, form, unsupported_reasoning) for message in row["messages"]]
    messages = [message for message, _ in passed_on]
    weights = [turn_weight(message) for message in row["messages"]]
    tools = row.get("tools") or None

    trained = [i for i in range(len(messages)) if weights[i] > 0 and has_user_turn(messages[:i])]
    if turns == "last":
        trained = trained[-1:]

    examples: list[dict[str, Any]] = []
    for i in trained:
        args["enable_thinking"] = {"auto": passed_on[i][1], "on": True, "off": False}[thinking]
        context, target = context_and_target(messages[: i + 1], tools, tokenizer, args)
        shared = examples[-1] if examples else None
        if shared is None or context[: len(shared["input_ids"])] != shared["input_ids"]:
            shared = {"turns": [], "input_ids": [], "labels": [], "weights": []}
            examples.append(shared)
        between = context[len(shared["input_ids"]) :]
        shared["turns"].append(i)
        shared["input_ids"] += between + target
        shared["labels"] += [UNTRAINED] * len(between) + target
        shared["weights"] += [0.0] * len(between) + [weights[i]] * len(target)

    for example in examples:
        if all(weights[i] == 1 for i in example["turns"]):
            example["weights"] = None
    return examples


# --- the row, as a server would pass it on


def normalised(message: Row, form: ReasoningForm | None, unsupported: Unsupported) -> tuple[Row, bool]:
    """The message as the template gets it, and whether there is reasoning in it.

    The reasoning is in the form that the template understands.
    """
    message = {
        key: value
        for key, value in copy.deepcopy(message).items()
        if value is not None and key not in ("train", "weight")
    }
    message["role"] = SERVER_ROLES.get(message["role"], message["role"])
    content = message.get("content", "")
    if isinstance(content, list):
        content = TEXT_PART_SEPARATOR.join(part["text"] for part in content)
    message["content"] = content
    for call in message.get("tool_calls", []):
        function = call.get("function", call)
        if isinstance(function["arguments"], str):
            function["arguments"] = json.loads(function["arguments"])
    if message["role"] != "assistant":
        return message, False

    given = [message.pop(name) for name in REASONING_FIELDS if name in message]
    reasoning = given[0] if given and given[0].strip() else None
    if reasoning is None and form is not None:
        reasoning, message["content"] = split_inline_reasoning(message["content"])
    if reasoning is None or (form is None and unsupported == "drop"):
        return message, False
    if form is None and unsupported == "refuse":
        raise UntrainableError("the template has no place for reasoning")
    if form == "field":
        return message | {"reasoning_content": reasoning}, True
    return message | {"content": inline(reasoning, message["content"])}, True


def split_inline_reasoning(content: str) -> tuple[str | None, str]:
    """The reasoning and the answer of a completion, whose opening tag may have been the end of the prompt."""
    before, closing, after = content.partition("</think>")
    opening = before.lstrip()
    if not closing or ("<think>" in opening and not opening.startswith("<think>")):
        return None, content
    reasoning = (opening.removeprefix("<think>") if opening.startswith("<think>") else before).strip("\n")
    return (reasoning if reasoning.strip() else None), after.lstrip("\n")


def inline(reasoning: str, answer: str) -> str:
    """Reasoning and answer as one text, as the Qwen3 templates write them."""
    return f"<think>\n{reasoning}\n</think>\n\n{answer}"


def turn_weight(message: Row) -> float:
    """The factor of the loss of a message; 0 for all that is not to be trained."""
    if message["role"] != "assistant" or message.get("train") is False:
        return 0.0
    weight = message.get("weight")
    return 1.0 if weight is None else float(weight)


def has_user_turn(messages: list[Row]) -> bool:
    """Whether a server could have been asked for what follows these messages."""
    return any(message["role"] == "user" for message in messages)


def reasoning_form(tokenizer: PreTrainedTokenizerFast, args: Mapping[str, Any]) -> ReasoningForm | None:
    """How the template takes reasoning: in its field, inside the content, or not at all.

    A template reads inline text as reasoning where it keeps it in the last turn and drops it from history.
    """
    question = {"role": "user", "content": "question"}
    in_field = {"role": "assistant", "content": "answer", "reasoning_content": "REASONING"}
    in_content = {"role": "assistant", "content": inline("REASONING", "answer")}

    def shows(*messages: Row) -> bool:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, **args)
        return "REASONING" in str(text)

    if shows(question, in_field):
        return "field"
    if shows(question, in_content) and not shows(question, in_content, question):
        return "inline"
    return None


# --- one turn


def context_and_target(
    messages: list[Row], tools: list[Row] | None, tokenizer: PreTrainedTokenizerFast, args: Mapping[str, Any]
) -> tuple[list[int], list[int]]:
    """The ids of the prompt before the last message, and of what the model is to answer.

    Text is rendered with every "|" replaced: each marker in the rendering was written by the template.
    """
    used = json.dumps([messages, tools, tokenizer.chat_template], ensure_ascii=False)
    guard = next(character for character in map(chr, range(0xE000, 0xF900)) if character not in used)
    messages, tools = replaced(messages, "|", guard), replaced(tools, "|", guard)
    added, marker = markers_of(tokenizer)

    def rendered(part: list[Row], **kwargs: Any) -> str:
        return str(tokenizer.apply_chat_template(part, tools=tools, tokenize=False, **kwargs, **args))

    context = rendered(messages[:-1], add_generation_prompt=True)
    whole = rendered(messages)
    if not whole.startswith(context):
        raise UntrainableError(f"the turn {whole!r} does not extend its context {context!r}")
    pieces = marker.split(whole[len(context) :])
    if len(pieces) == 1 or pieces[-1].strip():
        raise UntrainableError(f"the turn {whole!r} does not end in a control token")

    encode_text = text_encoder(tokenizer.backend_tokenizer, guard)

    def encode(pieces: list[str]) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            if marker.fullmatch(piece):
                ids.append(added[piece])
            else:
                ids += encode_text(piece.replace(guard, "|"))
        return ids

    return encode(marker.split(context)), encode(pieces[:-1])


def replaced(value: Any, old: str, new: str) -> Any:
    """The same JSON value with a replacement made in all its texts and keys."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, list):
        return [replaced(item, old, new) for item in value]
    if isinstance(value, dict):
        return {replaced(key, old, new): replaced(item, old, new) for key, item in value.items()}
    return value


@functools.lru_cache(maxsize=8)
def markers_of(tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, int], re.Pattern[str]]:
    """The added tokens with their ids, and a pattern that splits a rendering at those that are markers."""
    added = tokenizer.get_added_vocab()
    markers = [token for token in added if token.startswith("<|")]
    return added, re.compile("(" + "|".join(map(re.escape, markers)) + ")")


@functools.lru_cache(maxsize=8)
def text_encoder(tokenizer: Tokenizer, guard: str) -> Callable[[str], list[int]]:
    """Encodes text in which no marker is a token: the markers of this copy are spelled with the guard."""
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        if token["content"].startswith("<|"):
            token["content"] = token["content"].replace("|", guard)
    encoder = Tokenizer.from_str(json.dumps(content))
    return lambda text: encoder.encode(text, add_special_tokens=False).ids


# --- to read by eye


def masked_text(example: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast) -> str:
    """The text of an example with what carries loss in ⟦ ⟧."""
    shown = ""
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    for is_trained, run in itertools.groupby(pairs, key=lambda pair: pair[1] != UNTRAINED):
        text = str(tokenizer.decode([token_id for token_id, _ in run]))
        shown += f"⟦{text}⟧" if is_trained else text
    return shown
