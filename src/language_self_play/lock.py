"""One writer for a run: run.lock in its folder names the process that plays it.

The kernel holds the lock (flock) and lets go of it however the process ends. The file says who holds
it: for the sentence with which another process is refused, and for file systems where locks don't
reach other machines. There only a person, or the scheduler that has ended the holder, can know that it
has gone; they say so (`--take-over`). Reading a run needs no lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from language_self_play.errors import RunFolderError

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MACHINE_ID = Path("/etc/machine-id")  # the same after a reboot; containers may have none
# File systems without locks: then the file's contents alone decide.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

NAMING_TRIES, NAMING_PAUSE_S = 100, 0.01


@dataclass(frozen=True)
class Holder:
    """A process on a machine. `started` (ticks after the boot) tells it from a later one of its pid.

    `boot` and `machine` are the identities of this boot and of the installed system, where there are any.
    """

    host: str
    pid: int
    started: int | None
    boot: str | None
    machine: str | None = None

    @classmethod
    def this_process(cls) -> Holder:
        pid, host = os.getpid(), socket.gethostname()
        return cls(host, pid, _start_of(pid), _identity(BOOT_ID), _identity(MACHINE_ID))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class RunLock:
    """A context in which `take` may be called; left, it lets go. Raises RunFolderError.

    With `take_over` a holder whose machine can't be looked at is believed to have gone.
    """

    def __init__(self, folder: Path, take_over: bool = False):
        self.file = folder / "run.lock"
        self.take_over = take_over
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        if self._descriptor is not None:
            # Before letting go: later it could be the next holder's file. Where it can't be removed
            # it names a process that has gone, which is no obstacle.
            with suppress(OSError):
                if self._is_ours():
                    self.file.unlink()
            self._close()

    def take(self) -> None:
        """Hold the run from here on; a holder that has gone is replaced, with a warning.

        Raises RunFolderError if another process holds it, or may on another machine.
        """
        me = Holder.this_process()
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            held_elsewhere = not self._lock()
            holder = self._named(me) if held_elsewhere else _read(self.file)
            self._refuse(holder, held_elsewhere, me)
            assert self._descriptor is not None
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{json.dumps(asdict(me))}\n".encode(), 0)
        except OSError as error:
            self._close()
            if isinstance(error, RunFolderError):
                raise
            raise RunFolderError(
                f"{self.file}: can't be written ({error.strerror}); a run needs a folder to write to"
            ) from None
        os.register_at_fork(after_in_child=self._close)
        if holder is not None:
            seen = _same_machine(holder, me)
            gone = "has gone without a word" if seen else "has ended, as --take-over says"
            warnings.warn(
                f"{self.file}: {holder} held this run and {gone}; going on in its place",
                stacklevel=2,
            )

    def refuse_if_held(self) -> None:
        """Raises RunFolderError if `take` would find another holder now; holds and writes nothing."""
        if not self.file.exists():
            return
        me = Holder.this_process()
        try:
            held_elsewhere = not self._lock()
            self._refuse(
                self._named(me) if held_elsewhere else _read(self.file), held_elsewhere, me
            )
        except OSError as error:
            if isinstance(error, RunFolderError):
                raise
        finally:
            self._close()

    def _lock(self) -> bool:
        """Open the file and lock it; False if another process has it."""
        while True:
            self._descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if self._is_ours():
                    return False
                self._close()
                continue
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            if self._is_ours():
                return True
            self._close()  # its holder removed it between our opening and our locking

    def _is_ours(self) -> bool:
        """Whether the name still leads to the file that is open here."""
        assert self._descriptor is not None
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.file))
        except FileNotFoundError:
            return False

    def _named(self, me: Holder) -> Holder | None:
        """Who holds it. One that has just locked it needs a moment to put its name there."""
        for _ in range(NAMING_TRIES):
            holder = _read(self.file)
            if holder is not None and (not _same_machine(holder, me) or _lives(holder, me)):
                break
            time.sleep(NAMING_PAUSE_S)
        return holder

    def _refuse(self, holder: Holder | None, held_elsewhere: bool, me: Holder) -> None:
        run = self.file.parent
        if holder is None:
            if held_elsewhere:
                raise RunFolderError(f"{run}: another process plays this run; let it end")
            return
        if not _same_machine(holder, me):
            if held_elsewhere:
                raise RunFolderError(
                    f"{run}: {holder} plays this run; let it end, or stop it there"
                )
            if not self.take_over:
                raise RunFolderError(
                    f"{run}: {holder} plays this run, and whether it still does can't be seen from"
                    f" {_told_apart(me, holder)}; if it has ended, add --take-over"
                )
        elif held_elsewhere or _lives(holder, me):
            raise RunFolderError(
                f"{run}: {holder} plays this run; let it end, or stop it by: kill {holder.pid}"
            )

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _read(file: Path) -> Holder | None:
    """Who the lock file names; None if it is empty or torn."""
    try:
        table = json.loads(file.read_text("utf-8"))
        who = str(table["host"]), int(table["pid"]), table["started"], table["boot"]
        return Holder(*who, table.get("machine"))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _same_machine(holder: Holder, me: Holder) -> bool:
    """Whether this machine can tell if `holder` lives.

    By its boot: a restarted container has another name on the same kernel, and two machines may have
    one name. After a reboot by name and system; and by the name alone where nothing else is known.
    """
    if holder.boot is None or me.boot is None:
        return holder.host == me.host
    rebooted = me.machine is not None and (me.host, me.machine) == (holder.host, holder.machine)
    return holder.boot == me.boot or rebooted


def _told_apart(me: Holder, holder: Holder) -> str:
    """This machine's name, told apart from the holder's."""
    return me.host if me.host != holder.host else f"this {me.host}, another machine or boot"


def _identity(file: Path) -> str | None:
    """What a file of one line says; None if it is not there or says nothing."""
    try:
        return file.read_text().strip() or None
    except OSError:
        return None


def _lives(holder: Holder, me: Holder) -> bool:
    """Whether the process that was `holder`, on this machine, still runs, by its pid and start."""
    return (
        holder.boot == me.boot
        and holder.started is not None
        and (_start_of(holder.pid) == holder.started)
    )


def _start_of(pid: int) -> int | None:
    """When a process began, in clock ticks after the boot; None if it has gone or none can be told."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name, in brackets, may hold anything; state is the 3rd field and start time the 22nd.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])
