"""Every chat template against the oracle: those that TRL ships of Qwen, and five that are like none of them.

No template is known to qwentune, so these stand for all that there are. A dialogue is either trained just as the
oracle says, or refused for a reason that the oracle sees as well: a refusal of the template, a turn that does not
extend its prompt or does not end, or a text that the rendering lost.
"""

from __future__ import annotations

import json
from copy import copy
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import jinja2
import pytest
from hypothesis import HealthCheck, given, settings
from transformers import PreTrainedTokenizerFast

from qwentune.data.formats.chat import parse
from qwentune.data.rendering.dialogue import Dialogue
from qwentune.data.rendering.grammar import ReadOtherwiseError, same
from qwentune.data.rendering.render import Renderer, RenderOptions
from qwentune.data.rendering.turn import Turn
from qwentune.data.sample import Conversation, RowError, Source
from qwentune.data.templates.chat_template import ChatTemplate
from qwentune.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from tests.dialogues import chat_rows, random_rows
from tests.oracle import Row, UntrainableError, expected_examples, normalised, reasoning_form
from tests.test_render import as_previewed

WRITTEN = sorted((Path(__file__).parent / "templates").glob("*.jinja"))
SPEC = find_spec("trl")
assert SPEC is not None
assert SPEC.submodule_search_locations is not None
PUBLISHED = sorted(
    path
    for path in Path(SPEC.submodule_search_locations[0], "chat_templates").glob("qwen*.jinja")
    if "_training" not in path.name
)
TEMPLATES = pytest.mark.parametrize("path", [*PUBLISHED, *WRITTEN], ids=lambda path: path.stem)
NEVER_TRAINED = {"unclosed"}
ENOUGH = 400  # dialogues, for a share to say something
WITH_QWEN3_5_TOKENIZER = ("qwen3_5", "qwen3_6", "qwen3_8")


class Both:
    """A template in the hands of qwentune and of the oracle."""

    def __init__(self, folder: Path, path: Path) -> None:
        tokenizer, judge = loaded(folder)
        self.text = path.read_text(encoding="utf-8")
        template = ChatTemplate(self.text, tokenizer.special_tokens, {})
        self.renderer = Renderer(tokenizer, template, RenderOptions(max_tokens=1 << 20))
        self.judge = copy(judge)
        self.judge.chat_template = self.text
        self.form = reasoning_form(self.judge, {})

    def agree(self, row: Row) -> bool:
        """Whether the row is trained; asserts that both say the same of it."""
        outcome = self.renderer.render(parsed(row))
        try:
            expected = expected_examples(row, self.judge)
        except (UntrainableError, jinja2.TemplateError) as error:
            refusal = error
        else:
            refusal = None
        if refusal is not None:
            assert outcome.problems, refusal
            assert not outcome.examples
            return False
        if outcome.problems:
            assert self.loses_something(row), outcome.problems
            return False
        found = [as_previewed(example) for example in outcome.examples]
        assert found == expected
        return True

    def loses_something(self, row: Row) -> bool:
        """Whether a text, a call, an argument or a tool of the row is missing in its rendering."""
        messages = [normalised(message, self.form, "refuse")[0] for message in row["messages"]]
        # The rule sees a dialogue as far as each trained turn.
        stop = 1 + max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        rendering = str(self.judge.apply_chat_template(messages[:stop], tools=row.get("tools"), tokenize=False))
        wanted = [tool["function"]["name"] for tool in row.get("tools", ())]
        for message in messages[:stop]:
            answer = message["content"]
            wanted.append((answer.split("</think>")[-1] if self.form == "inline" else answer).strip())
            for call in message.get("tool_calls", ()):
                wanted += [call["function"]["name"], *call["function"]["arguments"]]
                wanted += [value for value in call["function"]["arguments"].values() if isinstance(value, str)]
        return any(text not in rendering and as_json(text) not in rendering for text in wanted)


def as_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def parsed(row: Row) -> Conversation:
    sample = parse(row, Source("rows.jsonl", 1))
    assert isinstance(sample, Conversation), sample
    return sample


@cache
def loaded(folder: Path) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    return load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)


@cache
def both(folder: Path, path: Path) -> Both:
    return Both(folder, path)


