"""Accuracy tasks of the lm-eval harness, on a model that is already loaded.

A task is lm-eval's own by name, or a YAML file below `include_path`, which then works without a network. A relative
`data_files` in such a file is taken from the file's folder (lm-eval takes it from the working directory).
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from kbvq.errors import ConfigError
from kbvq_eval.texts import missing_data

BOOTSTRAP_ITERATIONS = 1000
"""For metrics whose standard error lm-eval bootstraps; that of an accuracy is analytic."""


@dataclass(frozen=True)
class Metric:
    """One metric of one task.

    value, stderr: mean over the items and its standard error (None where lm-eval gives none, as for word_perplexity).
    per_item: the metric of each item in the order of the task, None where it is not a mean over items.
    """

    value: float
    stderr: float | None
    per_item: tuple[float, ...] | None


@dataclass(frozen=True)
class TaskResult:
    """Metrics of one task on `items` of `total`: "acc", "acc_norm", …, or "exact_match,strict-match" if filtered."""

    items: int | None
    total: int | None
    metrics: dict[str, Metric]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TaskResult:
        """Inverse of `dataclasses.asdict`, by way of JSON."""
        metrics = {
            name: Metric(m["value"], m["stderr"], None if m["per_item"] is None else tuple(m["per_item"]))
            for name, m in data["metrics"].items()
        }
        return cls(data["items"], data["total"], metrics)


@dataclass(frozen=True)
class TaskSelection:
    """Tasks whose data is there. loaded: by the name that was asked for, lm-eval's task and group objects (several
    for a tag). manager: lm-eval's."""

    loaded: dict[str, list[Any]]
    manager: Any

    def __iter__(self) -> Iterator[str]:
        return iter(self.loaded)

    def only(self, task: str) -> TaskSelection:
        return TaskSelection({task: self.loaded[task]}, self.manager)


def find_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> TaskSelection:
    """Look up tasks by name and load their data, before any model is loaded.

    Raises ConfigError for an unknown task, one whose data cannot be had, a missing include path, or when lm-eval is not
    installed.
    """
    try:
        import datasets
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"tasks need the package lm-eval ({error}); pip install 'kbvq[eval]'") from error
    # Else a server is told of each use of its loaders, that of local JSON files too.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    local = {} if include_path is None else local_tasks(include_path)
    # Indexing the built-in tasks takes seconds; local ones need none of them.
    manager = TaskManager(
        include_path=None if include_path is None else str(include_path),
        include_defaults=not set(tasks) <= local.keys(),
    )
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ConfigError(_unknown_task_message(unknown[0], include_path, local, manager.all_tasks))
    loaded = {}
    for task in dict.fromkeys(tasks):
        spec = _task_spec(local[task]) if task in local else task
        try:
            with quiet_harness():
                found = manager.load([spec])
        except (OSError, ValueError) as error:
            raise missing_data(f"the data of task {task}", error) from error
        loaded[task] = [found["groups"][task]] if task in found["groups"] else list(found["tasks"].values())
    return TaskSelection(loaded, manager)


def run_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] | TaskSelection,
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
) -> dict[str, TaskResult]:
    """Run lm-eval tasks; the keys of the result are their names and, for a group, its members' too.

    limit: the first so many items of each task. max_length: tokens, default the model's own. Raises as `find_tasks`.
    """
    selection = tasks if isinstance(tasks, TaskSelection) else find_tasks(tasks, include_path)
    import lm_eval

    from kbvq_eval.harness import KbvqLM

    with quiet_harness():
        output = lm_eval.simple_evaluate(
            model=KbvqLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length),
            tasks=[item for items in selection.loaded.values() for item in items],
            task_manager=selection.manager,
            limit=limit,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
        )
    counts, samples = output["n-samples"], output["samples"]
    return {
        task: TaskResult(
            counts.get(task, {}).get("effective"),
            counts.get(task, {}).get("original"),
            _metrics(values, samples.get(task, [])),
        )
        for task, values in output["results"].items()
    }


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """lm-eval logs errors alone, what it loads data with warnings too, and progress bars are drawn only on a
    terminal."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "httpx", "fsspec", "filelock")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR if logger.name == "lm_eval" else logging.WARNING)
    bars = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with bars:  # log handlers keep the stream that they were made with
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def local_tasks(include_path: str | Path) -> dict[str, Path]:
    """The tasks defined in the YAML files below `include_path`: name -> file."""
    folder = Path(include_path)
    if not folder.is_dir():
        raise ConfigError(f"include path {folder} is not a folder; pass the folder that holds the task YAML files")
    files = sorted(folder.rglob("*.yaml"))
    names = {file: _read_yaml(file).get("task") for file in files}
    return {name: file for file, name in names.items() if isinstance(name, str)}


class _Loader(yaml.SafeLoader):
    """YAML whose lm-eval tags (`!function module.name`) are read as text, never executed."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: f"!{suffix} {node.value}")


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        config = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    return config if isinstance(config, dict) else {}


def _task_spec(file: Path) -> str | dict[str, Any]:
    """What lm-eval is given for a local task: its name, or its config with `data_files` made absolute."""
    config = _read_yaml(file)
    data_files = config.get("dataset_kwargs", {}).get("data_files")
    if data_files is None:
        return config["task"]
    if "!function" in file.read_text(encoding="utf-8"):
        # lm-eval resolves functions only in a file that it reads itself, and then the paths are its own too.
        raise ConfigError(f"{file} has both data_files and !function; a local task can have only one of them")
    folder = file.resolve().parent

    def absolute(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: absolute(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [absolute(entry) for entry in value]
        return value if "://" in value else str(folder / value)

    return config | {"dataset_kwargs": config["dataset_kwargs"] | {"data_files": absolute(data_files)}}


def _unknown_task_message(task: str, include_path: str | Path | None, local: dict[str, Path], known: list[str]) -> str:
    message = f"unknown task {task!r}"
    close = difflib.get_close_matches(task, known, n=3)
    if close:
        message += f"; did you mean {', '.join(close)}?"
    if include_path is None:
        return message + " Pass --include-path for tasks of your own; `lm-eval ls tasks` lists the built-in ones"
    return message + f" {include_path} has: {', '.join(sorted(local)) or 'no task'}"


def _metrics(values: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Metric]:
    """lm-eval's flat "acc,none", "acc_stderr,none", … as Metrics, each with its standard error and per-item values."""
    metrics = {}
    for key, value in values.items():
        name, _, filtered = key.partition(",")
        if not filtered or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = values.get(f"{name}_stderr,{filtered}")
        metrics[name if filtered == "none" else key] = Metric(
            float(value),
            float(stderr) if isinstance(stderr, (int, float)) else None,
            _per_item(name, filtered, samples),
        )
    return metrics


def _per_item(name: str, filtered: str, samples: list[dict[str, Any]]) -> tuple[float, ...] | None:
    rows = sorted((row for row in samples if row.get("filter") == filtered), key=lambda row: row["doc_id"])
    if not rows or not all(isinstance(row.get(name), (bool, int, float)) for row in rows):
        return None
    return tuple(float(row[name]) for row in rows)
