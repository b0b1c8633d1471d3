"""Templates that want more than there is, and Qwen's own with bytes and words changed: refused in words, or exact.

pytest -m soak tests/faults/test_fuzz_templates.py    # thousands of changed templates
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast

from qwentune.data.rendering.render import Renderer, RenderOptions
from qwentune.data.templates import bounds
from qwentune.data.templates.chat_template import ChatTemplate, TemplateRefusalError
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from tests.dialogues import random_rows
from tests.oracle import expected_examples
from tests.test_render import as_previewed
from tests.test_templates import PUBLISHED, parsed

HELD = "{% set s = namespace(x='ab', y=['ab'], n=9) %}"
AGAIN = "{% for i in range(99) %}{% set s.x = s.x + s.x %}{% endfor %}"
NEST = "".join(f"{{% set a{k + 1} = [{', '.join([f'a{k}'] * 9)}] %}}" for k in range(12))
NESTED = "{% set a0 = ['ab'] %}{% set b0 = ['ab'] %}" + NEST + NEST.replace("a", "b").replace("{% bet", "{% set")
LONG = "{% set x = 'ab\\n' * 9999999 %}"

# Each is refused, with the limit that it meets.
WRITES = "writes more than 33554432 characters"
LISTS = "list of more than 1048576 items"
WIDTH = "more than 100000"
BITS = "a number of more than 65536 bits"
TIME = "computes for more than"
MEMORY = "uses more than 2 GiB of memory"
HOSTILE = {
    "'a' * 10 ** 9": WRITES,
    "10 ** 9 * 'a'": WRITES,
    "('a' * 99999) * 99999": WRITES,
    "[1] * 10 ** 9": LISTS,
    "10 ** (10 ** 10)": BITS,
    "(2 ** 60000) * (2 ** 60000)": BITS,
    "9 ** (9 ** 9)": BITS,
    "'%1000000000d' % 1": WIDTH,
    "'%*d' % (10 ** 9, 1)": WIDTH,
    "'%1000000000s' | format('x')": WIDTH,
    "'%*d' | format(10 ** 9, 1)": WIDTH,
    "'{:1000000000}'.format(1)": WIDTH,
    "'{:{}}'.format(1, 10 ** 9)": WIDTH,
    "'{a:1000000000}'.format_map({'a': 1})": WIDTH,
    "'a'.center(10 ** 9)": WIDTH,
    "'a'.ljust(10 ** 9)": WIDTH,
    "'a'.zfill(10 ** 9)": WIDTH,
    "('\\t' * 99999).expandtabs(99999)": WRITES,
    "(1).to_bytes(10 ** 9, 'big')": WIDTH,
    "('a' * 99999).join(range(99999) | map('string'))": WRITES,
    "('a' * 99999).replace('a', 'b' * 99999)": WRITES,
    "('a' * 99999).replace('', 'b' * 99999)": WRITES,
    "'a'.translate({97: 'b' * 9999999}) * 9": WRITES,
    "'a' | center(10 ** 9)": WIDTH,
    "'a' | indent(10 ** 9, first=true)": WIDTH,
    "('a\\n' * 99999) | indent('b' * 99999)": WRITES,
    "range(99999) | join('a' * 99999)": WRITES,
    "range(99999) | map('center', 99999) | join": WRITES,
    "('a' * 99999) | replace('a', 'b' * 99999)": WRITES,
    "range(9999) | list | tojson(indent=10 ** 9)": WIDTH,
    "range(99999) | list | tojson(indent=99999)": WRITES,
    "messages | batch(10 ** 9, 'x') | list": WIDTH,
    "messages | slice(10 ** 9, 'x') | list": WIDTH,
    "1.5 | round(10 ** 9, 'ceil')": WIDTH,
    "('a ' * 999999) | wordwrap(1)": "gives wordwrap a text of more than 65536 characters",
    "('<' * 999999) | striptags": "gives striptags a text of more than 65536 characters",
    "('www.' * 999999) | urlize": "gives urlize a text of more than 65536 characters",
    "lipsum(10 ** 9)": "more than 1000 paragraphs or words",
    "lipsum(n=1, min=10 ** 9, max=10 ** 9 + 1)": "more than 1000 paragraphs or words",
    "('ab' * 9999999) | list": LISTS,
    "raise_exception('no')": "no",
    HELD + AGAIN: WRITES,
    HELD + AGAIN.replace("s.x + s.x", "s.x ~ s.x"): WRITES,
    HELD + AGAIN.replace("x", "y"): LISTS,
    HELD + AGAIN.replace("s.x + s.x", "[s.x, s.x]") + "{{ s.x }}": f"{LISTS}|{TIME}",
    HELD + AGAIN.replace("s.x + s.x", "s.x | replace('a', s.x)"): WRITES,
    HELD + AGAIN.replace("s.x = s.x + s.x", "s.n = s.n * s.n"): BITS,
    HELD + AGAIN.replace("s.x + s.x", "dict(a=s.x, b=s.x)") + "{{ s.x | tojson }}": f"{LISTS}|{TIME}",
    HELD + AGAIN.replace("s.x + s.x", "namespace(a=s.x, b=s.x)") + "{{ s.x }}": f"{LISTS}|{TIME}",
    NESTED + "{{ a12 }}": LISTS,
    NESTED + "{{ a12 | tojson }}": LISTS,
    NESTED + "{{ a12 ~ '' }}": LISTS,
    NESTED + "{{ '%s' % a12 }}": LISTS,
    NESTED + "{{ a12 == b12 }}": LISTS,
    NESTED + "{{ [a12] is eq([b12]) }}": LISTS,
    NESTED + "{{ [a12] | select('eq', b12) | list }}": LISTS,
    NESTED + "{{ a12.index(b12) }}": LISTS,
    NESTED + "{% autoescape true %}{{ a12 }}{% endautoescape %}": LISTS,
    "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3: TIME,
    "{% for i in range(99999) %}" * 2 + "{% set x = 'a' %}" + "{% endfor %}" * 2: TIME,
    "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}": "recursion",
    "{% for i in [1, 1] recursive %}{% if loop.depth < 99 %}{{ loop([1, 1]) }}{% endif %}{% endfor %}": TIME,
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}": "recursion",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}": TIME,
    "{% macro f(n) %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f(1) %}" * 15
    + "x" * 4096
    + "{% endcall %}" * 15: f"{WRITES}|{TIME}",
    "{% block a %}{{ self.a() }}{% endblock %}": "recursion",
    LONG + "{% for i in range(99999) %}{% set y = x.upper() %}{% endfor %}": TIME,
    LONG + "{% for i in range(99999) %}{% if x in x + 'c' %}{% endif %}{% endfor %}": TIME,
    LONG + "{% for i in range(99999) %}{{ x | length }}{{ x }}{% endfor %}": WRITES,
    LONG + "".join(f"{{% set x{k} = x + '{k}' %}}" for k in range(2000)): f"{MEMORY}|{TIME}",
    LONG + "".join(f"{{% set x{k} = x[{k}:] %}}" for k in range(2000)): f"{MEMORY}|{TIME}",
    LONG + "{{ " + " ~ ".join(["x"] * 9999) + " }}": WRITES,
    LONG + "{{ " + " + ".join(["x"] * 99) + " }}": WRITES,
    LONG + "".join(f"{{% set x{k} = x.split() %}}" for k in range(99)): LISTS,
    "{% for i in range(99999) %}{{ range(99999) | map('string') | join }}{% endfor %}": f"{WRITES}|{TIME}",
    "{% for i in range(99999) %}{% set x = range(99999) | sort | list %}{% endfor %}": TIME,
    "{{ x }}" * 20_000: "a text of 140000 characters, more than 65536",
    "{% for i in x %}" * 21 + "{% endfor %}" * 21: "too many statically nested blocks",
    "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}": "recursion",
    "{{ " + "-" * 9999 + "1 }}": "recursion",
    "{% if x %}" * 999 + "{% endif %}" * 999: "",
}


@pytest.fixture(scope="module")
def said() -> dict[str, list[Any]]:
    """Of each hostile template, in a process of its own: what became of it, in which words, CPU seconds, peak KB."""
    shown = [name if name.startswith("{") else "{{ " + name + " }}" for name in HOSTILE]
    command = [sys.executable, __file__, "1"]
    done = subprocess.run(command, input=json.dumps(shown), stdout=subprocess.PIPE, text=True, check=True, timeout=900)
    return dict(zip(HOSTILE, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.fault("J72", "a template that computes, writes or keeps without end is stopped, and the limit is said")
@pytest.mark.parametrize("template", HOSTILE, ids=range(len(HOSTILE)))
def test_a_template_has_no_more_than_its_share(template: str, said: dict[str, list[Any]]) -> None:
    kind, words, seconds, peak = said[template]
    assert kind == "refused", words
    assert re.search(HOSTILE[template], words)
    assert seconds < 20
    assert peak < 4 * 2**20


# --- Qwen's own templates, changed


WORDS = re.compile(r"\{[%{#]-?|-?[%}#]\}|\w+|\s+|.", re.S)


def changed(text: str, rng: Random) -> str:
    """A template with one to three of its characters or words changed, moved, doubled or removed."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        parts = WORDS.findall(text) if rng.random() < 0.7 else list(text)
        place, other = rng.randrange(len(parts)), rng.randrange(len(parts))
        kind = rng.randrange(5)
        if kind == 0:
            del parts[place : place + rng.choice((1, 1, 1, 8))]
        elif kind == 1:
            parts[place] = rng.choice(("", "\0", "\ue000", "|", "<|im_end|>", "{{", "%}", "9", " not ", "\U0001f468"))
        elif kind == 2:
            parts[place], parts[other] = parts[other], parts[place]
        elif kind == 3:
            parts.insert(place, parts[other])
        else:
            parts[place : place + 8] = parts[place : place + 8] * 2
        text = "".join(parts)
    return text


