"""The verbs of `qwentune`."""

from __future__ import annotations

import typer

from qwentune import __version__, console
from qwentune.chat import chat
from qwentune.doctor import doctor
from qwentune.eval import eval
from qwentune.export import export
from qwentune.init import init
from qwentune.plan import plan
from qwentune.preview import preview
from qwentune.runs import runs
from qwentune.serve import serve
from qwentune.supervise import train

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help=f"Fine-tune Qwen models (version {__version__}). First init, then preview, plan and train.",
)
for verb in (init, preview, plan, train, export, chat, eval, serve, runs, doctor):
    app.command()(verb)


@app.command()
def models() -> None:
    """List the checkpoints that qwentune knows: parameters, kind, architecture, licence."""
    from qwentune.facts.models import MODELS
    from qwentune.facts.published_media import NOT_TAKEN

    for name, spec in MODELS.items():
        size = f"{spec.all_parameters / 1e9:>7.2f} B"
        console.show(
            f"{name:<44} {size}  {spec.kind:<9} {spec.checkpoint_type:<15} {', '.join(spec.takes):<26} {spec.licence}"
        )
    for name, sentence in NOT_TAKEN.items():
        console.show(f"{name:<44} not taken: {sentence}")


@app.command()
def gpus() -> None:
    """List the GPUs that qwentune knows, with the memory that a program can use."""
    from qwentune.facts.gpus import GPUS

    for name, spec in GPUS.items():
        rate = "no bf16" if spec.bf16_tflops is None else f"{spec.bf16_tflops:g} bf16 TFLOP/s"
        console.show(f"{name:<18} {spec.total_bytes / 2**30:>7.2f} GiB  {rate}")


@app.command()
def keys() -> None:
    """List the keys of a recipe with their defaults."""
    from qwentune.recipe import describe_keys, render_keys

    console.show("\n".join(render_keys(describe_keys())))


def main() -> None:
    """The console script."""
    console.program(app)


if __name__ == "__main__":
    main()
