"""Configurations of LLaMA-Factory, axolotl and ms-swift become recipes, and no key of theirs is passed over."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import qwentune
from qwentune.cli import app
from qwentune.errors import RecipeError
from qwentune.memory import judge
from qwentune.peers.configuration import Configuration, Given
from qwentune.peers.draft import draft, table
from qwentune.peers.key_tables import PEERS, Dropped, key_table
from qwentune.peers.translate import translate, translate_file
from qwentune.recipe import Recipe, describe_keys, load_recipe, parse_recipe
from tests.peer_keys import RELEASES, differences

CONFIGURATIONS = Path(__file__).parent / "configurations"
PEERS_FOLDER = Path(qwentune.__file__).parent / "peers"
REAL_LIFE = sorted(path.relative_to(CONFIGURATIONS).as_posix() for path in CONFIGURATIONS.glob("*/*") if path.is_file())
DEFAULTS = {key.name: key.default for key in describe_keys()}

CHAT = [
    {"role": "system", "content": "You help."},
    {"role": "user", "content": "Where is my parcel?"},
    {"role": "assistant", "content": "On its way."},
]
CALL = {"type": "function", "function": {"name": "track", "arguments": '{"number": 7}'}}
TOOL = {"type": "function", "function": {"name": "track", "parameters": {"type": "object", "properties": {}}}}
ROWS: dict[str, list[dict[str, Any]]] = {
    "tools.jsonl": [
        {
            "messages": [
                {"role": "user", "content": "Where is parcel 7?"},
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "on its way"},
                {"role": "assistant", "content": "On its way."},
            ],
            "tools": [TOOL],
        }
    ],
    "chat.jsonl": [{"messages": CHAT}],
    "faq.jsonl": [{"question": "Open on Sunday?", "answer": "No.", "earlier": [["Hello", "Hello!"]]}],
    "alpaca.jsonl": [{"instruction": "Translate", "input": "Haus", "output": "house"}],
    "handbook.jsonl": [{"text": "Parcels are sent on the day of the order. " * 8}],
    "old_chats.json": [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}],
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the configurations, their data and nothing else, in which commands run."""
    shutil.copytree(CONFIGURATIONS, tmp_path, dirs_exist_ok=True)
    for folder in (tmp_path / "data", tmp_path / "llama_factory/data"):
        folder.mkdir(exist_ok=True)
        for name, rows in ROWS.items():
            lines = [json.dumps(row) for row in rows for _ in range(8)]
            (folder / name).write_text(f"[{', '.join(lines)}]" if name.endswith(".json") else "\n".join(lines) + "\n")
        answers = "question,answer\n" + "Open on Sunday?,No.\n" * 8
        (folder / "faq.csv").write_text(answers)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(judge, "free_disk_bytes", lambda *_, **__: 10**13)
    monkeypatch.setattr(judge, "free_host_bytes", lambda: 10**12)
    return tmp_path


def convert(configuration: str | Path, recipe: str = "mine.yaml") -> tuple[int, str]:
    ended = CliRunner().invoke(app, ["init", "--from", str(configuration), "-o", recipe])
    return ended.exit_code, ended.stderr


def recipe_of(configuration: str | Path) -> Recipe:
    code, said = convert(configuration)
    assert code == 0, said
    return load_recipe("mine.yaml").recipe


def refusal(text: str, name: str = "old.yaml") -> str:
    Path(name).write_text(text)
    code, said = convert(name)
    assert code == 2, said
    assert not Path("mine.yaml").exists()
    return said


