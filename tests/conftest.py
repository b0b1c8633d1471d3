"""Checkpoints and tokenizers that the whole session shares; nothing here imports torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from hypothesis import settings

from qwentune.data.tokenizing import vocabulary
from qwentune.training.signals import SIGNALS
from tests import checkpoints, qwen3_5
from tests.checkpoints import write_checkpoint
from tests.warm import Warm

# The same examples every time, so that what was green stays green; --hypothesis-profile=explore looks for new ones.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("reproducible")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """A command that is run in this process takes the signals over for good; the next test has them as they were."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        return (yield)
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that lives as long as the session."""
    return tmp_path_factory.mktemp("session")


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Runs that start without importing anything; one at a time."""
    server = Warm()
    yield server
    server.close()


@pytest.fixture(scope="session")
def qwen2_folder(session_folder: Path) -> Path:
    """A tiny Qwen2.5 checkpoint with a vocabulary of 1000 ranks, without weights. Do not write into it."""
    return write_checkpoint(session_folder / "qwen2", "qwen2")


@pytest.fixture(scope="session")
def qwen3_folder(session_folder: Path) -> Path:
    """A tiny Qwen3 checkpoint with a vocabulary of 1000 ranks, without weights. Do not write into it."""
    return write_checkpoint(session_folder / "qwen3", "qwen3")


@pytest.fixture(scope="session")
def qwen3_moe_folder(session_folder: Path) -> Path:
    """A tiny Qwen3-MoE checkpoint with a vocabulary of 1000 ranks, without weights. Do not write into it."""
    return write_checkpoint(session_folder / "qwen3_moe", "qwen3_moe")


@pytest.fixture(scope="session")
def real_qwen2_folder(pytestconfig: pytest.Config) -> Path:
    """A tiny Qwen2.5 checkpoint with the real vocabulary, without weights. Do not write into it."""
    return cached(pytestconfig, "qwen2", lambda folder: write_checkpoint(folder, "qwen2", num_ranks=None))


@pytest.fixture(scope="session")
def real_qwen3_folder(pytestconfig: pytest.Config) -> Path:
    """A tiny Qwen3 checkpoint with the real vocabulary, without weights. Do not write into it."""
    return cached(pytestconfig, "qwen3", lambda folder: write_checkpoint(folder, "qwen3", num_ranks=None))


@pytest.fixture(scope="session")
def real_qwen3_5_folder(pytestconfig: pytest.Config) -> Path:
    """The two files of Qwen3.5's own tokenizer, with its real vocabulary. Do not write into it."""
    return cached(pytestconfig, "qwen3_5", qwen3_5.write_tokenizer)


def cached(config: pytest.Config, name: str, write: Callable[[Path], object]) -> Path:
    """A folder with a real vocabulary, from pytest's cache if an earlier session built the same one.

    The key is the content of what builds it. The folder appears by a rename: sessions may run side by side.
    """
    sources = (vocabulary.__file__, checkpoints.__file__, qwen3_5.__file__)
    key = hashlib.sha256(b"".join(Path(source).read_bytes() for source in sources)).hexdigest()[:16]
    folder = cache_folder(config) / f"{name}-{key}"
    if not folder.exists():
        staging = Path(tempfile.mkdtemp(dir=folder.parent))
        write(staging)
        try:
            staging.rename(folder)
        except OSError:  # another session was quicker
            shutil.rmtree(staging)
    return folder


def cache_folder(config: pytest.Config) -> Path:
    """Pytest's own cache, or the system's temporary folder where that cache is switched off."""
    cache: pytest.Cache | None = getattr(config, "cache", None)
    if cache is not None:
        return cache.mkdir("qwentune-vocabulary")
    folder = Path(tempfile.gettempdir(), "qwentune-vocabulary")
    folder.mkdir(exist_ok=True)
    return folder
