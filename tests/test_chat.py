"""`qwentune chat`: what a person sees while an answer is made, what is asked of the model, and what fits."""

from __future__ import annotations

import io
import json
import struct
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwentune import console
from qwentune.answering import screen
from qwentune.answering.answer import Answer
from qwentune.answering.speaker import Prompt
from qwentune.answering.spoken import Parts, Spoken
from qwentune.chat import Choices, run_chat
from qwentune.data.sample import Message
from qwentune.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from qwentune.errors import EXIT_OK, DoesNotFitError, UsageError
from qwentune.exporting import speakers
from qwentune.exporting.config_keys import in_both_places
from qwentune.exporting.finished import open_run
from qwentune.exporting.room import Memory, Room, room
from qwentune.exporting.speakers import Partner
from qwentune.facts.generation_config import samples, sampling
from tests.checkpoints import add_weights, write_checkpoint
from tests.finished import finished_run
from tests.terminal import LINE_END, on_terminal
from tests.test_eval import LIGHT

CALL = '<tool_call>\n{"name": "set_light", "arguments": {"room": "hall", "level": 3}}\n</tool_call>'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with random weights. Do not write into it."""
    return add_weights(write_checkpoint(tmp_path_factory.mktemp("model") / "qwen3", "qwen3"))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    """The tokenizer of that checkpoint."""
    return load_tokenizer(model)


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    """A run that ended with adapters of random numbers."""
    return talking(finished_run(tmp_path / "run", model, lora=True, data={"train": "rows.jsonl"}))


def talking(run: Path) -> Path:
    """The run, as if it had been trained on dialogues."""
    report = {"template": {"args": {}, "default_mode": "thinking"}, "modes": {"non_thinking": 1}, "stop_tokens": {}}
    (run / "data_report.json").write_text(json.dumps(report))
    return run


# ------------------------------------------------------------------------------------------------- an answer in pieces


@given(st.lists(st.sampled_from(["<think>", "</think>", "<tool_call>", "<th", "ink>", "\n", " ", "a", "</", "<"])))
def test_pieces_are_the_parts_of_the_whole(pieces: list[str]) -> None:
    for opened in (True, False):
        told: dict[str, str] = {"reasoning": "", "words": ""}
        parts = Parts(lambda part, text, told=told: told.update({part: told[part] + text}), opened=opened, apart=False)
        for piece in pieces:
            parts.add(piece)
        parts.add("", last=True)
        whole = Answer("".join(pieces), True, 1, opened)
        assert (told["reasoning"], told["words"]) == (whole.reasoning, whole.answer)


@given(st.text(alphabet="ab\n<tool_cal>/thinkä "), st.integers(1, 7))
def test_a_call_comes_whole_and_words_around_it_at_once(words: str, size: int) -> None:
    told: list[tuple[str, str]] = []
    parts = Parts(lambda part, text: told.append((part, text)), opened=False, apart=True)
    text = f"{words}.{CALL}{CALL} and <tool_call>cut"
    for start in range(0, len(text), size):
        parts.add(text[start : start + size])
    parts.add("", last=True)
    if "<tool_call>" not in words and not words.lstrip().startswith("<think>"):
        calls = [text for part, text in told if part == "call"]
        assert calls == [CALL, CALL, "<tool_call>cut"]
        assert "".join(text for _, text in told) == text


@settings(max_examples=40)
@given(st.text())
def test_characters_that_span_tokens_are_told_whole(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = tokenizer.encode([text])
    end, told = tokenizer.end_of_text_id, list[str]()
    spoken = Spoken(tokenizer, {end}, told.append)
    for token in [[[5, 6, 7]], *([token] for token in ids), [end]]:
        spoken.put(torch.tensor(token))
    spoken.end()
    assert "".join(told) == tokenizer.decode(ids)
    assert spoken.ids == [*ids, end]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in told)


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_terminal", [True, False])
def test_reasoning_and_calls_stand_apart_on_a_terminal(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = (Terminal(), Terminal()) if is_terminal else (StringIO(), StringIO())
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(console, "is_animated", lambda _: False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = screen.Screen(opened=True)
    for piece in ("I thi", "nk.\n</thi", "nk>\n\nLet me see.\x1b[2J\n", CALL[:9], CALL[9:]):
        shown.add(piece)
    shown.end()
    if is_terminal:
        assert "\x1b[2mI thi\x1b[0m" in err.getvalue(), "dim, and at once"
        assert "Let me see.\\u001b[2J\n" in out.getvalue(), "an answer cannot steer the terminal"
        assert 'call set_light({"room": "hall", "level": 3})' in out.getvalue()
        assert "<tool_call>" not in out.getvalue()
    else:
        assert err.getvalue() == "(thinking) I think.\n"
        assert out.getvalue() == f"Let me see.\x1b[2J\n{CALL}\n", "as the model wrote it"


# ----------------------------------------------------------------------------------------------------------- a dialogue


class Scripted:
    """A partner whose model says what the test says, token by token; it keeps what it was asked."""

    def __init__(self, partner: Partner, answers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.prompts: list[str] = []
        self.options: list[dict[str, Any]] = []
        tokenizer = partner.run.tokenizer
        left = iter(answers)

        def generate(network: Any, input_ids: torch.Tensor, streamer: Any, **options: Any) -> torch.Tensor:
            self.prompts.append(tokenizer.decode(input_ids[0].tolist()))
            self.options.append(options)
            said = next(left)
            (ids,) = tokenizer.encode([said.removesuffix("^C")])
            streamer.put(input_ids)
            for token in ids:
                streamer.put(torch.tensor([token]))
            if said.endswith("^C"):
                raise KeyboardInterrupt
            streamer.put(torch.tensor([options["eos_token_id"][0]]))
            return torch.tensor([input_ids[0].tolist() + ids])

        for each in partner._networks.values():
            monkeypatch.setattr(type(each), "generate", generate)


def talk(
    run: Path, typed: str, answers: list[str], monkeypatch: pytest.MonkeyPatch, choices: Choices | None = None
) -> Scripted:
    """A chat in which lines are typed and answers are given."""
    made: list[Scripted] = []

    class Kept(Partner):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(Scripted(self, answers, monkeypatch))

    monkeypatch.setattr(speakers, "Partner", Kept)
    monkeypatch.setattr(sys, "stdin", StringIO(typed))
    monkeypatch.setattr(console, "is_read", lambda: True)
    assert run_chat(run, None, choices or Choices()) == EXIT_OK
    return made[0]


def test_a_call_is_answered_by_hand_and_goes_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([LIGHT]))
    choices = Choices(tools=tools, system="Be kind.", thinking="on")
    answers = [f"<think>\nHall.\n</think>\n\nWait.\n{CALL}", "It is on.", "Bye."]
    found = talk(run, "Light!\nok 3\nThanks\n\nnever\n", answers, monkeypatch, choices)
    first, second, third = found.prompts
    assert "Be kind." in first
    assert '"set_light"' in first
    assert first.endswith("<|im_start|>user\nLight!<|im_end|>\n<|im_start|>assistant\n")
    assert CALL in second
    assert "<tool_response>\nok 3\n</tool_response>" in second
    assert "It is on." in third
    assert "Hall." not in third, "reasoning of earlier turns is what the template strips"
    said = capsys.readouterr()
    assert 'result of set_light({"room": "hall", "level": 3}): ' in said.err
    assert "(thinking) Hall." in said.err
    assert said.out.endswith("It is on.\nBye.\n")


def test_what_cannot_be_read_as_a_call_asks_for_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = talk(run, "Light!\nAgain\n", ['<tool_call>\n{"name": \n</tool_call>', "Yes."], monkeypatch)
    assert '<tool_call>\n{"name": \n</tool_call>' in found.prompts[1]
    assert "user\nAgain" in found.prompts[1]


def test_ctrl_c_ends_an_answer_and_not_the_chat(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = talk(run, "One?\nTwo?\nThree?\n", ["It is^C", "^C", "3."], monkeypatch)
    assert "It is<|im_end|>" in found.prompts[1], "what was said stays"
    assert "Two?" not in found.prompts[2], "a message without an answer does not"
    assert "Three?" in found.prompts[2]
    said = capsys.readouterr()
    assert said.err.count("(stopped)") == 2
    assert said.out.endswith("3.\n")


def test_a_chat_draws_as_the_checkpoint_says_and_a_message_takes_the_likeliest(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "adapter" / "generation_config.json"
    content = json.loads(path.read_text())
    drawn = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1}
    likeliest = talk(run, "Hi\n", ["Hi."], monkeypatch).options[0]
    assert likeliest["do_sample"] is False, "the file says nothing of drawing"
    path.write_text(json.dumps({**content, **drawn, "repetition_penalty": 1.05}))
    capsys.readouterr()
    found = talk(run, "Hi\n", ["Hi."], monkeypatch).options[0]
    assert {name: found[name] for name in drawn} == drawn
    assert found["repetition_penalty"] == 1.05
    assert "temperature 0.6, top_p 0.95, top_k 20, min_p 0.1" in capsys.readouterr().err
    assert talk(run, "Hi\n", ["Hi."], monkeypatch, Choices(drawn="greedy")).options[0]["do_sample"] is False
    long = found["max_new_tokens"]
    assert 4000 < long < 4096, "what the context has left"
    assert talk(run, "Hi\n", ["Hi."], monkeypatch, Choices(max_tokens=7)).options[0]["max_new_tokens"] == 7


def test_tokens_are_drawn_as_they_come_where_a_file_does_not_say_it() -> None:
    as_they_come = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
    assert sampling({}) == {"do_sample": True, **as_they_come}
    assert sampling({"temperature": 0.0, "top_k": 5}) == {"do_sample": True, **as_they_come, "top_k": 5}
    assert [samples(one) for one in ({}, {"do_sample": True}, {"do_sample": True, "temperature": 0})] == [
        *(False, True, False)
    ]


@pytest.mark.parametrize("lora", [True, False])
def test_one_message_has_one_answer_and_the_base_s_beside_it(
    lora: bool, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = talking(finished_run(tmp_path / "run", model, lora=lora, data={"train": "rows.jsonl"}))
    assert run_chat(run, "Hi", Choices(max_tokens=2, as_json=True)) == EXIT_OK
    answer = json.loads(capsys.readouterr().out)
    assert answer.keys() == {"answer", "stopped", "tokens"}
    assert answer == {**answer, "stopped": False, "tokens": 2}
    assert run_chat(run, "Hi", Choices(max_tokens=2, as_json=True, with_base=True)) == EXIT_OK
    both = json.loads(capsys.readouterr().out)
    assert both == {**answer, "base": both["base"]}
    assert (both["base"] != answer) == lora
    assert run_chat(run, "Hi", Choices(max_tokens=2, with_base=True)) == EXIT_OK
    said = capsys.readouterr()
    assert said.out == f"tuned:\n{answer['answer']}\nbase:\n{both['base']['answer']}\n"
    assert said.err.count("(cut after 2 tokens)") == 2
    assert list(dict(Partner(open_run(run), None, with_base=True).speakers())) == ["tuned", "base"]


def test_a_drawn_answer_is_another_each_time(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    for _ in range(2):
        assert run_chat(run, "Hi", Choices(max_tokens=8, drawn="sample")) == EXIT_OK
    first, second = capsys.readouterr().out.split("\n", 1)
    assert first != second.strip()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--greedy", "--sample"], "--greedy  stands beside --sample"),
        (["--tools", "no.json"], "--tools: no.json"),
        (["--tools", "number.json"], "number.json"),
        (["--tools", "object.json"], "object.json  is no list"),
        (["--thinking", "maybe"], "neither on nor off"),
        (["--message", "half \udcff"], "--message  is no UTF-8"),
        (["--system", "half \udcff"], "--system  is no UTF-8"),
    ],
)
def test_options_that_cannot_be_are_said(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from typer.testing import CliRunner

    from qwentune.cli import app

    monkeypatch.chdir(tmp_path)
    Path("number.json").write_text("[3]")
    Path("object.json").write_text("{}")
    result = CliRunner().invoke(app, ["chat", ".", *words])
    assert result.exit_code in (2, 3)
    assert said in result.stderr


def test_a_dialogue_longer_than_the_context_is_said(run: Path) -> None:
    partner = Partner(open_run(run), None)
    with pytest.raises(UsageError, match=r"has [\d,]+ tokens, and there is room for 4,096"):
        partner.prompt([Message("user", "word " * 5000)], None)
    with pytest.raises(UsageError, match=r"has [\d,]+ tokens, and there is room for 4,096"):
        partner.prompt([Message("user", "word " * 5000)], 8)
    prompt = partner.prompt([Message("user", "word " * 1700)], 1024)
    assert len(prompt.ids) + prompt.most_tokens == 4096, "what is left of the context"


def test_a_switch_that_the_template_does_not_have_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = add_weights(write_checkpoint(tmp_path / "model", "qwen2"))
    run = finished_run(tmp_path / "run", model, data={"train": "rows.jsonl"})
    Partner(open_run(run), "off")
    assert "--thinking off changes nothing" in capsys.readouterr().err


def test_a_chat_prints_json_too(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nHo\n\n"))
    assert run_chat(run, None, Choices(max_tokens=2, as_json=True, drawn="greedy")) == EXIT_OK
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answers
    assert all(answer.keys() == {"answer", "stopped", "tokens"} for answer in answers)


# ------------------------------------------------------------------------------------------------------------ what fits


def headers_only(folder: Path, layers: int = 64, hidden: int = 5120, intermediate: int = 25600) -> Path:
    """A bf16 checkpoint of a dense model of about 27 billion weights, of which the headers alone are on disk."""
    write_checkpoint(folder, "qwen3")
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate}
    config |= {"num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    rows = {"q_proj": (5120, hidden), "k_proj": (1024, hidden), "v_proj": (1024, hidden), "o_proj": (hidden, 5120)}
    mlp = {"gate_proj": (intermediate, hidden), "up_proj": (intermediate, hidden), "down_proj": (hidden, intermediate)}
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "lm_head.weight": (151936, hidden)}
    for k in range(layers):
        shapes |= {f"model.layers.{k}.self_attn.{name}.weight": shape for name, shape in rows.items()}
        shapes |= {f"model.layers.{k}.mlp.{name}.weight": shape for name, shape in mlp.items()}
    header, end = {}, 0
    for name, (height, width) in shapes.items():
        header[name] = {
            "dtype": "BF16",
            "shape": [height, width],
            "data_offsets": [end, end := end + 2 * height * width],
        }
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    assert 25e9 < end / 2 < 34e9
    return folder


@pytest.fixture
def large_run(run: Path, tmp_path: Path) -> Path:
    """A run with an adapter on a base that is too large to be read."""
    folder = headers_only(tmp_path / "large")
    recipe = (run / "recipe.resolved.yaml").read_text().splitlines()
    lines = [f"model: {folder}" if line.startswith("model:") else line for line in recipe]
    (run / "recipe.resolved.yaml").write_text("\n".join(lines))
    return run


GB = 10**9


@pytest.mark.parametrize(
    ("free", "is_gpu", "form"),
    [
        *((80 * GB, True, "as stored"), (24 * GB, True, "4 bits"), (12 * GB, True, None)),
        *((200 * GB, False, "fp32"), (80 * GB, False, "as stored"), (24 * GB, False, None)),
    ],
)
def test_the_form_of_weights_is_the_best_that_has_room(
    free: int, is_gpu: bool, form: str | None, large_run: Path
) -> None:
    run = open_run(large_run)
    memory = Memory("the GPU's memory" if is_gpu else "this machine's memory", free, is_gpu)
    if form is None:
        with pytest.raises(DoesNotFitError, match=r"the weights take [\d.]+ GB .+ and [\d.]+ GB .+GB of .+ are free"):
            room(run, [Path(run.model)], memory)
        return
    found = room(run, [Path(run.model)], memory)
    assert found.form == form
    assert (found.remark != "") == (form not in ("fp32",) and not (is_gpu and form == "as stored"))


def test_a_large_base_on_a_small_card_is_loaded_in_4_bits_or_refused_before_it_is_read(
    large_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Loaded(Exception):
        pass

    def load(*_: Any, four_bit: bool, **__: Any) -> Any:
        raise Loaded("4 bits" if four_bit else "whole")

    monkeypatch.setattr(speakers, "load_tuned", load)
    monkeypatch.setattr(speakers, "present_gpus", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (24 * GB, 24 * GB))
    with pytest.raises(Loaded, match="4 bits"):
        run_chat(large_run, "Hi", Choices())
    said = capsys.readouterr().err
    assert "24.0 GB of the GPU's memory are free: they are loaded in 4 bits" in said
    assert "answers may differ from those of the export" in said
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * GB, 24 * GB))
    with pytest.raises(DoesNotFitError, match=r"10.0 GB of the GPU's memory are free\n.*--gguf") as caught:
        run_chat(large_run, "Hi", Choices())
    assert caught.value.exit_code == 4


def test_in_4_bits_it_answers_too(run: Path) -> None:
    opened = open_run(run)
    ((_, network),) = speakers.networks(opened, judged=Room("4 bits", 4096))
    whole = network.get_base_model()
    assert type(whole.model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    answer = speakers.speaker(opened, network).answer(Prompt([1, 2, 3], 2))
    assert answer.tokens > 0


def test_rope_s_own_keys_are_moved_into_no_copy_of_themselves() -> None:
    config = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "text_config": {"rope_theta": 1e4}}
    both = in_both_places(config)
    assert both["rope_parameters"] == config["rope_parameters"]
    assert both["text_config"]["rope_parameters"]["rope_theta"] == 1e4


# ---------------------------------------------------------------------------------------------------------- a terminal

# The model says its first word and cannot go on before somebody, who has seen it, types.
HELD = """
import sys, torch
from qwentune import chat, console
from transformers import Qwen3ForCausalLM
from qwentune.exporting import speakers

