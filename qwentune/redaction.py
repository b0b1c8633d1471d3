"""Secrets kept out of what is printed and stored."""

from __future__ import annotations

import os
import re

HIDDEN = "[secret]"
# Tokens of hubs, trackers and clouds by their published prefixes, and passwords in addresses.
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|glpat-[A-Za-z0-9_-]{16,}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,}|A[KS]IA[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{30,})\b"
    r"|(?<=://)[^\s/:@]+:[^\s/@]+(?=@)"
)
_NAME_OF_A_SECRET = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_?KEY|SECRET_KEY)$")
SHORTEST_SECRET = 8  # characters; a shorter value would hide ordinary words


def redact(text: str) -> str:
    """The text without what looks like a token and without the values of variables such as HF_TOKEN."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST_SECRET and _NAME_OF_A_SECRET.search(name.upper()):
            text = text.replace(value, HIDDEN)
    return _TOKEN.sub(HIDDEN, text)


def holds_a_token(text: str) -> bool:
    """Whether a part of the text looks like a token or a password."""
    return _TOKEN.search(text) is not None