@pytest.mark.slow
@pytest.mark.parametrize("configuration", REAL_LIFE)
def test_a_real_configuration_becomes_a_recipe_that_previews_and_plans(place: Path, configuration: str) -> None:
    recipe = recipe_of(configuration)
    local = [source.path for source in recipe.data.train if Path(source.path).exists()]
    sources = [
        source.model_dump(by_alias=True, exclude_unset=True) for source in recipe.data.train if source.path in local
    ]
    overrides = ["model=builtin:tiny-qwen3", f"data.train={json.dumps(sources)}"]
    previewed = CliRunner().invoke(app, ["preview", "mine.yaml", *overrides, "--json"])
    assert previewed.exit_code == 0, previewed.stderr
    assert json.loads(previewed.stdout)["samples"] > 0
    planned = CliRunner().invoke(app, ["plan", "mine.yaml", "--gpu", "h200", "--json"])
    assert planned.exit_code == 0, planned.stderr


@pytest.mark.parametrize("configuration", REAL_LIFE)
def test_every_key_that_was_written_stands_in_the_table(place: Path, configuration: str) -> None:
    translation = translate_file(Path(configuration))
    said = "\n".join(table(translation, DEFAULTS))
    assert "ours is none" not in said, "every default of theirs that is written out stands beside ours"
    assert "theirs)" not in said, "and what it decides"
    assert {key for key in translation.configuration.given if key not in said} == set()
    assert "0123456789abcdefghij" not in said, "secrets are not shown"


def test_a_configuration_of_llama_factory_keeps_its_numbers(place: Path) -> None:
    recipe = recipe_of("llama_factory/qwen3_lora_sft.yaml")
    assert (recipe.model, recipe.tuning.kind, recipe.tuning.targets) == ("Qwen/Qwen3-8B", "lora", "all-linear")
    assert (recipe.tuning.rank, recipe.tuning.alpha) == (8, 16), "alpha is twice the rank there"
    tools, old = recipe.data.train
    assert (tools.path, tools.format, tools.max_rows) == ("llama_factory/data/tools.jsonl", "chat", 1000)
    assert (old.path, old.format, old.max_rows) == ("llama_factory/data/old_chats.json", "sharegpt", 500)
    assert (recipe.data.max_tokens, recipe.data.packing, recipe.data.eval_fraction) == (2048, False, 0.1)
    assert recipe.batch.sequences_per_step == 8
    optimizer, output = recipe.optimizer, recipe.output
    assert (optimizer.learning_rate, optimizer.epochs, optimizer.warmup_fraction) == (1e-4, 3.0, 0.1)
    assert (output.save_every_steps, output.eval_every_steps, output.log_every_steps) == (500, 500, 10)


def test_quantised_bases_ratios_and_trackers_of_llama_factory(place: Path) -> None:
    code, said = convert("llama_factory/qwen2.5_qlora.yaml")
    assert code == 0, said
    recipe = load_recipe("mine.yaml").recipe
    assert (recipe.tuning.kind, recipe.tuning.variant, recipe.tuning.targets) == (
        "qlora",
        "rslora",
        ["q_proj", "v_proj"],
    )
    assert (recipe.optimizer.lora_plus_ratio, recipe.optimizer.warmup_steps) == (16.0, 20)
    assert recipe.optimizer.schedule == "linear", "their default is written out"
    assert recipe.precision.optimizer_state == "8bit"
    assert (recipe.data.turns, recipe.data.packing) == ("last", True)
    assert (recipe.output.report_to, recipe.output.project, recipe.output.run_name) == (["swanlab"], "shop", "faq-1")
    assert (recipe.output.save_every_epochs, recipe.output.keep) == (1.0, 1)
    for words in ("neftune_noise_alpha: 5", "micro-batch", "fp16", "additional_target", "ours is cosine"):
        assert words in said


def test_text_fractions_of_a_run_and_lowest_rates_of_llama_factory(place: Path) -> None:
    recipe = recipe_of("llama_factory/qwen2.5_pretrain_full.yaml")
    assert (recipe.tuning.kind, recipe.data.train[0].format, recipe.data.packing) == ("full", "text", True)
    assert (recipe.optimizer.max_steps, recipe.optimizer.warmup_fraction) == (200, 0.05)
    assert recipe.optimizer.min_learning_rate == pytest.approx(1e-6)
    assert (recipe.optimizer.betas, recipe.optimizer.weight_decay, recipe.seed) == ((0.9, 0.95), 0.01, 7)
    assert recipe.output.save_every_steps == 50


