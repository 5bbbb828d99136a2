"""What every test shares: an environment without network, and the trained model of the repository."""

from __future__ import annotations

import os

# Before torch and transformers are imported, and inherited by the processes that tests start: one thread count gives
# one order of summation, hence equal bits.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
import torch
from quantizing import write_text

TESTS = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests marked gpu where there is none."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text for the tiny models."""
    return write_text(tmp_path_factory.mktemp("text") / "calibration.txt")


@pytest.fixture(scope="session")
def trained_model() -> Path:
    """Folder of the bundled Qwen3-MoE, trained on English text: 4 layers, 16 experts, 256 tokens at most."""
    return TESTS / "models" / "tiny-qwen3-moe"


@pytest.fixture(scope="session")
def data() -> Path:
    """Folder of calibration.txt, validation.txt, test.txt and tasks/."""
    return TESTS / "data"
