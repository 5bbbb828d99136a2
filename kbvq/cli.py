"""The command line: `kbvq quantize`, `chat`, `serve`, `eval`, `compare`, `report`, `lm-eval`, `inspect`, `verify`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

import kbvq
from kbvq.errors import ConfigError, KbvqError
from kbvq.models.calibration_text import DEFAULT_CALIBRATION
from kbvq.models.ranks import launched_index
from kbvq.quantization.pipeline import QuantizeOptions, dry_run, quantize_model
from kbvq.recipes import CODES, DENSE_BITS, MAX_BITS, MIN_BITS, RECIPE_NAMES, make_recipe, parse_change
from kbvq.reporting import write_documents
from kbvq.reporting.run_report import read_run
from kbvq.reporting.summary import summary_text
from kbvq.storage.checkpoint import inspect_checkpoint, verify_checkpoint
from kbvq.storage.work_folder import is_work_folder, verify_state, work_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 for an error that the message explains."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("kbvq").setLevel(logging.WARNING if options.quiet else logging.INFO)
    try:
        with logging_redirect_tqdm():
            options.run(options)
    except KbvqError as error:
        print(f"kbvq: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"kbvq: interrupted{_what_is_kept(options)}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kbvq", description="Compress the experts of mixture-of-experts models.")
    parser.add_argument("--version", action="version", version=f"kbvq {kbvq.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--quiet", action="store_true", help="report warnings and errors only")

    quantize = commands.add_parser("quantize", parents=[common], help="quantize the experts of a checkpoint")
    quantize.set_defaults(run=_quantize)
    quantize.add_argument("--model", required=True, help="local folder or hub name of the original model")
    quantize.add_argument("--output", required=True, type=Path, help="folder of the packed checkpoint")
    quantize.add_argument(
        "--calibration",
        default=DEFAULT_CALIBRATION,
        help=".txt, .jsonl, .json or .parquet file, a folder of them, or NAME[:CONFIG[:SPLIT[:COLUMN]]] on the hub "
        "(default: %(default)s)",
    )
    quantize.add_argument(
        "--bits",
        type=float,
        default=2,
        help=f"bits per expert weight with everything stored, any number from {MIN_BITS} to {MAX_BITS}; with --recipe "
        "paper or --no-budget: code bits, 1, 2, 3 or 4 (default: %(default)s)",
    )
    quantize.add_argument(
        "--dense-bits",
        type=int,
        choices=DENSE_BITS,
        default=16,
        help="bits per weight of attention, dense MLPs, embedding and head; 16 leaves them (default: %(default)s)",
    )
    quantize.add_argument("--recipe", default="default", help=f"{' or '.join(RECIPE_NAMES)} (default: %(default)s)")
    quantize.add_argument("--samples", type=int, default=128, help="calibration windows (default: %(default)s)")
    quantize.add_argument(
        "--sequence-length", type=int, help="tokens per window (default: the smaller of 2048 and the model's longest)"
    )
    quantize.add_argument("--seed", type=int, default=0, help="of the windows and the codebooks (default: %(default)s)")
    quantize.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    quantize.add_argument("--overwrite", action="store_true", help="replace a non-empty output folder")
    quantize.add_argument("--dry-run", action="store_true", help="print what the run will do and need, and do nothing")
    quantize.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="memory it may take, e.g. 24G: statistics go to the disk, and more is refused (default: what is free)",
    )
    quantize.add_argument(
        "--fresh", action="store_true", help="start anew where an interrupted run of this output could go on"
    )
    quantize.add_argument(
        "--idre",
        action=argparse.BooleanOptionalAction,
        help="shared low-rank basis (default: yes); under a budget its rank is chosen, 0 included",
    )
    quantize.add_argument("--no-klt", dest="klt", action="store_false", help="shared basis by plain SVD")
    quantize.add_argument("--no-bcos", dest="bcos", action="store_false", help="no output scale and bias correction")
    quantize.add_argument(
        "--no-budget", dest="budget", action="store_false", help="the same code bits for every projection"
    )
    quantize.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other field of the recipe (kbvq/recipes.py), for experiments, e.g. rank_divisor=64; may be repeated",
    )
    quantize.add_argument("--codebook", choices=tuple(CODES), help="code format (default: the recipe's)")
    quantize.add_argument(
        "--codebook-scope", choices=("expert", "bank"), help="a codebook for each expert, or one for all of a layer"
    )

    chat = commands.add_parser("chat", parents=[common], help="talk with a packed checkpoint")
    chat.set_defaults(run=_chat)
    chat.add_argument("folder", help="a packed checkpoint, or its name on the hub")
    chat.add_argument("--prompt", help="answer this and end; a text that comes through a pipe is answered so too")
    chat.add_argument("--max-new-tokens", type=int, default=256, help="of one answer (default: %(default)s)")
    chat.add_argument(
        "--temperature", type=float, default=0.7, help="0 takes the likeliest token always (default: %(default)s)"
    )
    chat.add_argument("--device", help="cpu, cuda, … or auto for all GPUs together (default: cuda where there is one)")
    chat.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the one stored)")

    serve = commands.add_parser(
        "serve", help="transformers serve, which loads packed checkpoints too", add_help=False, prefix_chars="\0"
    )
    serve.set_defaults(run=_serve, quiet=True)
    serve.add_argument("arguments", nargs=argparse.REMAINDER)

    evaluate = commands.add_parser("eval", parents=[common], help="perplexity, KL to a baseline and lm-eval tasks")
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("model", help="folder or hub name of the model to evaluate")
    evaluate.add_argument("--baseline", help="the original model, for differences")
    evaluate.add_argument("--suite", help="quick, paper, mmlu or all: texts and tasks that belong together")
    evaluate.add_argument(
        "--perplexity",
        metavar="TEXT",
        action="append",
        default=[],
        help="wikitext2, c4 or a UTF-8 file, for token perplexity, KL and top-1 agreement; may be repeated",
    )
    evaluate.add_argument("--tasks", default="", help="lm-eval tasks, separated by commas")
    evaluate.add_argument("--include-path", metavar="DIR", help="folder of local lm-eval tasks")
    evaluate.add_argument("--limit", type=int, help="items per task")
    evaluate.add_argument("--window", type=int, help="tokens per window (default: min(2048, the model's longest))")
    evaluate.add_argument("--batch-size", type=int, help="windows, or task requests, per forward")
    evaluate.add_argument("--device", help="cpu, cuda, … or auto (default: cuda where there is one)")
    evaluate.add_argument("--dtype", help="float32, bfloat16 or float16 (default: float32 on a CPU, else bfloat16)")
    evaluate.add_argument(
        "--generation",
        action="store_true",
        help="tokens/s, memory and continuations too (a suite measures them always)",
    )
    evaluate.add_argument(
        "--json", metavar="FILE", help="write the results there; an interrupted run goes on from FILE.partial"
    )
    evaluate.add_argument("--report", action="store_true", help="show the results in the model's report.html and card")

    harness = commands.add_parser(
        "lm-eval", help="lm-eval's own command line with the model kbvq", add_help=False, prefix_chars="\0"
    )
    harness.set_defaults(run=_harness, quiet=True)
    harness.add_argument("arguments", nargs=argparse.REMAINDER)

    compare = commands.add_parser("compare", parents=[common], help="checkpoints side by side: a table and a picture")
    compare.set_defaults(run=_compare)
    compare.add_argument("models", nargs="+", help="folders or hub names, ours or other tools'")
    compare.add_argument("--baseline", required=True, help="the original model")
    compare.add_argument("--perplexity", required=True, metavar="TEXT", help="wikitext2, c4 or a UTF-8 file")
    compare.add_argument("--output", required=True, type=Path, help="folder of the table, the picture and what is done")
    compare.add_argument("--window", type=int, help="tokens per window (default: min(2048, the model's longest))")
    compare.add_argument("--batch-size", type=int, help="windows per forward")
    compare.add_argument("--device", help="as of eval")
    compare.add_argument("--dtype", help="as of eval")

    report = commands.add_parser("report", parents=[common], help="write report.html and the model card anew")
    report.set_defaults(run=_report)
    report.add_argument("folder", type=Path, help="a packed checkpoint")

    inspect = commands.add_parser("inspect", parents=[common], help="bits and bytes of a packed checkpoint")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("folder", type=Path)
    inspect.add_argument("--json", action="store_true", help="print JSON")

    verify = commands.add_parser(
        "verify", parents=[common], help="check every file of a packed checkpoint, or of an interrupted run"
    )
    verify.set_defaults(run=_verify)
    verify.add_argument("folder", type=Path)
    return parser


def _quantize(options: argparse.Namespace) -> None:
    changes: dict[str, object] = {"dense_bits": options.dense_bits}
    changes |= {name: False for name in ("klt", "bcos", "budget") if not getattr(options, name)}
    for name in ("idre", "codebook", "codebook_scope"):
        if getattr(options, name) is not None:
            changes[name] = getattr(options, name)
    changes |= dict(map(parse_change, options.set))
    wanted = QuantizeOptions(
        model=options.model,
        output=options.output,
        calibration=options.calibration,
        recipe=make_recipe(options.recipe, options.bits, **changes),
        samples=options.samples,
        sequence_length=options.sequence_length,
        seed=options.seed,
        device=options.device,
        overwrite=options.overwrite,
        fresh=options.fresh,
        max_memory=_num_bytes(options.max_memory),
    )
    if options.dry_run:
        print("\n".join(dry_run(wanted).lines()))
        return
    quantize_model(wanted, kbvq_version=kbvq.__version__)
    if launched_index() == 0:  # of several processes of one run, one writes
        documents = write_documents(options.output)
        print(summary_text(read_run(options.output), options.output, documents, baseline=options.model))


def _num_bytes(text: str | None) -> int | None:
    """Bytes of a size such as "24G" or "800M", in powers of 1000."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9.]+)\s*([KMGT]?)B?", text, re.IGNORECASE)
    if found is None or found[1].count(".") > 1:
        raise ConfigError(f"--max-memory {text}: not a size; write a number of bytes, or one with K, M, G or T")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))


