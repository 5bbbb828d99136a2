"""`kbvq.load` and `kbvq chat` on a tiny packed model, against transformers' own loading and generate."""

import io
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec

import pytest
import torch
from packed_banks import random_bank, write_packed
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import kbvq
from kbvq.cli import main
from kbvq.errors import CheckpointError, ConfigError
from kbvq.models.moe_adapters import find_expert_banks
from kbvq.serving.chat import Chat, ChatOptions, typed_lines

SERVER = ("fastapi", "openai", "pydantic", "uvicorn")
GREEDY = ["--max-new-tokens", "6", "--temperature", "0"]
TEMPLATE = (
    "{% for message in messages %}{{ 'w5 ' if message.role == 'user' else 'w6 ' }}{{ message.content }} {% endfor %}w7"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("loading")
    model = save_tiny_model(root / "source", "qwen3_moe", dtype=torch.bfloat16)
    banks = [
        random_bank(bank.path, bank.kind, bank.num_experts, bank.hidden_size, bank.intermediate_size, seed=seed)
        for seed, bank in enumerate(find_expert_banks(model))
    ]
    write_packed(root / "source", root / "packed", model, banks)
    return root / "packed"


@pytest.fixture
def with_template(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "packed")
    (tmp_path / "packed" / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path / "packed"


def continuation(folder, prompt, **options):
    """What transformers generates, from a prompt as the model sees it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    tokens = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("dtype", [None, "float32", torch.float16])
def test_load_gives_what_from_pretrained_gives(folder, dtype):
    model, tokenizer = kbvq.load(folder, device="cpu", dtype=dtype)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.bfloat16)
    prompt = tokenizer("w3 w4 w9", return_tensors="pt")["input_ids"]
    assert prompt.tolist() == [[3, 4, 9]] and not model.training
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, expected(prompt).logits)
    assert model.dtype == expected.dtype


def test_what_cannot_be_loaded_is_named(folder, tmp_path):
    for options, message in (
        ({"device": "tpu9"}, "device tpu9: torch knows no such device"),
        ({"device": "cuda:77"}, r"device cuda:77: torch sees \w+ CUDA devices"),
        ({"dtype": "int8"}, "dtype int8 is not one of float32"),
    ):
        with pytest.raises(ConfigError, match=message):
            kbvq.load(folder, **options)
    with pytest.raises(CheckpointError, match="neither a folder nor a model name"):
        kbvq.load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="source is not a packed checkpoint.*kbvq quantize makes one"):
        kbvq.load(folder.parent / "source")
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    (tmp_path / "bare" / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="bare has no tokenizer that can be read"):
        kbvq.load(tmp_path / "bare")


def test_a_prompt_is_continued_where_there_is_no_template(folder, capsys):
    assert main(["chat", str(folder), "--prompt", "w3 w4 w9", "--device", "cpu", *GREEDY]) == 0
    assert capsys.readouterr().out == continuation(folder, "w3 w4 w9") + "\n"


def test_a_pipe_is_one_prompt(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("w3 w4\nw9\n"))
    assert main(["chat", str(folder), "--device", "cpu", *GREEDY]) == 0
    assert capsys.readouterr().out == continuation(folder, "w3 w4 w9") + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert main(["chat", str(folder), "--device", "cpu", *GREEDY]) == 0
    assert capsys.readouterr().out == ""


def test_with_a_template_the_model_sees_the_whole_conversation(with_template, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("w3 w4\n\nw9\n/exit\nw10\n"))
    assert main(["chat", str(with_template), "--device", "cpu", *GREEDY]) == 0
    first = continuation(with_template, "w5 w3 w4 w7")
    second = continuation(with_template, f"w5 w3 w4 w6 {first} w5 w9 w7")
    assert first and second
    out, err = capsys.readouterr()
    assert out == f"> {first}\n> > {second}\n> "
    assert "Talk to it. /exit" in err


def test_sampling_draws_and_the_end_of_the_input_ends(folder, capsys, monkeypatch):
    model, tokenizer = kbvq.load(folder, device="cpu")
    chat = Chat(model, tokenizer, ChatOptions(max_new_tokens=8, temperature=2.0), sys.stdout)
    torch.manual_seed(0)
    said = [chat.answer("w3 w4 w9") for _ in range(3)]
    assert len(set(said)) == 3
    monkeypatch.setattr(sys, "stdin", io.StringIO("w3"))
    assert list(typed_lines()) == ["w3"]


def test_too_long_conversations_and_odd_options_are_refused(folder, capsys):
    longest = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    too_long = " ".join(["w3"] * longest)
    assert main(["chat", str(folder), "--prompt", too_long, "--device", "cpu"]) == 2
    assert f"the conversation has {longest} tokens and the model takes {longest}" in capsys.readouterr().err
    for option in (["--max-new-tokens", "0"], ["--temperature", "-1"]):
        assert main(["chat", str(folder), "--prompt", "w3", *option]) == 2
        assert f"{option[0]} {option[1]}" in capsys.readouterr().err


def test_the_last_answer_is_cut_where_the_model_ends(folder):
    model, tokenizer = kbvq.load(folder, device="cpu")
    model.config.max_position_embeddings = 10
    model.generation_config.eos_token_id = None
    chat = Chat(model, tokenizer, ChatOptions(max_new_tokens=20, temperature=0), io.StringIO())
    assert len(tokenizer(chat.answer("w3 w4 w9"))["input_ids"]) <= 7


@pytest.mark.skipif(not all(map(find_spec, SERVER)), reason="the packages of kbvq[serve] are not installed")
def test_the_server_answers_a_completion_as_generate_does(folder, tmp_path):
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    log = tmp_path / "log"
    run = "import sys; from kbvq.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", run, "serve", str(folder), "--port", str(port), "--device", "cpu"]
    with log.open("wb") as stream:
        server = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:

        def ask(path, **body):
            request = urllib.request.Request(f"http://localhost:{port}{path}", json.dumps(body).encode())
            request.add_header("Content-Type", "application/json")
            with urllib.request.urlopen(request if body else request.full_url, timeout=120) as answer:
                return json.load(answer)

        for _ in range(600):
            try:
                ask("/health")
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                time.sleep(0.2)
        completion = {"prompt": "w3 w4 w9", "temperature": 0, "max_tokens": 6}
        (choice,) = ask("/v1/completions", model=str(folder), **completion)["choices"]
        assert choice["text"] == continuation(folder, "w3 w4 w9")
        with pytest.raises(urllib.error.HTTPError, match="400"):
            ask("/v1/completions", model="another", **completion)
    finally:
        server.terminate()
        server.wait(60)


def test_what_cannot_be_served_is_named(folder, tmp_path, capsys, monkeypatch):
    assert main(["serve", str(folder.parent / "source"), "--port", "1"]) == 2
    assert "source is not a packed checkpoint" in capsys.readouterr().err
    shutil.copytree(folder, tmp_path / "a@b")
    assert main(["serve", str(tmp_path / "a@b")]) == 2
    assert "a@b: transformers serve takes what follows @ for a revision" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["serve", str(folder), "--no-such-option"])


@pytest.mark.skipif(all(map(find_spec, SERVER)), reason="the packages of kbvq[serve] are installed")
def test_missing_packages_of_the_server_are_named(folder, capsys):
    assert main(["serve", str(folder)]) == 2
    assert "pip install 'kbvq[serve]'" in capsys.readouterr().err
