import json

import datasets
import pyarrow
import pytest
import torch
from pyarrow import parquet
from tiny_models import VOCAB_SIZE, tiny_tokenizer
from transformers import AutoTokenizer

from kbvq.errors import CalibrationError
from kbvq.models.calibration_text import DEFAULT_CALIBRATION, calibration_windows, load_texts

DOCUMENTS = ["w2 w3\nw4", "w5\u2028w6", "w7 w8 w9"]


def write_jsonl(path, field="text", **others):
    lines = (json.dumps({field: text} | others, ensure_ascii=False) + "\n" for text in DOCUMENTS)
    path.write_text("".join(lines), encoding="utf-8")


def write_json(path, field="text", **others):
    path.write_text(json.dumps([{field: text} | others for text in DOCUMENTS]), encoding="utf-8")


def write_parquet(path, field="text", **others):
    columns = {name: [value] * len(DOCUMENTS) for name, value in others.items()}
    parquet.write_table(pyarrow.table({field: DOCUMENTS} | columns), path)


RECORD_FORMATS = pytest.mark.parametrize("suffix, write", [
    (".jsonl", write_jsonl), (".json", write_jsonl), (".json", write_json), (".parquet", write_parquet),
], ids=["jsonl", "json-lines", "json-list", "parquet"])  # fmt: skip


@RECORD_FORMATS
@pytest.mark.parametrize(
    "field, others", [("text", {"title": "a", "id": 3}), ("content", {"id": 3})], ids=["text", "only-string"]
)
def test_records(tmp_path, suffix, write, field, others):
    path = tmp_path / f"data{suffix}"
    write(path, field, **others)
    assert load_texts(str(path)) == DOCUMENTS


@RECORD_FORMATS
def test_ambiguous_records_name_their_fields(tmp_path, suffix, write):
    path = tmp_path / f"data{suffix}"
    write(path, "body", title="a", id=3)
    with pytest.raises(CalibrationError, match='data.*"text" among body, title, id'):
        load_texts(str(path))


def test_txt_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert load_texts(str(tmp_path / "a.txt")) == ["one\n\ntwo\n"]


def test_json_list_of_strings(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(DOCUMENTS), encoding="utf-8")
    assert load_texts(str(tmp_path / "a.json")) == DOCUMENTS