def test_data_sets_of_axolotl_are_sources(place: Path) -> None:
    recipe = recipe_of("axolotl/qwen2.5_lora_alpaca.yml")
    assert [source.format for source in recipe.data.train] == ["instruction", "instruction", "text"]
    assert recipe.data.train[1].columns == {"instruction": "question", "output": "answer"}
    assert (recipe.tuning.kind, recipe.tuning.rank, recipe.tuning.alpha, recipe.tuning.variant) == (
        "lora",
        32,
        16,
        "rslora",
    )
    assert recipe.optimizer.min_learning_rate == pytest.approx(2e-5)
    assert (recipe.output.early_stopping, recipe.output.best, recipe.output.keep) == (3, "loss", 2)
    recipe = load_after("axolotl/qwen3_full_fsdp.yaml")
    assert (recipe.tuning.kind, recipe.data.thinking, recipe.optimizer.max_grad_norm) == ("full", "off", 0.5)
    assert (recipe.optimizer.schedule, recipe.optimizer.decay_fraction) == ("wsd", 0.2)
    assert recipe.data.evaluation is not None
    assert (recipe.data.evaluation[0].path, recipe.output.eval_every_epochs) == ("data/alpaca.jsonl", 1.0)
    recipe = load_after("axolotl/qwen3_qlora.yaml")
    assert (recipe.data.train[0].format, recipe.tuning.kind) == ("sharegpt", "qlora")
    assert (recipe.output.eval_every_epochs, recipe.output.report_to, recipe.output.project) == (
        0.25,
        ["wandb"],
        "shop",
    )


def load_after(configuration: str) -> Recipe:
    Path("mine.yaml").unlink()
    return recipe_of(configuration)


def test_a_command_line_of_ms_swift_with_variables_and_two_gpus(place: Path) -> None:
    recipe = recipe_of("ms_swift/qwen2.5_lora.sh")
    assert (recipe.model, recipe.batch.sequences_per_step) == ("Qwen/Qwen2.5-7B-Instruct", 16)
    assert [(source.path, source.max_rows) for source in recipe.data.train] == [
        ("data/chat.jsonl", 500),
        ("data/faq.csv", 1000),
    ]
    assert recipe.data.train[1].columns == {"instruction": "question", "output": "answer"}
    assert (recipe.data.system, recipe.data.eval_fraction) == ("You are a helpful assistant.", 0.1)
    assert (recipe.tuning.dropout, recipe.optimizer.weight_decay) == (0.05, 0.1), "their defaults are written out"
    assert recipe.optimizer.betas == (0.9, 0.95)


def test_yaml_and_json_of_ms_swift(place: Path) -> None:
    recipe = recipe_of("ms_swift/qwen3_qlora.yaml")
    assert (recipe.tuning.kind, recipe.tuning.alpha, recipe.optimizer.lora_plus_ratio) == ("qlora", 64, 10.0)
    assert (recipe.data.train[1].path, recipe.data.train[1].max_rows) == ("someone/faq:en:train", 200)
    assert recipe.batch.sequences_per_step == 16, "their rule: about 16 rows a step"
    assert (recipe.data.too_long, recipe.output.run_name) == ("drop_old_turns", "qlora-1")
    recipe = load_after("ms_swift/qwen3_full_args.json")
    assert (recipe.tuning.kind, recipe.data.turns, recipe.optimizer.min_learning_rate) == ("full", "last", 1e-6)
    assert recipe.output.report_to == ["tensorboard", "swanlab"]


