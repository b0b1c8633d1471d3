"""Turns that are too long, without the first exchanges of their dialogue: as few as make what is left fit."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from qwentune.data.rendering.dialogue import Dialogue
from qwentune.data.rendering.example import TurnIds
from qwentune.data.rendering.grammar import prove
from qwentune.data.rendering.turn import Turn
from qwentune.data.sample import RowError


@dataclass
class Shortening:
    """Shortens the turns of one dialogue, one after the other.

    What is left is a dialogue that a server could have seen: whole exchanges go, and the system text stays. Each
    exchange less is some tokens less, so that a few lengths tell where it fits first.
    """

    dialogue: Dialogue
    ids: TurnIds
    is_checked: bool  # by the rule, some of them
    num_shortened: int = 0
    guess: int = 0  # of the user's messages that may open a turn, the one that did last
    literal: dict[int, Turn | RowError] = field(default_factory=dict[int, Turn | RowError])  # of a turn, by its opening

    def of(self, turn: Turn) -> Turn | None:
        """The turn in the longest dialogue that ends with it and fits; None where there is none.

        RowError where the rule refuses the dialogue.
        """
        users = [k for k in range(turn.index) if self.dialogue.messages[k].role == "user"]
        if turn.starts is None:
            return self._by_the_rule(turn.index, [k for k in users if k])
        numbers = range(1, turn.num_starts)
        number = 1 + bisect_left(numbers, True, key=lambda number: self._fits(turn.beginning(number)))
        if number >= turn.num_starts:
            return None
        shortened = turn.beginning(number)
        self.num_shortened += 1
        if self.is_checked and self.num_shortened.bit_count() == 1:  # the first, the second, the fourth, …
            prove(self.dialogue, [self.dialogue.literal_turn(turn.index, users[number])], [shortened])
        return shortened

    def _by_the_rule(self, i: int, users: list[int]) -> Turn | None:
        """The same, each that is tried rendered on its own: first where the last turn fitted."""
        self.literal.clear()
        low, high, step = 0, len(users), 1
        place = min(self.guess, high - 1)
        while low < high:
            if self._fits_by_the_rule(i, users[place]):
                high, place = place, place - step
            else:
                low, place = place + 1, place + step
            step *= 2
            if not low <= place < high:
                place = (low + high) // 2
        self.guess = low
        if low == len(users):
            return None
        found = self.literal[users[low]]
        if isinstance(found, RowError):
            raise found
        return found

    def _fits_by_the_rule(self, i: int, first: int) -> bool:
        """Also where it is refused: then the row is, if nothing longer fits."""
        try:
            turn = self.literal[first] = self.dialogue.literal_turn(i, first)
        except RowError as error:
            self.literal[first] = error
            return True
        self.ids.know([turn.context, turn.target])
        return self._fits(turn)

    def _fits(self, turn: Turn) -> bool:
        return self.ids.num_tokens(turn) <= self.dialogue.options.max_tokens
