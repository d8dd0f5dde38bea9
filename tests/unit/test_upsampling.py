"""Prompt upsampling: a local model, an OpenAI-compatible endpoint, and what either may do wrong."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import sora_engine as sora
from sora_engine.text.upsampling import (
    INSTRUCTION,
    EndpointUpsampler,
    LocalUpsampler,
    open_upsampler,
    upsample,
)


class Server:
    """An endpoint on the loopback that answers as told, and remembers what it was asked."""

    def __init__(self) -> None:
        self.status, self.body, self.headers = 200, b"", {}
        self.asked: list[tuple[str, dict, dict]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                body = json.loads(self.rfile.read(length))
                outer.asked.append((self.path, dict(self.headers), body))
                self.send_response(outer.status)
                for name, value in outer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(outer.body)))
                self.end_headers()
                self.wfile.write(outer.body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def says(self, content: object) -> None:
        self.body = json.dumps({"choices": [{"message": {"content": content}}]}).encode()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server():
    made = Server()
    yield made
    made.close()


def test_an_endpoint_is_asked_as_openai_is(server) -> None:
    server.says('  "A red circle\n glides to the right." ')
    upsampler = EndpointUpsampler(server.url + "/", model="tiny", api_key="secret")
    assert upsampler.expand("a red circle") == "A red circle glides to the right."
    ((path, headers, body),) = server.asked
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body["model"] == "tiny"
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert body["messages"][0]["content"] == INSTRUCTION
    assert body["messages"][1]["content"] == "a red circle"


def test_what_an_endpoint_does_wrong_is_named(server) -> None:
    upsampler = EndpointUpsampler(server.url, timeout_s=5)
    cases = [
        (500, b"", {}, "answered 500"),
        (302, b"", {"Location": "http://127.0.0.1:9/"}, "answered 302"),  # never followed
        (200, b"<html>", {}, "did not answer as an OpenAI chat completion"),
        (200, b'{"choices": []}', {}, "did not answer as"),
        (200, b'{"choices": [{"message": {"content": null}}]}', {}, "answered with no text"),
        (200, b" " * (1 << 20) + b"{}", {}, "more than 1048576 bytes"),
    ]
    for server.status, server.body, server.headers, words in cases:
        with pytest.raises(sora.UpsamplingError, match=words):
            upsampler.expand("a cat")
    server.close()
    with pytest.raises(sora.UpsamplingError, match="cannot be asked"):
        upsampler.expand("a cat")
    with pytest.raises(sora.UpsamplingError, match="no http or https address"):
        EndpointUpsampler("file:///etc/passwd")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny causal model that always answers `glides`, whatever it is asked."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "</s>", "glides", "red", "circle", "user", "system"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=8, n_positions=512, n_embd=8, n_layer=1, n_head=1)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[2] * 50)
    path = tmp_path_factory.mktemp("instruct")
    model.save_pretrained(path)
    fast.save_pretrained(path)
    return path


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.role }} {% endfor %}"])
def test_a_local_model_answers(folder, template) -> None:
    upsampler = LocalUpsampler(folder, max_new_tokens=3)
    upsampler._tokenizer.chat_template = template
    assert upsampler.expand("a red circle") == "glides glides glides"


def test_a_folder_that_is_none(tmp_path) -> None:
    with pytest.raises(sora.CheckpointError, match="no such folder"):
        open_upsampler(tmp_path / "none")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(sora.CheckpointError, match="not an instruct model"):
        open_upsampler(tmp_path)


def test_a_folder_has_no_other_models_name(folder) -> None:
    with pytest.raises(sora.UpsamplingError, match=r"model 'm' is a name at an address, and .* is"):
        open_upsampler(folder, model="m")


class Shouting:
    def expand(self, prompt: str) -> str:
        return prompt.upper()


def test_a_request_keeps_both_texts() -> None:
    request = upsample(sora.VideoRequest("a cat", seed=3), Shouting())
    assert (request.prompt, request.original_prompt, request.seed) == ("A CAT", "a cat", 3)
    shots = (sora.Shot("a cat", 5), sora.Shot("a dog", 4))
    request = upsample(sora.VideoRequest("a cat / a dog", shots=shots), Shouting())
    assert [shot.prompt for shot in request.shots] == ["A CAT", "A DOG"]
    assert request.prompt == "A CAT / A DOG"


def test_the_command_shows_and_stores_it(server, tmp_path, capsys) -> None:
    from sora_engine.cli import main
    from sora_engine.io.provenance import read_provenance

    server.says("a large red circle moves right on a white background")
    out = str(tmp_path / "a.png")
    arguments = ["image", "a circle", "--steps", "1", "--size", "64x64", "-o", out]
    assert main([*arguments, "--upsample", server.url]) == 0
    assert "prompt: a large red circle moves" in capsys.readouterr().out
    told = read_provenance(out)
    assert told.prompt == "a large red circle moves right on a white background"
    assert told.settings["original_prompt"] == "a circle"
    server.status = 503
    assert main([*arguments, "--upsample", server.url]) == 2
    assert "--upsample: " in capsys.readouterr().err
    assert main(arguments) == 0
    assert len(server.asked) == 2  # off unless asked for
