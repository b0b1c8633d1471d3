"""`preview --html`: one page that says what is trained, and in which no row can act."""

from __future__ import annotations

import itertools
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.test_preview import preview, write_recipe, write_rows

HOSTILE = "</pre><script>alert(1)</script> <img src=x onerror=alert(2)> & \u202eevil\x1b[31m 👩‍👩‍👧 你好 {{ 7 * 7 }}"


class Page(HTMLParser):
    """The elements of a page, and the text of those that a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "input", "wbr"}:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data


def rows(*answers: str) -> list[dict]:
    return [
        {"messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": answer}]}
        for answer in answers
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, qwen3_folder: Path) -> Page:
    folder = tmp_path_factory.mktemp("html")
    write_recipe(folder, qwen3_folder, write_rows(folder, *rows("one\u200fway", HOSTILE, "three")))
    finished = preview(folder, "--html", "page.html")
    assert finished.returncode == 0, finished.stderr
    return Page((folder / "page.html").read_text("utf-8"))


def test_the_page_is_whole_and_loads_nothing(page: Page) -> None:
    assert not page.open
    for _, attributes in page.tags:
        assert not {"src", "srcset", "action"} & attributes.keys()
        assert str(attributes.get("href", "#")).startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    policy = next(attributes for tag, attributes in page.tags if attributes.get("http-equiv"))
    assert "default-src 'none'" in str(policy["content"])


@pytest.mark.fault("J76", "preview shows control and bidi characters written out; its page runs no script of a row")
def test_rows_add_no_element_and_no_script(page: Page) -> None:
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1
    assert "alert" not in page.texts["script"][0]
    assert "img" not in tags


def test_every_example_is_there_with_its_mask_in_characters(page: Page) -> None:
    assert len(page.texts["article"]) == 3
    for article, answer in zip(page.texts["article"], ("one\\u200fway", None, "three"), strict=True):
        assert article.count("⟦") == article.count("⟧") == 1
        trained = article.partition("⟦")[2].partition("⟧")[0]
        assert trained.endswith("<|im_end|>")
        assert answer is None or trained == f"{answer}<|im_end|>"


def test_what_could_steer_is_written_out_and_letters_stay_whole(page: Page) -> None:
    article = page.texts["article"][1]
    assert article.count("\\u202eevil\\u001b[31m 👩‍👩‍👧 你好 {{ 7 * 7 }}") == 2
    assert "\u202e" not in article


def test_tables_have_captions_and_headings_and_the_search_a_label(page: Page) -> None:
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("caption") == 3  # nothing was dropped
    assert all(attributes.get("scope") in {"row", "col"} for tag, attributes in page.tags if tag == "th")
    labels = {attributes.get("for") for tag, attributes in page.tags if tag == "label"}
    assert labels == {attributes["id"] for tag, attributes in page.tags if tag in {"input", "select"}}
    assert next(attributes for tag, attributes in page.tags if tag == "html")["lang"] == "en"
    assert tags.count("h1") == tags.count("main") == 1


def test_the_page_says_steps_beginnings_and_what_was_dropped(tmp_path: Path, qwen3_folder: Path) -> None:
    file = write_rows(tmp_path, *rows("again and again", "again and again", "long " * 3000))
    write_recipe(tmp_path, qwen3_folder, file, max_tokens=2048, max_dropped_fraction=0.5)
    finished = preview(tmp_path, "--html", "page.html", "--json")
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["dropped"] == {"too long": 1}
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    cells = page.texts["td"]
    assert any(cell == "2" and "again" in after for cell, after in itertools.pairwise(cells))
    assert any(cell.endswith(":3 messages[1]") for cell in cells)
    assert "optimizer steps of the run" in page.texts["th"]


def test_strict_ends_with_the_exit_code_of_data_where_there_is_a_warning(tmp_path: Path, qwen3_folder: Path) -> None:
    plain = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    write_recipe(tmp_path, qwen3_folder, write_rows(tmp_path, plain))
    assert preview(tmp_path, "--strict").returncode == 0
    write_recipe(tmp_path, qwen3_folder, write_rows(tmp_path, *rows("a forged <|im_end|>")))
    assert preview(tmp_path).returncode == 0
    refused = preview(tmp_path, "--strict")
    assert refused.returncode == 3
    assert "--strict allows none" in refused.stderr
    assert "control token is spelled" in refused.stderr


def test_a_page_that_cannot_be_written_is_said_before_anything_is_rendered(tmp_path: Path, qwen3_folder: Path) -> None:
    write_recipe(tmp_path, qwen3_folder, write_rows(tmp_path, *rows("x")))
    refused = preview(tmp_path, "--html", "no/such/folder.html", "--jsonl", ".")
    assert refused.returncode == 2
    assert "--html" in refused.stderr
    assert "--jsonl" in refused.stderr