def test_media_of_other_tools_are_taken_over_or_said_by_name(place: Path) -> None:
    entry = {"file_name": "seen.json", "columns": {"images": "pictures"}}
    Path("dataset_info.json").write_text(json.dumps({"seen": entry}))
    config = "model_name_or_path: Qwen/Qwen2.5-VL-3B-Instruct\nstage: sft\ndataset: seen\ndataset_dir: .\nmedia_dir: "
    Path("old.yaml").write_text(f"{config}photos\n")
    translated = translate_file(Path("old.yaml"))
    assert translated.settings["data.train"].value[0]["columns"] == {"images": "pictures"}
    (left,) = [one for one in translated.left_out if one.given.key == "media_dir"]
    assert left.changes
    assert "put those of photos there" in left.why
    Path("old.yaml").write_text(f"{config}.\n")
    translated = translate_file(Path("old.yaml"))
    assert not [one for one in translated.left_out if one.given.key == "media_dir"], "where they are looked for anyway"
    Path("rows.jsonl").write_text('{"messages": [], "pics": ["a.png"], "clip": "a.mp4"}\n')
    columns = {"pics": "images", "clip": "videos"}
    Path("swift.yaml").write_text(
        yaml.safe_dump({"model": "Qwen/Qwen2.5-VL-3B-Instruct", "dataset": ["rows.jsonl"], "columns": columns})
    )
    translated = translate_file(Path("swift.yaml"))
    assert translated.settings["data.train"].value[0]["columns"] == {"images": "pics", "videos": "clip"}
    assert not [one for one in translated.left_out if one.given.key == "columns"]


def test_fields_and_roles_by_other_names_are_tags(place: Path) -> None:
    entry = {
        "file_name": "old_chats.json",
        "formatting": "sharegpt",
        "columns": {"messages": "turns", "system": "rules"},
        "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "customer", "assistant_tag": "clerk"},
    }
    Path("dataset_info.json").write_text(json.dumps({"shop": entry}))
    Path("old.yaml").write_text("model_name_or_path: Qwen/Qwen3-8B\nstage: sft\ndataset: shop\ndataset_dir: .\n")
    (source,) = recipe_of("old.yaml").data.train
    assert (source.format, source.columns) == ("chat", {"messages": "turns", "system": "rules"})
    assert source.tags == {"role": "who", "content": "says", "user": "customer", "assistant": "clerk"}
    entry = {
        "path": "data/chat.jsonl",
        "type": "chat_template",
        "field_messages": "turns",
        "message_property_mappings": {"role": "who", "content": "says", "reasoning_content": "thought"},
        "message_field_training": "counts",
        "roles": {"user": ["human", "customer"], "assistant": ["gpt", "clerk"]},
    }
    Path("old.yaml").write_text(yaml.safe_dump({"base_model": "Qwen/Qwen3-8B", "datasets": [entry]}))
    (source,) = load_after("old.yaml").data.train
    assert (source.format, source.columns) == ("chat", {"messages": "turns"})
    assert source.tags == {
        **{"role": "who", "content": "says", "reasoning_content": "thought", "train": "counts"},
        **{"user": ["customer"], "assistant": ["clerk"]},
    }


