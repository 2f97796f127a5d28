"""The errors that a user sees, each with its exit code."""

import errno

from .secrets import redacted

# what the system says of the surroundings of this process, wherever it says so; and what to do
SURROUNDINGS = {
    errno.ENOSPC: "free some space and run this again",
    errno.EDQUOT: "free some space and run this again",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f) and run this again",
    errno.EMFILE: "raise the limit on open files (ulimit -n) and run this again",
    errno.ENFILE: "the system has too many files open; run this again later",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "choose a folder that you have permission for",
    errno.EPERM: "choose a folder that you have permission for",
    errno.ENOTDIR: "a part of this path is a file; choose another place",
    errno.EISDIR: "it is a folder; give a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "the symbolic links form a loop; fix them",
    errno.EIO: "the disk reports an error; see the system log",
}


class QLoRAError(Exception):
    """One message for the user: what is wrong, where, and what to do. Shown without a traceback; access tokens are removed."""

    exit_code = 1
    is_said: bool | None = None  # by another process of the same training; None: there is none

    def __init__(self, message=""):
        super().__init__(redacted(str(message)))


class InputError(QLoRAError):
    """The recipe, the data, the model folder or an argument is wrong."""

    exit_code = 2

    @classmethod
    def listing(cls, where, problems, remedy=None, total=None, more=None):
        """Return one error that reports `problems` (strings) together: the first 20 in full, then the count, and
        what to do about them. total: how many there are, where `problems` holds only the first. more: how many of these the
        `problems` do not say, where one may stand for several."""
        total = len(problems) if total is None else total
        head = f"{where} has {total:,} problem{'s' if total != 1 else ''}"
        lines = [f"  {problem}" for problem in problems[:20]]
        more = total - len(lines) if more is None else more
        if more:
            lines.append(f"  ... and {more:,} more")
        if remedy:
            lines.append(f"  {remedy}")
        return cls("\n".join([head, *lines]))


class DoesNotFit(QLoRAError):
    """Not enough memory for the job."""

    exit_code = 3


class ProofFailed(QLoRAError):
    """The exported model is not the model that was trained."""

    exit_code = 4


class TrainingFailed(QLoRAError):
    """Training cannot go on: a non-finite loss, or adapters that do not change."""

    exit_code = 1


class Interrupted(BaseException):
    """Stopped by a signal. No Exception, so that no library takes it for a failure that it can recover from.

    number: of the signal. message: what was stopped, what was saved, and how to go on; None where nothing is to be said
    about that.
    """

    def __init__(self, number, message=None):
        super().__init__(message)
        self.number, self.message, self.exit_code = number, message, 128 + number
        self.is_said: bool | None = None  # as of QLoRAError
