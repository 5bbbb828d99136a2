"""What the emulator finds wrong, each place once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .program import Instruction


class Faults:
    """Faults of a launch: (kind, instruction) -> what, where and in which thread first, and how many threads.

    Kinds: "out of bounds", "misaligned", "uninitialised memory", "uninitialised register", "race", "divergence".
    """

    def __init__(self) -> None:
        self.found: dict[tuple[str, str, str], list] = {}

    def add(self, kind: str, instruction: Instruction, wrong: np.ndarray, describe: Callable[[int], str]) -> None:
        """wrong: which threads (or lanes of an access); describe: the first of them, by its number."""
        places = np.flatnonzero(wrong)
        if not len(places):
            return
        entry = self.found.setdefault((kind, instruction.source, instruction.text), [describe(int(places[0])), 0])
        entry[1] += len(places)

    def kinds(self) -> set[str]:
        return {kind for kind, _, _ in self.found}

    def lines(self) -> list[str]:
        return [
            f"{kind} at {source}: {text}: {first} ({count} in all)"
            for (kind, source, text), (first, count) in self.found.items()
        ]
