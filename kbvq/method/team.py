"""Who shares the experts of a projection: one process, or several that each code a run of them.

What an expert's share of the work gives is written into tensors of zeros for all experts, and summed: exact, since all
other terms are zeros. `models.ranks.Ranks` is such a team.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class Team(Protocol):
    """The processes that quantize one projection together; all make the same calls."""

    def share(self, total: int) -> range:
        """Which of so many experts are this process's, a run of neighbours, maybe none."""

    def sum_(self, *tensors: Tensor) -> None:
        """Add these tensors up over all processes, in place."""


class Alone:
    """A team of one."""

    def share(self, total: int) -> range:
        return range(total)

    def sum_(self, *tensors: Tensor) -> None:
        pass


ALONE = Alone()


def sum_fields_(team: Team, *gathered: DataclassInstance) -> None:
    """Add up dataclasses of nothing but sums over all processes, in place."""
    for sums in gathered:
        team.sum_(*(getattr(sums, field.name) for field in dataclasses.fields(sums)))


def gather(team: Team, own: Tensor, total: int) -> Tensor:
    """[own experts, …] of each process -> [total, …] of all of them."""
    share = team.share(total)
    if len(share) == total:
        return own
    everyone = own.new_zeros(total, *own.shape[1:])
    everyone[share.start : share.stop] = own
    team.sum_(everyone)
    return everyone
