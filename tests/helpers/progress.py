"""A progress reporter that records the totals of its tasks."""

from contextlib import AbstractContextManager

from likewise.progress import NULL_PROGRESS, Progress, ProgressBar


class RecordingProgress(Progress):
    """Records (total, completed) of each task."""

    def __init__(self) -> None:
        """Start without tasks."""
        self.totals: list[tuple[int, int]] = []

    def task(
        self, description: str, total: int, unit: str, completed: int = 0
    ) -> AbstractContextManager[ProgressBar]:
        """Record the task."""
        self.totals.append((total, completed))
        return NULL_PROGRESS.task(description, total, unit, completed)
