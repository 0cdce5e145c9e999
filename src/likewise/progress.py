"""Progress reporting: the library reports finished units, the caller decides how to display them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichBars
    from rich.progress import TaskID


class ProgressBar(ABC):
    """Progress of one task."""

    @abstractmethod
    def update(self, n: int = 1, postfix: str | None = None) -> None:
        """Add `n` finished units; `postfix` is a short text beside the bar."""


class Progress(ABC):
    """Reporter of tasks; messages go to `logging` instead."""

    @abstractmethod
    def task(
        self, description: str, total: int, unit: str, completed: int = 0
    ) -> AbstractContextManager[ProgressBar]:
        """Open a task of `total` units, of which an earlier run finished `completed`."""


@final
class _NullProgressBar(ProgressBar):
    def update(self, n: int = 1, postfix: str | None = None) -> None:
        """Ignore the update."""


@final
class NullProgress(Progress):
    """No progress reporting, the default of the library."""

    @contextmanager
    def task(self, description: str, total: int, unit: str, completed: int = 0) -> Iterator[ProgressBar]:
        """Return a bar that ignores updates."""
        yield _NullProgressBar()


@final
class _RichProgressBar(ProgressBar):
    def __init__(self, bars: "RichBars", task_id: "TaskID", unit: str) -> None:
        self._bars, self._task_id, self._unit = bars, task_id, unit
        self._num_done = 0

    def update(self, n: int = 1, postfix: str | None = None) -> None:
        """Advance the bar; the rate excludes units that an earlier run finished."""
        self._num_done += n
        elapsed = self._bars.tasks[self._bars.task_ids.index(self._task_id)].elapsed
        rate = _format_rate(self._num_done / elapsed, self._unit) if elapsed else ""
        fields = {"rate": rate} if postfix is None else {"rate": rate, "postfix": postfix}
        self._bars.update(self._task_id, advance=n, **fields)  # pyrefly: ignore[bad-argument-type]


def _format_rate(per_second: float, unit: str) -> str:
    return f"{per_second:,.{0 if per_second >= 10 else 1}f} {unit}/s"


@final
class RichProgress(Progress):
    """Progress bars with rate and time left on a rich console."""

    def __init__(self, console: "Console") -> None:
        self._console = console

    @contextmanager
    def task(self, description: str, total: int, unit: str, completed: int = 0) -> Iterator[ProgressBar]:
        """Open a bar with description, fraction, count, rate, time left and the latest postfix."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichBars

        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", style="cyan"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[postfix]}", style="dim"),
        )
        with RichBars(*columns, console=self._console) as bars:
            task_id = bars.add_task(description, total=total, completed=completed, rate="", postfix="")
            yield _RichProgressBar(bars, task_id, unit)


NULL_PROGRESS = NullProgress()
