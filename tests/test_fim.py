"""Fill-in-the-middle: whatever the cut, the parts are the source, and only the middle and its end are trained."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from qwentune.data.dataset import Dataset, prepare
from qwentune.data.formats import FORMATS
from qwentune.data.formats.fim import parse
from qwentune.data.layout.schedule import Schedule
from qwentune.data.rendering.example import Example
from qwentune.data.rendering.fill_in_the_middle import cut
from qwentune.data.rendering.outcome import Outcome
from qwentune.data.rendering.render import Renderer, RenderOptions
from qwentune.data.sample import Code, Source
from qwentune.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from qwentune.recipe import DataOptions, Fim
from tests.checkpoints import add_weights, write_checkpoint
from tests.runs import write_recipe
from tests.warm import Warm

SOURCE = Source("code.jsonl", 3)
LINES = ["def f(x):\n", "    return x\n", "\tif 你好:\r\n", "émoji 🙂👩‍👩‍👧\n", "\n", " ", "e\u0301"]
LINES += ["<|fim_middle|>", "<|endoftext|>"]
texts = st.lists(st.sampled_from(LINES) | st.text(max_size=12), min_size=1, max_size=12).map("".join)
code_texts = texts.filter(str.strip)
fims = st.builds(Fim, rate=st.just(1.0), spm_rate=st.sampled_from([0.0, 0.5, 1.0]), cuts=st.integers(1, 3))
IDEAL = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizer(real_qwen2_folder: Path) -> Tokenizer:
    return load_tokenizer(real_qwen2_folder)


def code(**row: Any) -> Code:
    sample = FORMATS["fim"](row, SOURCE)
    assert isinstance(sample, Code), sample
    return sample


def outcome(tokenizer: Tokenizer, sample: Code, fim: Fim, max_tokens: int = 4096, **options: Any) -> Outcome:
    renderer = Renderer(tokenizer, None, RenderOptions(max_tokens, fim=fim, seed=options.pop("seed", 5), **options))
    return next(renderer.render_all([sample], options.get("source_number", 0)))


def marked(tokenizer: Tokenizer, ids: list[int]) -> list[tuple[str, list[int]]]:
    """The tokens after each marker, up to the next."""
    names = {token_id: name for name, token_id in tokenizer.control_ids.items()}
    parts: list[tuple[str, list[int]]] = []
    for token in ids:
        if token in names:
            parts.append((names[token], []))
        else:
            parts[-1][1].append(token)
    return parts


def trained(example: Example) -> list[int]:
    return [token for token, weight in zip(example.input_ids, example.weights, strict=True) if weight]


@given(texts.filter(bool), st.integers(0, 2**32))
def test_the_parts_of_a_cut_are_the_text_and_the_middle_is_never_empty(text: str, seed: int) -> None:
    prefix, middle, suffix = cut(text, np.random.default_rng(seed))
    assert prefix + middle + suffix == text
    assert middle


def test_every_pair_of_places_is_cut_alike() -> None:
    random = np.random.default_rng(0)
    seen = Counter(tuple(map(len, cut("abc", random))) for _ in range(6000))
    assert len(seen) == 6
    assert max(seen.values()) < 1.2 * min(seen.values())


@IDEAL
@given(text=code_texts, fim=fims)
def test_a_cut_file_is_its_source_and_only_the_middle_and_its_end_carry_loss(
    tokenizer: Tokenizer, text: str, fim: Fim
) -> None:
    found = outcome(tokenizer, code(text=text), fim)
    assert [example.version for example in found.examples] == list(range(fim.cuts))
    for example in found.examples:
        parts = marked(tokenizer, example.input_ids)
        order = [name for name, _ in parts]
        assert order in (
            ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|endoftext|>"],
            ["<|fim_suffix|>", "<|fim_prefix|>", "<|fim_middle|>", "<|endoftext|>"],
        )
        assert (order[0] == "<|fim_prefix|>") or fim.spm_rate > 0
        by_name = dict(parts)
        joined = "".join(tokenizer.decode(by_name[f"<|fim_{name}|>"]) for name in ("prefix", "middle", "suffix"))
        normal = tokenizer.backend.normalizer.normalize_str
        assert normal(joined) == normal(text)  # the tokenizer itself composes characters
        assert trained(example) == [*by_name["<|fim_middle|>"], tokenizer.end_of_text_id]


@IDEAL
@given(prefix=texts, middle=texts, suffix=texts)
def test_a_row_that_is_cut_already_is_written_as_qwen_reads_it(
    tokenizer: Tokenizer, prefix: str, middle: str, suffix: str
) -> None:
    row = code(prefix=prefix, middle=middle, suffix=suffix)
    (example,) = outcome(tokenizer, row, Fim(rate=0.0, spm_rate=1.0)).examples
    control = tokenizer.control_ids
    expected = [control["<|fim_prefix|>"], *tokenizer.encode([prefix])[0]]
    expected += [control["<|fim_suffix|>"], *tokenizer.encode([suffix])[0], control["<|fim_middle|>"]]
    target = [*tokenizer.encode([middle])[0], tokenizer.end_of_text_id]
    assert example.input_ids == expected + target
    assert trained(example) == target
    assert example.version == -1


FILES = [{"path": f"src/{name}.py", "text": f"def {name}():\n    return {k}\n"} for k, name in enumerate("abc")]


def test_of_a_repository_the_last_file_is_cut_after_all_others(tokenizer: Tokenizer) -> None:
    (example,) = outcome(tokenizer, code(repo="me/letters", files=FILES), Fim(rate=1, spm_rate=0, cuts=1)).examples
    before, middle = tokenizer.decode(example.input_ids).split("<|fim_prefix|>")
    assert before == (
        "<|repo_name|>me/letters\n<|file_sep|>src/a.py\ndef a():\n    return 0\n\n"
        "<|file_sep|>src/b.py\ndef b():\n    return 1\n\n<|file_sep|>src/c.py\n"
    )
    assert middle.endswith("<|endoftext|>")
    assert tokenizer.decode(trained(example)) == middle.partition("<|fim_middle|>")[2]


def test_a_repository_that_is_not_cut_is_trained_as_a_text(tokenizer: Tokenizer) -> None:
    (example,) = outcome(tokenizer, code(repo="me/letters", files=FILES), Fim(rate=0, cuts=1)).examples
    assert tokenizer.decode(example.input_ids).startswith("<|repo_name|>me/letters\n<|file_sep|>src/a.py\ndef a()")
    assert example.input_ids[-1] == tokenizer.end_of_text_id
    assert trained(example) == example.input_ids[1:]


@pytest.mark.parametrize("max_tokens", [70, 90, 110, 130])
def test_of_a_long_repository_the_first_files_are_left_out(tokenizer: Tokenizer, max_tokens: int) -> None:
    found = outcome(tokenizer, code(repo="r", files=FILES), Fim(rate=1, spm_rate=0, cuts=2), max_tokens)
    assert not found.dropped
    for example in found.examples:
        assert len(example.input_ids) <= max_tokens
        text = tokenizer.decode(example.input_ids)
        paths = [name for name in "abc" if f"src/{name}.py" in text]
        assert "abc".endswith("".join(paths))
        assert "c" in paths
    left_out = [3 - tokenizer.decode(e.input_ids).count("<|file_sep|>") for e in found.examples if e.version == 0]
    assert len(found.remarks) in (left_out[0], 2)  # where the last file is cut into windows, all others are left out


def test_a_row_that_is_cut_already_and_too_long_is_left_out_with_a_record(tokenizer: Tokenizer) -> None:
    row = {"prefix": "x = 1\n" * 50, "middle": "y = 2\n", "suffix": ""}
    found = outcome(tokenizer, code(**row), Fim(), 64)
    assert not found.examples
    (drop,) = found.dropped
    assert (drop.source, drop.turn, drop.num_tokens > 64) == (SOURCE, None, True)
    assert "more than data.max_tokens=64" in drop.reason


@IDEAL
@given(lines=st.lists(st.sampled_from(LINES), min_size=1, max_size=60), max_tokens=st.integers(60, 200))
def test_a_long_file_is_cut_into_windows_that_lose_nothing(
    tokenizer: Tokenizer, lines: list[str], max_tokens: int
) -> None:
    text = "x = 1\n" + "".join(lines)
    found = outcome(tokenizer, code(text=text), Fim(rate=1, spm_rate=0, cuts=1), max_tokens)
    assert not found.dropped
    joined = ""
    for example in found.examples:
        assert len(example.input_ids) <= max_tokens
        parts = dict(marked(tokenizer, example.input_ids))
        joined += "".join(tokenizer.decode(parts[f"<|fim_{name}|>"]) for name in ("prefix", "middle", "suffix"))
    normal = tokenizer.backend.normalizer.normalize_str
    assert normal(joined) == normal(text)


def test_a_cut_depends_on_seed_version_and_place_alone(tokenizer: Tokenizer) -> None:
    text = "".join(f"line {k}\n" for k in range(50))
    fim = Fim(rate=1.0, cuts=3)

    def ids(source: Source = SOURCE, seed: int = 5, others: int = 0, number: int = 0) -> list[list[int]]:
        samples = [Code(Source("code.jsonl", 100 + k), code(text=text).files) for k in range(others)]
        renderer = Renderer(tokenizer, None, RenderOptions(4096, fim=fim, seed=seed))
        sample = Code(source, code(text=text).files)
        return [example.input_ids for example in list(renderer.render_all([*samples, sample], number))[-1].examples]

    first = ids()
    assert len(set(map(tuple, first))) == 3
    torch.manual_seed(1)
    assert ids(others=3) == first
    assert ids(Source("renamed.jsonl", 3)) == first
    assert all(other != first for other in (ids(seed=6), ids(Source("code.jsonl", 4)), ids(number=1)))


def test_rates_are_kept(tokenizer: Tokenizer) -> None:
    renderer = Renderer(tokenizer, None, RenderOptions(4096, fim=Fim(rate=0.8, spm_rate=0.25, cuts=1), seed=1))
    samples = [Code(Source("code.jsonl", k), code(text="some = 'code'\n").files) for k in range(4000)]
    orders = Counter(order for done in renderer.render_all(samples) for order in done.orders)
    assert orders["plain"] / 4000 == pytest.approx(0.2, abs=0.03)
    assert orders["spm"] / (orders["spm"] + orders["psm"]) == pytest.approx(0.25, abs=0.03)


def test_the_whole_can_carry_loss(tokenizer: Tokenizer) -> None:
    (example,) = outcome(tokenizer, code(text="a = 1\n"), Fim(rate=1.0, cuts=1, loss="all")).examples
    assert trained(example) == example.input_ids[1:]


def test_a_tokenizer_without_the_markers_is_refused(tokenizer: Tokenizer) -> None:
    lacking = {name: token for name, token in tokenizer.control_ids.items() if not name.startswith("<|fim_")}
    poor = Tokenizer(tokenizer.definition, lacking, {}, None, "poor")
    (problem,) = outcome(poor, code(text="a = 1\n"), Fim(rate=1.0)).problems
    assert "has no token <|fim_prefix|>" in problem.what


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prefix": "a", "suffix": "b"}, "middle is missing"),
        ({"prefix": "a", "suffix": "b", "middle": 3}, "middle is the number 3"),
        ({"prefix": "", "suffix": "", "middle": ""}, "prefix, middle and suffix are empty"),
        ({"text": " \n"}, "text is empty"),
        ({"text": "a", "repo": "r"}, "path is missing"),
        ({"files": [{"path": "a", "text": "b"}]}, "repo is missing"),
        ({"repo": "r", "files": []}, "files is empty"),
        ({"repo": "r", "files": [{"path": "a"}, "b"]}, "files[0].text is missing"),
        ({"repo": "r", "files": [{"path": "a"}, "b"]}, "files[1] is the text 'b'"),
        ({"text": "a", "prefix": "b"}, "the row has the keys 'text', 'prefix'"),
        ({"prefx": "a", "suffix": "b", "middle": "c"}, "unknown key 'prefx'"),
    ],
)
def test_wrong_rows_say_what_is_wrong(row: dict[str, Any], message: str) -> None:
    problems = parse(row, SOURCE)
    assert isinstance(problems, list)
    assert message in "\n".join(problem.what for problem in problems)
    assert all(problem.where == "code.jsonl:3" and problem.fix for problem in problems)


def dataset_of(folder: Path, tokenizer: Tokenizer, **data: Any) -> Dataset:
    rows = [{"text": "".join(f"value_{k}_{i} = {i}\n" for i in range(1 + k % 7))} for k in range(40)]
    file = folder / "code.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": str(file), "format": "fim"}, {"path": "data_templates/text.jsonl"}]
    options = DataOptions.model_validate({"train": sources, "max_tokens": 256, **data})
    return prepare(options, tokenizer, None, 7)


@pytest.mark.parametrize("packing", [True, False])
def test_each_epoch_trains_the_next_cut_of_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, packing: bool
) -> None:
    monkeypatch.setenv("QWENTUNE_CACHE", str(tmp_path / "cache"))
    dataset = dataset_of(tmp_path, tokenizer, packing=packing, eval_fraction=0.2, fim=Fim(rate=1.0, cuts=2))
    schedule = Schedule(dataset.train.per_epoch, 1, 0, 3.0, None)
    stream = [dataset.train.examples_of(row) for step in range(schedule.num_steps) for row in schedule.rows(step)]
    sizes = dataset.train.per_epoch
    epochs = [stream[: sizes[0]], stream[sizes[0] : sum(sizes)], stream[sum(sizes) :]]
    assert len(epochs[2]) == sizes[0]
    of = [sorted(i for row in epoch for i in row) for epoch in epochs]
    versions = [{int(dataset.examples.versions[i]) for i in epoch} for epoch in of]
    assert versions == [{-1, 0}, {-1, 1}, {-1, 0}]
    assert of[2] == of[0] == dataset.first_epoch.tolist()
    sources = [sorted(str(dataset.examples.source(i)) for i in epoch) for epoch in of]
    assert sources[0] == sources[1]
    held_out = [i for row in range(len(dataset.evaluation)) for i in dataset.evaluation.examples_of(row)]
    assert all(int(dataset.examples.versions[i]) <= 0 for i in held_out)
    assert not {str(dataset.examples.source(i)) for i in held_out} & set(sources[0])
    report = dataset.report
    assert report["train_examples"] == len(of[0])
    assert report["train_examples"] + report["eval_examples"] == report["examples"]
    assert report["fim"] == {"psm": report["fim"]["psm"], "spm": 40 - report["fim"]["psm"]}
    assert set(report["stop_tokens"]) == {"<|endoftext|>"}


@pytest.mark.slow
def test_a_tiny_model_completes_a_middle_it_was_taught(tmp_path: Path, warm: Warm) -> None:
    folder = add_weights(write_checkpoint(tmp_path / "model", "qwen2"))
    rows = [
        {"prefix": f"def {name}(x):\n    return ", "middle": f"x {sign} {k}", "suffix": f"\n\nprint({name}(1))\n"}
        for k, (name, sign) in enumerate([("add", "+"), ("less", "-"), ("times", "*"), ("modulo", "%")])
    ]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write_recipe(
        tmp_path,
        folder,
        data={"train": str(tmp_path / "code.jsonl")},
        optimizer={"max_steps": 120, "learning_rate": 1e-2},
    )
    assert warm.train(recipe).code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    tokenizer = load_tokenizer(folder)
    for row in rows:
        (example,) = outcome(tokenizer, code(**row), Fim()).examples
        start = example.spans[0].start
        prompt = torch.tensor([example.input_ids[:start]])
        answer = model.generate(prompt, max_new_tokens=60, do_sample=False)[0, start:].tolist()
        assert answer == example.input_ids[start:]  # and stops by itself, by the exported generation config