def agree_on_changed_templates(count: int, seed: int, folder: Path) -> None:
    rng, trained, unjudged, refused = Random(seed), 0, 0, Counter[str]()
    tokenizer, judge = load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    rows = random_rows(seed, 30, reasoning=False, lists=False)
    for _ in range(count):
        text = changed(rng.choice(PUBLISHED).read_text("utf-8"), rng)
        judge.chat_template = text
        template = ChatTemplate(text, tokenizer.special_tokens, {})
        too_long = rng.choice(("drop", "drop_old_turns"))
        renderer = Renderer(tokenizer, template, RenderOptions(max_tokens=1 << 20, too_long=too_long))
        for row in rng.sample(rows, 3):
            outcome = renderer.render(parsed(row))
            if outcome.problems:
                assert not outcome.examples
                refused[re.sub(r"\d+|'.*", "", outcome.problems[0].what)[:40]] += 1
                continue
            try:
                expected = expected_examples(row, judge)
            except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError):
                unjudged += 1  # the template fails on a message that the oracle asks it about, and not on this row's
                continue
            trained += 1
            assert [as_previewed(one) for one in outcome.examples] == expected, text
    judged = f"{trained} dialogues trained as the oracle says, {unjudged} that it cannot judge"
    print(f"seed {seed}: {judged}, {refused.total()} refused: {refused}")
    assert trained > unjudged
    assert refused


