"""Messages without the names of files, fit for results that may be passed on."""

import contextlib
import re
from pathlib import Path

from dinoscope.slides.find import slide_files

__all__ = ["without_file_name"]

# Names of files that tell nothing, and whose loss would spoil a message.
_ORDINARY_WORDS = {
    "background", "case", "column", "copy", "data", "file", "folder", "image", "images", "level", "levels", "map",
    "mask", "mpp", "open", "original", "pixel", "pixels", "pyramid", "reader", "region", "scan", "scanner", "size",
    "slide", "slides", "test", "tile", "tiles", "tiff", "tissue",
}  # fmt: skip


def without_file_name(message: object, path: str | Path, slide_id: str) -> str:
    """A message without the names of the slide's files and folders, fit for results that may be passed on."""
    path, text = Path(path), str(message).replace(f"(file {Path(path).name})", "")
    folders = [str(path.absolute()), str(path), *(str(parent) for parent in path.absolute().parents[:-1])]
    names = sorted(_names_of(path) - {slide_id} - _ORDINARY_WORDS, key=len, reverse=True)
    words = "|".join(re.escape(name) for name in names if len(name) > 2)
    kept = repr(slide_id)
    parts = text.split(kept)
    for number, part in enumerate(parts):
        for folder in folders:
            part = part.replace(folder, "the file") if len(folder) > 2 else part
        parts[number] = re.sub(rf"(?<!\w)({words})(?!\w)", "the file", part) if words else part
    return " ".join(kept.join(parts).split())


def _names_of(path: Path) -> set[str]:
    """Names of a slide's files, those included that a VMS file names and that may be missing."""
    names = {path.name, path.stem}
    with contextlib.suppress(OSError):
        names |= {member.name for member in slide_files(path)}
        if path.suffix.lower() in {".vms", ".vmu"}:
            lines = path.read_text(encoding="latin-1").splitlines()
            names |= {line.partition("=")[2].strip() for line in lines}
    return names
