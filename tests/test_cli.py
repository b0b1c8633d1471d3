"""The command table: every verb is there, and the lists say what they should."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from qwentune.cli import app
from qwentune.facts.gpus import GPUS
from qwentune.facts.models import MODELS
from qwentune.facts.published_media import NOT_TAKEN
from qwentune.recipe import describe_keys


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_help_names_every_verb_in_the_order_of_the_walk() -> None:
    lines = printed("--help").splitlines()
    verbs = [line.split()[0] for line in lines if line.startswith("  ") and line.split()[0].isalpha()]
    assert verbs[-13:-3] == ["init", "preview", "plan", "train", "export", "chat", "eval", "serve", "runs", "doctor"]
    assert verbs[-3:] == ["models", "gpus", "keys"]


@pytest.mark.parametrize(("verb", "names"), [("models", {**MODELS, **NOT_TAKEN}), ("gpus", GPUS)])
def test_a_list_has_one_line_for_each_thing_known(verb: str, names: dict[str, object]) -> None:
    assert [line.split()[0] for line in printed(verb).splitlines()] == list(names)


def test_keys_explains_every_key_of_a_recipe() -> None:
    lines = printed("keys").splitlines()
    assert [line.split(":")[0] for line in lines[::2]] == [key.name for key in describe_keys()]
    assert all(line.startswith("    ") for line in lines[1::2])
