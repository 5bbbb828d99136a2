"""Plain data with tensors in it as JSON and a table of tensors, and back: what a run carries from step to step.

None, booleans, numbers, strings, lists, tuples, dictionaries with any of these as keys, tensors, and the dataclasses
that the reader lists. Two references to one tensor stay two references to one tensor. Nothing is executed on reading.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kbvq.errors import CheckpointError

_KIND = "$"  # marks what JSON has no form for


@dataclass(frozen=True)
class StoredFile:
    """A file that belongs to the data. name: relative to the work folder. fingerprint: {"bytes", "sha256"}."""

    name: str
    fingerprint: dict[str, Any]


def to_json(value: object) -> tuple[Any, dict[str, Tensor], list[StoredFile]]:
    """(JSON-ready data, tensors by the names that stand for them there, the files that it refers to)."""
    tensors: dict[str, Tensor] = {}
    files: list[StoredFile] = []
    names: dict[int, str] = {}

    def convert(part: object) -> Any:
        if part is None or isinstance(part, bool | int | float | str):
            return part
        if isinstance(part, Tensor):
            name = names.setdefault(id(part), str(len(names)))
            tensors[name] = part
            return {_KIND: "tensor", "name": name}
        if isinstance(part, list):
            return [convert(item) for item in part]
        if isinstance(part, tuple):
            return {_KIND: "tuple", "items": [convert(item) for item in part]}
        if isinstance(part, Mapping):
            if all(isinstance(key, str) for key in part) and _KIND not in part:
                return {key: convert(item) for key, item in part.items()}
            return {_KIND: "dict", "items": [[convert(key), convert(item)] for key, item in part.items()]}
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            if isinstance(part, StoredFile):
                files.append(part)
            fields = {field.name: convert(getattr(part, field.name)) for field in dataclasses.fields(part)}
            return {_KIND: type(part).__name__, "fields": fields}
        raise TypeError(f"{type(part).__name__} cannot be carried from step to step")

    return convert(value), tensors, files


def from_json(data: Any, tensors: Mapping[str, Tensor], classes: Iterable[type]) -> Any:
    """Inverse of `to_json`; classes: the dataclasses that may occur. Raises CheckpointError for anything else."""
    known = {cls.__name__: cls for cls in classes}

    def convert(part: Any) -> Any:
        if isinstance(part, list):
            return [convert(item) for item in part]
        if not isinstance(part, dict):
            return part
        kind = part.get(_KIND)
        if kind is None:
            return {key: convert(item) for key, item in part.items()}
        if kind == "tensor":
            return tensors[part["name"]]
        if kind == "tuple":
            return tuple(convert(item) for item in part["items"])
        if kind == "dict":
            return {convert(key): convert(item) for key, item in part["items"]}
        return known[kind](**{key: convert(item) for key, item in part["fields"].items()})

    try:
        return convert(data)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the saved state holds something that this version cannot read: {error!r}") from error
