"""What gradients in bf16 lose when they are added up over micro-batches, beside sums in fp32.

    python tests/bench/sums.py [FOLDER] [--counts 8 32 64 256] [--tokens 64]

FOLDER is a checkpoint with weights and tokenizer; without one a tiny random Qwen3 is taken. Each micro-batch is another
piece of the project's own pages. Printed are the median and the worst relative error over the weights' tensors.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median

import torch

from qwentune.data.tokenizing.tokenizer import load_tokenizer
from qwentune.model.loading import load_model
from tests.checkpoints import add_weights, write_checkpoint

ROOT = Path(__file__).parents[2]
PAGES = ("FAULTS.md", "CHANGELOG.md", "README.md", "recipes/README.md", "data_templates/README.md")


def main() -> None:
    """Adds up the gradients twice, in both types, and compares them at each count."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--counts", nargs="+", type=int, default=[8, 32, 64, 256])
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    folder = given.folder or add_weights(write_checkpoint(Path(tempfile.mkdtemp()), "qwen3"))
    ids = load_tokenizer(folder).encode(["".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)])[0]
    model = load_model(folder, dtype="bf16").train()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    exact = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    plain = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for count in range(1, max(given.counts) + 1):
        begin = count * given.tokens % (len(ids) - given.tokens)
        row = torch.tensor([ids[begin : begin + given.tokens]])
        model(input_ids=row, labels=row).loss.backward()
        for name, weight in weights.items():
            assert weight.grad is not None
            exact[name] += weight.grad
            plain[name] += weight.grad
            weight.grad = None
        if count in given.counts:
            errors = [float((plain[n].float() - exact[n]).norm() / exact[n].norm()) for n in weights if exact[n].any()]
            print(f"{count} micro-batches: median {median(errors):.1e}, worst {max(errors):.1e}", flush=True)


if __name__ == "__main__":
    main()
