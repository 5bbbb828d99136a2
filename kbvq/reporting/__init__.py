"""What a run leaves for people to read: the report and the model card."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from kbvq.reporting.card import write_card
from kbvq.reporting.report import write_report

logger = logging.getLogger("kbvq")


def write_documents(folder: Path) -> list[Path]:
    """The model card and, where matplotlib is installed, the report of a packed checkpoint; returns their paths.

    Raises CheckpointError when the folder is no packed checkpoint.
    """
    written = [write_card(folder)]
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("no report.html: it needs matplotlib; pip install 'kbvq[report]', then kbvq report %s", folder)
    else:
        written.append(write_report(folder))
    return written
