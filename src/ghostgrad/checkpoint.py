"""One file for all that a private training needs to go on: written whole or not at all, checked before it is read.

The file is a line of text with a checksum, and then what ``torch.save`` writes. It is read with ``weights_only=True``, so
nothing in it is executed, whoever wrote it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol, cast

import torch
from torch import Tensor, nn

from ghostgrad import _forms as forms
from ghostgrad.distributed import is_split
from ghostgrad.errors import CheckpointError, ConfigurationError
from ghostgrad.ledger.writing import sync_folder
from ghostgrad.random_states import GLOBAL_STATES, check_global_states, global_states

_TITLE = b"ghostgrad checkpoint 1 sha256 "
_HEADER = len(_TITLE) + 64 + 1  # with the checksum in hexadecimal and the end of the line
_PLAIN = (str, bytes, int, float, bool, complex, type(None), torch.dtype, torch.device, torch.Size)


class Stateful(Protocol):
    """Anything with a state: an optimizer, a learning-rate scheduler, an average of the weights."""

    def state_dict(self) -> dict[str, Any]:
        """What it needs to go on."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Go on from that."""


# ---------------------------------------------------------------------- the file


def write(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a checkpoint in place of the one that is there; readable by its owner alone.

    It is written to another file in the same folder, synced, and renamed, so at any moment there is either the old one or the
    new one.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written to; an old checkpoint is as it was.
        ConfigurationError: something in it could not be loaded again.
    """
    target = Path(path)
    check_plain(content, "the checkpoint")
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")  # with mode 0600
        with open(descriptor, "w+b") as file:
            file.write(bytes(_HEADER))
            _save(content, file)
            file.seek(0)
            file.write(_TITLE + _checksum(file, _HEADER).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        temporary = None
        sync_folder(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {target} could not be written ({error}). What was there before is as it was; make room, or save "
            f"to another place, and save again."
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _save(content: Mapping[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(dict(content), file)
    except RuntimeError as error:  # torch's writer says so when the file does not take what it is given
        raise OSError(f"torch could not write it: {error!s:.200}") from error


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write` wrote; its checksum is right, which says that it is whole, not who wrote it.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it is something else.
    """
    try:
        with open(path, "rb") as file:
            title = file.read(_HEADER)
            if len(title) < _HEADER or not title.startswith(_TITLE):
                raise CheckpointError(
                    f"{path} is not a checkpoint of ghostgrad, or of a version that this one does not read."
                )
            if title[len(_TITLE) :] != _checksum(file, _HEADER).encode() + b"\n":
                raise CheckpointError(
                    f"{path} is damaged: its content does not have the checksum that it was written with. Load an older one."
                )
            rest = cast(IO[bytes], _Rest(file, _HEADER))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of strange content, which is refused below
                content = torch.load(rest, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"the checkpoint {path} could not be read ({error}).") from error
    except CheckpointError:
        raise
    except (
        Exception
    ) as error:  # torch's reader fails on made-up bytes in any way: IndexError, struct.error, MemoryError
        raise CheckpointError(
            f"{path} holds what a checkpoint does not hold, and nothing of it was run: {error!s:.200}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__} where a checkpoint is a table.")
    return content


def _checksum(file: BinaryIO, start: int) -> str:
    found, position = hashlib.sha256(), file.tell()
    file.seek(start)
    while block := file.read(1 << 20):
        found.update(block)
    file.seek(position)
    return found.hexdigest()


class _Rest(io.RawIOBase):
    """A file without its first bytes."""

    def __init__(self, file: BinaryIO, start: int) -> None:
        self._file, self._start = file, start
        file.seek(start)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset + (self._start if whence == 0 else 0), whence) - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer)  # type: ignore[attr-defined, no-any-return]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def check_plain(value: Any, place: str) -> None:
    """Refuse what ``weights_only=True`` would not load again.

    Raises:
        ConfigurationError: naming where it is.
    """
    if isinstance(value, Mapping):
        for name, part in value.items():
            check_plain(name, f"a key of {place}")
            check_plain(part, f"{place}[{name!r}]")
    elif type(value) in (list, tuple, set):
        for part in value:
            check_plain(part, f"an entry of {place}")
    elif not isinstance(value, Tensor) and type(value) not in _PLAIN:
        raise ConfigurationError(
            f"{place} is a {type(value).__name__}, which is not plain data: loading it again could run code. Leave it out of the "
            f"state, or turn it into numbers, text, tensors, and lists and dicts of these."
        )


# ---------------------------------------------------------------------- what is in it


_CONTENT = {
    "module": forms.is_table,
    "buffers": forms.named(forms.is_any_tensor),
    "optimizer": forms.is_table,
    "extra": forms.named(forms.is_table),
    "ranks": [{"random": GLOBAL_STATES, "engine": forms.is_table}],
}


