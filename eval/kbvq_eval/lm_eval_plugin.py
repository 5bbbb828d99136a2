"""What makes `lm_eval --model kbvq` known: an entry point of the group `torch.backends`.

lm-eval reads no entry points. torch calls those of its group for out-of-tree backends at the end of `import torch`,
which lm-eval's command line does after `import lm_eval` and before it looks a model up. Then, and only then, a line of
text is put into lm-eval's registry; nothing of kbvq is imported until the name is looked up. A program that imports
torch before lm-eval says `import kbvq_eval.harness` itself. TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns this off.
"""

import contextlib
import sys


def register() -> None:
    """Name the model to an lm-eval that is being loaded. Never raises: an error here would be one of `import torch`."""
    if "lm_eval" in sys.modules:
        with contextlib.suppress(Exception):  # an lm-eval without this registry; `kbvq lm-eval` works with it
            from lm_eval.api.registry import model_registry

            model_registry.register("kbvq", target="kbvq_eval.harness:KbvqLM")
