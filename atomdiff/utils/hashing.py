"""Hashes by which files and folders are known again."""

from __future__ import annotations

import hashlib
from pathlib import Path


def content_hash(path: Path) -> str:
    """Return a SHA-256 of a file, or of the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for file in _files(path):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def listing_hash(folder: Path) -> str:
    """Return a SHA-256 of names, sizes and times: the gigabytes of a base are not worth reading twice."""
    stats = [(str(file.relative_to(folder)), file.stat()) for file in _files(folder)]
    return hashlib.sha256(repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]).encode()).hexdigest()


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
