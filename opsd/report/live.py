"""Serves the report of a run that goes on, at 127.0.0.1 only; a page is written anew when the run has written more."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from opsd.errors import CheckpointError, ConfigError
from opsd.evaluation.compare import Comparison
from opsd.evaluation.run_folder import CARD
from opsd.evaluation.summary import FOLDER
from opsd.health.log import FILE
from opsd.health.traces import FOLDER as TRACES
from opsd.report.build import report_of
from opsd.report.missing import Missing
from opsd.report.page import Table, render
from opsd.report.run import read_run

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")  # by which it may be asked: a page of another site must not read it through its own name


class LiveReport:
    """The report of a run, as new as its files.

    >>> report = LiveReport(Path("runs/first"))
    >>> report.page()[:15]
    '<!doctype html>'

    Args:
        folder: of the run.
        compared: (folder) -> its comparison with its controls, and the tables of that; None without controls.
    """

    def __init__(self, folder: Path, compared: Callable[[Path], tuple[Comparison, Sequence[Table]]] | None = None):
        self.folder, self._compared = folder, compared
        self.key = secrets.token_urlsafe(9)  # a part of the address: other users of the machine do not know it
        self._lock = Lock()
        self._version, self._page = "", ""

    @property
    def version(self) -> str:
        """Changes whenever the run writes."""
        stats = []
        for path in self._files():
            with contextlib.suppress(OSError):  # not yet there, or no longer: a run that goes on writes its files anew
                stats.append(path.stat())
        return f"{len(stats)}-{max((stat.st_mtime_ns for stat in stats), default=0)}-{sum(s.st_size for s in stats)}"

    def _files(self) -> Iterator[Path]:
        yield from (self.folder / CARD, self.folder / FILE)
        yield from (self.folder / FOLDER).glob("*.json")
        yield from (self.folder / TRACES).glob("steps-*.parquet")

    def page(self) -> str:
        """Return the page."""
        with self._lock:
            if self._version != (version := self.version):
                try:
                    page = self._made(version)
                except CheckpointError as error:  # it has not begun
                    return render("waiting.html", reason=str(error))
                self._version, self._page = version, page
            return self._page

    def _made(self, version: str) -> str:
        run = read_run(self.folder)
        if self._compared is None or not run.has_ended:
            why_not = "" if self._compared is None else "it is compared when it has ended."
            return report_of(run, why_not=why_not, live=version)
        lacks = Missing(run.missing)
        nothing: tuple[Comparison | None, Sequence[Table]] = None, ()
        comparison, tables = lacks.tried("the comparison", partial(self._compared, self.folder), nothing)
        why_not = "it could not be compared; what is missing is said below." if comparison is None else ""
        return report_of(replace(run, missing=lacks.found), comparison, tables, why_not=why_not, live=version)


def make_server(report: LiveReport, port: int) -> ThreadingHTTPServer:
    """Return a server that listens on 127.0.0.1; its `serve_forever` serves.

    Raises:
        ConfigError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Host", "").rpartition(":")[0] not in NAMES:
                self._send(HTTPStatus.FORBIDDEN, f"ask for {HOST}", "text/plain")
            elif self.path == f"/{report.key}/":
                self._send(HTTPStatus.OK, report.page(), "text/html")
            elif self.path == f"/{report.key}/version":
                self._send(HTTPStatus.OK, report.version, "text/plain")
            else:
                self._send(HTTPStatus.NOT_FOUND, "there is nothing here", "text/plain")

        def _send(self, status: HTTPStatus, text: str, kind: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing per request: the terminal shows the run."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise ConfigError(f"port {port} is not free ({error.strerror}). Choose another one with --port.") from error
