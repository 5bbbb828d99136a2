"""KBVQ-MoE: the experts of mixture-of-experts language models at 2-3 bits per weight.

`import kbvq` lets transformers load packed checkpoints; `kbvq.load` does it in one call.
"""

__version__ = "0.1.0"

from kbvq.codes.rq_moe import RQMoE
from kbvq.serving import hf
from kbvq.serving.loading import load

__all__ = ["RQMoE", "hf", "load"]
