"""One server, asked by HTTP: the only address that lora-fx contacts beside those of `hf:`.

A connection goes to the host and port of the URL and nowhere else: redirects are errors, and
proxies of the environment are not used. An answer has a limit in bytes and one in seconds. A token
comes from TOKEN alone and is sent to that host alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from lora_fx import __version__
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.strict_json import json_value
from lora_fx.text import Json, counted

TOKEN = "LORA_FX_SERVER_TOKEN"
"""The environment variable of the token. Other programs' variables are not read: OPENAI_API_KEY is
a secret between the user and one company, and the URL may be another's."""
MOST_BYTES = 1 << 20
"""The size in bytes of the longest answer that is read."""
SECONDS = 120.0
"""The seconds that an answer may take; a server may load the model first."""
_AT_ONCE = 1 << 16
_FORM = "pass --server http://HOST:PORT, or https://HOST"


@dataclass(frozen=True)
class HttpAnswer:
    """What a server answered.

    Attributes:
        status: The status of HTTP.
        data: The JSON; None if the answer was none.
        text: The beginning of the answer, in one line.
    """

    status: int
    data: Any
    text: str

    @property
    def is_html(self) -> bool:
        """Whether it is a page for a browser."""
        return self.text[:15].lower().startswith(("<!doctype", "<html"))

    @property
    def reason(self) -> str:
        """What the server says of an error."""
        data = self.data
        if isinstance(data, dict):
            for name in ("error", "detail", "message"):
                value = data.get(name)
                if isinstance(value, dict):
                    value = value.get("message", value)
                if value:
                    return one_line(value if isinstance(value, str) else json.dumps(value), 200)
        if self.is_html:
            return "a page for a browser"
        return one_line(self.text, 200) or "nothing"


