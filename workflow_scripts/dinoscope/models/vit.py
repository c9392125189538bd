"""The DINOv3 vision transformer (arXiv:2508.10104).

Shape suffixes: B images, N tokens = 1 CLS + R storage + P patches, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dinoscope.models.layers import Block, BlockDraws, build_norm
from dinoscope.models.registry import ViTSettings
from dinoscope.models.rope import RotaryEmbedding2d, Rotation

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "BackboneOutput", "DinoVisionTransformer"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class BackboneOutput:
    """What the backbone makes of one group of crops."""

    cls_BD: Tensor
    storage_BRD: Tensor
    patches_BPD: Tensor
    prenorm_BND: Tensor


class PatchEmbed(nn.Module):
    """Images to patch tokens by one convolution whose stride is its size."""

    def __init__(self, settings: ViTSettings) -> None:
        super().__init__()
        patch = settings.patch_size
        self.proj = nn.Conv2d(settings.in_chans, settings.embed_dim, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, P, D), patches row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)


class DinoVisionTransformer(nn.Module):
    """Vision transformer with storage (register) tokens, 2-D RoPE, LayerScale, and the state-dict names of DINOv3.

    Weights are empty until `init_weights` or `load_state_dict`. `mean` and `std` are the normalisation that images were
    trained with (RGB in 0..1).
    """

    def __init__(self, settings: ViTSettings) -> None:
        super().__init__()
        self.settings = settings
        self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD
        width = settings.embed_dim
        self.patch_embed = PatchEmbed(settings)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        if settings.num_storage_tokens:
            self.storage_tokens = nn.Parameter(torch.empty(1, settings.num_storage_tokens, width))
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.rope_embed = RotaryEmbedding2d(
            width // settings.num_heads,
            base=settings.rope_base,
            min_period=settings.rope_min_period,
            max_period=settings.rope_max_period,
            normalize_coords=settings.rope_normalize_coords,
            dtype=settings.rope_dtype,
        )
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.depth))
        self.norm = build_norm(settings)
        self.cls_norm = build_norm(settings) if settings.untie_cls_and_patch_norms else None
        self.local_cls_norm = build_norm(settings) if settings.untie_global_and_local_cls_norm else None

    @property
    def embed_dim(self) -> int:
        """Width of the features."""
        return self.settings.embed_dim

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.settings.patch_size

    @property
    def num_storage_tokens(self) -> int:
        """Number of storage (register) tokens."""
        return self.settings.num_storage_tokens

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fills every parameter and buffer: the starting point of a training from scratch."""
        for module in self.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        nn.init.normal_(self.cls_token, std=0.02)
        if self.num_storage_tokens:
            nn.init.normal_(self.storage_tokens, std=0.02)
        nn.init.zeros_(self.mask_token)

    def forward(self, images: Tensor) -> Tensor:
        """CLS features (B, D) of normalised images (B, 3, H, W)."""
        return self.forward_features(images)["cls"]

    def forward_features(self, images: Tensor) -> dict[str, Tensor]:
        """Features of normalised images (B, 3, H, W), H and W multiples of the patch size.

        Returns:
            "cls" (B, D), "storage" (B, R, D) and "patches" (B, P, D, row by row), all after the final norm.
        """
        output = self.forward_crops([images])[0]
        return {"cls": output.cls_BD, "storage": output.storage_BRD, "patches": output.patches_BPD}

    def forward_crops(
        self,
        images: list[Tensor],
        masks: list[Tensor | None] | None = None,
        draws: list[list[BlockDraws]] | None = None,
        local: list[bool] | None = None,
    ) -> list[BackboneOutput]:
        """Forwards several groups of crops of different sizes at once.

        Args:
            images: One tensor (B, 3, H, W) a group.
            masks: Per group None, or (B, P) bool: True patches are replaced by the mask token.
            draws: Random numbers of training, [block][group].
            local: Which groups are local crops (they have a norm of their own under
                `untie_global_and_local_cls_norm`).
        """
        masks = masks or [None] * len(images)
        local = local or [False] * len(images)
        grids = [self._grid(group) for group in images]
        groups = [self._tokens(*group) for group in zip(images, masks, strict=True)]
        plain = [self.rope_embed(*grid) for grid in grids]
        for index, block in enumerate(self.blocks):
            block_draws = draws[index] if draws is not None else None
            groups = block(groups, self._rotations(grids, plain, block_draws), block_draws)
        return [self._output(*group) for group in zip(groups, local, strict=True)]

    def get_intermediate_layers(
        self, images: Tensor, n: int | list[int] = 1, *, reshape: bool = False, norm: bool = True
    ) -> list[Tensor]:
        """Patch features of several blocks.

        Args:
            images: Normalised images (B, 3, H, W).
            n: The last n blocks, or the indices of the blocks wanted.
            reshape: (B, D, H/patch, W/patch) instead of (B, P, D).
            norm: Apply the final norm.
        """
        depth = len(self.blocks)
        wanted = list(range(depth - n, depth)) if isinstance(n, int) else [index % depth for index in n]
        grid = self._grid(images)
        tokens, rotation = self._tokens(images, None), self.rope_embed(*grid)
        taken: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            (tokens,) = block([tokens], [rotation])
            if index in wanted:
                patches_BPD = tokens[:, 1 + self.num_storage_tokens :]
                taken[index] = self.norm(patches_BPD) if norm else patches_BPD
        features = [taken[index] for index in wanted]
        return [f.transpose(1, 2).unflatten(2, grid).contiguous() for f in features] if reshape else features

    def _grid(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"images are {height}×{width} px; both must be multiples of the patch size {self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    def _tokens(self, images: Tensor, mask_BP: Tensor | None) -> Tensor:
        patches_BPD = self.patch_embed(images)
        if mask_BP is not None:
            patches_BPD = torch.where(mask_BP[..., None], self.mask_token.to(patches_BPD.dtype), patches_BPD)
        batch = patches_BPD.shape[0]
        # without masks the mask token takes part with weight zero, so that it always has a gradient
        prefix = [(self.cls_token + 0 * self.mask_token).expand(batch, -1, -1)]
        if self.num_storage_tokens:
            prefix.append(self.storage_tokens.expand(batch, -1, -1))
        return torch.cat([*prefix, patches_BPD], 1)

    def _rotations(
        self, grids: list[tuple[int, int]], plain: list[Rotation], draws: list[BlockDraws] | None
    ) -> list[Rotation]:
        if draws is None:
            return plain
        groups = zip(grids, plain, draws, strict=True)
        return [self.rope_embed(*grid, draw.rope) if draw.rope is not None else fixed for grid, fixed, draw in groups]

    def _output(self, tokens_BND: Tensor, local: bool) -> BackboneOutput:
        num_prefix = 1 + self.num_storage_tokens
        prefix_norm = self.cls_norm or self.norm
        if local and self.training and self.local_cls_norm is not None:
            prefix_norm = self.local_cls_norm
        if prefix_norm is self.norm:
            normed = self.norm(tokens_BND)
            prefix, patches = normed[:, :num_prefix], normed[:, num_prefix:]
        else:
            prefix, patches = prefix_norm(tokens_BND[:, :num_prefix]), self.norm(tokens_BND[:, num_prefix:])
        return BackboneOutput(prefix[:, 0], prefix[:, 1:], patches, tokens_BND)
