"""Encoders of other libraries and of the user's own, with the face of our backbones.

Hugging Face's and timm's models are built by these libraries, which are needed for this alone, from local files;
nothing is downloaded and no code of a model's folder is run.

Shapes: B images, D width, R storage (register) tokens, P patches, row by row.
"""

import importlib
import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinoscope import user_code
from dinoscope.errors import WeightsError
from dinoscope.files import read_json
from dinoscope.models.tensor_files import KINDS, listed, read_tensors
from dinoscope.models.vit import IMAGENET_MEAN, IMAGENET_STD
from dinoscope.names import nearest

__all__ = ["ENCODER_KINDS", "ForeignEncoder", "from_function", "from_hugging_face", "from_timm", "timm_folder"]

_log = logging.getLogger(__name__)

# Hugging Face's model types whose tokens are [CLS, further prefix tokens, patches]; how many further ones there are.
_HUGGING_FACE: dict[str, Callable[[Any], int]] = {
    "vit": lambda config: 0,
    "deit": lambda config: 1,
    "dinov2": lambda config: 0,
    "dinov2_with_registers": lambda config: config.num_register_tokens,
}
ENCODER_KINDS = (
    f"{KINDS}; a Hugging Face folder of model type {', '.join(_HUGGING_FACE)} or dinov3_vit; a timm folder "
    "(config.json with its architecture), or a timm file with the name of its architecture; a function "
    "module:function or FILE.py:function that returns a torch module"
)
_CLS_ONLY_PX = 224  # input of a user's function that names none


class ForeignEncoder(nn.Module):
    """A model of somebody else as an `Encoder` (encoders.py).

    Args:
        model: The model.
        tokens: Called with the model and normalised images, gives cls and, where there are any, storage and patches.
        image_px: Side of its input; tiles are resized to it. None: any multiple of the patch size.
        version: What else of it changes the features, for its digest.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Callable[[nn.Module, Tensor], Mapping[str, Tensor]],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        image_px: int | None,
        version: str = "",
    ) -> None:
        super().__init__()
        self.model, self._tokens = model, tokens
        self.mean, self.std, self.image_px, self.version = tuple(mean), tuple(std), image_px, version
        self.eval()
        self._measure()

    def forward_features(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) -> cls (B, D), storage (B, R, D) and, if it has patches, patches (B, P, D)."""
        out = dict(self._tokens(self.model, images))
        if out.get("storage") is None:
            out["storage"] = out["cls"][:, None][:, :0]
        return {name: value for name, value in out.items() if value is not None}

    def _measure(self) -> None:
        """Learns the shapes of what the model gives from one grey image."""
        side = self.image_px or _CLS_ONLY_PX
        with torch.inference_mode():
            out = self.forward_features(torch.zeros(1, 3, side, side))
        self.embed_dim, self.num_storage_tokens = out["cls"].shape[1], out["storage"].shape[1]
        self.patch_size = None
        if "patches" in out:
            grid = round(out["patches"].shape[1] ** 0.5)
            if grid * grid == out["patches"].shape[1] and side % grid:
                raise WeightsError(
                    f"the encoder's input of {side} x {side} px does not divide into its {grid} x {grid} patches; give "
                    "it a side that is a multiple of its patch size"
                )
            if grid * grid != out["patches"].shape[1]:
                raise WeightsError(
                    f"the encoder gives {out['patches'].shape[1]} patch tokens for {side} x {side} px, which is no "
                    "square grid; give only patches as `patches`"
                )
            self.patch_size = side // grid