def agrees(of: Both, path: Path, num_examples: int) -> None:
    trained: list[bool] = []

    @settings(max_examples=num_examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(row=chat_rows(reasoning=of.form is not None, marks=True))
    def check(row: Row) -> None:
        trained.append(of.agree(row))

    check()
    share = sum(trained) / len(trained)
    print(f"{path.stem}: {share:.0%} of the dialogues are trained")
    if path.stem in NEVER_TRAINED:
        assert not any(trained)
    elif num_examples >= ENOUGH:
        assert share > 0.02


@pytest.fixture
def of(path: Path, request: pytest.FixtureRequest) -> Both:
    """The template with the real vocabulary of its family."""
    is_qwen3_5 = path.stem.startswith(WITH_QWEN3_5_TOKENIZER)
    return both(request.getfixturevalue("real_qwen3_5_folder" if is_qwen3_5 else "real_qwen3_folder"), path)


@TEMPLATES
def test_a_dialogue_is_trained_as_the_oracle_says_or_refused_for_a_reason_it_sees(path: Path, of: Both) -> None:
    agrees(of, path, 50)


@pytest.mark.parametrize(
    "num_dialogues", [pytest.param(400, marks=pytest.mark.slow), pytest.param(2000, marks=pytest.mark.soak)]
)
@TEMPLATES
def test_many_dialogues_are_trained_as_the_oracle_says(path: Path, of: Both, num_dialogues: int) -> None:
    agrees(of, path, num_dialogues)


@TEMPLATES
def test_what_is_read_off_one_rendering_is_what_the_rule_gives(path: Path, of: Both) -> None:
    renderer = of.renderer
    num_read = num_trained = 0
    for row in random_rows(31, 60, reasoning=of.form is not None, lists=False):
        dialogue = dialogue_of(renderer, row)
        if dialogue is None:
            continue
        try:
            literal = dialogue.literal_turns()
        except RowError:
            assert renderer.grammar is None or renderer.grammar.turns(dialogue) is None  # it is left to the rule
            continue
        num_trained += 1
        read = renderer.grammar and dialogue.trained and renderer.grammar.turns(dialogue)
        if read:
            num_read += 1
            assert same(literal, read)
    print(f"{path.stem}: {num_read} of {num_trained} dialogues are read off one rendering")
    if path in PUBLISHED:
        assert num_read > 0.5 * num_trained


@TEMPLATES
def test_a_message_that_is_said_twice_stands_twice(path: Path, of: Both) -> None:
    said = [("user", "a"), ("assistant", "b"), ("user", "X"), ("user", "X"), ("assistant", "c"), ("user", "d")]
    messages = [{"role": role, "content": text} for role, text in [*said, ("assistant", "e")]]
    assert of.agree({"messages": messages}) is (path.stem not in NEVER_TRAINED)


@TEMPLATES
def test_an_answer_after_an_answer_is_trained_where_the_rule_holds(path: Path, of: Both) -> None:
    said = [("user", "a"), ("assistant", "b"), ("assistant", "c"), ("user", "d"), ("assistant", "e")]
    messages: list[dict[str, object]] = [{"role": role, "content": text} for role, text in said]
    messages[1]["train"] = False
    of.agree({"messages": messages})


def dialogue_of(renderer: Renderer, row: Row) -> Dialogue | None:
    assert renderer.template is not None
    try:
        return Dialogue.of(parsed(row), renderer.template, renderer.options, renderer.encoder)
    except RowError:
        return None


class Erring:
    """A grammar that leaves the end out of what is trained."""

    def turns(self, dialogue: Dialogue) -> list[Turn]:
        return [replace(turn, target=turn.target[:-1]) for turn in dialogue.literal_turns()]


def test_a_grammar_that_errs_is_found_out(real_qwen3_folder: Path) -> None:
    honest = both(real_qwen3_folder, PUBLISHED[0]).renderer
    renderer = Renderer(honest.tokenizer, honest.template, honest.options)
    renderer.__dict__["grammar"] = Erring()
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    with pytest.raises(ReadOtherwiseError, match=r"rows\.jsonl:1"):
        renderer.render(parsed(row))