def _what_is_kept(options: argparse.Namespace) -> str:
    """Where an interrupted command goes on, if it does."""
    if options.run is not _quantize or not is_work_folder(work_folder(options.output)):
        return ""
    return f": what is finished is in {work_folder(options.output)}, and the same command goes on from there"


def _chat(options: argparse.Namespace) -> None:
    from kbvq.serving.chat import Chat, ChatOptions, typed_lines

    settings = ChatOptions(options.max_new_tokens, options.temperature)
    chat = Chat(*kbvq.load(options.folder, device=options.device, dtype=options.dtype), settings, sys.stdout)
    if options.prompt is not None:
        chat.answer_all([options.prompt])
    elif sys.stdin.isatty():
        manner = "Talk to it" if chat.has_template else "The model has no chat template: it goes on from what you type"
        print(f"{manner}. /exit or the end of the input ends.", file=sys.stderr)
        chat.answer_all(typed_lines())
    else:
        chat.answer_all([sys.stdin.read()])


def _serve(options: argparse.Namespace) -> None:
    from kbvq.serving.loading import serve

    serve(options.arguments)


def _evaluate(options: argparse.Namespace) -> None:
    from kbvq_eval.run import evaluate  # above this package: only this command needs it

    # oneDNN keeps compiled code for every number of tokens that an expert has had, 1024 of them unless told otherwise:
    # hundreds of MB, in bfloat16. It reads this at its first product.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    evaluate(
        options.model,
        baseline=options.baseline,
        suite=options.suite,
        perplexity=options.perplexity,
        tasks=[task for task in options.tasks.split(",") if task],
        include_path=options.include_path,
        limit=options.limit,
        window=options.window,
        batch_size=options.batch_size,
        generation=options.generation,
        device=options.device,
        dtype=options.dtype,
        json_path=options.json,
        report=options.report,
    )


