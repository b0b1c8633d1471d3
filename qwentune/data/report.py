"""What there is to say about a run's data: counts, lengths, modes, what was dropped, and what deserves a warning."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from qwentune.data.media.pads import Shown
from qwentune.data.reading.files import RowCount
from qwentune.data.reading.unread import UnreadKeys
from qwentune.data.rendering.credentials import Credential
from qwentune.data.rendering.outcome import Dropped, Outcome
from qwentune.data.rendering.remarks import CHANGED_BY_NFC
from qwentune.data.sample import Source
from qwentune.data.templates.chat_template import ChatTemplate
from qwentune.data.tokenizing.tokenizer import Tokenizer
from qwentune.errors import counted

NUM_PLACES = 3
FORGED = (
    "control token{|s} {is|are} spelled in texts of the data: encoded as plain text, a server may read them as "
    "control tokens. Remove them, unless the text is about them."
)
# Of a row that is read: one of them.
FATES = ("trained", "evaluated", "logged_again", "left_out_by_repeat", "dropped", "refused")
LENGTH_EDGES = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


@dataclass(slots=True)
class MediaCount:
    """How many media of a kind the rows show, how many tokens these are, and what was scaled, by share of pixels.

    `rows_with_own_limits` are those that bound one otherwise than the run does.
    """

    count: int = 0
    tokens: int = 0
    scaled_down: int = 0
    scaled_up: int = 0
    smallest_scale: float = 1.0
    largest_scale: float = 1.0
    rows_with_own_limits: int = 0

    def add(self, shown: Shown) -> None:
        """Counts one in."""
        scale = round(shown.scale, 4)
        self.merge(MediaCount(1, shown.num_tokens, shown.scale < 1, shown.scale > 1, min(scale, 1.0), max(scale, 1.0)))

    def merge(self, later: MediaCount) -> None:
        """Counts in what another counted."""
        for name in ("count", "tokens", "scaled_down", "scaled_up", "rows_with_own_limits"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.smallest_scale = min(self.smallest_scale, later.smallest_scale)
        self.largest_scale = max(self.largest_scale, later.largest_scale)


@dataclass
class Tally:
    """Counts of outcomes."""

    modes: Counter[str] = field(default_factory=Counter[str])
    counts: Counter[str] = field(default_factory=Counter[str])
    orders: Counter[str] = field(default_factory=Counter[str])  # in which code was written
    lengths: array[int] = field(default_factory=lambda: array("q"))  # of the examples, in tokens
    remarks: Counter[str] = field(default_factory=Counter[str])
    unread: UnreadKeys = field(default_factory=UnreadKeys)
    credentials: Counter[Credential] = field(default_factory=Counter[Credential])
    places: dict[str, list[Source]] = field(
        default_factory=dict[str, list[Source]]
    )  # of remarks and secrets: the first
    last_tokens: Counter[int] = field(default_factory=Counter[int])  # of trained spans
    rows: Counter[str] = field(default_factory=Counter[str])  # by what becomes of them
    media: dict[str, MediaCount] = field(default_factory=dict[str, "MediaCount"])  # by kind, of rows with examples

    def add(self, outcome: Outcome) -> None:
        """Counts one sample in."""
        self.rows[outcome.fate] += 1
        self.remarks.update(outcome.remarks)
        self.credentials.update(outcome.credentials)
        kinds = (credential.kind for credential in outcome.credentials)
        for remark in {*outcome.remarks, *([FORGED] if outcome.forged_control_tokens else []), *kinds}:
            places = self.places.setdefault(remark, [])
            if len(places) < NUM_PLACES:
                places.append(outcome.source)
        self.unread.add(outcome.unread, outcome.source)
        self.modes.update(outcome.modes)
        self.counts["samples"] += 1
        self.counts["rows_with_problems"] += bool(outcome.problems)
        self.counts["turns_with_reasoning"] += outcome.turns_with_reasoning
        self.counts["unreachable_turns"] += outcome.unreachable_turns
        self.counts["forged_control_tokens"] += outcome.forged_control_tokens
        self.counts["checked_turns"] += outcome.checked_turns
        self.orders.update(outcome.orders)
        first = [example for example in outcome.examples if example.version <= 0]
        for example in first:
            self.lengths.append(example.num_tokens)
            self.counts["shared_tokens"] += example.shared
            self.counts["trained_tokens"] += sum(span.stop - span.start for span in example.spans)
            self.last_tokens.update(example.last_tokens)
        if outcome.examples:
            self.counts["rendering_tokens"] += outcome.rendering_tokens
            self.counts["texts"] += sum(not example.turns for example in first)
            for shown in outcome.media:
                self.media.setdefault(shown.kind, MediaCount()).add(shown)
            for kind in {shown.kind for shown in outcome.media if shown.has_own_limits}:
                self.media[kind].rows_with_own_limits += 1

    def merge(self, later: Tally) -> None:
        """Counts in the outcomes of samples that come after these."""
        for counter in ("modes", "counts", "orders", "remarks", "credentials", "last_tokens", "rows"):
            getattr(self, counter).update(getattr(later, counter))
        self.unread.merge(later.unread)
        self.lengths.extend(later.lengths)
        for remark, places in later.places.items():
            self.places[remark] = [*self.places.get(remark, ()), *places][:NUM_PLACES]
        for kind, count in later.media.items():
            self.media.setdefault(kind, MediaCount()).merge(count)


@dataclass
class Report(Tally):
    """What the whole of the samples is like."""

    tokenizer: Tokenizer = field(kw_only=True)
    template: ChatTemplate | None = field(kw_only=True)
    thinking: str = field(kw_only=True)
    num_rows: int = 0  # of the sources that were read to their end

    def end_source(self, path: str, rows: RowCount) -> None:
        """Counts a source in that was read to its end; AssertionError where a row of it is lost uncounted."""
        self.num_rows += rows.read
        self.rows["refused"] += rows.refused
        if not rows.is_complete or self.num_rows != self.rows.total():
            raise AssertionError(f"{path}: rows are lost: {self.num_rows} were read, accounted for are {self.rows}")

    def end(self, fates: Mapping[str, int]) -> None:
        """Counts in what becomes of the rows that have examples; AssertionError where one of them is lost."""
        kept = self.rows.pop("kept", 0)
        if kept != sum(fates.values()):
            raise AssertionError(f"rows are lost: {kept} have examples, accounted for are {dict(fates)}")
        self.rows.update(fates)

    @property
    def num_trained_turns(self) -> int:
        """Trained turns of conversations, and pieces of texts."""
        return sum(self.modes.values()) + self.counts["texts"]

    def finish(
        self,
        num_train: int,
        num_evaluation: int,
        dropped: Sequence[Dropped],
        copies: Mapping[str, tuple[int, Sequence[str]]],
        calls: Mapping[str, int],
    ) -> dict[str, Any]:
        """The report as JSON: numbers of the whole dataset as the first epoch sees it, no text of any row.

        `copies` counts samples that train what another does, and names the first: `duplicates`, `eval_overlap` and
        `calls_logged_again`, which are left out and count among the duplicates. `calls` counts logged calls.
        """
        lengths = np.asarray(self.lengths, dtype=np.int64)
        tokens = int(lengths.sum())
        report: dict[str, Any] = {
            "schema": 1,
            "samples": self.counts["samples"],
            "rows": {"read": self.num_rows, **{fate: self.rows[fate] for fate in FATES}},
            "rows_changed_by_nfc": self.remarks[CHANGED_BY_NFC],
            "examples": len(lengths),
            "train_examples": num_train,
            "eval_examples": num_evaluation,
            "tokens": tokens,
            "trained_tokens": self.counts["trained_tokens"],
            "trained_spans": self.last_tokens.total(),
            "expansion_factor": self._expansion(tokens - self.counts["shared_tokens"]),
            "separate_expansion_factor": self._expansion(tokens),
            "lengths": self._lengths(lengths),
            "trained_turns": sum(self.modes.values()),
            "modes": dict(sorted(self.modes.items())),
            "fim": dict(sorted(self.orders.items())),
            "turns_with_reasoning": self.counts["turns_with_reasoning"],
            "unreachable_turns": self.counts["unreachable_turns"],
            "forged_control_tokens": self.counts["forged_control_tokens"],
            "secrets": self._secrets(),
            **{kind: count for kind, (count, _) in copies.items()},
            "duplicates": copies["duplicates"][0] + copies["calls_logged_again"][0],
            **calls,
            "checked_turns": self.counts["checked_turns"],
            "stop_tokens": self._stop_tokens(),
            "unread_keys": self.unread.report(),
            "dropped": dict(Counter(drop.kind for drop in dropped)),
            "template": self._template(),
        }
        if self.media:
            report["media"] = {kind: asdict(count) for kind, count in sorted(self.media.items())}
        report["warnings"] = self._warnings(report, copies)
        return report

    def _expansion(self, num_tokens: int) -> float:
        """Tokens that a model is given for each token of one rendering."""
        return round(num_tokens / max(1, self.counts["rendering_tokens"]), 3)

    def _lengths(self, lengths: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, Any]:
        edges = [0, *LENGTH_EDGES, int(max(lengths.max(initial=0), LENGTH_EDGES[-1])) + 1]
        counts, _ = np.histogram(lengths, bins=np.asarray(edges) + 1)
        last = max((k for k, count in enumerate(counts) if count), default=0)
        return {
            "max": int(lengths.max(initial=0)),
            "mean": round(float(lengths.mean()), 1) if len(lengths) else 0.0,
            "histogram": [{"up_to": edges[k + 1], "examples": int(counts[k])} for k in range(last + 1)],
        }

    def _stop_tokens(self) -> dict[str, int]:
        """The control tokens that end a trained span, with how often each does."""
        names = {token_id: name for name, token_id in self.tokenizer.control_ids.items()}
        return {names[token]: count for token, count in self.last_tokens.most_common() if token in names}

    def _secrets(self) -> dict[str, Any]:
        """By kind: how many stand in the texts, how they begin, and where the first are."""
        return {
            kind: {
                "count": sum(count for one, count in self.credentials.items() if one.kind == kind),
                "shown": sorted(one.masked for one in self.credentials if one.kind == kind),
                "first": [asdict(place) for place in self.places[kind]],
            }
            for kind in sorted({one.kind for one in self.credentials})
        }

    def _template(self) -> dict[str, Any] | None:
        if self.template is None:
            return None
        return {
            "thinking_switch": self.template.has_thinking_switch,
            "default_mode": self.template.default_mode,
            "reasoning_form": self.template.reasoning_form,
            "args": dict(self.template.args),
        }

    def _warnings(self, report: dict[str, Any], copies: Mapping[str, tuple[int, Sequence[str]]]) -> list[str]:
        warnings: list[str] = []
        if self.thinking != "auto" and self.template and not self.template.has_thinking_switch:
            warnings.append(f"data.thinking={self.thinking} has no effect: the chat template has no thinking switch")
        if report["duplicates"] > report["calls_logged_again"]:
            count, places = copies["duplicates"]
            warnings.append(
                f"{counted(count, 'row{|s} train{s|}')} exactly what an earlier row trains; leave them out, or "
                f"weigh whole files with repeat. First: {', '.join(places)}"
            )
        if report["calls_logged_again"]:
            count, places = copies["calls_logged_again"]
            warnings.append(
                f"{counted(count, 'call{|s} {was|were}')} logged before, with the same answer: such a call is "
                f"trained once. First: {', '.join(places)}"
            )
        if report["eval_overlap"]:
            warnings.append(
                f"{counted(report['eval_overlap'], 'evaluation row{|s} {is|are}')} trained as well: the evaluation "
                f"loss says too little about unseen data. Remove them from one side. "
                f"First: {', '.join(copies['eval_overlap'][1])}"
            )
        for kind, found in report["secrets"].items():
            places = ", ".join(map(str, self.places[kind]))
            warnings.append(
                f"{found['count']} × what looks like a secret, {kind} ({', '.join(found['shown'])}): a model may say "
                f"what it was trained on. Put a placeholder there and revoke it. First: {places}"
            )
        for remark, count in (self.remarks + Counter({FORGED: report["forged_control_tokens"]})).items():
            places = ", ".join(map(str, self.places[remark]))
            warnings.append(counted(count, remark) + (f" First: {places}" if places else ""))
        return warnings + self.unread.warnings()


def with_separate_examples(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report for a run whose examples do not share their beginnings."""
    factor = report["separate_expansion_factor"]
    warnings = list(report["warnings"])
    if factor > 1.5:
        warnings.append(
            f"the chat template rewrites history, so each dialogue is rendered {factor:.1f} times on average; "
            "data.turns=last trains only the last turn of each"
        )
    return {**report, "expansion_factor": factor, "warnings": warnings}
