"""The keys that other fine-tuning tools take, read from the source of one named release of each; nothing is imported.

    python -m tests.peer_keys FOLDER

says, for each table of `qwentune/peers/`, which keys it lacks and which its release does not have. The wheels are in
FOLDER, put there by `pip download --no-deps llamafactory==0.9.5` and the like: `RELEASES` names them.
"""

from __future__ import annotations

import ast
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qwentune.peers.key_tables import key_table


@dataclass(frozen=True, slots=True)
class Release:
    """Where the arguments of a tool stand: the fields of classes (`roots`) in files of a wheel are its keys.

    With `nested`, a field that is itself such a class has keys of its own. `same` renames the beginning of a key, where
    several lists have items of one kind.
    """

    wheel: str
    files: str  # beginnings of names in the wheel
    roots: str
    nested: bool = False
    same: tuple[tuple[str, str], ...] = ()


RELEASES: Mapping[str, Release] = {
    "transformers": Release(
        "transformers-5.24.0", "transformers/training_args", "TrainingArguments Seq2SeqTrainingArguments"
    ),
    "llama_factory": Release(
        "llamafactory-0.9.5",
        "llamafactory/hparams/",
        "DataArguments EvaluationArguments FinetuningArguments GeneratingArguments ModelArguments TrainingArguments",
    ),
    "axolotl": Release(
        "axolotl-0.19.0",
        "axolotl/utils/schemas/ axolotl/integrations/",
        "AxolotlInputConfig CutCrossEntropyArgs LigerArgs KernelsArgs SpectrumArgs GrokfastArgs KDArgs LMEvalArgs"
        " DiffusionArgs MoraArgs SwanLabConfig DenseMixerArgs ExpertParallelArgs LLMCompressorArgs HatcheryArgs"
        " NemoGymArgs",
        nested=True,
        same=(("test_datasets[].", "datasets[]."), ("pretraining_dataset[].", "datasets[].")),
    ),
    "ms_swift": Release(
        "ms_swift-4.6.0",
        "swift/arguments/ swift/trainers/arguments.py swift/rlhf_trainers/ swift/megatron/arguments/",
        "SftArguments RLHFArguments PretrainArguments ExportArguments InferArguments DeployArguments RolloutArguments"
        " EvalArguments SamplingArguments AppArguments WebUIArguments MegatronSftArguments MegatronRLHFArguments"
        " MegatronPretrainArguments MegatronExportArguments",
    ),
}


def extract(wheel: Path, release: Release) -> set[str]:
    """The dotted keys of a wheel; `[]` stands for the number of a list's item."""
    classes: dict[str, ast.ClassDef] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(tuple(release.files.split())) and name.endswith(".py"):
                for node in ast.parse(archive.read(name)).body:
                    if isinstance(node, ast.ClassDef):
                        classes.setdefault(node.name, node)
    found = {key for root in release.roots.split() for key in _keys(root, classes, release.nested, "", ())}
    for theirs, ours in release.same:
        found = {ours + key.removeprefix(theirs) if key.startswith(theirs) else key for key in found}
    return found


def _keys(
    name: str, classes: Mapping[str, ast.ClassDef], nested: bool, prefix: str, above: tuple[str, ...]
) -> Iterator[str]:
    for statement in classes[name].body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            key, words = statement.target.id, _words(statement.annotation)
            if key.startswith("_") or "ClassVar" in words or _is_internal(statement.value):
                continue
            yield from (prefix + known for known in (key, *_aliases(statement.value)))
            item = "[]" if "list" in words else ""
            for inner in words if nested else ():
                if inner in classes and inner not in above:
                    yield from _keys(inner, classes, nested, f"{prefix}{key}{item}.", (*above, inner))
    for parent in classes[name].bases:
        inherited = ast.unparse(parent).rpartition(".")[2]
        if inherited in classes and inherited != name:
            yield from _keys(inherited, classes, nested, prefix, above)


def _words(annotation: ast.expr) -> list[str]:
    return [node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)]


def _aliases(value: ast.expr | None) -> Iterator[str]:
    """The other names by which a configuration gives a field."""
    for word in value.keywords if isinstance(value, ast.Call) else ():
        if word.arg in {"alias", "validation_alias"}:
            yield from (node.value for node in ast.walk(word.value) if isinstance(node, ast.Constant))


def _is_internal(value: ast.expr | None) -> bool:
    """Whether a field is none that a user gives."""
    words = value.keywords if isinstance(value, ast.Call) else ()
    return any(word.arg == "init" and ast.unparse(word.value) == "False" for word in words)


def differences(folder: Path) -> dict[str, tuple[set[str], set[str]]]:
    """Of each table: the keys of its release that it lacks, and its keys that the release does not have."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for name, release in RELEASES.items():
        (wheel,) = folder.glob(f"{release.wheel}-*.whl")
        table, keys = key_table(name), extract(wheel, release)
        found[name] = keys - table.own, table.own - table.earlier - keys
    return found


if __name__ == "__main__":
    for name, (lacking, other) in differences(Path(sys.argv[1])).items():
        print(f"{name}: {len(key_table(name).own)} keys; lacks {sorted(lacking)}; has besides {sorted(other)}")
