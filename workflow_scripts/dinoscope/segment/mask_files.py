"""Images and masks as files, whatever kinds of picture Pillow reads."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from dinoscope.errors import MasksError

__all__ = ["image_size", "read_image", "read_values"]

_EIGHT_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


def image_size(root: Path, name: str) -> tuple[int, int]:
    """Width and height of an image, whose pixels are not read.

    Raises:
        MasksError: It is missing or damaged.
    """
    with _opened(root, name, "image") as image:
        return image.size


def read_image(root: Path, name: str) -> np.ndarray:
    """An image of 8 bits a channel as uint8 RGB (H, W, 3); an alpha channel is dropped, grey stays grey.

    Raises:
        MasksError: It is missing, damaged, or has more bits a channel.
    """
    with _opened(root, name, "image") as image:
        if image.mode not in _EIGHT_BITS or _is_cut_short(image):
            raise MasksError(
                f"{root.name}: image {name} has more than 8 bits a channel ({image.mode}); convert it to 8 bits, since "
                "how to map its values to 0 … 255 is for you to say"
            )
        try:
            return np.array(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise _unreadable(root, name, "image", error) from None


def read_values(root: Path, name: str) -> np.ndarray:
    """The numbers of a mask file, uint16 (H, W): palette indices, grey values of 1 to 32 bits; alpha is dropped.

    Raises:
        MasksError: It is missing, damaged or a colour picture, or has numbers other than 0, 1 … 65535.
    """
    with _opened(root, name, "mask") as mask:
        cut_short = _is_cut_short(mask)
        try:
            values = np.asarray(mask.convert("P") if mask.mode == "PA" else mask)
        except (OSError, SyntaxError, ValueError) as error:
            raise _unreadable(root, name, "mask", error) from None
    if values.ndim == 3:
        colours = values.shape[2] - 1 if values.shape[2] in (2, 4) else values.shape[2]
        if cut_short or (values[..., :colours] != values[..., :1]).any():
            raise MasksError(
                f"{root.name}: mask {name} is a colour picture ({mask.mode}); masks hold one number a pixel: save it "
                "with a palette or in grey"
            )
        values = values[..., 0]
    if values.dtype in (np.uint8, np.uint16, np.bool_):
        return values.astype(np.uint16)
    whole = values.clip(0, 2**16 - 1).astype(np.uint16) if np.isfinite(values).all() else None
    if whole is None or (whole != values).any():
        raise MasksError(f"{root.name}: mask {name} has numbers other than 0, 1 … 65535 ({mask.mode}): save it again")
    return whole


def _is_cut_short(image: Image.Image) -> bool:
    """Whether Pillow drops the lower 8 of 16 bits of colours, which it does without a word."""
    stored = [str(tile.args) for tile in image.tile]
    return image.mode.startswith(("RGB", "LA")) and any(";16" in kind and "BGR;16" not in kind for kind in stored)


def _opened(root: Path, name: str, kind: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(root / name)
    except FileNotFoundError:
        raise MasksError(f"{root.name}: {kind} {name} is missing: put it back or take its partner out") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(root, name, kind, error) from None


def _unreadable(root: Path, name: str, kind: str, error: Exception) -> MasksError:
    reason = " ".join(str(error).replace(str(root / name), name).split())
    return MasksError(f"{root.name}: {kind} {name} cannot be read ({reason}); replace it or take it out")
