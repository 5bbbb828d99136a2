"""Calibration text: from a file, a folder or a hub data set to windows of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kbvq.errors import CalibrationError

DEFAULT_CALIBRATION = "allenai/c4:en:train:text"

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")

_PASS_A_FILE = f"pass a local {', '.join(SUFFIXES)} file or a folder of them with --calibration"
_BATCH_DOCUMENTS = 1000  # tokenized together


def load_texts(source: str, *, max_characters: int = 16_000_000) -> list[str]:
    """The documents of a calibration source.

    source: a .txt file (one document), a .jsonl, .json or .parquet file (one document per record: its field "text", or
    else its only text field), a folder of such files, or a hub data set as `name[:config[:split[:column]]]`, where
    split defaults to "train" and an empty part means the default.
    max_characters: when to stop reading a hub data set; local files are read whole.

    Raises CalibrationError when there is no such source or no text in it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise CalibrationError(f"calibration folder {path} holds no {', '.join(SUFFIXES)} file")
        texts = [text for file in files for text in _read_file(file)]
    elif path.is_file():
        texts = _read_file(path)
    elif path.suffix in SUFFIXES or source.startswith(("/", ".", "~")):
        raise CalibrationError(f"calibration file {path} does not exist")
    else:
        texts = _read_hub(source, max_characters)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise CalibrationError(f"calibration source {source} holds no text")
    return texts


def calibration_windows(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    sequence_length: int,
    seed: int,
    vocab_size: int,
    further: int = 0,
) -> Tensor:
    """Windows of consecutive tokens, [samples, sequence_length] int64.

    The documents are tokenized without special tokens, joined by the end-of-text token if there is one, and cut into
    windows that do not overlap; `samples` of them are drawn by seed without replacement and kept in text order. Up to
    `further` others follow them in the same way, as many as there are: more rows, and the first ones stay the same.

    Raises CalibrationError when there are too few windows, or a token that the model (vocab_size) does not have.
    """
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces = []
    for start in range(0, len(texts), _BATCH_DOCUMENTS):
        batch = list(texts[start : start + _BATCH_DOCUMENTS])
        # Not verbose: it would warn of documents longer than the model takes, and these are cut below.
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        pieces += [torch.tensor(ids + separator, dtype=torch.int64) for ids in encoded["input_ids"] if ids]
    tokens = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
    if not len(tokens):
        raise CalibrationError(f"the calibration text has no tokens; {_PASS_A_FILE}")
    if (largest := int(tokens.max())) >= vocab_size:
        raise CalibrationError(
            f"the tokenizer does not fit the model: it gives token {largest} (its vocabulary has {len(tokenizer)}), "
            f"and the model has {vocab_size}; put the model's own tokenizer into its folder"
        )
    num_windows = len(tokens) // sequence_length
    if num_windows < samples:
        raise CalibrationError(
            f"the calibration text gives {num_windows} windows of {sequence_length} tokens ({len(tokens)} tokens), not "
            f"{samples}; pass fewer --samples, a shorter --sequence-length or more text"
        )
    windows = tokens[: num_windows * sequence_length].view(num_windows, sequence_length)
    order = torch.randperm(num_windows, generator=torch.Generator().manual_seed(seed))
    first, others = order[:samples], order[samples : samples + further]
    return windows[torch.cat([first.sort().values, others.sort().values])]


def _read_file(path: Path) -> list[str]:
    try:
        if path.suffix == ".parquet":
            return _read_parquet(path)
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CalibrationError(f"calibration file {path} cannot be read: {error}") from error
    if path.suffix == ".txt":
        return [text]
    if path.suffix in (".json", ".jsonl"):
        return [_text_of(record, str(path)) for record in _records(text, path)]
    raise CalibrationError(f"calibration file {path}: {path.suffix or 'no suffix'} is not one of {', '.join(SUFFIXES)}")


def _records(text: str, path: Path) -> Iterable[object]:
    """The values of a JSON file (a list, or a single record) or of a file with one JSON value per line."""
    if path.suffix == ".json":
        try:
            data = json.loads(text)
            return data if isinstance(data, list) else [data]
        except json.JSONDecodeError:
            pass  # lines of JSON are often named .json too
    records = []
    # Not splitlines: JSON strings may hold other line separators.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise CalibrationError(f"calibration file {path}, line {number}, is not JSON: {error}") from error
    return records


def _text_of(record: object, source: str, column: str | None = None) -> str:
    """The text of a record: the named column, or "text", or the only field that is a string."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise CalibrationError(f"{source}: a record is a {type(record).__name__}, not an object with a text field")
    names = [name for name, value in record.items() if isinstance(value, str)]
    return record[_choose(names, list(record), source, column)]


def _choose(text_fields: list[str], fields: list[str], source: str, column: str | None = None) -> str:
    if column is None and "text" not in text_fields and len(text_fields) == 1:
        return text_fields[0]
    if (wanted := column or "text") in text_fields:
        return wanted
    raise CalibrationError(f'{source}: no text field "{wanted}" among {", ".join(fields) or "no fields"}')


def _read_parquet(path: Path) -> list[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise CalibrationError(f"{path}: parquet files need the eval extra: pip install 'kbvq[eval]'") from error
    file = parquet.ParquetFile(path)
    schema = file.schema_arrow
    strings = [f.name for f in schema if pyarrow.types.is_string(f.type) or pyarrow.types.is_large_string(f.type)]
    column = _choose(strings, schema.names, str(path))
    return [text for text in file.read(columns=[column]).column(column).to_pylist() if text is not None]


def _read_hub(source: str, max_characters: int) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"calibration text from the hub needs the eval extra: pip install 'kbvq[eval]', or {_PASS_A_FILE}"
        ) from error
    name, config, split, column, *rest = [part or None for part in source.split(":")] + [None] * 3
    if any(rest) or name is None:
        raise CalibrationError(f"calibration source {source!r} is not a path or name[:config[:split[:column]]]")
    texts: list[str] = []
    characters = 0
    try:
        for record in datasets.load_dataset(name, config, split=split or "train", streaming=True):
            texts.append(_text_of(record, source, column))
            characters += len(texts[-1])
            if characters >= max_characters:
                break
    except CalibrationError:
        raise
    except Exception as error:  # of a dozen unrelated types, from the hub, the network and the data set's own format
        reason = str(error).strip().partition("\n")[0]
        raise CalibrationError(
            f"there is no local file {source}, and the hub did not provide such a data set ({reason}); {_PASS_A_FILE}"
        ) from error
    return texts
