"""`python tests/ranks_in_processes.py FOLDER 1 2 4`: a run on 1, 2 and 4 ranks, and one that loses a rank.

The processes are forked from this one, which saves importing torch in each. Prints JSON: how they ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a process that was forked has no threads to share work with

from quantizing import quantize, write_text
from tiny_models import save_tiny_model

from kbvq.errors import KbvqError
from kbvq.quantization import pipeline
from kbvq.recipes import make_recipe


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(
    folder: Path,
    name: str,
    count: int,
    lost_at: int | None = None,
    *,
    model: str = "model",
    bits: float = 3.5,
    **changes: object,
) -> list[int]:
    """Quantize on `count` ranks; exit status of each. lost_at: the layer at which SIGKILL ends the last rank. changes:
    of the recipe fast without matching."""
    port, children = str(free_port()), []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                place = {"WORLD_SIZE": str(count), "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ |= place
                if lost_at is not None and rank == count - 1:
                    lose_at(lost_at)
                recipe = make_recipe("fast", bits, **{"kmeans_iterations": 2, "matching": False} | changes)
                quantize(folder / model, folder / name, folder / "text.txt", recipe)
                status = 0
            except KbvqError as error:
                print(f"rank {rank}: {error}", file=sys.stderr)
                status = 2
            except BaseException:  # os._exit prints nothing of it
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def lose_at(layer: int) -> None:
    original = pipeline.Run.quantize

    def lose(self: pipeline.Run, index: int, carry: dict) -> object:
        if index == layer:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, index, carry)

    pipeline.Run.quantize = lose


def main() -> None:
    folder = Path(sys.argv[1])
    save_tiny_model(folder / "model", "mixtral")
    write_text(folder / "text.txt")
    pipeline.TOKENS_PER_BATCH = 128  # six batches, which the ranks share
    ended = {f"on-{count}": run(folder, f"on-{count}", count) for count in map(int, sys.argv[2:])}
    ended |= {f"matched-{count}": run(folder, f"matched-{count}", count, matching=True) for count in (1, 2)}
    save_tiny_model(folder / "tied", "qwen3_moe_tied")
    ended |= {f"tied-{n}": run(folder, f"tied-{n}", n, model="tied", bits=4, dense_bits=4) for n in (1, 2)}
    ended["lost"] = run(folder, "lost", 2, lost_at=1)
    kept = (folder / "lost.partial" / "state.json").exists()
    ended["resumed"] = run(folder, "lost", 4)
    print(json.dumps(ended | {"kept": kept}))


if __name__ == "__main__":
    main()
