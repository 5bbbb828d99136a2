"""A run as a row of stages that can be interrupted anywhere.

A stage is a number of steps. A step gets what the step before it carried on, and returns what the next one needs; in
between all of that is on the disk (WorkFolder.commit), so nothing else may pass from step to step. Given the same
carry a step must do the same, bit for bit: its random numbers come from the run's seed and its own index.

To add a pass (over the layers from last to first, say, or steps of tuning), write a function (index, carry) -> Step and
put a Stage into the row in `pipeline._stages`. The carry is a dictionary of plain data and tensors (storage.records; a
dataclass of its own is added to `pipeline.CARRIED`). Tensors too large for memory come from the work folder
(`WorkFolder.empty`), and what is written once and kept for later from `WorkFolder.store`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kbvq.quantization.progress import Part, Progress, peak_memory
from kbvq.storage.work_folder import METRICS, WorkFolder

Carry = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """What a step returns. carry: for the next one. text: for the log. metrics: for metrics.jsonl."""

    carry: Carry
    text: str = ""
    metrics: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """name: as shown, e.g. "measuring layer". seconds: estimated for one step."""

    name: str
    steps: int
    step: Callable[[int, Carry], Step]
    seconds: float = 1.0


def run_stages(stages: Sequence[Stage], work: WorkFolder, *, shown: bool = True) -> dict[str, list[float]]:
    """Run every step that the work folder does not have yet. Returns the seconds of all steps by stage, those of
    interrupted runs included."""
    steps = [(stage, index) for stage in stages for index in range(stage.steps)]
    seconds: dict[str, list[float]] = {stage.name: [] for stage in stages}
    for line in _metrics(work)[: work.done]:
        seconds[line["stage"]].append(line["seconds"])
    progress = Progress([Part(stage.name, stage.steps, stage.seconds) for stage in stages], seconds, shown=shown)
    carry = {} if work.carry is None else work.carry
    try:
        for stage, index in steps[work.done :]:
            progress.start(stage.name)
            started = time.process_time()
            step = stage.step(index, carry)
            taken = progress.finish(stage.name, step.text)
            seconds[stage.name].append(taken)
            line = {"stage": stage.name, "step": index, "steps": stage.steps, "seconds": taken}
            line |= {"cpu_seconds": time.process_time() - started, "peak_memory": peak_memory()}
            work.commit(step.carry, line | dict(step.metrics))
            carry = step.carry
    finally:
        progress.close()
    return seconds


def _metrics(work: WorkFolder) -> list[dict[str, Any]]:
    path = work.path / METRICS
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
