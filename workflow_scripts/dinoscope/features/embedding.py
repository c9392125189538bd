"""Tiles in, rows of features out: normalisation, number format, forward pass and pooling on one device.

Shapes: B tiles a batch, D width of a token, R storage tokens, P = h·w patches a tile.
"""

import contextlib
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoscope.errors import ConfigError, FeaturesError
from dinoscope.features.encoders import Encoder
from dinoscope.features.gpus import take_free_gpu
from dinoscope.features.packed_linear import can_pack, pack_linears
from dinoscope.models.layers import Linear

__all__ = ["POOLINGS", "PRECISIONS", "Embedder", "choose_device", "choose_precision", "pool"]

POOLINGS = ("cls", "mean", "cls+mean", "cls+storage")
PRECISIONS = ("auto", "float32", "bfloat16")


class Embedder:
    """Embeds batches of tiles with one encoder.

    Args:
        model: An encoder in evaluation mode on `device`.
        name: How messages call it.
        pooling: One of `POOLINGS`.
        device: Where the model is.
        precision: One of `PRECISIONS`.
        dense: Also give the features of every patch.
        compile_for: Compile the forward pass for batches of so many tiles (shorter ones are filled up); None, run it as
            it is.
    """

    def __init__(
        self,
        model: Encoder,
        name: str,
        pooling: str,
        device: torch.device,
        *,
        precision: str = "auto",
        dense: bool = False,
        compile_for: int | None = None,
    ) -> None:
        self.model, self.name, self.pooling, self.device, self.dense = model, name, pooling, device, dense
        self.image_px: int | None = getattr(model, "image_px", None)
        self.dtype = choose_precision(device, precision)
        self._check_tokens()
        self._batch = compile_for
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._forward = model.forward_features
        if compile_for is not None:
            self._forward = torch.compile(model.forward_features, dynamic=False)
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1)
            for values in (model.mean, model.std)
        )

    def prepare(self) -> None:
        """Makes the model, which nobody else may use from then on, as fast as it gets on this machine."""
        if self.dtype != torch.float32:
            for module in self.model.modules():
                if isinstance(module, Linear):  # ours; autocast would round its weights anew for every batch
                    module.to(self.dtype)
        elif self.device.type == "cpu" and can_pack():
            pack_linears(self.model)

    @property
    def feature_dim(self) -> int:
        """Length of a row of features."""
        tokens = {"cls": 1, "mean": 1, "cls+mean": 2, "cls+storage": 1 + self.model.num_storage_tokens}
        return self.model.embed_dim * tokens[self.pooling]

    def patch_shape(self, tile_px: int, slide_id: str) -> tuple[int, int, int]:
        """(h, w, D) of the patch features of a tile.

        Raises:
            FeaturesError: The tile's side is no multiple of the patch size, and the encoder does not resize it.
        """
        patch_size, side = self.model.patch_size, self.image_px or tile_px
        if patch_size is None:
            return (0, 0, 0)
        if side % patch_size:
            below = side // patch_size * patch_size
            fitting = " or ".join(f"{fit} px" for fit in (below, below + patch_size) if fit)
            raise FeaturesError(
                f"slide {slide_id!r}: its tiles of {tile_px} px are no multiple of the {patch_size} px patches "
                f"of model {self.name!r}; use a tile set of {fitting}"
            )
        return side // patch_size, side // patch_size, self.model.embed_dim

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features of a batch of tiles, left on the device.

        Args:
            images: (B, H, W, 3) uint8.

        Returns:
            Pooled features (B, `feature_dim`) float32, and patch features (B, h, w, D) float16 or None.
        """
        count = len(images)
        with torch.inference_mode():
            pixels = self._resized(self._uploaded(images).permute(0, 3, 1, 2).float().div_(255))
            if self._batch is not None and count < self._batch:  # another batch size would be compiled anew
                pixels = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, self._batch - count))
            with self._autocast():
                out = self._forward((pixels - self._mean) / self._std)
            out = {name: tokens[:count] for name, tokens in out.items()}
            pooled = pool(out, self.pooling)
            if not self.dense:
                return pooled, None
            side = pixels.shape[-1] // self.model.patch_size
            return pooled, out["patches"].unflatten(1, (side, side)).half()

    def _uploaded(self, images: Tensor) -> Tensor:
        """On the device; to a GPU by a stream of its own, so that the copy runs beside the forward pass before."""
        if self._copies is None:
            return images.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copies):
            uploaded = images.to(self.device, non_blocking=True)
        current.wait_stream(self._copies)
        uploaded.record_stream(current)  # its memory is not reused before the forward pass has read it
        return uploaded

    def _resized(self, pixels: Tensor) -> Tensor:
        """At the side of the encoder's input, where that is fixed."""
        if self.image_px is None or pixels.shape[-1] == self.image_px:
            return pixels
        size = (self.image_px, self.image_px)
        return F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp_(0, 1)

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _check_tokens(self) -> None:
        if self.pooling == "cls+storage" and not self.model.num_storage_tokens:
            raise FeaturesError(
                f"model {self.name!r} has no storage tokens, so there is nothing to take for pooling 'cls+storage'; "
                "use cls, mean or cls+mean"
            )
        if self.model.patch_size is None and (self.dense or "mean" in self.pooling):
            what = "patch features" if self.dense else f"pooling {self.pooling!r}"
            raise FeaturesError(f"model {self.name!r} gives no patch tokens, which {what} needs; use pooling cls")


def pool(out: Mapping[str, Tensor], pooling: str) -> Tensor:
    """One row a tile from the tokens of an encoder, in float32.

    Args:
        out: cls (B, D), storage (B, R, D) and patches (B, P, D).
        pooling: One of `POOLINGS`; parts are concatenated.
    """
    parts = {
        "cls": lambda: [out["cls"]],
        "mean": lambda: [out["patches"].float().mean(dim=1)],
        "cls+mean": lambda: [out["cls"], out["patches"].float().mean(dim=1)],
        "cls+storage": lambda: [out["cls"], out["storage"].flatten(1)],
    }
    return torch.cat([part.float() for part in parts[pooling]()], dim=1)


def choose_device(name: str = "auto") -> torch.device:
    """The accelerator that is there, else the CPU; or the device that `name` says, e.g. "cuda:1".

    Of several GPUs it is one that no other extraction on this machine has taken.

    Raises:
        ConfigError: There is no such device.
    """
    if name != "auto":
        return _device(name)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return device
    names = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    return torch.device("cuda", take_free_gpu(names))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"there is no device {name!r} ({reason}); wanted is auto, cpu, or a GPU that torch sees, e.g. cuda:0"
        ) from None
    return device


def choose_precision(device: torch.device, name: str = "auto") -> torch.dtype:
    """Number format of the matrix products: bfloat16 on GPUs that have it, float32 elsewhere; or what `name` says.

    On CPUs bfloat16 is for those who ask: without units of its own it is slower than float32, and with them features
    are no longer the same to 1e-5 whatever the batch.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.float32 if device.type in ("cpu", "mps") else torch.bfloat16