def test_a_folder_that_is_elsewhere_is_the_hub_id_of_its_name(place: Path) -> None:
    Path("old.yaml").write_text(
        "base_model: /mnt/models/Qwen3-8B\ndatasets: [{path: data/chat.jsonl, type: chat_template}]\n"
    )
    assert recipe_of("old.yaml").model == "Qwen/Qwen3-8B"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: Qwen/Qwen3-8B\npeft_config: {name: lora}\ntrain_dataset: x.yaml\n", ["second schema (v1)"]),
        ("model: Qwen/Qwen3-8B\ntuning: {kind: lora}\ndata: {train: [x.jsonl]}\n", ["a recipe of qwentune already"]),
        ("a: 1\n", ["no configuration of LLaMA-Factory, axolotl, ms-swift", "base_model"]),
        ("- 1\n", ["a configuration is a mapping"]),
        ("base_model: [Qwen\n", ["old.yaml:2", "neither YAML nor JSON"]),
        (
            "model_name_or_path: meta-llama/Llama-3.1-8B\nstage: dpo\nfinetuning_type: freeze\nlearning_rate: fast\n"
            "dataset: modelscope,pairs,photos,support_fag\ndataset_dir: llama_factory/data\n",
            [
                *("old.yaml:1", "no Qwen", "old.yaml:2", "stage", "old.yaml:3", "freeze", "old.yaml:4", "fast"),
                *("ms_hub_url", "preferences", "Did you mean 'support_faq'?", "7 problems"),
            ],
        ),
        ("model_name_or_path: Qwen/Qwen3-8B\nstage: sft\n", ["no data is named"]),
        (
            "model_name_or_path: Qwen/Qwen3-8B\nstage: sft\ndataset: x\ndataset_dir: nowhere\n",
            ["dataset_info.json", "nowhere"],
        ),
        ("base_model: Qwen/Qwen3-8B\nrl: grpo\ndatasets: [{path: x.jsonl, type: pygmalion}]\n", ["grpo", "pygmalion"]),
        ("model: Qwen/Qwen3-8B\nrlhf_type: kto\ntuner_type: adalora\ndataset: x.jsonl\n", ["kto", "adalora"]),
        ("model: Qwen/Qwen-VL-Chat\ntuner_type: lora\ndataset: x.jsonl\n", ["Qwen-VL"]),
        (
            "base_model: Qwen/Qwen3-8B\nlearning_rate: 20\ndatasets: [{path: x, type: alpaca}]\n",
            ["old.yaml:2  learning_rate"],
        ),
    ],
)
def test_what_has_no_meaning_here_is_refused_all_at_once(place: Path, text: str, words: list[str]) -> None:
    said = refusal(text)
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize("verb", ["rlhf", "infer", "export"])
def test_commands_of_ms_swift_that_train_nothing_of_ours_are_refused(place: Path, verb: str) -> None:
    said = refusal(f"swift {verb} --model Qwen/Qwen3-8B --dataset data/chat.jsonl --torch_dtype bfloat16\n", "old.sh")
    assert f"swift {verb}" in said


@pytest.mark.parametrize(
    "command", ["llamafactory-cli train real.yaml", "axolotl train real.yaml", "swift sft --config real.yaml"]
)
def test_a_command_that_reads_a_file_is_answered_with_the_file(place: Path, command: str) -> None:
    assert "qwentune init --from real.yaml" in refusal(f"export A=1\n{command}\n", "old.sh")


def test_nothing_is_overwritten_and_options_that_contradict_are_refused(place: Path) -> None:
    Path("mine.yaml").write_text("mine")
    code, said = convert(REAL_LIFE[0])
    assert (code, Path("mine.yaml").read_text()) == (2, "mine")
    assert "nothing is overwritten" in said
    ended = CliRunner().invoke(app, ["init", "--from", REAL_LIFE[0], "--model", "Qwen/Qwen3-8B", "-o", "other.yaml"])
    assert (ended.exit_code, "--from names model and data already" in ended.stderr) == (2, True)
    assert CliRunner().invoke(app, ["init", "--from", "missing.yaml", "-o", "other.yaml"]).exit_code == 2


# One configuration of each tool, to which a key is added.
LEAST: dict[str, dict[str, Any]] = {
    "llama_factory": {"model_name_or_path": "Qwen/Qwen3-8B", "finetuning_type": "lora", "dataset": "support_faq"},
    "axolotl": {"base_model": "Qwen/Qwen3-8B", "datasets": [{"path": "data/alpaca.jsonl", "type": "alpaca"}]},
    "ms_swift": {"model": "Qwen/Qwen3-8B", "tuner_type": "lora", "dataset": ["data/chat.jsonl"]},
}
TOP = {name: sorted(key for key in key_table(name).keys if "." not in key) for name in PEERS}


