"""Image files of users, opened for their pixels: what else is in them may be damaged or huge."""

import io
import re
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from atomdiff.utils.errors import UserError
from atomdiff.utils.names import normalize_name

# Suffixes that promise an image although Pillow may not read it: such a file is reported, not passed over.
_UNREAD = {".heic", ".heif", ".avif", ".jxl", ".svg", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw"}
_ORIENTATION = 0x0112  # the tag of EXIF
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_PNG_METADATA = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_JPEG_METADATA = (*range(0xE1, 0xEE), 0xEF, 0xFE)  # markers of all application data but JFIF and Adobe's, and comments


def list_images(folder: Path) -> list[Path]:
    """List the files of `folder` whose suffix promises an image, in the order of their names.

    Hidden files are passed over; a link that leads nowhere is listed, so that whoever reads it complains.

    Warns:
        UserWarning: folders are named as if they were images.
    """
    suffixes = _UNREAD | {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    named = [file for file in folder.iterdir() if file.suffix.lower() in suffixes and not file.name.startswith(".")]
    if folders := sorted(file.name for file in named if file.is_dir()):
        warnings.warn(f"{folder}: not read, as they are folders: {', '.join(folders)}", stacklevel=2)
    files = [file for file in named if file.is_file() or (file.is_symlink() and not file.exists())]
    return sorted(files, key=lambda file: (normalize_name(file.name), file.name))


def open_upright(file: Path) -> Image.Image:
    """Read the pixels of one image in the mode of its file, turned as its EXIF orientation says.

    Warns:
        UserWarning: something beside the pixels cannot be read, or there are more images in the file.

    Raises:
        UserError: the pixels cannot be read; the message is the reason, without the file's name.
    """
    try:
        return _load(file, file)
    except Image.DecompressionBombError as error:
        found, limit = (int(number) for number in re.findall(r"\d+", str(error))[:2])
        raise UserError(
            f"{found:,} pixels, more than the {limit:,} that Pillow opens: make it smaller, the training resolution is "
            "far below"
        ) from error
    except Exception as error:  # Pillow's plugins raise whatever their parsers raise
        return _load_without_metadata(file, error)


def _load_without_metadata(file: Path, error: Exception) -> Image.Image:
    """Read the pixels of a PNG or JPEG whose texts or profiles are at fault; else raise the reason as a UserError."""
    try:
        content = file.read_bytes()
        bare = _strip_metadata(content)
        image = _load(io.BytesIO(bare), file) if bare != content else None
    except Exception:
        image = None
    if image is None:
        raise UserError(_reason(file, error)) from error
    warnings.warn(f"{file}: read without its texts and profiles, which are damaged ({error})", stacklevel=2)
    return image


def _load(source: Path | io.BytesIO, file: Path) -> Image.Image:
    with Image.open(source) as opened:
        count = getattr(opened, "n_frames", 1) if opened.format != "MPO" else 1  # of which the rest are previews
        opened.load()
        try:
            turn = _TURNED.get(opened.getexif().get(_ORIENTATION, 1))
        except Exception as error:  # whatever a parser raises
            warnings.warn(f"{file}: its EXIF data cannot be read ({error}): taken as upright", stacklevel=2)
            turn = None
        image = opened.copy() if turn is None else opened.transpose(turn)
    if count > 1:
        warnings.warn(f"{file}: has {count} images, of which the first is used", stacklevel=2)
    return image


def _reason(file: Path, error: Exception) -> str:
    """Say in a few words why an image cannot be read."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower() + (", where its link leads" if file.is_symlink() else "")
    if not file.stat().st_size:
        return "empty"
    if file.suffix.lower() in _UNREAD:
        return f"Pillow cannot read {file.suffix.lower()} here: save it as JPEG or PNG"
    if isinstance(error, UnidentifiedImageError):
        return f"no {file.suffix.lower()[1:]} nor any other image that Pillow knows"
    return " ".join(str(error).split()) or type(error).__name__


def _strip_metadata(content: bytes) -> bytes:
    if content.startswith(_PNG):
        return _strip_png(content)
    return _strip_jpeg(content) if content.startswith(_JPEG) else content


def _strip_png(content: bytes) -> bytes:
    """Return a PNG without its texts and its color profile."""
    kept, start = [content[:8]], 8
    while start + 12 <= len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        if content[start + 4 : start + 8] not in _PNG_METADATA:
            kept.append(content[start:end])
        start = end
    return b"".join(kept)


def _strip_jpeg(content: bytes) -> bytes:
    """Return a JPEG without EXIF, other application data and comments."""
    kept, start = [content[:2]], 2
    while start + 4 <= len(content) and content[start] == 0xFF and content[start + 1] != 0xDA:  # of the pixels
        end = start + 2 + int.from_bytes(content[start + 2 : start + 4], "big")
        if content[start + 1] not in _JPEG_METADATA:
            kept.append(content[start:end])
        start = end
    return b"".join([*kept, content[start:]])
