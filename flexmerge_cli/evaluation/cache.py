"""Caches scores on disk, `flexmerge.score/1`: one .npz per model and task, named by what the score depends on.

key     xxh3-128 of weights digest, data digest and settings, as canonical JSON
header  {format, key, scores: [{metric, notes, given}]}, JSON as uint8; further metrics after the first
p0, l0, p1, …   predictions and labels of each
Entries are files below $XDG_CACHE_HOME/flexmerge/scores, or ~/.cache/flexmerge/scores. A file is written under another
name and renamed, so it is never partial. A file that cannot be read counts as missing and is replaced; if the folder
cannot be written to, nothing is cached. The folder may be removed at any time.
"""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from flexmerge_cli.errors import MachineError
from flexmerge_cli.evaluation.metrics import METRICS
from flexmerge_cli.evaluation.readers import UNSOUND_NPZ
from flexmerge_cli.evaluation.scored import Given, Scored
from flexmerge_cli.text import expanded
from flexmerge_cli.writing import write_file

FORMAT = "flexmerge.score/1"


def cache_folder() -> Path:
    root, home = os.environ.get("XDG_CACHE_HOME"), expanded("~")
    # The XDG specification says to ignore a relative path. Without a home directory nothing is cached.
    cache = Path(root) if root and Path(root).is_absolute() else home / ".cache" if home.is_absolute() else os.devnull
    return Path(cache) / "flexmerge" / "scores"


def cache_contents() -> dict[str, Any]:
    """Return the folder of everything that flexmerge caches, the number of entries, and their bytes."""
    folder = cache_folder().parent
    sizes = [path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {"folder": str(folder), "entries": len(sizes), "bytes": sum(sizes)}


def clear_cache() -> dict[str, Any]:
    """Remove the folder, and return what it held. Raises MachineError."""
    found = cache_contents()
    folder = Path(found["folder"])
    if folder.is_dir():
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise MachineError(f"{folder} cannot be removed: {error.strerror}", hint="check its permissions") from None
    return found


def key_of(parts: Mapping[str, Any]) -> str:
    """Compute the key of a score. parts: everything that the score depends on, as JSON."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreCache:
    """The cached entries, by key."""

    folder: Path = field(default_factory=cache_folder)
    overwrite: bool = False
    """Whether to find nothing, so that every score is computed anew and replaces the cached one."""

    def get(self, key: str) -> Scored | None:
        """Return the entry, or None if there is none that can be read."""
        if self.overwrite:
            return None
        try:
            data = self._path(key).read_bytes()
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                header = json.loads(file["header"].tobytes())
                if (header["format"], header["key"]) != (FORMAT, key):
                    return None
                found = [_scored(entry, file[f"p{n}"], file[f"l{n}"]) for n, entry in enumerate(header["scores"])]
        except UNSOUND_NPZ:  # a malformed header, or one that does not fit the arrays, raises only these
            return None
        return replace(found[0], others=tuple(found[1:])) if found else None

    def put(self, key: str, scored: Scored) -> None:
        everything = (scored, *scored.others)
        header = {"format": FORMAT, "key": key, "scores": [_entry(item) for item in everything]}
        arrays = {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)}
        for number, item in enumerate(everything):
            arrays |= {f"p{number}": item.predictions, f"l{number}": item.labels}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        self._write(self._path(key), buffer.getvalue())

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.npz"

    def _write(self, path: Path, data: bytes) -> None:
        """Write the whole entry or nothing. A failure costs the next run its time, and this run nothing."""
        with contextlib.suppress(OSError, MachineError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, data)


def _entry(scored: Scored) -> dict[str, Any]:
    given = asdict(scored.given) if scored.given is not None else None
    return {"metric": scored.metric, "notes": list(scored.notes), "given": given}


def _scored(entry: Mapping[str, Any], predictions: np.ndarray, labels: np.ndarray) -> Scored:
    """Decode an entry. Raises KeyError, TypeError or ValueError if it is malformed."""
    given = entry["given"]
    if given is not None:
        interval = given["interval"]
        given = Given(**{**given, "interval": tuple(interval) if interval is not None else None})
    else:
        METRICS[entry["metric"]]
        if len(labels) and len(labels) != len(predictions):
            raise ValueError("predictions and labels differ in number")
    return Scored(
        metric=str(entry["metric"]), predictions=predictions, labels=labels, notes=tuple(entry["notes"]), given=given
    )
