"""Shows an answer while it arrives: in a notebook or on a terminal, and not once it is there."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

#: Lines of a terminal that are left to other things.
_MARGIN = 2


class Shown(Protocol):
    """Shows an answer; `note` is what it waits for."""

    def __enter__(self) -> Shown: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def show(self, text: str, note: str) -> None:
        """Show how it stands; may be called often."""


def shown(is_shown: bool, shows_text: bool) -> Shown:
    """The display for what standard error is; without `shows_text` it shows only notes."""
    console = Console(stderr=True)
    if not is_shown:
        return _Silence()
    if console.is_jupyter:
        return _Notebook(shows_text)
    if console.is_terminal and not console.is_dumb_terminal:
        return _Terminal(console, shows_text)
    return _Lines(console)


class _Silence:
    def __enter__(self) -> _Silence:
        return self

    def __exit__(self, *args: object) -> None: ...

    def show(self, text: str, note: str) -> None: ...


class _Terminal:
    """The end of the text, where the cursor is; erased at the end."""

    def __init__(self, console: Console, shows_text: bool) -> None:
        self._console = console
        self._shows_text = shows_text
        self._live: Live | None = None

    def __enter__(self) -> _Terminal:
        return self

    def __exit__(self, *args: object) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def show(self, text: str, note: str) -> None:
        said = note or (text if self._shows_text else "")
        if not said:
            self.__exit__()
            return
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        lines = Text(said).wrap(self._console, self._console.width)
        tail = lines[-max(1, self._console.height - _MARGIN) :]
        self._live.update(Text("\n").join(tail), refresh=True)


class _Notebook:
    """A display of the cell that is updated in place, and is empty at the end."""

    def __init__(self, shows_text: bool) -> None:
        self._shows_text = shows_text
        self._handle: Any = None
        self._said = ""

    def __enter__(self) -> _Notebook:
        return self

    def __exit__(self, *args: object) -> None:
        self._say("")

    def show(self, text: str, note: str) -> None:
        self._say(note or (text if self._shows_text else ""))

    def _say(self, said: str) -> None:
        from IPython.display import display

        if said == self._said:
            return
        self._said = said
        content = {"text/plain": said}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)  # type: ignore[no-untyped-call] # IPython's own
        else:
            self._handle.update(content, raw=True)


class _Lines:
    """One line for what the question waits for first."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._has_said = False

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *args: object) -> None: ...

    def show(self, text: str, note: str) -> None:
        if note and not self._has_said:
            self._has_said = True
            self._console.print(note, highlight=False, soft_wrap=True)
