"""Whether a tokenizer gives back what it is given, and each control token is one token, always the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from tokenizers import Tokenizer as Backend

from qwentune.errors import Problem

END_OF_TEXT = "<|endoftext|>"
ANOTHER = "Take the tokenizer files of the published checkpoint."
AROUND = (("a", "b"), ("a ", "\n b"))  # a token that takes its neighbours' white space would show
NFC = ("NFC", None)  # what Qwen's own do to a text
SAMPLE = (
    "The quick brown fox, 'twas 1234567890 it's said; ÀÉîõü ß Ł ø.",
    "今天天气怎么样?我想去公园。 カタカナ ひらがな 한국어 텍스트",
    "हिन्दी में लिखिए กรุณาเขียน السَّلَامُ עברית Ελληνικά Кириллица ქართული አማርኛ",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪 ♥\ufe0f \ue000\U000f0000 \ufeff\u200b\u200f x\u0337\u0301 e\u0301 \u0e33",
    " leading,  double,   three; trailing \t\ttabs \r\n\r\n \n\n\n\u00a0\u3000\u2028end  \n ",
    "def f(x: int) -> dict:\n    return {'a': [1.5e-3, None], \"b\": x ** 2}  # ½ №\n\n\nUPPER lower",
    '<|im_ <| |> im_end|> <think> </think> <tool_call>{"name": "f"}</tool_call> ## ▁ Ġ Ċ @@ </w> [UNK] <s> \x00\x7f',
)


def file_problems(
    file: str, document: Mapping[str, Any], added: Iterable[Mapping[str, Any]], num_rows: int | None
) -> list[Problem]:
    """What in a `tokenizer.json` keeps it from being exact; `added` are its added tokens and those named elsewhere.

    `num_rows` is how many tokens the model has rows for, where that is known.
    """
    model = cast(dict[str, Any], document.get("model") or {})
    whats: list[str] = []
    if model.get("dropout"):
        whats.append(f"its model has dropout {model['dropout']}: the same text has other tokens each time")
    others = [name for name in _normalizers(document.get("normalizer")) if name not in NFC]
    if others:
        whats.append(f"its normaliser {others[0]!r} changes texts; Qwen's own composes characters (NFC), no more")
    vocabulary = cast(dict[str, int], model.get("vocab") or {})
    ids, names = dict[int, str](), dict[str, int]()
    for token in added:
        name, number = str(token["content"]), int(token["id"])
        if ids.setdefault(number, name) != name:
            whats.append(f"the id {number} is that of both {ids[number]!r} and {name!r}")
        if names.setdefault(name, number) != number or vocabulary.get(name, number) != number:
            other = names[name] if names[name] != number else vocabulary[name]
            whats.append(f"{name!r} has two ids, {other} and {number}")
        if number < 0 or (num_rows is not None and number >= num_rows):
            whats.append(f"{name!r} has the id {number}, and the model has rows for {num_rows} tokens")
    if END_OF_TEXT not in names:
        whats.append(f"it has no token {END_OF_TEXT}, with which texts end")
    taken = ids.keys() & set(vocabulary.values())
    whats += [f"the id {number} of {ids[number]!r} is that of another token" for number in sorted(taken)
              if vocabulary.get(ids[number]) != number]  # fmt: skip
    return [Problem(file, what, ANOTHER) for what in whats]


def proof_problems(file: str, backend: Backend, control_ids: Mapping[str, int], tags: Iterable[str]) -> list[Problem]:
    """What a built tokenizer does not give back of a sample of texts, and which control tokens are not single.

    `tags` are tokens that texts may spell. `backend` recognises no control token in a text, and does so again after.
    """
    spelled = (f"{before}{token}{after}" for token in (*control_ids, *tags) for before, after in AROUND)
    whats = [what for text in (*SAMPLE, *spelled) if (what := lost(backend, text, _ids(backend, text)))][:1]
    backend.encode_special_tokens = False  # as a server reads what a template wrote
    try:
        for name, number in control_ids.items():
            if backend.decode([number], skip_special_tokens=False) != name or any(
                _ids(backend, f"{before}{name}{after}") != [*_ids(backend, before), number, *_ids(backend, after)]
                for before, after in AROUND
            ):
                whats.append(f"the control token {name} is not the one token {number} wherever it stands")
    finally:
        backend.encode_special_tokens = True
    return [Problem(file, what, ANOTHER) for what in whats]


def lost(backend: Backend, text: str, ids: list[int]) -> str | None:
    """What is lost of a text, up to the composition of its characters; None where nothing is."""
    decoded = backend.decode(ids, skip_special_tokens=False)
    if decoded == text or composed(backend, decoded) == composed(backend, text):
        return None
    at = next((k for k, (a, b) in enumerate(zip(text, decoded, strict=False)) if a != b), min(len(text), len(decoded)))
    near = slice(max(0, at - 8), at + 16)
    return f"it does not give back what it is given: {text[near]!r} comes back as {decoded[near]!r}"


def composed(backend: Backend, text: str) -> str:
    """The text as the tokenizer's own normaliser composes it."""
    return text if backend.normalizer is None else backend.normalizer.normalize_str(text)


def _ids(backend: Backend, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


def _normalizers(value: Any) -> list[str | None]:
    """The types of a normaliser and of those it is made of."""
    if not isinstance(value, dict):
        return [None]
    fields = cast(dict[str, Any], value)
    if fields.get("type") == "Sequence":
        return [name for one in cast(list[Any], fields.get("normalizers") or []) for name in _normalizers(one)]
    return [fields.get("type")]
