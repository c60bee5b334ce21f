"""What all pages share: who asks, in which language, and how what went wrong is told.

Knows sessions and endpoints. Must not know of single pages.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
from starlette.types import ASGIApp

from adaptive_fusion.serving.web.client import Api, ApiError
from adaptive_fusion.serving.web.gate import COOKIE
from adaptive_fusion.serving.web.sessions import Session, Sessions
from adaptive_fusion.serving.web.texts import text


class Trouble(Exception):
    """What is told to who asked, in their language."""


@dataclass
class Web:
    """The surroundings of the pages in one language.

    Attributes:
        app: The server's application.
        sessions: Who is there.
        language: Of the texts.
    """

    app: ASGIApp
    sessions: Sessions
    language: str

    def say(self, key: str, **values: object) -> str:
        """A text in the language of the pages."""
        return text(key, self.language, **values)

    def session(self, request: gr.Request) -> Session:
        """Whose call it is; raises Trouble once it has ended."""
        session = self.sessions.get(dict(request.cookies).get(COOKIE))
        if session is None:
            raise Trouble(self.say("session_over"))
        return session

    def api(self, request: gr.Request) -> Api:
        """The endpoints with the key of who calls."""
        return Api(self.app, self.session(request).key)

    async def models(self, api: Api) -> list[str]:
        """The names of the models that there are; raises Trouble where there is none."""
        found = [str(row["id"]) for row in (await api.call("models")).get("data") or ()]
        if not found:
            raise Trouble(self.say("no_model"))
        return found

    async def model(self, api: Api, chosen: str = "") -> str:
        """The name of the model that is asked: the one that was chosen, else the first."""
        return chosen or (await self.models(api))[0]

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Turn what may go wrong with a request into Trouble."""
        try:
            yield
        except ApiError as error:
            raise Trouble(f"{self.say('failed')}: {error} ({error.code})") from error
        except FileNotFoundError:
            raise Trouble(self.say("file_gone")) from None


def ms(values: Mapping[str, Any] | None, name: str) -> str:
    """A time in milliseconds of predictions or measurements, in short."""
    found = None if values is None else values.get(name)
    return "–" if found is None else f"{found:,.0f} ms"
