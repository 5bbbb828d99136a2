"""A packed checkpoint for people who just want to try it: model and tokenizer by one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from kbvq.errors import CheckpointError, ConfigError
from kbvq.storage.checkpoint import is_packed_checkpoint

if TYPE_CHECKING:  # importing them loads torch._dynamo and Triton
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


class Loaded(NamedTuple):
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(folder: str | Path, *, device: str | None = None, dtype: str | torch.dtype | None = None) -> Loaded:
    """(model, tokenizer) of a packed checkpoint, ready for `generate`.

    folder: a local folder, or a name of the hub, which is downloaded. device: "cpu", "cuda", "cuda:1", …, or "auto" for
    all GPUs together and what does not fit there on the CPU; None for cuda where there is one. dtype: of everything
    that is not packed; a torch dtype or a name of DTYPES, None for the one stored.

    Raises ConfigError for a device or dtype that cannot be, CheckpointError for a folder that is no packed checkpoint
    or is damaged, UnsupportedModelError for a model that the installed transformers does not know.
    """
    from transformers import AutoTokenizer  # of old versions they load Triton

    from kbvq.models.devices import choose_device
    from kbvq.models.layer_stream import auto_class, read_config

    if dtype is not None and dtype not in (*DTYPES, *DTYPES.values()):
        raise ConfigError(f"dtype {dtype} is not one of {', '.join(DTYPES)}")
    device_map = "auto" if device == "auto" else choose_device(device)
    path = _packed_folder(folder)
    try:
        if not any((path / name).is_file() for name in _VOCABULARIES):
            raise OSError(f"none of {', '.join(_VOCABULARIES)} is there")  # transformers would make an empty one
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} has no tokenizer that can be read ({error}); copy that of the original model there"
        ) from error
    model = auto_class(read_config(path)).from_pretrained(
        path, dtype="auto" if dtype is None else DTYPES.get(str(dtype), dtype), device_map=device_map
    )
    return Loaded(model.eval(), tokenizer)


def serve(arguments: Sequence[str]) -> None:
    """`transformers serve` with these arguments, in a process that has imported kbvq; returns when the server ends.

    The first may be a packed checkpoint, or its name on the hub: the one model that there is then, under that name.
    Without it, models are loaded as requests name them. Raises CheckpointError when it is none, ConfigError when
    packages are missing. Options that transformers does not know end in SystemExit, as there.
    """
    from transformers.cli.transformers import app

    command = ["serve", *arguments]
    if arguments and not arguments[0].startswith("-"):
        if "@" in arguments[0]:
            raise ConfigError(f"{arguments[0]}: transformers serve takes what follows @ for a revision; rename it")
        _packed_folder(arguments[0])
        parameters = app.commands["serve"].params
        if all(parameter.param_type_name == "option" for parameter in parameters):  # as in transformers 5.4
            command.insert(1, "--force-model")
    try:
        app(command, prog_name="kbvq")
    except ImportError as error:
        raise ConfigError(f"{error}, or pip install 'kbvq[serve]'") from error


def _packed_folder(folder: str | Path) -> Path:
    """A local folder, or that of a hub name after downloading it; raises CheckpointError when it is not packed."""
    from kbvq.models.layer_stream import resolve_model_folder

    path = resolve_model_folder(str(folder))
    if not is_packed_checkpoint(path):
        raise CheckpointError(
            f"{path} is not a packed checkpoint: config.json has no kbvq quantization_config. kbvq quantize makes one; "
            "an original model is loaded by transformers itself"
        )
    return path
