"""How long work takes, told while it runs: the library reports, the caller decides how to show it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichBars
    from rich.progress import TaskID


class Task(ABC):
    """One piece of work under way."""

    @abstractmethod
    def advance(self, amount: int = 1, note: str | None = None) -> None:
        """Add `amount` finished units; `note` is a few words to stand beside the bar."""


class Progress(ABC):
    """Where a step reports to."""

    @abstractmethod
    def task(self, name: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Task]:
        """Open a task of `total` units of which `done` were finished by an earlier run."""

    @abstractmethod
    def say(self, sentence: str) -> None:
        """Tell the user one thing worth knowing."""


@final
class _SilentTask(Task):
    def advance(self, amount: int = 1, note: str | None = None) -> None:
        """Drop the report."""


@final
class Silent(Progress):
    """Reports nothing: the default of the library."""

    @contextmanager
    def task(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        """Open a task that nobody watches."""
        yield _SilentTask()

    def say(self, sentence: str) -> None:
        """Drop the sentence."""


@final
class _BarTask(Task):
    def __init__(self, bars: "RichBars", task: "TaskID", unit: str) -> None:
        self._bars, self._task, self._unit = bars, task, unit
        self._here = 0

    def advance(self, amount: int = 1, note: str | None = None) -> None:
        """Move the bar; the rate counts only what this run did, not what it found done."""
        self._here += amount
        elapsed = self._bars.tasks[self._bars.task_ids.index(self._task)].elapsed
        rate = _rate(self._here / elapsed, self._unit) if elapsed else ""
        fields = {"rate": rate} if note is None else {"rate": rate, "note": note}
        self._bars.update(self._task, advance=amount, **fields)  # pyrefly: ignore[bad-argument-type]


def _rate(each_second: float, unit: str) -> str:
    return f"{each_second:,.{0 if each_second >= 10 else 1}f} {unit}/s"


@final
class Terminal(Progress):
    """Bars with rate and time left on a rich console."""

    def __init__(self, console: "Console") -> None:
        self._console = console

    @contextmanager
    def task(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        """Open a bar that shows name, share, count, rate, time left and the latest note."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichBars

        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", style="cyan"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", style="dim"),
        )
        with RichBars(*columns, console=self._console) as bars:
            bar = bars.add_task(name, total=total, completed=done, rate="", note="")
            yield _BarTask(bars, bar, unit)

    def say(self, sentence: str) -> None:
        """Print the sentence, marked as an aside."""
        self._console.print(sentence, style="dim", highlight=False, markup=False)


SILENT = Silent()
