"""The parts of an evaluation, each kept on disk once it is measured, so that an interrupted run goes on from there."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger("kbvq")


class FinishedParts:
    """A folder of JSON files, one for each part that is finished, under what it was measured with.

    A part is taken from the folder when its settings are the same to the letter, and measured anew otherwise.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str, settings: Mapping[str, Any], suffix: str = ".json") -> Path:
        """Where the part is kept: the name says which, the digest with what settings."""
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        readable = "".join(character if character.isalnum() or character in "-_." else "_" for character in name)
        return self.folder / f"{readable}-{digest}{suffix}"

    def has(self, name: str, settings: Mapping[str, Any]) -> bool:
        return self.path(name, settings).is_file()

    def get(self, name: str, settings: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `measure` returned for these settings, now or in a run before."""
        path = self.path(name, settings)
        if path.is_file():
            logger.info("%s: measured before, taken from %s", name, path)
            return json.loads(path.read_text(encoding="utf-8"))
        result = measure()
        written = path.with_suffix(".writing")
        written.write_text(json.dumps(result), encoding="utf-8")
        written.rename(path)
        return result

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def fingerprint(model: str) -> dict[str, Any]:
    """What tells one state of a local model from another: names, sizes and times of its files. Of a hub name, the
    name."""
    path = Path(model)
    if not path.exists():
        return {"name": model}
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    weights = [file for file in files if file.suffix in (".safetensors", ".json", ".bin", ".gguf", ".model")]
    return {
        "path": str(path.resolve()),
        # Not the record of evaluations: that would change with every one.
        "files": {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in weights if f.name != "kbvq_eval.json"},
    }