def _compare(options: argparse.Namespace) -> None:
    from kbvq_eval.compare import compare

    compare(
        options.models,
        baseline=options.baseline,
        perplexity=options.perplexity,
        output=options.output,
        window=options.window,
        batch_size=options.batch_size,
        device=options.device,
        dtype=options.dtype,
    )


def _report(options: argparse.Namespace) -> None:
    for path in write_documents(options.folder):
        print(f"written   {path}")


def _harness(options: argparse.Namespace) -> None:
    from kbvq_eval.harness import main as lm_eval_main

    lm_eval_main(options.arguments)


def _inspect(options: argparse.Namespace) -> None:
    summary = inspect_checkpoint(options.folder)
    if options.json:
        print(json.dumps(summary, indent=2))
        return
    print(f"{'projection':48} {'codebook':>8} {'bits':>7} {'codes':>7} {'rank':>5} {'bytes':>14}")
    for bank in summary["banks"]:
        for projection in ("gate_up_proj", "down_proj"):
            row = bank[projection]
            print(
                f"{bank['path'] + '.' + projection:48} {row['codebook']:>8} {row['bits_per_weight']:7.3f} "
                f"{row['code_bits']:7.3f} {row['rank']:5} {row['bytes']:14,}"
            )
    for row in summary["dense"]:
        print(
            f"{row['path']:48} {row['weight']['codebook']:>8} {row['bits_per_weight']:7.3f} {row['code_bits']:7.3f} "
            f"{'':5} {row['bytes']:14,}"
        )
    print(
        f"experts: {summary['bits_per_weight']:.3f} bits per weight, {summary['code_bits']:.3f} in codes; "
        f"whole model: {summary['model_bits_per_weight']:.3f} bits per weight, {summary['model_bytes']:,} bytes"
    )


def _verify(options: argparse.Namespace) -> None:
    if is_work_folder(options.folder):
        state = verify_state(options.folder)
        print(f"{options.folder}: every file matches the state of the interrupted run, {state['done']} steps done")
        return
    verify_checkpoint(options.folder)
    print(f"{options.folder}: every file matches the manifest")
