"""Open the page to this machine alone, and keep every other site out of it."""

import os
import signal
import socket
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import gradio as gr
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rediffuse.data.decoding import MAX_FILE_BYTES
from rediffuse.errors import ConfigError
from rediffuse.processes import alone
from rediffuse.studio.desk import Desk
from rediffuse.studio.page import build
from rediffuse.words import say

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
    """Answer only those who came by our own name, and only our own page.

    Without it, any site that the user visits could send requests here: under a name of its own that
    leads to this machine (DNS rebinding), or blindly, from a form (CSRF).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on and send the policy with the answer."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        if scope["type"] != "http" or not is_ours(headers.get("host"), headers.get("origin")):
            refused = PlainTextResponse("this page is for its own machine alone", 403)
            return await refused(scope, receive, send)

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                held = MutableHeaders(scope=message)
                held["Content-Security-Policy"] = POLICY
                held["Referrer-Policy"] = "no-referrer"
                held["X-Content-Type-Options"] = "nosniff"
            await send(message)

        return await self.app(scope, receive, with_policy)


def is_ours(host: str | None, origin: str | None) -> bool:
    """Whether a request names this machine, and comes from our page or from no page at all."""
    name = (host or "").rpartition(":")[0] or host
    return name in _OUR_NAMES and origin in (None, f"http://{host}")


def launch(desk: Desk, port: int = 0, cache: Path | None = None) -> tuple[gr.Blocks, str]:
    """Serve the page from a thread; return it, to be closed, and its address.

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
        app_kwargs={"middleware": [Middleware(Guard)]},
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
    return page, address


def studio(desk: Desk, port: int, opens: bool) -> int:
    """Serve the page until Ctrl-C; return the exit code."""
    alone("studio")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with TemporaryDirectory(prefix="rediffuse-studio-") as cache:
        page, address = launch(desk, port, Path(cache))
        say(f"studio    {address}")
        say(f"runs      {desk.root}")
        say("Ctrl-C ends it")
        if opens:
            import webbrowser

            webbrowser.open(address)
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
