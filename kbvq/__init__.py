"""KBVQ-MoE: the experts of mixture-of-experts language models at 2-3 bits per weight.

`import kbvq` lets transformers load packed checkpoints.
"""

__version__ = "0.1.0"

from kbvq import hf
from kbvq.rq_moe import RQMoE

__all__ = ["RQMoE", "hf"]
