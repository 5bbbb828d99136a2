"""Where a model runs, from the name that a person gave."""

from __future__ import annotations

import torch

from kbvq.errors import ConfigError


def choose_device(name: str | None) -> torch.device:
    """The device of that name; None for cuda where there is one, else the CPU.

    Raises ConfigError for a name that torch does not know and for a GPU that is not here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"device {name}: torch knows no such device; use cpu, cuda, cuda:1, …") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {name}: torch sees {torch.cuda.device_count() or 'no'} CUDA devices here; use one of them, or cpu"
        )
    return device
