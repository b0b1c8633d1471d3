"""Keys and tokens of services that stand in texts of the data, known by the beginnings that their issuers publish.

A detector of everything that looks random was tried: it is slow, and takes English words for keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_PLACEHOLDER = "(?![xX0*]{8})"  # as documentation writes a key that is none


@dataclass(frozen=True, slots=True)
class Form:
    """How the secrets of one kind are written: a `head`, which may be shown, and a body; `source` says where from.

    Both are regular expressions. A head begins with plain characters and has one length: these are what `re` looks
    for first, so that a text without them costs next to nothing.
    """

    kind: str
    head: str
    body: str
    source: str
    pattern: re.Pattern[str] = field(init=False)

    def __post_init__(self) -> None:
        start = f"({self.head})(?<![A-Za-z0-9]{self.head})"  # no part of a longer word
        object.__setattr__(self, "pattern", re.compile(f"{start}{_PLACEHOLDER}{self.body}"))


_AWS = "docs.aws.amazon.com/IAM/latest/UserGuide/reference_identifiers.html#identifiers-unique-ids"
_GITHUB = "github.blog/2021-04-05-behind-githubs-new-authentication-token-formats/"
_HUGGING_FACE = "huggingface.co/docs/hub/security-tokens"
_OPENAI = "help.openai.com/en/articles/5112595-best-practices-for-api-key-safety"
_ANTHROPIC = "docs.anthropic.com/en/api/admin-api/apikeys/get-api-key"
_GOOGLE = "cloud.google.com/docs/authentication/api-keys"
_SLACK = "docs.slack.dev/authentication/tokens/"
_ARMOUR = "RFC 7468, section 10; RFC 9580, section 6.2"

_MORE = r"(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{20,}"  # with a digit: words have none
_LINE_END = r"(?:\s|\\[nr])"
FORMS = (
    Form("AWS access key", "A(?:KIA|SIA|BIA|CCA)", r"[A-Z0-9]{16}(?![A-Za-z0-9])", _AWS),
    Form("GitHub token", "gh[pousr]_", "[A-Za-z0-9]{36,}", _GITHUB),
    Form("GitHub token", "github_pat_", "[A-Za-z0-9_]{36,}", _GITHUB),
    Form("Hugging Face token", "hf_", "[A-Za-z0-9]{30,}", _HUGGING_FACE),
    Form("Anthropic key", "sk-ant-", _MORE, _ANTHROPIC),
    Form("OpenAI key", "sk-", rf"(?:(?:proj|svcacct|admin)-{_MORE}|(?=[A-Za-z]*[0-9])[A-Za-z0-9]{{32,}})", _OPENAI),
    Form("Google key", "AIza", "[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])", _GOOGLE),
    Form("Google key", "GOCSPX-", "[A-Za-z0-9_-]{28}(?![A-Za-z0-9_-])", _GOOGLE),
    Form("Slack token", "xox[a-z]-", "(?=[A-Za-z-]*[0-9])[A-Za-z0-9-]{10,}", _SLACK),
    Form("Slack token", "xapp-", "[0-9]-[A-Za-z0-9-]{20,}", _SLACK),
    Form("Slack webhook", r"hooks\.slack\.com/", "(?:services|workflows|triggers)/[A-Za-z0-9/]{20,}", _SLACK),
    Form(
        "private key",
        "-----BEGIN ",
        rf"[A-Z0-9 ]{{0,20}}PRIVATE KEY(?: BLOCK)?-----{_LINE_END}*+"
        rf"(?:[A-Za-z-]++: [^\n\\]*+{_LINE_END}++)*+[A-Za-z0-9+/=]{{16}}",
        _ARMOUR,
    ),
)


@dataclass(frozen=True, slots=True)
class Credential:
    """A secret that was found: its kind, and what of it may be shown."""

    kind: str
    masked: str


def credentials(text: str) -> Iterator[Credential]:
    """The secrets in a text, kind by kind."""
    for form in FORMS:
        for match in form.pattern.finditer(text):
            yield Credential(form.kind, f"{match[1].strip()}…")
