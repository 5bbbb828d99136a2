"""How far a run is and how long it will still take: one bar over all its steps, a line and a record for each."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

logger = logging.getLogger("kbvq")


@dataclass(frozen=True)
class Part:
    """A part of a run: so many steps that each take about so many seconds, as estimated beforehand."""

    name: str
    steps: int
    seconds: float


class Progress:
    """parts: of the run, in order. done: their steps that earlier runs finished, with the seconds that they took."""

    def __init__(self, parts: Sequence[Part], done: Mapping[str, Sequence[float]], *, shown: bool = True) -> None:
        self._parts = parts
        self._seconds = {part.name: list(done.get(part.name, ())) for part in parts}
        total = sum(part.steps for part in parts)
        finished = sum(map(len, self._seconds.values()))
        # disable=None: no bar where stderr is no terminal; the lines of the log are there in any case.
        self._bar = tqdm(total=total, initial=finished, unit="step", disable=None if shown else True)
        self._started = time.perf_counter()

    def start(self, part: str) -> None:
        self._bar.set_description(part)
        self._started = time.perf_counter()

    def finish(self, part: str, text: str) -> float:
        """A step is done; `text` says what came of it. Returns its seconds."""
        seconds = time.perf_counter() - self._started
        self._seconds[part].append(seconds)
        self._bar.update()
        left = self.seconds_left()
        self._bar.set_postfix_str(f"{format_seconds(left)} left")
        of = next(p.steps for p in self._parts if p.name == part)
        number = len(self._seconds[part])
        logger.info(
            "%s %d of %d: %s%s; about %s left",
            part,
            number,
            of,
            f"{text}; " if text else "",
            format_seconds(seconds),
            format_seconds(left),
        )
        return seconds

    def close(self) -> None:
        self._bar.close()

    def seconds_left(self) -> float:
        """The steps to come, each as long as those of its part were; parts to come as estimated, corrected by how
        the estimates of the others turned out."""
        expected = sum(len(self._seconds[part.name]) * part.seconds for part in self._parts)
        measured = sum(map(sum, self._seconds.values()))
        correction = measured / expected if expected else 1.0
        left = 0.0
        for part in self._parts:
            own = self._seconds[part.name]
            left += (part.steps - len(own)) * (sum(own) / len(own) if own else correction * part.seconds)
        return left


def format_seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes; 0 where the system does not tell."""
    if sys.platform != "linux":
        return 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    return 0
