"""Asking a vision model to describe pictures, through any endpoint that speaks the OpenAI chat protocol (vLLM, LMDeploy, ...).

What may pass (a timeout, a lost connection, status 429 or 5xx, an answer that is no answer) is asked again after a wait.
"""

from __future__ import annotations

import asyncio
import base64
import email.utils
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import aiohttp

from ..errors import AccVideoError

LONGEST_WAIT = 300.0
_PASSING = frozenset({408, 409, 425, 429})  # and all from 500 on
_HOPELESS: Mapping[int, str] = {
    401: "set the key in the environment variable that --key-from names",
    403: "set a key that may use this model in the environment variable that --key-from names",
    404: "give the address up to /v1, and a model it serves as --model",
}


class VisionError(AccVideoError):
    """The vision model did not describe something: that one is left out."""


class EndpointError(AccVideoError):
    """The endpoint cannot be used at all."""


class _Passing(Exception):
    """Worth asking again, after `wait` seconds if the endpoint named a time."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Asking:
    """How to ask. timeout: seconds an answer may take. tries: in all. wait: seconds before the second try, then twice as long
    each time (the endpoint's Retry-After goes before). max_tokens: longest answer."""

    instruction: str
    max_tokens: int = 512
    timeout: float = 120.0
    tries: int = 6
    wait: float = 1.0


class VisionClient:
    """`async with VisionClient(url) as vision: text = await vision.describe(pictures)`.

    url    up to and with /v1
    model  a name the endpoint serves; "" for the only one it lists
    key    sent as bearer token, if any
    """

    def __init__(self, url: str, asking: Asking, model: str = "", key: str = "") -> None:
        self.url, self.model, self._asking = url.rstrip("/"), model, asking
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> VisionClient:
        """Raises EndpointError if nobody answers, or the model to use is not clear."""
        timeout = aiohttp.ClientTimeout(total=self._asking.timeout)
        many = aiohttp.TCPConnector(limit=0)  # how many ask at once is the caller's to say; by itself it lets 100
        self._session = aiohttp.ClientSession(connector=many, timeout=timeout, headers=self._headers)
        try:
            self.model = self.model or await self._only_model()
        except BaseException:
            await self._session.close()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._session is not None:
            await self._session.close()

    async def describe(self, pictures: Sequence[bytes]) -> str:
        """The model's description of JPEG files, which are frames of one video in order; one line, never empty.

        Raises VisionError once all tries have failed or the endpoint refuses this one, EndpointError where it refuses all.
        """
        content: list[dict[str, Any]] = []
        for i, picture in enumerate(pictures, 1):
            address = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
            content += [{"type": "text", "text": f"Frame{i}: "}, {"type": "image_url", "image_url": {"url": address}}]
        content.append({"type": "text", "text": self._asking.instruction})
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._asking.max_tokens,
            "temperature": 0.0,
        }
        for attempt in range(self._asking.tries):
            try:
                return _text_of(await self._request("POST", "/chat/completions", body))
            except _Passing as error:
                reason = error
            if attempt + 1 < self._asking.tries:
                # Spread, so that many who were sent away at once do not come back at once.
                own = self._asking.wait * 2**attempt * random.uniform(1.0, 1.5)
                await asyncio.sleep(min(LONGEST_WAIT, max(own, reason.wait)))
        raise VisionError(f"{reason}, {self._asking.tries} times")

    async def _only_model(self) -> str:
        try:
            answer = await self._request("GET", "/models")
            names = [str(entry["id"]) for entry in answer["data"]]
        except (_Passing, VisionError, KeyError, TypeError) as error:
            raise EndpointError(
                f"{self.url}/models cannot be used ({error}); start the model there, or give its address up to /v1, and --model"
            ) from error
        if len(names) != 1:
            raise EndpointError(f"{self.url} serves {', '.join(names) or 'no model'}; choose one with --model")
        return names[0]

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        assert self._session is not None, "use VisionClient as an async context manager"
        try:
            async with self._session.request(method, self.url + path, json=body) as response:
                said = " ".join((await response.text(errors="replace"))[:300].split())
                if response.status in _PASSING or response.status >= 500:
                    raise _Passing(f"status {response.status} ({said})", _retry_after(response))
                if response.status in _HOPELESS:
                    cure = _HOPELESS[response.status]
                    raise EndpointError(f"{self.url}{path} answered with status {response.status} ({said}); {cure}")
                if response.status != 200:
                    raise VisionError(f"refused with status {response.status} ({said})")
                try:
                    return await response.json(content_type=None)
                except ValueError as error:
                    raise _Passing(f"an answer that is no JSON ({said[:80]!r})") from error
        except asyncio.TimeoutError as error:
            raise _Passing(f"no answer within {self._asking.timeout:g} s") from error
        except aiohttp.InvalidURL as error:
            raise EndpointError(f"{self.url!r} is no address; give one like http://127.0.0.1:8000/v1") from error
        except (aiohttp.ClientError, OSError) as error:
            raise _Passing(f"no connection ({error or type(error).__name__})") from error


def _text_of(answer: Any) -> str:
    """The description in an answer. VisionError for one that was cut off, which asking again would not change."""
    try:
        choice = answer["choices"][0]
        text, ended = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _Passing(f"an answer without a message ({str(answer)[:80]})") from error
    if not isinstance(text, str) or not text.strip():
        raise _Passing(f"an empty message ({text!r})")
    if ended == "length":
        raise VisionError("the description was cut off; raise --max-tokens")
    return " ".join(text.split())


def _retry_after(response: aiohttp.ClientResponse) -> float:
    """Seconds to wait: the header holds them, or a date."""
    value = response.headers.get("Retry-After", "").strip()
    if value.replace(".", "", 1).isdigit():
        return float(value)
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0