def configuration_of(name: str, **more: Any) -> Configuration:
    """The least configuration of a tool, and some keys more."""
    tree = {**LEAST[name], **more}
    given = {key: Given(key, value, f"old.yaml:{line}") for line, (key, value) in enumerate(tree.items(), start=1)}
    return Configuration(Path("old.yaml"), key_table(name), name, given, "", None)


@pytest.mark.parametrize("name", PEERS)
def test_no_key_of_a_release_is_passed_over(place: Path, name: str) -> None:
    """Whatever its value: the table names it, or the refusal does."""
    passed_over: list[tuple[str, Any]] = []
    for number, key in enumerate(TOP[name]):
        value = (True, 3, "words", ["a", "b"])[number % 4]
        translation = translate(configuration_of(name, **{key: value}))
        if key not in "\n".join([*table(translation, DEFAULTS), *map(str, translation.problems)]):
            passed_over.append((key, value))
    assert passed_over == []


@pytest.mark.parametrize("name", [*PEERS, "transformers"])
def test_a_table_gives_each_key_one_entry_and_names_keys_that_we_have(name: str) -> None:
    tree = yaml.safe_load((PEERS_FOLDER / f"{name}.yaml").read_text())
    keys = [*tree["takes"], *(key for group in tree["dropped"] for key in group["keys"].split())]
    assert len(keys) == len(set(keys)) == len(key_table(name).own)
    ours = {key.name for key in describe_keys()}
    assert {entry.ours for entry in key_table(name).keys.values() if not isinstance(entry, Dropped)} <= ours
    assert tree["release"].partition(" ")[2] in RELEASES[name].wheel


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["1e-4", "no"])
)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=3)


@pytest.mark.parametrize("name", PEERS)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_value_of_a_key_is_a_bug_of_ours(name: str, data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.sampled_from(TOP[name]), max_size=8))
    translation = translate(configuration_of(name, **{key: data.draw(VALUES) for key in keys}))
    table(translation, DEFAULTS)
    with suppress(RecipeError):  # a wrong value of theirs is no bug of ours
        parse_recipe(draft(translation, "mine.yaml", DEFAULTS).text, "mine.yaml")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("cutoff_len: 2048", "LLaMA-Factory's cutoff_len is data.max_tokens here."),
        ("tuning: {kind: lora, lora_rank: 8}", "LLaMA-Factory's lora_rank is tuning.rank here."),
        ("tuning: {kind: lora, lora: {lora_r: 8}}", "tuning.lora"),
        ("data: {train: [x.jsonl], sequence_len: 512}", "axolotl's sequence_len is data.max_tokens here."),
        ("split_dataset_ratio: 0.1", "ms-swift's split_dataset_ratio is data.eval_fraction here."),
        ("num_train_epochs: 3", "num_train_epochs is optimizer.epochs here."),
        ("optimizer: {neftune_noise_alpha: 5}", "micro-batch"),
        ("use_galore: true", "LLaMA-Factory's use_galore has no counterpart: another optimizer"),
        ("learning_rate: 1e-4", "Is it optimizer.learning_rate?"),
    ],
)
def test_a_recipe_with_a_key_of_another_tool_is_told_ours(key: str, words: str) -> None:
    tree = {"model": "Qwen/Qwen3-8B", "tuning": {"kind": "lora"}, "data": {"train": ["x.jsonl"]}}
    with pytest.raises(RecipeError) as error:
        parse_recipe(yaml.safe_dump({**tree, **yaml.safe_load(key)}), "mine.yaml")
    assert words in str(error.value)


@pytest.mark.soak
def test_the_tables_are_those_of_the_releases(tmp_path: Path) -> None:
    for release in RELEASES.values():
        name, _, version = release.wheel.rpartition("-")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            f"{name}=={version}",
            "-d",
            str(tmp_path),
        ]
        subprocess.run(command, check=True)
    assert {name: found for name, found in differences(tmp_path).items() if found != (set(), set())} == {}
