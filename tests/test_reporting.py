"""The report, the model card and the screen's summary of a packed checkpoint, against the files they are made from."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from quantizing import quantize
from tiny_models import save_tiny_model

from kbvq.cli import main
from kbvq.recipes import make_recipe
from kbvq.reporting import write_documents
from kbvq.reporting.run_report import EVALUATION, read_run
from kbvq.reporting.summary import summary_text
from kbvq.storage.checkpoint import inspect_checkpoint, read_headers, verify_checkpoint
from kbvq.storage.provenance import provenance, source

SECTIONS = (
    "sizes bits errors limit sensitivities spectrum tokens experts routers evaluation continuations timeline "
    "configuration"
).split()

EVALUATED = {
    "perplexity": {
        "held-out.txt": {
            "window": 32, "perplexity": 8.25, "baseline_perplexity": 8.0, "kl": 0.03125, "kl_stderr": 0.001,
            "agreement": 0.9375, "agreement_stderr": 0.002,
            "router_agreement": {"model.layers.0.mlp.experts": 0.75, "model.layers.1.mlp.experts": 0.5},
        }
    },
    "tasks": {
        "cloze": {
            "part_of": "cloze",
            "metrics": {
                "acc": {
                    "baseline": {"value": 0.5, "stderr": 0.1}, "model": {"value": 0.4375, "stderr": 0.1},
                    "difference": {"value": -0.0625, "stderr": 0.01},
                }
            },
        }
    },
    "means": {},
    "generation": {
        "model": {"continuations": [{"prompt": "w2 <b>", "continuation": "</section><script>alert(1)</script>"}]},
        "baseline": {"continuations": [{"prompt": "w2 <b>", "continuation": "w3 & w4"}]},
    },
}  # fmt: skip


class Page(HTMLParser):
    """What a test asks of a page: its elements with their attributes, that they nest, and its text."""

    VOID = {"meta", "link", "br", "img", "hr", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def packed(tmp_path_factory, text) -> Path:
    """Routed and shared experts, with a budget: everything that the record can have."""
    folder = tmp_path_factory.mktemp("reporting")
    save_tiny_model(folder / "model", "qwen2_moe")
    (folder / "model" / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n# text\nlicense: mit\n")
    recipe = make_recipe("fast", 3, kmeans_iterations=3)
    quantize(folder / "model", folder / "packed", text, recipe, samples=8)
    return folder / "packed"


@pytest.fixture
def copy(packed, tmp_path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "packed"))


def page(folder: Path) -> Page:
    write_documents(folder)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_report_is_one_file_that_reads_without_pictures(copy):
    (copy / EVALUATION).write_text(json.dumps(EVALUATED))
    report = page(copy)
    ids = [attributes["id"] for _, attributes in report.elements if "id" in attributes]
    assert len(ids) == len(set(ids)), "an identifier appears twice"
    assert [attributes["id"] for attributes in report.all("section")] == SECTIONS
    links = [attributes["href"] for attributes in report.all("a")]
    assert [f"#{section}" for section in SECTIONS] == links[1:] and links[0] == "#main"
    sources = [attributes.get(key) or "" for _, attributes in report.elements for key in ("src", "href", "xlink:href")]
    outside = [value for value in sources if "//" in value and not value.startswith("data:")]
    assert not outside, "something would be asked of a network"
    assert not report.all("script") and len(report.all("svg")) == 10
    pictures = [attributes for attributes in report.all("div") if attributes.get("role") == "img"]
    assert len(pictures) == 10 and all(len(attributes["aria-label"]) > 20 for attributes in pictures)
    assert len(report.all("caption")) == len(report.all("table"))
    assert all("scope" in attributes for attributes in report.all("th"))
    assert "Nothing to show" not in report.text
    for shown in ("8.2500", "0.0312 ± 0.0010", "-0.0625 ± 0.0100", "w3 & w4", "<script>alert(1)</script>"):
        assert shown in report.text
    assert (
        'lang="en"' in (copy / "report.html").read_text()
        and "prefers-color-scheme: dark" in (copy / "report.html").read_text()
    )


def test_report_shows_what_the_files_say(packed):
    run, inspected = read_run(packed), inspect_checkpoint(packed)
    record = json.loads((packed / "kbvq_run.json").read_text())
    assert run.size.after == sum(header.num_bytes for header in read_headers(packed).values())
    dense = run.size.after - inspected["bytes"]
    assert run.size.before == dense + 4 * inspected["weights"]  # the tiny model is stored in float32
    rows = {row.name: row for row in run.projections}
    assert len(rows) == 2 * len(inspected["banks"])
    for planned in record["budget"]["projections"]:
        row = rows[f"{planned['bank']}.{planned['projection']}"]
        assert row.predicted_kl == planned["predicted_divergence"][str(planned["code_bits"])]
    assert run.predicted_kl == pytest.approx(sum(row.predicted_kl for row in rows.values()))
    bank = record["layers"][0]["banks"][0]
    row = rows[f"{bank['path']}.down_proj"]
    assert row.error == bank["down_proj"]["relative_error"] and len(row.by_expert) == 8
    assert min(row.by_expert) < row.error < max(row.by_expert)
    assert run.banks[0].tokens == bank["tokens"]
    for step, following in zip(run.steps, run.steps[1:], strict=False):
        assert step.start + step.seconds == pytest.approx(following.start)


def test_what_was_not_recorded_is_said_and_stops_nothing(copy):
    for name in ("kbvq_run.json", "kbvq_timing.json", "kbvq_metrics.jsonl"):
        (copy / name).unlink(missing_ok=True)
    report = page(copy)
    assert [attributes["id"] for attributes in report.all("section")] == SECTIONS
    assert report.text.count("Nothing to show") == 11
    assert "not recorded" in (copy / "README.md").read_text()


def test_older_records_without_single_fields_are_shown_as_far_as_they_go(copy):
    record = json.loads((copy / "kbvq_run.json").read_text())
    del record["budget"], record["experts_with_few_tokens"], record["layers"][0]["output_error"]
    for bank in record["layers"][1]["banks"]:
        del bank["gate_up_proj"]["relative_error_by_expert"], bank["down_proj"]
    (copy / "kbvq_run.json").write_text(json.dumps(record))
    report = page(copy)
    assert "they are measured for a bit budget only" in report.text and "not recorded" in report.text
    assert read_run(copy).predicted_kl is None


def test_model_card_has_the_metadata_of_the_hub(copy):
    record = json.loads((copy / "kbvq_run.json").read_text())
    record["source"] = {"name": "example/original", "license": "other", "license_name": "its own: terms"}
    (copy / "kbvq_run.json").write_text(json.dumps(record))
    (copy / EVALUATION).write_text(json.dumps(EVALUATED))
    write_documents(copy)
    card = (copy / "README.md").read_text(encoding="utf-8")
    _, header, body = card.split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert metadata["base_model"] == "example/original" and metadata["base_model_relation"] == "quantized"
    assert metadata["license"] == "other" and metadata["license_name"] == "its own: terms"
    assert {"kbvq", "moe", "3-bit"} <= set(metadata["tags"])
    assert "| KL(original ‖ quantized), held-out.txt, windows of 32 |  |  | 0.0312 ± 0.0010 |" in body
    assert f"{inspect_checkpoint(copy)['bits_per_weight']:.3f} bits per weight" in body
    compile(body.split("```python\n")[1].split("```")[0], "card", "exec")


def test_documents_stay_outside_the_manifest_and_are_rebuilt(copy, capsys):
    write_documents(copy)
    first = (copy / "report.html").read_bytes()
    assert main(["report", str(copy)]) == 0
    assert (copy / "report.html").read_bytes() == first
    assert str(copy / "report.html") in capsys.readouterr().out
    verify_checkpoint(copy)
    assert main(["report", str(copy.parent)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_summary_ends_with_where_things_are_and_what_comes_next(packed):
    run = read_run(packed)
    text = summary_text(run, Path("out/x"), [Path("out/x/report.html")], baseline="original")
    assert "routed experts" in text and "shared experts" in text and "out/x/report.html" in text
    assert f"{run.summary['bits_per_weight']:.3f} bits per expert weight" in text
    assert f"KL of about {run.predicted_kl:.4f}" in text
    assert "kbvq eval out/x --baseline original" in text and "hf upload" in text


def test_provenance_names_the_source_and_its_licence(packed, tmp_path):
    original = packed.parent / "model"
    assert source(str(original), original) == {"name": None, "folder": "model", "license": "apache-2.0"}
    assert source("example/original", original)["name"] == "example/original"
    tokens = torch.arange(6).view(2, 3)
    found = provenance("example/original", original, tokens)
    assert found["environment"]["versions"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__
    assert found["environment"]["hardware"]["cores"] >= 1
    assert found["calibration_sha256"] != provenance("x/y", original, tokens + 1)["calibration_sha256"]
    record = json.loads((packed / "kbvq_run.json").read_text())
    assert record["source"]["license"] == "apache-2.0" and len(record["calibration_sha256"]) == 64