@pytest.mark.fault("J72", "a template with changed bytes or words: masks as first principles give them, or refused")
def test_a_changed_template_trains_what_it_says_or_nothing(qwen3_folder: Path) -> None:
    agree_on_changed_templates(40, 19, qwen3_folder)


@pytest.mark.soak
@pytest.mark.fault("J72", "a template with changed bytes or words: masks as first principles give them, or refused")
def test_thousands_of_changed_templates(qwen3_folder: Path) -> None:
    agree_on_changed_templates(3000, int(time.time()), qwen3_folder)


def results() -> None:
    """Reads templates from the standard input; what is said of each, how long it took, in a process of its own."""
    if len(sys.argv) > 1:
        bounds.MOST_SECONDS = float(sys.argv[1])
    for template in json.load(sys.stdin):
        reading, writing = os.pipe()
        child = os.fork()
        if child:
            os.close(writing)
            with os.fdopen(reading) as pipe:
                print(pipe.read() or json.dumps(["died", "", 0, 0]), flush=True)
            os.waitpid(child, 0)
            continue
        resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
        start = time.process_time()
        kind, said = "rendered", ""
        try:
            ChatTemplate(template, {}, {}).render([[{"role": "user", "content": "hi"}]])
        except TemplateRefusalError as error:
            kind, said = "refused", str(error)
        except BaseException as error:
            kind, said = "raised", repr(error)
        seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        os.write(writing, json.dumps([kind, said[:200], seconds, peak]).encode())
        os._exit(0)


if __name__ == "__main__":
    results()
