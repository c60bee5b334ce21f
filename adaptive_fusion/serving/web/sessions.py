"""Who looks at the pages: a browser session with its key and the files that it brought.

A session is named by a random cookie that ends with the browser; its key lives in this process's memory alone, its
files in a folder of its own that goes with it. Knows files and clocks. Must not know of HTTP, Gradio or endpoints.
"""

import atexit
import secrets
import shutil
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

IDLE_S = 3600.0
"""How long a session that asks for nothing is kept."""
MOST = 256
"""Sessions that there may be at a time; the one that was idle longest makes room."""
MOST_TABS = 64
"""Names of pages that are kept of one session."""
MOST_FILE_BYTES = 256 << 20
"""Of the files of one session; the oldest make room."""


@dataclass
class Session:
    """One browser.

    Attributes:
        token: Its cookie.
        key: The bearer token that it gave; None where none is needed.
        files: Paths of what it uploaded, with their sizes, oldest first.
        tabs: Names of its pages that are open, as Gradio has them.
        used_s: When it last asked for something.
    """

    token: str
    key: str | None
    folder: Path
    files: "OrderedDict[str, int]" = field(default_factory=OrderedDict)
    tabs: "OrderedDict[str, None]" = field(default_factory=OrderedDict)
    used_s: float = 0.0

    def new_file(self, name: str) -> Path:
        """Where a file called `name` is to be written: its last part alone is kept, in a folder of its own."""
        folder = self.folder / secrets.token_hex(8)
        folder.mkdir(parents=True)
        plain = "".join(c if c.isalnum() or c in "-_. " else "_" for c in Path(name).name)[-80:].strip(". ")
        return folder / (plain or "file")

    def add(self, path: Path) -> None:
        """Keep a file that was written."""
        self.files[str(path)] = path.stat().st_size
        while sum(self.files.values()) > MOST_FILE_BYTES and len(self.files) > 1:
            oldest, _ = self.files.popitem(last=False)
            shutil.rmtree(Path(oldest).parent, ignore_errors=True)

    def close(self) -> None:
        """Delete its files."""
        self.files.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


class Sessions:
    """All of them; used on the event loop alone.

    Args:
        folder: Below which files are kept; None makes one that ends with the process.
        clock: Seconds, monotonic.
    """

    def __init__(self, folder: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="adaptive-fusion-ui-")).resolve()
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        self.folder, self._clock = folder, clock
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def new(self, key: str | None) -> Session:
        """A session of a browser that has none."""
        self._forget_idle()
        token = secrets.token_urlsafe(24)
        session = Session(token, key, self.folder / secrets.token_hex(8), used_s=self._clock())
        self._sessions[token] = session
        while len(self._sessions) > MOST:
            _, oldest = self._sessions.popitem(last=False)
            oldest.close()
        return session

    def get(self, token: str | None) -> Session | None:
        """The session of that cookie, which counts as used; None where there is none (any more)."""
        self._forget_idle()
        session = self._sessions.get(token or "")
        if session is not None:
            session.used_s = self._clock()
            self._sessions.move_to_end(session.token)
        return session

    def claim(self, tab: str, session: Session) -> bool:
        """Whether the page named `tab` is this session's; nobody's becomes its."""
        owner = next((each for each in self._sessions.values() if tab in each.tabs), session)
        if owner is session:
            session.tabs[tab] = None
            while len(session.tabs) > MOST_TABS:
                session.tabs.popitem(last=False)
        return owner is session

    def end(self, session: Session) -> None:
        """Forget a session, its key and its files."""
        self._sessions.pop(session.token, None)
        session.close()

    def close(self) -> None:
        """Forget all."""
        for session in list(self._sessions.values()):
            self.end(session)

    def _forget_idle(self) -> None:
        now = self._clock()
        while self._sessions:
            oldest = next(iter(self._sessions.values()))
            if now - oldest.used_s <= IDLE_S:
                break
            self.end(oldest)
