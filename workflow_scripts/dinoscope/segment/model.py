"""A segmentation model: an encoder, frozen or adapted, and a decoder on its patch features.

Shapes: B images, C classes.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoscope.errors import ConfigError, WeightsError
from dinoscope.features.encoders import LoadedEncoder
from dinoscope.models.tensor_files import listed
from dinoscope.names import nearest
from dinoscope.segment.adapters import LoraSettings, adapter_parameters, add_adapters, merge_adapters
from dinoscope.segment.decoders import build_decoder
from dinoscope.segment.encoder_parts import blocks_of, patch_maps

if TYPE_CHECKING:
    from dinoscope.segment.files import SegmenterCard

__all__ = ["TRAINABLE", "Segmenter"]

TRAINABLE = ("decoder", "lora", "last_n", "full")
# parameters that no patch feature depends on; trained ones without a gradient would stop several GPUs
_NOT_OF_PATCHES = ("mask_token", "cls_norm.weight", "cls_norm.bias", "local_cls_norm.weight", "local_cls_norm.bias")


class Segmenter(nn.Module):
    """Logits of every pixel of normalised images.

    Args:
        encoder: From `load_encoder`. It belongs to the segmenter from then on, which adapts it in place.
        num_classes: C.
        decoder: One of `decoders.DECODERS`.
        lora: Adapters, or None.
        seed: Of the first weights of adapters and decoder.
        trainable: What of it is trained, one of `TRAINABLE`: the decoder alone; with adapters ("lora"); with the last
            blocks and the final norm in full; or all of it. None: "lora" where there are adapters, else "decoder".
        last_n: Blocks that "last_n" trains.

    Attributes:
        mean, std: Normalisation that images must have, RGB in 0..1.
        patch_size: Both sides of images must be multiples of it, in pixels.
        encoder_sha256, encoder_kind: Of the encoder as it was loaded.
        card: Of the file that it was loaded from (files.py), else None.

    Raises:
        ConfigError: A name that is unknown, settings that contradict each other, or an encoder that cannot do it.
    """

    def __init__(
        self,
        encoder: LoadedEncoder,
        num_classes: int,
        decoder: str = "linear",
        lora: LoraSettings | None = None,
        seed: int = 0,
        *,
        trainable: str | None = None,
        last_n: int = 1,
    ) -> None:
        super().__init__()
        self.trainable = ("decoder" if lora is None else "lora") if trainable is None else trainable
        self.num_classes, self.decoder_name, self.lora, self.last_n = num_classes, decoder, lora, last_n
        self.card: SegmenterCard | None = None
        self._check(encoder)
        self.encoder = encoder.model.eval().requires_grad_(False)
        self.encoder_sha256, self.encoder_kind = encoder.sha256, encoder.kind
        self.mean, self.std = tuple(encoder.model.mean), tuple(encoder.model.std)
        self.patch_size: int = encoder.model.patch_size
        self.decoder = build_decoder(decoder, encoder.model.embed_dim, num_classes, seed)
        if self.decoder.num_blocks > 1:
            blocks_of(self.encoder)
        if lora is not None:
            add_adapters(self.encoder, lora, seed)
        for name, parameter in self.encoder.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or self._trains(name))
        self.decoder.to(next(self.encoder.parameters()).device)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> logits (B, C, H, W), at least float32.

        Raises:
            ConfigError: H or W is no multiple of the patch size.
        """
        logits = self.decoder(patch_maps(self.encoder, images, self.decoder.num_blocks))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)

    def normalised(self, images: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8 -> (B, 3, H, W) float32 on their device, as `forward` wants them."""
        mean, std = (images.new_tensor(values, dtype=torch.float32) for values in (self.mean, self.std))
        return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()

    def train(self, mode: bool = True) -> "Segmenter":
        """Training mode for what is trained; a frozen or adapted encoder stays in evaluation mode."""
        super().train(mode)
        if self.trainable in ("decoder", "lora"):
            self.encoder.eval()
        return self

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Those with gradients, each once."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def trainable_state(self) -> dict[str, Tensor]:
        """All that training changes: "adapters.blocks.3.q.a", "decoder.classifier.weight", "encoder.…" (unfrozen)."""
        return {name: tensor.detach() for name, tensor in self._trained()}

    @torch.no_grad()
    def load_trainable(self, state: Mapping[str, Tensor], source: str = "the state") -> None:
        """Sets what training changes; every tensor must fit, none may be missing or left over.

        Args:
            state: As `trainable_state` gives it, on any device.
            source: What messages call it.

        Raises:
            WeightsError: Names the tensors that do not fit.
        """
        own = dict(self._trained())
        for names, what in (
            (own.keys() - state.keys(), "lacks tensors"),
            (state.keys() - own.keys(), "has tensors that have no place"),
            ({n for n in own.keys() & state.keys() if own[n].shape != state[n].shape}, "has wrongly shaped tensors"),
        ):
            if names:
                raise WeightsError(
                    f"{source} {what} in a {self.decoder_name} decoder of {self.num_classes} classes on a "
                    f"{self.encoder_kind} ({self.trainable} trained): {listed(names)}"
                )
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def merge(self) -> None:
        """Adds the adapters into the encoder's weights, for inference: the same logits but for rounding."""
        if self.lora is not None:
            merge_adapters(self.encoder)
            self.lora, self.trainable = None, "decoder" if self.trainable == "lora" else self.trainable

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        if self.lora is not None:
            for name, parameter in adapter_parameters(self.encoder).items():
                yield f"adapters.{name}", parameter
        if self.trainable in ("last_n", "full"):
            for name, parameter in self.encoder.named_parameters():
                if self._trains(name):
                    yield f"encoder.{name}", parameter
        for name, tensor in self.decoder.state_dict().items():
            yield f"decoder.{name}", tensor

    def _trains(self, name: str) -> bool:
        """Whether a parameter of the encoder's own is trained, by its name."""
        if self.trainable not in ("last_n", "full") or ".lora." in name or name.endswith(_NOT_OF_PATCHES):
            return False
        if self.trainable == "full":
            return True
        path, blocks = blocks_of(self.encoder)
        if name.startswith(f"{path}."):
            return int(name.removeprefix(f"{path}.").split(".")[0]) >= len(blocks) - self.last_n
        return name.rpartition(".")[0] in ("norm", "model.layernorm")

    def _check(self, encoder: LoadedEncoder) -> None:
        if self.trainable not in TRAINABLE:
            raise ConfigError(
                f"{self.trainable!r} is nothing that can be trained: choose from {', '.join(TRAINABLE)}"
                f"{nearest(self.trainable, TRAINABLE)}"
            )
        if (self.lora is None) == (self.trainable == "lora"):
            adapters = "no adapters are given" if self.lora is None else "adapters are given"
            raise ConfigError(f"{self.trainable!r} is to be trained, but {adapters}; adapters go with 'lora' alone")
        if self.num_classes < 2:
            raise ConfigError(f"the model is to have {self.num_classes} classes; at least 2 are wanted")
        if encoder.model.patch_size is None:
            raise ConfigError(f"the encoder ({encoder.kind}) gives no patch tokens, which segmentation needs")
        if self.trainable == "last_n" and not 1 <= self.last_n <= len(blocks_of(encoder.model)[1]):
            raise ConfigError(f"the last {self.last_n} blocks are to be trained; wanted is 1 to all of the encoder's")
