"""A server on this machine that answers as servers of language models do, and fails as asked.

Its numbers are real: a tiny model of transformers, whose adapters are added to the weights here, by
numpy, from the file as PEFT defines it.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

SHAPES = ("vllm", "openai", "content", "texts")
"""Forms of answers: ids in place of texts; texts, at most 5; rows with ids; no numbers at all."""


def applied(
    base: Path,
    adapter: Path | None = None,
    scale: float = 1.0,
    without: Callable[[str], bool] | None = None,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The model with scale · alpha/rank · B A added to every weight but those of `without`."""
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32).eval()
    if adapter is not None:
        config = json.loads((adapter / "adapter_config.json").read_text())
        tensors = load_file(str(adapter / "adapter_model.safetensors"))
        weights = dict(model.named_parameters())
        for name, a in tensors.items():
            if ".lora_A." not in name:
                continue
            b = tensors[name.replace("lora_A", "lora_B")]
            key = name.removeprefix("base_model.model.").replace("lora_A.", "")
            if without is not None and without(key):
                continue
            rank = a.shape[0]
            delta = scale * config["lora_alpha"] / rank * (b @ a)
            weights[key].data += torch.from_numpy(delta.astype(np.float32))
    return model.to(dtype)


@dataclass
class LanguageServer:
    """What the server has, and what it was asked.

    Attributes:
        tokenizer: Of all models.
        models: Name → model.
        shape: One of SHAPES.
        fault: Called with the handler before an answer; True if it has answered.
        token: The token that is needed; any if empty.
        any_name: Unknown names are answered by the first model.
        asked: (method, path, headers, body), in order.
    """

    tokenizer: Any
    models: Mapping[str, nn.Module]
    shape: str = "vllm"
    fault: Callable[[BaseHTTPRequestHandler], bool] | None = None
    token: str = ""
    any_name: bool = False
    first_token: int | None = None
    asked: list[tuple[str, str, dict[str, str], Any]] = field(default_factory=list)
    url: str = ""

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """The status and the JSON of an answer."""
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": name} for name in self.models]}
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        return self._complete(body)

    def _complete(self, body: Any) -> tuple[int, Any]:
        name = body["model"]
        if name not in self.models and not self.any_name:
            return 404, {"error": {"message": f"The model `{name}` does not exist.", "code": 404}}
        model = self.models.get(name) or next(iter(self.models.values()))
        prompt, count = body["prompt"], body.get("logprobs")
        if self.shape in ("openai", "texts") and not isinstance(prompt, str):
            return 400, {"error": {"message": "prompt must be a string."}}
        if self.shape == "openai" and (count or 0) > 5:
            return 400, {"error": {"message": "logprobs must be at most 5"}}
        if self.shape in ("openai", "texts") and "return_tokens_as_token_ids" in body:
            return 422, {"detail": "Unexpected fields in the request"}
        tokens = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        if self.first_token is not None:
            tokens = [self.first_token, *tokens]
        new: list[int] = []
        first = np.zeros(0)
        for _ in range(body["max_tokens"]):
            with torch.no_grad():
                logits = model(torch.tensor([[*tokens, *new]])).logits[0, -1].double()
            if not new:
                first = logits.log_softmax(-1).numpy()
            new.append(int(logits.argmax()))
        choice: dict[str, Any] = {"index": 0, "text": self.tokenizer.decode(new)}
        choice["logprobs"] = self._logprobs(first, count, body)
        usage = {"prompt_tokens": len(tokens), "completion_tokens": len(new)}
        return 200, {"object": "text_completion", "choices": [choice], "usage": usage}

    def _logprobs(self, row: Any, count: int | None, body: Any) -> Any:
        if count is None or self.shape == "texts":
            return None
        top = [int(i) for i in np.argsort(-row)[:count]]
        if self.shape == "content":
            rows = [
                {"id": i, "token": self.tokenizer.decode([i]), "logprob": float(row[i])}
                for i in top
            ]
            return {"content": [{**rows[0], "top_logprobs": rows}]}
        named = [self.tokenizer.decode([i]) for i in top]
        if body.get("return_tokens_as_token_ids"):
            named = [f"token_id:{i}" for i in top]
        return {
            "tokens": named[:1],
            "token_logprobs": [float(row[top[0]])],
            "top_logprobs": [{n: float(row[i]) for n, i in zip(named, top, strict=True)}],
        }


@contextmanager
def serving(server: LanguageServer) -> Iterator[LanguageServer]:
    """A block in which it answers."""

    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            server.asked.append((self.command, self.path, dict(self.headers), body))
            if server.fault is not None and server.fault(self):
                return
            if server.token and self.headers.get("Authorization") != f"Bearer {server.token}":
                send(self, 401, b'{"error": "Unauthorized"}')
                return
            status, data = server.answer(self.path, body)
            send(self, status, json.dumps(data).encode())

        do_GET = do_POST = _reply

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    class Http(ThreadingHTTPServer):
        def handle_error(self, *args: object) -> None:
            """Say nothing of connections that a client has closed."""

    http = Http(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_port}"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def send(
    handler: BaseHTTPRequestHandler, status: int, data: bytes, kind: str = "application/json"
) -> None:
    """A whole answer."""
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


# Faults: each answers in place of the server.


def of_status(status: int, text: str = '{"error": {"message": "CUDA out of memory"}}') -> Any:
    """An error of the server's own."""

    def fault(handler: BaseHTTPRequestHandler) -> bool:
        send(handler, status, text.encode())
        return True

    return fault


def of_bytes(data: bytes, kind: str = "application/json") -> Any:
    """These bytes, as a success."""

    def fault(handler: BaseHTTPRequestHandler) -> bool:
        send(handler, 200, data, kind)
        return True

    return fault


def slow(handler: BaseHTTPRequestHandler) -> bool:
    """Nothing at all for a while."""
    time.sleep(3)
    return False


def dripping(handler: BaseHTTPRequestHandler) -> bool:
    """A byte now and then, sooner than a timeout between two bytes."""
    handler.send_response(200)
    handler.end_headers()
    try:
        for _ in range(60):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        pass
    return True


def dripping_headers(handler: BaseHTTPRequestHandler) -> bool:
    """The same before the answer begins."""
    try:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        for _ in range(60):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        pass
    return True


def endless(handler: BaseHTTPRequestHandler) -> bool:
    """An answer without an end."""
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b"[" * 65536)
    except OSError:
        pass
    return True


def cut_off(handler: BaseHTTPRequestHandler) -> bool:
    """The connection ends within the answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True
    return True


def closed(handler: BaseHTTPRequestHandler) -> bool:
    """The connection ends without an answer."""
    handler.close_connection = True
    return True


def to(address: str) -> Any:
    """A redirect."""

    def fault(handler: BaseHTTPRequestHandler) -> bool:
        handler.send_response(307)
        handler.send_header("Location", address)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    return fault


@cache
def words(base: Path) -> Any:
    """The tokenizer of a folder."""
    return AutoTokenizer.from_pretrained(str(base))


def group_of(name: str, layers: int) -> Callable[[str], bool]:
    """Whether a key is in a group such as "q, first half", or "q"."""
    role, _, part = name.partition(", ")
    parts = {"": range(layers), "first half": range(layers // 2)}
    numbers = parts.get(part, range(layers // 2, layers))

    def within(key: str) -> bool:
        layer = int(re.findall(r"layers\.(\d+)\.", key)[0])
        return f".{role}_proj." in key and layer in numbers

    return within
