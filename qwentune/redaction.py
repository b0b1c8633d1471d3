"""Secrets kept out of what is printed and stored: known by the names of variables, and by the look of tokens."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

HIDDEN = "[secret]"
SHORTEST_SECRET = 8  # characters; a shorter value would hide ordinary words
SHORTEST_LINE = 16  # of a secret of several lines, each of which is kept out as well

# A name is cut at what is no letter or digit. A part that ends so, or is one of the words, makes it a secret's name.
_ENDINGS = (
    *("PASSWORD", "PASSWORDS", "PASSWD", "PASSPHRASE", "SECRET", "SECRETS", "TOKEN", "CREDENTIAL", "CREDENTIALS"),
    *("APIKEY", "ACCESSKEY", "SECRETKEY", "PRIVATEKEY", "AUTHKEY"),
)
_WORDS = {"PASS", "PWD", "PAT", "PATS", "CREDS", "AUTH", "JWT", "DSN", "BEARER", "DBPASS", "SSHPASS"}
# What a name ends with that holds no secret itself, but says something about one or where it is.
_ABOUT = {
    *("FILE", "PATH", "DIR", "SOCK", "HOST", "ENDPOINT", "NAME", "TYPE", "MODE", "METHOD", "ALGORITHM", "VERSION"),
    *("ENABLED", "PARALLELISM", "PROVIDER", "DOMAIN", "RATE", "LIST", "LIMIT", "LENGTH", "SIZE", "COUNT", "TTL"),
    *("SECONDS", "EXPIRY", "EXPIRES"),
}
_LABELS = {"ID", "PROD", "PRODUCTION", "DEV", "TEST", "STAGING", "CI", "OLD", "NEW", "DATA"}  # after KEY
_ORDINARY_KEYS = {"PUBLIC", "EXPERIMENT", "SORT", "PARTITION", "FOREIGN", "CACHE", "INDEX", "GROUP", "JOIN", "ROUTING"}
_ORDINARY_KEYS |= {"TEXT", "PROMPT", "RESPONSE", "MESSAGES", "COLUMN", "LABEL", "IMAGE"}
_OF_A_MODEL = {  # before TOKEN
    *("EOS", "BOS", "PAD", "UNK", "SEP", "MASK", "STOP", "SPECIAL", "CHAT", "START", "END", "MAX", "NEW"),
}

# Tokens of hubs, trackers, clouds and shops by their published prefixes, and what follows a prefix.
_TOKENS = {
    r"[A-Za-z0-9]{16,}": "hf_ api_org_ ghp_ gho_ ghu_ ghs_ ghr_ npm_ LTAI gsk_ xai- pplx- "
    "sk_live_ sk_test_ rk_live_ rk_test_ lin_api_ AGE-SECRET-KEY-1",
    # What could as well begin the name of a file or a run must go on as no words do.
    r"(?=[A-Za-z0-9_-]*[0-9])(?=[A-Za-z0-9_-]*[A-Za-z0-9]{16}|[A-Za-z0-9_-]{32})[A-Za-z0-9_-]{16,}": "sk-",
    r"(?=[A-Za-z]*[0-9])(?=[a-z0-9]*[A-Z])[A-Za-z0-9]{16,}": "r8_ fw_ ntn_",
    r"[ ](?=[A-Za-z/+]*[0-9])(?=[a-z0-9/+]*[A-Z])[A-Za-z0-9/+]{20,}={0,2}(?![\w.-])": "Basic",
    r"[A-Z0-9]{16}": "AKIA ASIA ABIA ACCA",
    r"[A-Za-z0-9_-]{20,}": "github_pat_ pypi- AIza ya29. GOCSPX- dckr_pat_ dckr_oat_ hvs. hvb.",
    r"[a-f0-9]{32,}": "dapi dop_v1_ doo_v1_ dor_v1_ shpat_ shpca_ shppa_ shpss_ rubygems_",
    r"[A-Za-z0-9-]{10,}": "xoxa- xoxb- xoxe- xoxo- xoxp- xoxr- xoxs- xapp-",
    r"[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.?[A-Za-z0-9_-]*": "SG. eyJ",  # the second is a JSON Web Token
    r"(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{16,}": "nvapi- tvly- tgp_v1_ wandb_v1_ lsv2_pt_ lsv2_sk_ glpat- glptt- "
    "gldt- glrt- glcbt- glft- glsoat- glagent- figd_ glsa_ glc_ tskey- CFPAT- PMAK- ATATT3",  # words have no digit
    r"[ ]?(?=[A-Za-z_/+=.-]*[0-9])[A-Za-z0-9_/+=.-]{20,}": "Bearer bearer AccountKey= SharedAccessKey= sntrys_ "
    "sntryu_ whsec_ hooks.slack.com/services/",
}
_ADDRESS = r"(?<=://)[^\s/:@]*:[^\s/@]+(?=@)"  # a password in it
_ARMOUR = r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----(?:(?!-----)[\s\S])*(?:-----END [A-Z0-9 ]*-----)?"
_PATTERNS = [  # each behind what a text must hold for it, which is found sooner
    (prefixes.split(), re.compile(rf"\b(?:{'|'.join(map(re.escape, prefixes.split()))}){rest}"))
    for rest, prefixes in _TOKENS.items()
]
_PATTERNS += [(["://"], re.compile(_ADDRESS)), (["-----BEGIN "], re.compile(_ARMOUR))]
_LONG_ENOUGH = re.compile(r"[A-Za-z0-9_/+=.-]{15}|://|-----BEGIN ")  # most texts hold no such thing: found at once
_PLAIN_WORDS = re.compile("[a-z_]+")  # a field's name, by which it is read again
_PASSWORD_IN_ADDRESS = re.compile(r"[\w+.-]+://[^\s/:@]*:([^\s/@]+)@")


def redact(text: str) -> str:
    """The text without what looks like a token and without the values of variables such as HF_TOKEN.

    Values are found as they are, and as JSON, Python, HTML, a shell or an address would write them.
    """
    return _hidden(text, _forms(tuple(os.environ.items())))


def redacted(value: Any) -> Any:
    """A value for JSON with every text in it redacted; numbers and structure stay, and keys that are plain words."""
    forms = _forms(tuple(os.environ.items()))

    def inner(value: Any) -> Any:
        if isinstance(value, str):
            return _hidden(value, forms)
        if isinstance(value, Mapping):
            return {key if _PLAIN_WORDS.fullmatch(key) else inner(key): inner(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [inner(item) for item in value]
        return value

    return inner(value)


def holds_a_token(text: str) -> bool:
    """Whether a part of the text looks like a token or a password."""
    return _hidden(text, ()) != text


def variable_in(text: str) -> str | None:
    """The variable whose secret value is a part of the text; None where there is none."""
    return next((name for name, secret in _secrets(tuple(os.environ.items())) if secret in text), None)


def names_a_secret(name: str) -> bool:
    """Whether a variable of that name holds a password, a token or a key, by the parts of its name."""
    parts = [part.rstrip("0123456789") for part in re.split(r"[^A-Z0-9]+", name.upper())]
    parts = [part for part in parts if part]
    if not parts or parts[-1] in _ABOUT or parts in (["PWD"], ["OLDPWD"]):
        return False
    if parts[-1] == "TOKEN" and parts[-2:-1] and parts[-2] in _OF_A_MODEL:
        return False
    if any(part in _WORDS or part.endswith(_ENDINGS) for part in parts):
        return True
    while parts[-1] in _LABELS and len(parts) > 1:
        parts.pop()
    return parts[-1] == "KEY" and _ORDINARY_KEYS.isdisjoint(parts)


def _hidden(text: str, forms: tuple[str, ...]) -> str:
    for form in forms:
        if form in text:
            text = text.replace(form, HIDDEN)
    if _LONG_ENOUGH.search(text):
        for needles, pattern in _PATTERNS:
            if any(needle in text for needle in needles):
                text = pattern.sub(HIDDEN, text)
    return text


@lru_cache(maxsize=4)
def _secrets(environment: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """The secrets of an environment, each after the name of its variable; paths that exist are none."""
    found: list[tuple[str, str]] = []
    for name, value in environment:
        value = value.strip()
        if names_a_secret(name) and not (os.path.isabs(value) and os.path.exists(value)):
            found.append((name, value))
            found += [(name, line.strip()) for line in value.splitlines() if len(line.strip()) >= SHORTEST_LINE]
        found += [(name, unquote(password)) for password in _PASSWORD_IN_ADDRESS.findall(value)]
    return tuple((name, secret) for name, secret in found if len(secret) >= SHORTEST_SECRET)


@lru_cache(maxsize=4)
def _forms(environment: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """The secrets of an environment as they are and as a text may quote them, the longest first."""
    forms: set[str] = set()
    for _, secret in _secrets(environment):
        forms |= {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]}
        forms |= {repr(f"{secret}\"'")[1:-4], html.escape(secret), html.escape(secret, quote=False)}
        forms |= {quote(secret, safe="", errors="replace"), secret.replace("'", "'\"'\"'")}
    return tuple(sorted(forms, key=len, reverse=True))
