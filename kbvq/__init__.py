"""KBVQ-MoE: the experts of mixture-of-experts language models at 2-3 bits per weight.

`import kbvq` lets transformers load packed checkpoints.
"""

__version__ = "0.1.0"

from kbvq.codes.rq_moe import RQMoE
from kbvq.serving import hf

__all__ = ["RQMoE", "hf"]
