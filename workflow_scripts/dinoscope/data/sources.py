"""What a run is trained on: anything that gives RGB images by number.

Three kinds exist: tiles of slides (tiles.py), a folder of images (images.py) and a data set of the user's own (here).
`train.dataset_path` chooses. Importing this is fast (no numpy until an image is read): planning compares seals.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dinoscope import user_code
from dinoscope.errors import ConfigError, DinoscopeError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["TrainingImages", "UserImages", "Window", "is_class_name", "name_without_folders"]


@dataclass(frozen=True)
class Window:
    """Images of one size, from which crops are cut.

    Attributes:
        width: Pixels.
        height: Pixels.
        mpp: Micrometres a pixel, None where unknown.
        name: What a message calls them, e.g. "the tiles".
    """

    width: int
    height: int
    mpp: float | None = None
    name: str = "the tiles"

    @property
    def shorter_px(self) -> int:
        """The shorter side."""
        return min(self.width, self.height)


class TrainingImages(Protocol):
    """Images by number 0 … len - 1; the same number gives the same image always.

    Instances are pickled to all processes and used after a fork: open files belong to the process that opened them.

    Attributes:
        windows: Which sizes and resolutions there are, as far as that is known without reading every image.
        slide_ids: The slides that the images are cut from, sorted; empty where there are none.
    """

    windows: list[Window]
    slide_ids: list[str]

    def __len__(self) -> int: ...

    def read(self, index: int) -> "tuple[np.ndarray, str]":
        """The image, uint8 RGB (H, W, 3), and its sample id. Raises DinoscopeError, naming it, when it cannot."""
        ...

    def sample_id(self, index: int) -> str:
        """What messages call the image, without reading it."""
        ...

    def stain(self, index: int) -> str | None:
        """How the image is stained, as column `stain` of the slide table says; None where unknown."""
        ...

    def digest(self) -> str:
        """Changes when these are other images; a run is sealed with it."""
        ...


def is_class_name(dataset_path: str) -> bool:
    """Whether `train.dataset_path` reads module:Class (folders of such a name come first)."""
    return user_code.is_class_name(dataset_path) and not Path(dataset_path).is_dir()


def name_without_folders(dataset_path: str | None) -> str | None:
    """What results may say of `train.dataset_path`: a folder's own name, which it keeps when it is moved."""
    if dataset_path is None or user_code.is_class_name(dataset_path):
        return dataset_path
    return os.path.basename(os.path.abspath(dataset_path))


class UserImages:
    """A data set of the user's own, given as module:Class; every process builds an instance for itself.

    The module is imported from the working directory or from what is installed; the class takes no arguments. It has
    `__len__` and `__getitem__(index)`, which returns a uint8 RGB array (H, W, 3) or a pair of that and a sample id,
    and may have `digest()`.
    """

    def __init__(self, name: str) -> None:
        """Builds the data set and reads its first image.

        Raises:
            ConfigError: It cannot be imported or built, lacks a method, or has no image.
            DinoscopeError: Its first image is of the wrong kind.
        """
        self.name, self.slide_ids = name, []
        self._images, self._pid = _build(name), os.getpid()
        self.length = _length(self._images, name)
        if self.length < 1:
            raise ConfigError(f"data set {name} has no image: its length is {self.length}")
        image, sample_id = self.read(0)
        self.windows = [Window(image.shape[1], image.shape[0], None, f"image {sample_id}")]

    def __getstate__(self) -> tuple[str, int, list[Window]]:
        return self.name, self.length, self.windows

    def __setstate__(self, state: tuple[str, int, list[Window]]) -> None:
        self.name, self.length, self.windows = state
        self.slide_ids, self._images, self._pid = [], None, -1

    def __len__(self) -> int:
        return self.length

    def read(self, index: int) -> "tuple[np.ndarray, str]":
        """The image and the id that the data set gives it, else module:Class[index]."""
        import numpy as np

        images = self._instance()
        try:
            item = images[index]
        except DinoscopeError:
            raise
        except Exception as error:  # whatever it is, the user's code did it and its name must be told
            raise DinoscopeError(f"data set {self.name} failed at index {index}: {_told(error)}") from error
        image, sample_id = item if isinstance(item, tuple) and len(item) == 2 else (item, f"{self.name}[{index}]")
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DinoscopeError(
                f"data set {self.name} gave {_kind(image)} at index {index}; it must give a numpy array of uint8, RGB, "
                "of shape (height, width, 3), or a pair of that and a sample id"
            )
        return np.ascontiguousarray(image), str(sample_id)

    def sample_id(self, index: int) -> str:
        """module:Class[index]; the data set itself may call it otherwise."""
        return f"{self.name}[{index}]"

    def stain(self, index: int) -> str | None:
        """Unknown."""
        return None

    def digest(self) -> str:
        """Of the data set's own `digest()` if it has one, else of its name and length."""
        images = self._instance()
        try:
            identity = images.digest() if hasattr(images, "digest") else len(self)
        except Exception as error:
            raise ConfigError(f"data set {self.name}: its digest() failed: {_told(error)}") from error
        return hashlib.sha256(f"{self.name}\0{identity}".encode()).hexdigest()

    def _instance(self) -> Any:
        """The data set as this process built it: open files must not be shared after a fork."""
        if self._pid != os.getpid():
            self._images, self._pid = _build(self.name), os.getpid()
            found = _length(self._images, self.name)
            if found != self.length:
                raise DinoscopeError(
                    f"data set {self.name} has {found} images in one process and {self.length} in another; "
                    "it must have the same in all"
                )
        return self._images


def _build(name: str) -> Any:
    try:
        return user_code.load_class(name)()
    except Exception as error:
        raise ConfigError(
            f"train.dataset_path {name} is no folder, and as module:Class it cannot be built: {_told(error)}; the "
            "module must lie in the working directory or be installed, and the class takes no arguments"
        ) from error


def _length(images: Any, name: str) -> int:
    missing = [method for method in ("__len__", "__getitem__") if not hasattr(images, method)]
    if missing:
        raise ConfigError(f"data set {name} has no {missing[0]}; it needs __len__ and __getitem__(index)")
    try:
        return len(images)
    except Exception as error:
        raise ConfigError(f"data set {name}: its __len__ failed: {_told(error)}") from error


def _told(error: Exception) -> str:
    """An error of the user's code in one line, with the place it came from."""
    return user_code.told(error, __file__)


def _kind(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{type(value).__name__} of {value.dtype} and shape {tuple(value.shape)}"
    return f"a {type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "")
