"""Appends to a ledger file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import weakref
from collections.abc import Iterable
from typing import Any

from ghostgrad.accounting import Event, event_to_json
from ghostgrad.errors import LedgerError
from ghostgrad.ledger.reading import FORMAT, VERSION, LedgerText, parse

try:
    import fcntl
except ImportError:  # not on Windows, where two processes that append are found out by what they wrote only
    fcntl = None  # type: ignore[assignment]

_open: weakref.WeakSet[LedgerFile] = weakref.WeakSet()


class LedgerFile:
    """A ledger file that this process alone appends to.

    A new file gets its header at once; one that is there is verified and continued. Bytes at its end that are no whole line
    are dropped: they are of a write that a crash cut short, so its step was not made.

    Args:
        path: of the file.
        relation: for which neighbouring datasets it is accounted; goes into the header of a new file.

    Raises:
        LedgerError: in use by another process, tampered with, forked, or not to be written to.
    """

    def __init__(self, path: str | os.PathLike[str], relation: str) -> None:
        self.path = os.path.abspath(path)
        new = not os.path.exists(self.path)
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise LedgerError(f"the ledger file {self.path} cannot be opened ({error}).") from error
        try:
            self._lock()
            self.text = self._read()
            self._size = os.fstat(self._descriptor).st_size
            self.head, self.lines = self.text.head, len(self.text.hashes)
            if self.text.cut:
                self._size -= self.text.cut
                os.ftruncate(self._descriptor, self._size)
            self._broken = ""
            _open.add(self)
            if not self.lines:
                self.text.identity, self.text.relation = secrets.token_hex(16), relation
                header = {"format": FORMAT, "version": VERSION, "id": self.text.identity, "relation": relation}
                self._append(header)
                self.text.hashes.append(self.head)
            if new:
                sync_folder(os.path.dirname(self.path))
        except BaseException:
            os.close(self._descriptor)
            raise

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LedgerError(
                f"the ledger file {self.path} is in use by another process (or another engine): two that append would fork it. "
                f"Wait until it has ended, or give this training a file of its own."
            ) from error

    def _read(self) -> LedgerText:
        with open(self.path, "rb") as file:
            return parse(file.read(), self.path)

    def release(self, events: Iterable[tuple[Event, int]], *, run: str, training: int, step: int, digest: str) -> None:
        """Write down one logical step; when this returns, it is on the disk."""
        self._append(
            {
                "kind": "release",
                "run": run,
                "training": training,
                "step": step,
                "digest": digest,
                "events": _plain(events),
            }
        )

    def record(self, events: Iterable[tuple[Event, int]], *, run: str, steps: int = 0) -> None:
        """Write down what was released without the engine's private steps, or before the file was there."""
        self._append({"kind": "recorded", "run": run, "steps": steps, "events": _plain(events)})

    def training(self, *, run: str, number: int, relation: str, settings: dict[str, Any]) -> None:
        """Write down under which relation and with which public settings a training begins, or goes on."""
        self._append({"kind": "training", "run": run, "training": number, "relation": relation, "settings": settings})

    def _append(self, body: dict[str, Any]) -> None:
        """One line, written and synced.

        Raises:
            LedgerError: it could not be; nothing of it is in the file.
        """
        self._check_alone()
        line = json.dumps(
            {"prev": self.head, "n": self.lines + 1, **body}, separators=(",", ":"), allow_nan=False
        ).encode()
        try:
            whole = line + b"\n"
            while whole:
                whole = whole[os.write(self._descriptor, whole) :]
            os.fsync(self._descriptor)
        except OSError as error:
            self._take_back()
            raise LedgerError(
                f"the ledger file {self.path} could not be written ({error}), so the step was not made. Make room and go on."
            ) from error
        self._size += len(line) + 1
        self.head, self.lines = hashlib.sha256(line).hexdigest(), self.lines + 1

    def _take_back(self) -> None:
        try:
            os.ftruncate(self._descriptor, self._size)
        except OSError as error:
            self._broken = f"a line that was cut short could not be taken back ({error})"

    def _check_alone(self) -> None:
        if self._broken:
            raise LedgerError(f"the ledger file {self.path} is not written to any more: {self._broken}.")
        own = os.fstat(self._descriptor)
        try:
            there = os.stat(self.path)
        except OSError as error:
            raise LedgerError(
                f"the ledger file {self.path} is gone ({error}): what is written would be lost."
            ) from error
        if (own.st_ino, own.st_dev) != (there.st_ino, there.st_dev):
            raise LedgerError(f"the ledger file {self.path} was replaced by another while it was in use.")
        if own.st_size != self._size:
            raise LedgerError(
                f"the ledger file {self.path} was changed by another process while it was in use (it has {own.st_size} bytes and "
                f"should have {self._size}): going on would fork it."
            )

    def close(self) -> None:
        """Give the file free; nothing can be written any more."""
        if not self._broken:
            self._broken = "it was closed, or belongs to the process that this one was forked from"
            with contextlib.suppress(OSError):
                os.close(self._descriptor)

    def __del__(self) -> None:
        if hasattr(self, "_broken"):
            self.close()


def _close_all() -> None:
    for file in list(_open):
        file.close()


if hasattr(os, "register_at_fork"):
    # A worker of a data loader must not hold the lock when the training itself is gone.
    os.register_at_fork(after_in_child=_close_all)


def _plain(events: Iterable[tuple[Event, int]]) -> list[Any]:
    return [[event_to_json(event), count] for event, count in events]


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """See to it that a name in the folder is on the disk."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