class Server:
    """A server at one address.

    Attributes:
        url: Where its OpenAI-compatible paths begin: it ends in /v1.
    """

    def __init__(self, url: str, seconds: float = SECONDS) -> None:
        """Take the address apart; nothing is connected yet.

        Args:
            url: http or https; /v1 at its end may be left out.
            seconds: How long an answer may take.

        Raises:
            LoraFxError: It is no such address.
        """
        self._seconds = seconds
        try:
            parts = urlsplit(url)
            host = parts.hostname
            self._port = parts.port
        except ValueError as error:
            raise LoraFxError(f"{url}: not an address: {one_line(error)}", _FORM) from error
        if parts.scheme not in ("http", "https") or not host:
            raise LoraFxError(f"{url}: not an address of http or https", _FORM)
        if parts.username is not None or parts.password is not None:
            raise LoraFxError(
                f"{host}: the address holds a name or a password",
                f"set {TOKEN} to the server's token",
            )
        if parts.query or parts.fragment or not url.isprintable() or " " in url:
            raise LoraFxError(f"{url}: an address with other parts than host, port and path", _FORM)
        self._host = host
        self._is_encrypted = parts.scheme == "https"
        path = parts.path.rstrip("/")
        self._path = path if path.endswith("/v1") else f"{path}/v1"
        self.url = f"{parts.scheme}://{parts.netloc}{self._path}"

    @property
    def sends_token_openly(self) -> bool:
        """Whether a token goes to another machine without encryption."""
        is_here = self._host in ("localhost", "127.0.0.1", "::1")
        return bool(os.environ.get(TOKEN)) and not self._is_encrypted and not is_here

    def get(self, path: str) -> HttpAnswer:
        """Ask for a path below `url`."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: Json) -> HttpAnswer:
        """Send a JSON object to a path below `url`."""
        return self._ask("POST", path, json.dumps(body).encode())

    def _ask(self, method: str, path: str, body: bytes | None) -> HttpAnswer:
        """Send one request and read its answer.

        Raises:
            LoraFxError: No connection, a redirect, a token that is missing or wrong, or an answer
                that is too long or too late.
        """
        place = f"{self.url}{path}"
        connection = self._connection()
        headers = self._headers(body)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._explained(place))
            stack.enter_context(self._within_time(place, connection))
            connection.request(method, f"{self._path}{path}", body, headers)
            response = stack.enter_context(connection.getresponse())
            if 300 <= response.status < 400:
                target = response.getheader("Location") or "nowhere"
                raise LoraFxError(
                    f"{place}: redirects to {one_line(target, 120)}, which is not followed",
                    "pass the address that answers itself",
                )
            raw = b""
            while len(raw) <= MOST_BYTES:
                piece = response.read1(_AT_ONCE)
                if not piece:
                    break
                raw += piece
            is_cut_off = bool(response.length)  # the bytes that are still to come
        if is_cut_off and len(raw) <= MOST_BYTES:
            raise LoraFxError(f"{place}: the answer ends before its length", "try again")
        if len(raw) > MOST_BYTES:
            raise LoraFxError(
                f"{place}: the answer has more than {MOST_BYTES} bytes",
                "check that this is an OpenAI-compatible server",
            )
        return self._answer(place, response.status, raw)

    def _answer(self, place: str, status: int, raw: bytes) -> HttpAnswer:
        """Return an answer; one of success has to be JSON."""
        text = one_line(raw[:2000].decode("utf-8", "replace"), 1000)
        answer = HttpAnswer(status, None, text)
        try:
            answer = HttpAnswer(status, json_value(raw, place, constants=True), text)
        except LoraFxError as error:
            if status < 300:
                what = answer.reason if answer.is_html else "no JSON"
                raise LoraFxError(
                    f"{place}: the answer is {what}",
                    "check that this is an OpenAI-compatible server",
                ) from error
        if status in (401, 403):
            hint = f"set {TOKEN} to the server's token"
            if os.environ.get(TOKEN):
                hint = f"check the token in {TOKEN}"
            raise LoraFxError(f"{place}: {status}: {answer.reason}", hint)
        return answer

    def _connection(self) -> HTTPConnection:
        seconds = self._seconds
        if self._is_encrypted:
            context = ssl.create_default_context()
            return HTTPSConnection(self._host, self._port, timeout=seconds, context=context)
        return HTTPConnection(self._host, self._port, timeout=seconds)

    def _headers(self, body: bytes | None) -> dict[str, str]:
        headers = {"Accept": "application/json", "User-Agent": f"lora-fx/{__version__}"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        token = os.environ.get(TOKEN)
        if token:
            if not token.isascii() or not token.isprintable() or " " in token:
                raise LoraFxError(
                    f"{TOKEN} is no token: it has spaces, line breaks or other signs", "set it anew"
                )
            headers["Authorization"] = f"Bearer {token}"
        return headers

    @contextlib.contextmanager
    def _within_time(self, place: str, connection: HTTPConnection) -> Iterator[None]:
        """A block whose connection is cut after the limit, however slowly the bytes come.

        The timeout of a socket begins anew with every byte.

        Raises:
            LoraFxError: The limit was reached.
        """
        is_late = threading.Event()
        connection.connect()
        connected = connection.sock  # which the connection forgets before an answer is read

        def cut() -> None:
            is_late.set()
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(self._seconds, cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        except (OSError, HTTPException):
            if not is_late.is_set():
                raise
        finally:
            timer.cancel()
            connection.close()
        if is_late.is_set():
            raise self._too_late(place)

    def _too_late(self, place: str) -> LoraFxError:
        return LoraFxError(
            f"{place}: no whole answer within {counted(2, 'second', f'{self._seconds:g}')}",
            "try again when the server has loaded the model, or pass a larger --timeout",
        )

    @contextlib.contextmanager
    def _explained(self, place: str) -> Iterator[None]:
        """A block whose errors of the network become LoraFxErrors."""
        check = "check the address, and that the server runs"
        try:
            yield
        except TimeoutError as error:
            raise self._too_late(place) from error
        except ConnectionRefusedError as error:
            raise LoraFxError(f"{place}: connection refused", check) from error
        except socket.gaierror as error:
            raise LoraFxError(f"{place}: no such host: {self._host}", check) from error
        except ssl.SSLCertVerificationError as error:
            hint = "set SSL_CERT_FILE to the file of the server's certificate, if you trust it"
            raise LoraFxError(f"{place}: {one_line(error, 160)}", hint) from error
        except ssl.SSLError as error:
            hint = "pass http:// if the server does not encrypt"
            raise LoraFxError(f"{place}: {one_line(error, 160)}", hint) from error
        except (OSError, HTTPException) as error:
            why = one_line(error, 160) or type(error).__name__
            raise LoraFxError(f"{place}: {why}", check) from error
