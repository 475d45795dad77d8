"""The one kind of error that a user may see."""

from __future__ import annotations

from pathlib import Path


class CryoreconError(Exception):
    """Something the user can mend: what is wrong and where, then what to do.

    The command line prints it as two sentences and exits with status 1.

    Parameters
    ----------
    problem : str
        What is wrong, naming the file and, where there is one, the row or column.
    remedy : str
        What the user can do about it.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        self.problem = _without_stop(problem)
        self.remedy = _without_stop(remedy)
        super().__init__(f"{_sentence(self.problem)} {_sentence(self.remedy)}")


def _without_stop(text: str) -> str:
    """Without the stop at its end; an ellipsis tells that something is left out, and stays."""
    text = text.rstrip(" ")
    return text if text.endswith("...") else text.rstrip(". ")


def _sentence(text: str) -> str:
    return text if text.endswith("...") else f"{text}."


class LostRankError(CryoreconError):
    """Another process of the job has ended before its time."""


class MissingStacksError(CryoreconError):
    """Images that a table names are nowhere; the table itself may be all that is needed."""


def require_file(path: str | Path, what: str) -> Path:
    """Return `path` when it is a readable file, else say what it is instead.

    Raises
    ------
    CryoreconError
        If the path is missing or is no regular file: a directory, a pipe, a device.
    """
    path = Path(path)
    if path.is_dir():
        raise CryoreconError(
            f"{path} is a directory, not a {what}", f"Give the path of the {what} inside it"
        )
    if not path.is_file():
        if path.exists():
            raise CryoreconError(
                f"{path} is a pipe or a device, not a {what}", "Write it to a file first"
            )
        raise CryoreconError(
            f"{path} does not exist", f"Check the path of the {what} and the current directory"
        )
    return path
