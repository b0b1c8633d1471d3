"""The kinds of score, one file each. A new one is a file and its line here."""

from __future__ import annotations

from qwentune.scores.case import Score
from qwentune.scores.exact_match import EXACT_MATCH
from qwentune.scores.likelihood import LOSS, PERPLEXITY
from qwentune.scores.middle import FIM_EXACT, FIM_SIMILARITY
from qwentune.scores.stopped import STOPPED
from qwentune.scores.thinking import REASONING_AS_ASKED
from qwentune.scores.tool_calls import TOOL_ARGUMENTS, TOOL_NAME
from qwentune.scores.valid_json import VALID_JSON

SCORES: tuple[Score, ...] = (
    LOSS,
    PERPLEXITY,
    STOPPED,
    EXACT_MATCH,
    VALID_JSON,
    TOOL_NAME,
    TOOL_ARGUMENTS,
    FIM_EXACT,
    FIM_SIMILARITY,
    REASONING_AS_ASKED,
)