ANSWERS = [["Quetzal", "coatl."], ["Axo", "lotl."]]

def generate(self, input_ids, streamer, eos_token_id, **options):
    (first, last), streamed = TOKENIZER.encode(ANSWERS.pop(0)), streamer.put
    streamed(input_ids)
    for ids in (first, [], last):
        if not ids:
            sys.stdin.readline()
        for token in ids:
            streamed(torch.tensor([token]))
    streamed(torch.tensor([eos_token_id[0]]))
    return input_ids

made = speakers.Partner.__init__
def keeping(self, run, *arguments, **options):
    global TOKENIZER
    TOKENIZER = run.tokenizer
    made(self, run, *arguments, **options)
speakers.Partner.__init__ = keeping
Qwen3ForCausalLM.generate = generate
console.main(chat.chat)
"""


@pytest.mark.slow
def test_the_first_token_is_on_the_screen_before_the_last_is_made(model: Path, tmp_path: Path) -> None:
    run = talking(finished_run(tmp_path / "run", model, data={"train": "rows.jsonl"}))
    script = tmp_path / "held.py"
    script.write_text(HELD)
    up = "\x1b[A"
    asks = "\r\n> "  # only once it stands there does the terminal hand over keys one by one
    typed = [
        (f"ends the chat.{asks}", f"Who?{LINE_END}"),
        ("Quetzal", LINE_END),
        (f"coatl.{asks}", f"{up}{LINE_END}"),  # what was typed before, by an arrow key
        ("Axo", LINE_END),
        (f"lotl.{asks}", "\x04"),
    ]
    screen = on_terminal([sys.executable, str(script), str(run)], tmp_path, typed=typed, seconds=240)
    assert screen.code == 0, screen.text
    assert screen.text.count("> Who?") == 2
    assert "Traceback" not in screen.text
