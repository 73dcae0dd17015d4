"""Open the page to this machine alone, and keep every other site out of it."""

import hmac
import os
import secrets
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import gradio as gr
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rediffuse.data.decoding import MAX_FILE_BYTES
from rediffuse.errors import ConfigError
from rediffuse.processes import alone
from rediffuse.studio.desk import Desk
from rediffuse.studio.page import build
from rediffuse.tracking.jsonl import write_atomically
from rediffuse.words import say, tell_styled

HOST = "127.0.0.1"
_OUR_NAMES = (HOST, "localhost")

POLICY = "; ".join(
    (
        "default-src 'self'",
        # Gradio's page is made by inline scripts, and by functions that are made from text.
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""A browser loads nothing from elsewhere and tells nothing to anybody, whatever the page says."""


class Guard:
    """Answer only requests that have the token, name this machine, and come from our own page.

    Without the names, any site that the user visits could send requests here: under a name of its
    own that leads to this machine (DNS rebinding), or blindly, from a form (CSRF). Without the
    token, every user of this machine could. It comes in the address that is printed, as Jupyter's
    does, and then as a cookie that scripts cannot read and other sites cannot send.
    """

    def __init__(self, app: ASGIApp, token: str | None = None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on and send the policy with the answer."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if scope["type"] != "http" or not is_ours(headers.get("host"), headers.get("origin")):
            refused = PlainTextResponse("this page is for its own machine alone", 403)
            await refused(scope, receive, send)
            return
        request = HTTPConnection(scope)
        cookie = f"rediffuse-studio-{request.url.port}"  # all ports of a host share their cookies
        typed = self._is_token(request.query_params.get("token"))
        if not (typed or self._is_token(request.cookies.get(cookie)) or _is_start(request)):
            refused = PlainTextResponse(f"{_NO_TOKEN}\n", 401)
            await refused(scope, receive, send)
            return

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                held = MutableHeaders(scope=message)
                held["Content-Security-Policy"] = POLICY
                held["Referrer-Policy"] = "no-referrer"
                held["X-Content-Type-Options"] = "nosniff"
                if self.token and typed:
                    rules = "Path=/; HttpOnly; SameSite=Strict"
                    held.append("Set-Cookie", f"{cookie}={self.token}; {rules}")
            await send(message)

        with suppress(ClientDisconnect):  # it left while it was sending, and waits for no answer
            await self.app(scope, receive, with_policy)

    def _is_token(self, given: str | None) -> bool:
        if self.token is None:
            return True
        return hmac.compare_digest((given or "").encode(), self.token.encode())


_NO_TOKEN = "this page opens with the whole address that `rediffuse studio` printed, token included"


def _is_start(request: HTTPConnection) -> bool:
    """Whether it is the request that Gradio sends itself, once, when it starts; it says nothing."""
    return request.url.path == "/gradio_api/startup-events"


def is_ours(host: str | None, origin: str | None) -> bool:
    """Whether a request names this machine, and comes from our page or from no page at all."""
    name = (host or "").rpartition(":")[0] or host
    return name in _OUR_NAMES and origin in (None, f"http://{host}")


def launch(
    desk: Desk, port: int = 0, cache: Path | None = None, token: str | None = None
) -> tuple[gr.Blocks, str]:
    """Serve the page from a thread; return it, to be closed, and its address with the token.

    Without a `token`, whoever may open ports of this machine may use the page.

    Raises:
        ConfigError: if the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if cache:
        os.environ["GRADIO_TEMP_DIR"] = str(cache)
    page = build(desk)
    page.queue()
    _, address, _ = page.launch(
        server_name=HOST,
        server_port=_free(port),
        max_file_size=MAX_FILE_BYTES,
        app_kwargs={"middleware": [Middleware(Guard, token=token)]},
        css_paths=Path(__file__).with_name("style.css"),
        theme=_theme(),
        footer_links=[],
        share=False,
        ssr_mode=False,
        mcp_server=False,
        run_history=False,
        pwa=False,
        enable_monitoring=False,
        show_error=False,
        root_path="",
        inline=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    return page, f"{address}?token={token}" if token else address


def studio(desk: Desk, port: int, opens: bool, with_token: bool = True) -> int:
    """Serve the page until Ctrl-C; return the exit code."""
    alone("studio")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        TemporaryDirectory(prefix="rediffuse-studio-") as cache,
        TemporaryDirectory(prefix="rediffuse-studio-") as opened,
    ):
        page, address = launch(
            desk, port, Path(cache), secrets.token_urlsafe(24) if with_token else None
        )
        # The token is for whoever reads this terminal, so it is not masked as secrets are.
        tell_styled(f"studio    {address}", sys.stdout)
        say(f"runs      {desk.root}")
        say("Ctrl-C ends it")
        if opens:
            import webbrowser

            # Every user can read a browser's command line, so the address is in a file.
            page_file = Path(opened, "studio.html")
            link = f'<meta http-equiv="refresh" content="0;url={address}">'
            write_atomically(page_file, link.encode(), mode=0o600)
            webbrowser.open(page_file.as_uri())
        try:
            Event().wait()
        except KeyboardInterrupt:
            page.close(verbose=False)
    return 0


def _free(port: int) -> int:
    """The port asked for, or any that is free for 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as taken:
            raise ConfigError(
                f"--port {port} cannot be opened ({taken.strerror}); name another, or 0 for any"
            ) from None
        found: int = probe.getsockname()[1]
    return found


def _theme() -> Any:
    return gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "DejaVu Sans Mono", "monospace"),
    )