def gather(module: nn.Module, optimizer: Stateful, extra: Mapping[str, Stateful]) -> dict[str, Any]:
    """What of a checkpoint all ranks have in common."""
    saved = module.state_dict()
    split = next((name for name, tensor in saved.items() if isinstance(tensor, Tensor) and is_split(tensor)), None)
    if split is not None:
        raise ConfigurationError(
            f"{split} is split over the ranks, and one file holds whole tensors. Save model and optimizer with "
            f"torch.distributed.checkpoint, and each rank's engine.state_dict() beside them."
        )
    return {
        "module": saved,
        "buffers": {name: buffer for name, buffer in module.named_buffers() if name not in saved},
        "optimizer": optimizer.state_dict(),
        "extra": {name: part.state_dict() for name, part in extra.items()},
    }


def of_this_rank(engine_state: Mapping[str, Any]) -> dict[str, Any]:
    """What each rank has of its own: besides the engine's, the states that its dropout and its loader draw from."""
    return {"random": global_states(), "engine": engine_state}


def part_of(content: Mapping[str, Any], rank: int) -> Mapping[str, Any]:
    """What a rank goes on from; one that the run which was saved did not have, from what all have in common in rank 0's."""
    ranks: list[Mapping[str, Any]] = content["ranks"]
    return ranks[rank] if rank < len(ranks) else ranks[0]


def check(content: Mapping[str, Any], module: nn.Module, optimizer: Stateful, extra: Mapping[str, Stateful]) -> None:
    """Hold a content to the objects it is to be loaded into; changes nothing.

    Raises:
        CheckpointError: naming what does not fit.
    """
    forms.require(content, _CONTENT, "the checkpoint")
    if not content["ranks"]:
        raise CheckpointError("the checkpoint is of no rank: it is damaged.")
    _check_tensors(content["module"], module.state_dict(), "the module")
    unsaved = {name: buffer for name, buffer in module.named_buffers() if name not in content["module"]}
    _check_tensors(content["buffers"], unsaved, "the module's other buffers")
    if set(content["extra"]) != set(extra):
        raise CheckpointError(
            f"the checkpoint was saved with extra={sorted(content['extra'])} and is loaded with extra={sorted(extra)}; give the "
            f"same names, so that none of them goes on from its beginning."
        )
    groups = content["optimizer"].get("param_groups")
    own = optimizer.state_dict()["param_groups"]
    if not isinstance(groups, list) or [_count(group) for group in groups] != [_count(group) for group in own]:
        raise CheckpointError("the optimizer in the checkpoint has other param_groups than the one it is loaded into.")
    for part in content["ranks"]:
        check_global_states(part["random"])


def _count(group: Any) -> int:
    held = group.get("params") if isinstance(group, Mapping) else None
    return len(held) if isinstance(held, list) else -1


def _check_tensors(saved: Mapping[str, Any], own: Mapping[str, Any], place: str) -> None:
    for name in sorted({*saved, *own}):
        if name not in saved or name not in own:
            raise CheckpointError(f"{name} is in {place} {'here' if name in own else 'of the checkpoint'} only.")
        if isinstance(saved[name], Tensor) != isinstance(own[name], Tensor):
            raise CheckpointError(
                f"{name} of {place} is a {type(saved[name]).__name__} in the checkpoint; it is damaged."
            )
        if not isinstance(own[name], Tensor):
            continue  # a module's own extra state, which it checks itself
        if saved[name].shape != own[name].shape or saved[name].dtype != own[name].dtype:
            raise CheckpointError(
                f"{name} of {place} has shape {list(saved[name].shape)} and type {saved[name].dtype} in the checkpoint, and "
                f"{list(own[name].shape)} and {own[name].dtype} here."
            )


@contextlib.contextmanager
def undone_on_error(module: nn.Module, optimizer: Stateful, extra: Mapping[str, Stateful]) -> Iterator[None]:
    """If loading fails in the middle, everything is put back as it was before."""
    before = gather(module, optimizer, extra)
    kept = {name: value.detach().clone() for name, value in {**before["module"], **before["buffers"]}.items()}
    try:
        yield
    except Exception as error:
        with torch.no_grad():
            for name, value in {**module.state_dict(), **dict(module.named_buffers())}.items():
                value.copy_(kept[name])
        for part, state in [(optimizer, before["optimizer"]), *((extra[n], s) for n, s in before["extra"].items())]:
            with contextlib.suppress(Exception):
                part.load_state_dict(state)
        raise CheckpointError(
            f"the checkpoint could not be loaded ({type(error).__name__}: {error!s:.200}); everything is as it was before."
        ) from error


def restore(content: Mapping[str, Any], module: nn.Module, optimizer: Stateful, extra: Mapping[str, Stateful]) -> None:
    """Load a content that was checked."""
    with undone_on_error(module, optimizer, extra):
        for name, part in extra.items():
            part.load_state_dict(dict(content["extra"][name]))
        optimizer.load_state_dict(dict(content["optimizer"]))
        with torch.no_grad():
            module.load_state_dict(dict(content["module"]))
            for name, buffer in module.named_buffers():
                if name in content["buffers"]:
                    buffer.copy_(content["buffers"][name])