def test_folder_reads_every_format_in_order_of_names(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "b.txt").write_text("last", encoding="utf-8")
    (tmp_path / "inner" / "c.txt").write_text("deeper", encoding="utf-8")
    (tmp_path / "readme.md").write_text("not calibration text", encoding="utf-8")
    write_jsonl(tmp_path / "a.jsonl")
    assert load_texts(str(tmp_path)) == [*DOCUMENTS, "last", "deeper"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n ", "holds no text"),
        ("a.txt", b"\xff\xfe\x00", "a.txt cannot be read"),
        ("a.csv", b"text", r"\.csv is not one of \.txt"),
        ("a.jsonl", b'{"text": "w2"}\n{"text": \n', "a.jsonl, line 2"),
        ("a.jsonl", b"3\n", "a record is a int"),
        ("a.parquet", b"PAR1 but not really", "a.parquet cannot be read"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        load_texts(str(tmp_path / name))


def test_missing_file_and_empty_folder(tmp_path):
    with pytest.raises(CalibrationError, match="does not exist"):
        load_texts(str(tmp_path / "absent"))
    with pytest.raises(CalibrationError, match="absent.txt does not exist"):
        load_texts("absent.txt")
    with pytest.raises(CalibrationError, match="holds no .txt"):
        load_texts(str(tmp_path))


def test_hub_offline_says_how_to_pass_a_file():
    with pytest.raises(CalibrationError, match=r"allenai/c4.*pass a local \.txt.*--calibration"):
        load_texts(DEFAULT_CALIBRATION)


@pytest.mark.parametrize(
    "source, call, column",
    [
        ("owner/name:en:validation:body", ("owner/name", "en", "validation"), "body"),
        ("owner/name", ("owner/name", None, "train"), "text"),
        ("owner/name::test", ("owner/name", None, "test"), "text"),
    ],
)
def test_hub_specification_and_budget(monkeypatch, source, call, column):
    taken = []

    def records():
        for i in range(100):
            taken.append(i)
            yield {"url": "somewhere", column: f"{i:04d}"}

    def load_dataset(name, config, *, split, streaming):
        assert (name, config, split) == call and streaming
        return records()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_texts(source, max_characters=10) == ["0000", "0001", "0002"]
    assert taken == [0, 1, 2]


def test_hub_column_that_is_not_there_and_malformed_specification(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: iter([{"text": "a", "url": "b"}]))
    with pytest.raises(CalibrationError, match='"body" among text, url'):
        load_texts("owner/name:::body")
    with pytest.raises(CalibrationError, match="name\\[:config"):
        load_texts("owner/name:en:train:text:more")


def windows(texts, samples, sequence_length, seed=0, vocab_size=VOCAB_SIZE, tokenizer=None):
    return calibration_windows(
        texts,
        tokenizer or tiny_tokenizer(),
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        vocab_size=vocab_size,
    )


def test_documents_are_joined_by_the_end_of_text_token_and_cut():
    assert windows(["w2 w3 w4", "w5", "", "w6 w7 w8"], 3, 3).tolist() == [[2, 3, 4], [1, 5, 1], [6, 7, 8]]


def test_without_an_end_of_text_token_documents_follow_directly():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    assert windows(["w2 w3 w4", "w5", "w6"], 1, 5, tokenizer=tokenizer).tolist() == [[2, 3, 4, 5, 6]]


def test_more_documents_than_one_batch():
    texts = [f"w{2 + i % 100}" for i in range(2500)]
    flat = windows(texts, 2500, 2).flatten().tolist()
    assert flat == [token for i in range(2500) for token in (2 + i % 100, 1)]


def test_windows_are_drawn_by_seed_without_replacement_in_text_order():
    texts = [" ".join(f"w{i}" for i in range(2, 102))]  # 25 windows of 4 tokens, each named by its first token
    drawn = [windows(texts, 10, 4, seed)[:, 0].tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for firsts in drawn:
        assert firsts == sorted(set(firsts)) and len(firsts) == 10
        assert all(first % 4 == 2 for first in firsts)
    assert windows(texts, 10, 4).dtype == torch.int64


def test_too_little_text():
    with pytest.raises(CalibrationError, match=r"gives 2 windows of 3 tokens \(8 tokens\), not 4.*fewer --samples"):
        windows(["w2 w3 w4 w5 w6 w7 w8"], 4, 3)
    with pytest.raises(CalibrationError, match="no tokens"):
        windows(["", " "], 1, 3)


def test_tokenizer_of_another_model():
    with pytest.raises(CalibrationError, match="does not fit.*token 90 .*has 128.*the model has 64"):
        windows(["w2 w90 w5"], 1, 3, vocab_size=64)


def test_long_document_gives_no_warning(caplog, trained_model, data):
    """The bundled text, tokenized as one document of many times the model's length; the suite fails on warnings."""
    tokenizer = AutoTokenizer.from_pretrained(trained_model)
    texts = load_texts(str(data / "validation.txt"))
    tokens = windows(texts, 8, 256, vocab_size=2**20, tokenizer=tokenizer)
    assert tokens.shape == (8, 256)
    assert "longer than" not in caplog.text
    for decoded in tokenizer.batch_decode(tokens):
        assert decoded.strip("\ufffd") in texts[0]


def test_further_windows_follow_the_same_first_ones():
    texts = [" ".join(f"w{i // 100 + 2} w{i % 100 + 2}" for i in range(200))]  # 400 tokens, 25 windows, all different
    settings = {"samples": 5, "sequence_length": 16, "seed": 3, "vocab_size": VOCAB_SIZE}
    first = calibration_windows(texts, tiny_tokenizer(), **settings)
    more = calibration_windows(texts, tiny_tokenizer(), further=7, **settings)
    assert more.shape == (12, 16) and torch.equal(more[:5], first)
    assert len({tuple(window) for window in more.tolist()}) == 12
    assert len(calibration_windows(texts, tiny_tokenizer(), further=1000, **settings)) == 25