def from_hugging_face(folder: Path, config: Mapping[str, Any]) -> ForeignEncoder:
    """A model of a local Hugging Face folder, with its own normalisation and input size.

    Raises:
        WeightsError: An unknown type of model, missing tensors, or transformers is not installed.
    """
    kind = config.get("model_type")
    if kind not in _HUGGING_FACE:
        raise WeightsError(
            f"{folder}: its config.json is of model type {kind!r}, which is none of the kinds that are known"
            f"{nearest(str(kind), _HUGGING_FACE)}; wanted: {ENCODER_KINDS}"
        )
    library = _library("transformers", "a Hugging Face folder")
    classes = {"vit": "ViTModel", "deit": "DeiTModel", "dinov2": "Dinov2Model"}
    options = {"add_pooling_layer": False} if kind in ("vit", "deit") else {}
    try:  # transformers imports only what is asked for
        factory = getattr(library, classes.get(kind, "Dinov2WithRegistersModel"))
        library.utils.logging.disable_progress_bar()
    except Exception as error:
        raise _not_importable("transformers", "a Hugging Face folder", error) from error
    try:
        model, told = factory.from_pretrained(
            str(folder), local_files_only=True, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{folder} cannot be read by transformers: {_in_one_line(error)}") from None
    if told["missing_keys"]:
        raise WeightsError(f"{folder} lacks tensors of a {kind} model: {listed(told['missing_keys'])}")
    count = _HUGGING_FACE[kind](model.config)
    mean, std, image_px = _preprocessing(folder)
    if image_px is None and kind in ("vit", "deit"):  # positions are learned for one size
        image_px = model.config.image_size

    patch_px = model.config.patch_size
    if image_px is not None and isinstance(patch_px, int) and image_px % patch_px:
        raise WeightsError(
            f"{folder}: the input side of {image_px} px does not divide into patches of {patch_px} px; correct the "
            "size in preprocessor_config.json"
        )

    def tokens(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        own_size = images.shape[-1] == getattr(model.config, "image_size", None)
        interpolate = {} if own_size or kind not in ("vit", "deit") else {"interpolate_pos_encoding": True}
        return _split(model(pixel_values=images, **interpolate).last_hidden_state, 1, count)

    return ForeignEncoder(model, tokens, mean, std, image_px)


def timm_folder(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of timm's."""
    return "architecture" in config


def from_timm(path: Path, architecture: str | None = None) -> ForeignEncoder:
    """A timm checkpoint: a folder with its config.json, or a file of tensors and the name of its architecture.

    Raises:
        WeightsError: timm does not know the architecture, tensors do not fit, or timm is not installed.
    """
    timm = _library("timm", "a timm checkpoint")
    try:
        if architecture is None:
            model = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0)
        else:
            model = timm.create_model(architecture, pretrained=False, num_classes=0)
            _load_timm_file(model, path)
    except (OSError, RuntimeError, KeyError, TypeError, AssertionError) as error:
        raise WeightsError(f"{path} cannot be read by timm: {_in_one_line(error)}") from None
    about = model.pretrained_cfg or {}
    mean, std = about.get("mean", IMAGENET_MEAN), about.get("std", IMAGENET_STD)
    return ForeignEncoder(model, _timm_tokens, mean, std, about.get("input_size", (3, _CLS_ONLY_PX))[-1])


def from_function(name: str) -> ForeignEncoder:
    """What the user's function returns: a module that gives (B, D), or a dictionary with cls and perhaps more.

    It is called without arguments. The module is called with normalised images (B, 3, image_px, image_px) in float32;
    of its attributes `mean`, `std`, `image_px` and `version` are read.

    Raises:
        WeightsError: There is no such function, it fails, or its module gives something else.
    """
    try:
        model = user_code.load_function(name)()
    except Exception as error:
        raise WeightsError(
            f"encoder {name} cannot be made: {user_code.told(error, __file__)}; the module must lie in the working "
            "directory or be installed, and the function takes no arguments"
        ) from error
    if not isinstance(model, nn.Module):
        raise WeightsError(f"encoder {name} returned a {type(model).__name__}, but wanted was a torch.nn.Module")
    image_px = getattr(model, "image_px", _CLS_ONLY_PX)
    mean, std = getattr(model, "mean", IMAGENET_MEAN), getattr(model, "std", IMAGENET_STD)
    if not (isinstance(image_px, int) and image_px > 0 and len(tuple(mean)) == len(tuple(std)) == 3):
        raise WeightsError(
            f"encoder {name} has image_px {image_px!r}, mean {mean!r} and std {std!r}, but wanted are a number of "
            "pixels and three numbers each"
        )
    _log.info("encoder %s: tiles at %d px, mean %s, std %s", name, image_px, tuple(mean), tuple(std))

    def tokens(model: nn.Module, images: Tensor) -> Mapping[str, Tensor]:
        return _checked(name, model(images), len(images))

    try:
        return ForeignEncoder(model, tokens, mean, std, image_px, str(getattr(model, "version", "")))
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(f"encoder {name} fails on a grey image: {user_code.told(error, __file__)}") from error


def _checked(name: str, out: Any, count: int) -> Mapping[str, Tensor]:
    """What the user's module gave, as tokens; refuses anything else."""
    given = {"cls": out} if isinstance(out, Tensor) else out
    wanted = {"cls": 2, "storage": 3, "patches": 3}
    is_right = (
        isinstance(given, Mapping)
        and "cls" in given
        and given.keys() <= wanted.keys()
        and all(value.ndim == wanted[key] and len(value) == count for key, value in given.items())
    )
    if not is_right:
        shown = {key: tuple(value.shape) for key, value in given.items()} if isinstance(given, Mapping) else given
        shown = tuple(out.shape) if isinstance(out, Tensor) else shown if isinstance(given, Mapping) else type(out)
        raise WeightsError(
            f"encoder {name} gave {shown} for {count} images, but wanted is a tensor (B, D), or a dictionary of cls "
            "(B, D) and perhaps storage (B, R, D) and patches (B, P, D)"
        )
    return given


def _timm_tokens(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    features = model.forward_features(images)
    num_prefix = getattr(model, "num_prefix_tokens", None)
    if features.ndim != 3 or num_prefix is None:  # no transformer of tokens: what its own pooling gives
        return {"cls": model.forward_head(features, pre_logits=True)}
    if not num_prefix:
        return {"cls": model.forward_head(features, pre_logits=True), "patches": features}
    return _split(features, 1, num_prefix - 1)


def _load_timm_file(model: nn.Module, path: Path) -> None:
    tensors = read_tensors(path)
    for key in ("state_dict", "model"):
        tensors = tensors[key] if isinstance(tensors.get(key), dict) else tensors
    heads = model.pretrained_cfg.get("classifier") or "head"
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(f"{h}." for h in heads))}
    model.load_state_dict(kept, strict=True)


def _split(tokens_BND: Tensor, num_cls: int, num_storage: int) -> dict[str, Tensor]:
    first = num_cls + num_storage
    return {"cls": tokens_BND[:, 0], "storage": tokens_BND[:, num_cls:first], "patches": tokens_BND[:, first:]}


def _preprocessing(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...], int | None]:
    """Mean, std and input size of a Hugging Face folder; the size is that of the crop, if it crops."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        _log.warning(
            "%s has no preprocessor_config.json: mean and std of the images are taken to be ImageNet's", folder.name
        )
        return IMAGENET_MEAN, IMAGENET_STD, None
    about = read_json(file)
    if about.get("do_normalize", True):
        mean, std = tuple(about.get("image_mean", IMAGENET_MEAN)), tuple(about.get("image_std", IMAGENET_STD))
    else:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    size = about.get("crop_size") if about.get("do_center_crop") else None
    size = size or about.get("size")
    if isinstance(size, Mapping):
        size = size.get("height") or size.get("shortest_edge")
    return mean, std, size


def _library(name: str, what: str) -> Any:
    if importlib.util.find_spec(name) is None:
        raise WeightsError(f"{what} needs the package {name}, which is not installed: pip install {name}")
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever it dies of, mostly of another version of torch than it wants
        raise _not_importable(name, what, error) from error


def _not_importable(name: str, what: str, error: Exception) -> WeightsError:
    return WeightsError(
        f"{what} needs the package {name}, which is installed but cannot be imported ({type(error).__name__}: "
        f"{_in_one_line(error)}); install a version that fits the installed torch"
    )


def _in_one_line(error: Exception) -> str:
    """An error of another library, as far as a person reads."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) < 300 else f"{words[:300]} …"
