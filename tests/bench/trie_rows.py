"""CPU seconds of an epoch in rows that share prefixes, divided by those of the separate examples run singly.

    python tests/bench/trie_rows.py [dialogues] [messages]

Random chats with Qwen3's template, whose history is rewritten at every turn; a Qwen3 of hidden 512, 2 layers, a
vocabulary of 1,000. Forward and backward pass, without an optimizer.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from random import Random

import torch

from qwentune.data.dataset import chat_template, prepare
from qwentune.data.layout.batch import collate
from qwentune.data.layout.rows import Rows
from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.model.attention import IMPLEMENTATIONS
from qwentune.model.head import LossHead
from qwentune.model.loading import load_model
from qwentune.recipe import DataOptions
from tests.checkpoints import add_weights, write_checkpoint

WORDS = ("river", "stone", "because", "seven", "to run", "天气", "def f(x):", "blue", "and then", "it is", "42")


def chat(rng: Random, num_messages: int) -> dict[str, object]:
    """A chat in which every answer has its reasoning."""
    messages = []
    for k in range(num_messages):
        message = {"role": "assistant" if k % 2 else "user", "content": text(rng, 12)}
        messages.append(message | ({"reasoning_content": text(rng, 20)} if k % 2 else {}))
    return {"messages": messages}


def text(rng: Random, num_words: int) -> str:
    """Some words."""
    return " ".join(rng.choices(WORDS, k=rng.randint(num_words // 2, num_words * 3 // 2)))


def seconds_of_an_epoch(folder: Path, rows: Rows) -> tuple[float, float]:
    """CPU seconds of the forward and backward passes over all rows, and the loss."""
    model = load_model(folder, dtype="fp32", attention=IMPLEMENTATIONS["sdpa"])
    head = LossHead(model, "supervised")
    batches = [collate([rows[k]], 1 / sum(rows.trained_weights)) for k in range(len(rows))]
    start, total = time.process_time(), 0.0
    for batch in batches:
        loss = head.loss(model, batch)
        loss.backward()
        total += loss.item()
    return time.process_time() - start, total


def main(num_dialogues: int = 8, num_messages: int = 40) -> None:
    """Prints both epochs and their ratio."""
    torch.set_num_threads(1)
    rng = Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = write_checkpoint(Path(name) / "model", "qwen3")
        config = json.loads((folder / "config.json").read_text())
        config |= {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}
        (folder / "config.json").write_text(json.dumps(config | {"head_dim": 64}))
        add_weights(folder)
        file = Path(name) / "rows.jsonl"
        file.write_text("".join(json.dumps(chat(rng, num_messages)) + "\n" for _ in range(num_dialogues)))
        options = {"train": [{"path": str(file)}], "max_tokens": 16384, "eval_fraction": 0}
        data, tokenizer = DataOptions.model_validate(options), load_tokenizer(folder)
        template = chat_template(data, tokenizer)
        shared = prepare(data, tokenizer, template, 0).train
        apart = prepare(data.model_copy(update={"packing": False}), tokenizer, template, 0).train
        seconds, loss = seconds_of_an_epoch(folder, shared)
        seconds_apart, loss_apart = seconds_of_an_epoch(folder, apart)
    print(f"{num_dialogues} chats of {num_messages} messages")
    results = ("separate", apart, seconds_apart, loss_apart), ("shared", shared, seconds, loss)
    for name, rows, total, loss_of_it in results:
        print(f"{name:9} {sum(rows.num_tokens):9d} tokens {total:8.2f} s  loss {loss_of_it:.6f}")
    print(f"{'ratio':9} {sum(shared.num_tokens) / sum(apart.num_tokens):9.3f} {seconds / seconds_apart:15.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
