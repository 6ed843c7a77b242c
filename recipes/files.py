"""Files that are whole or not there: results, checkpoints, and a log that a killed run takes up again."""

import csv
import fcntl
import json
import math
import os
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch

from .recipe import UserError


def write(path: Path, data: bytes) -> None:
    """Puts a file in the place of another in one move: whoever reads, and whoever comes after a crash, finds the old or the new one."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        whole = f"; {path.name} is still the one before" if path.exists() else ""
        raise UserError(f"{path}: could not be written ({error.strerror}){whole}. Make room, then go on with --resume") from None


def _sync_folder(folder: Path) -> None:
    """After this the new name survives a loss of power. Some file systems cannot, and need not."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, values: Any) -> None:
    """JSON without NaN and infinity, which it does not have: they become null and text."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None if math.isnan(value) else str(value)
        return value

    write(path, (json.dumps(plain(values), indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: expected a file that this tool wrote, got {error}. Remove it to have its run made again") from None


def save(path: Path, state: dict[str, Any]) -> None:
    buffer = BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getvalue())


def load(path: Path, device: str) -> dict[str, Any]:
    """A checkpoint: tensors and plain values only, so that a file from elsewhere runs no code."""
    try:
        with ZipFile(path) as parts:  # torch's reader does not look at the checksums
            if broken := parts.testzip():
                raise ValueError(f"the checksum of {broken} is wrong")
        state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict) or "settings" not in state:
            raise ValueError("it holds something else")
        return state
    except Exception as error:  # a torn file fails in zip, in pickle or in torch, each with its own errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: expected a whole checkpoint of this tool ({reason}). Remove it to begin this run again, or put the run's best.pt, "
            "which is a checkpoint too, in its place"
        ) from None


@contextmanager
def owned(folder: Path):
    """One process at a time writes into a folder. The lock ends with the process, also where it is killed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"--out: cannot write into {folder} ({error.strerror})") from None
    _locks.add(lock)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out: another run is writing into {folder}; wait for it, stop it, or choose another folder") from None
        except OSError as error:
            raise UserError(f"--out: cannot lock {folder} ({error.strerror})") from None
        yield
    finally:
        _locks.discard(lock)
        os.close(lock)


_locks: set[int] = set()


def _close_locks() -> None:
    for lock in _locks:
        os.close(lock)
    _locks.clear()


os.register_at_fork(after_in_child=_close_locks)  # else the processes that read data hold a killed run's lock until they end


class Log:
    """A CSV file of which a checkpoint knows how long it was: what a killed run wrote after its checkpoint is cut off, and comes again."""

    def __init__(self, path: Path, columns: tuple[str, ...], length: int = 0):
        self.path, self.columns = path, columns
        if length == 0:
            write(path, (",".join(columns) + "\n").encode())
        elif not path.exists() or path.stat().st_size < length:
            raise UserError(f"{path}: expected at least the {length} bytes that the checkpoint knows. Remove its folder to begin again")
        else:
            try:
                os.truncate(path, length)
            except OSError as error:
                raise UserError(f"{path}: could not be written ({error.strerror})") from None

    def add(self, values: dict[str, Any]) -> None:
        row = ["" if (v := values.get(name)) is None else f"{v:.9g}" if isinstance(v, float) else v for name in self.columns]
        try:
            with self.path.open("a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(row)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: could not be written ({error.strerror}). Make room, then go on with --resume") from None

    @property
    def length(self) -> int:
        return self.path.stat().st_size
