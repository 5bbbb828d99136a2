"""Texts whose perplexity is measured: files, and the two of the quantization literature by name."""

from __future__ import annotations

import hashlib
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

from kbvq.errors import ConfigError

C4_DOCUMENTS = 1100
C4_WINDOWS = 256
"""C4 as GPTQ's code measures it ("c4-new"): 256 windows from the first 1100 documents of the validation split's
first file."""


@dataclass(frozen=True)
class EvaluationText:
    """name: of the text, or of its file. source: what it was made from. max_windows: so many are scored, None for
    all."""

    name: str
    text: str
    source: str
    max_windows: int | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_text(name: str) -> EvaluationText:
    """The text called wikitext2 or c4, or a UTF-8 file.

    wikitext2: the test split of wikitext-2-raw-v1, its lines joined by blank lines. c4: see C4_DOCUMENTS; its
    documents are joined by spaces. Raises ConfigError when the text cannot be read and, without a network, which
    cache to fill.
    """
    if name == "wikitext2":
        lines = _rows("Salesforce/wikitext", config="wikitext-2-raw-v1", split="test", count=None)
        return EvaluationText(name, "\n\n".join(lines), "Salesforce/wikitext, wikitext-2-raw-v1, test")
    if name == "c4":
        file = "en/c4-validation.00000-of-00008.json.gz"
        documents = _rows("allenai/c4", data_file=file, split="validation", count=C4_DOCUMENTS)
        return EvaluationText(name, " ".join(documents), f"allenai/c4, {file}, {C4_DOCUMENTS} documents", C4_WINDOWS)
    try:
        return EvaluationText(Path(name).name, Path(name).read_text(encoding="utf-8"), name)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the text {name}: {error}; pass wikitext2, c4 or a UTF-8 text file") from error


def _rows(
    dataset: str, *, split: str, count: int | None, config: str | None = None, data_file: str | None = None
) -> list[str]:
    """The column "text" of the first `count` rows of a hub data set."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"{dataset} needs the package datasets ({error}); pip install 'kbvq[eval]'") from error
    data_files = None if data_file is None else {split: data_file}
    try:
        rows = datasets.load_dataset(dataset, config, data_files=data_files, split=split)
    except (OSError, ValueError) as error:
        raise missing_data(f"the data set {dataset}", error) from error
    return [row["text"] for row in itertools.islice(rows, count)]


def missing_data(what: str, error: Exception) -> ConfigError:
    """What to say when hub data cannot be loaded: the reason, and which cache to fill where there is a network."""
    from huggingface_hub.constants import HF_HOME

    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    cache = os.environ.get("HF_DATASETS_CACHE", f"{HF_HOME}/datasets")
    return ConfigError(
        f"{what} could not be loaded: {reason}. Without a network it must be in the cache {cache}: run the same "
        "command once where there is a network, copy that folder, and set HF_DATASETS_CACHE if it lies elsewhere"
    )
