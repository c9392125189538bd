"""The published sizes of the backbone, and how a recipe becomes the settings of one."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dinoscope.errors import ConfigError

if TYPE_CHECKING:
    from dinoscope.config import StudentConfig

__all__ = ["ARCHS", "ViTSettings", "settings_from_config"]


@dataclass(frozen=True)
class Arch:
    """One row of the table of sizes. `ffn` is fixed for the archs whose FFN no recipe chooses."""

    embed_dim: int
    depth: int
    num_heads: int
    ffn_ratio: float
    ffn: str | None = None


# The *_plus names are ours: published models that the published configs cannot express. vit_nano and vit_micro are for
# tests and the demo, vit_tiny is the size of that name everywhere else.
ARCHS = {
    "vit_nano": Arch(64, 2, 2, 4),
    "vit_micro": Arch(128, 6, 4, 4),
    "vit_tiny": Arch(192, 12, 3, 4),
    "vit_small": Arch(384, 12, 6, 4),
    "vit_small_plus": Arch(384, 12, 6, 6, "swiglu"),
    "vit_base": Arch(768, 12, 12, 4),
    "vit_large": Arch(1024, 24, 16, 4),
    "vit_large_plus": Arch(1024, 24, 16, 6, "swiglu"),
    "vit_so400m": Arch(1152, 27, 18, 3.777777778),
    "vit_huge2": Arch(1280, 32, 20, 4),
    "vit_huge_plus": Arch(1280, 32, 20, 6, "swiglu"),
    "vit_giant2": Arch(1536, 40, 24, 4),
    "vit_7b": Arch(4096, 40, 32, 3, "swiglu64"),
}


@dataclass(frozen=True)
class ViTSettings:
    """Everything that the shape and the arithmetic of a backbone depend on.

    `ffn_hidden` is the width inside the FFN. `drop_path_rate` and the rope_shift/jitter/rescale settings act in
    training only. Either `rope_base` or both `rope_min_period` and `rope_max_period` are set.
    """

    embed_dim: int
    depth: int
    num_heads: int
    ffn_hidden: int
    ffn_layer: str = "mlp"  # mlp | swiglu
    patch_size: int = 16
    in_chans: int = 3
    num_storage_tokens: int = 0
    qkv_bias: bool = True
    proj_bias: bool = True
    ffn_bias: bool = True
    mask_k_bias: bool = False
    norm_layer: str = "layernorm"
    layerscale: float | None = 1e-5
    untie_cls_and_patch_norms: bool = False
    untie_global_and_local_cls_norm: bool = False
    rope_base: float | None = 100.0
    rope_min_period: float | None = None
    rope_max_period: float | None = None
    rope_normalize_coords: str = "separate"
    rope_dtype: str = "fp32"
    rope_shift: float | None = None
    rope_jitter: float | None = None
    rope_rescale: float | None = None
    drop_path_rate: float = 0.0

    @property
    def arch(self) -> str:
        """Name of the row of ARCHS with these numbers, "custom" if there is none."""
        for name, arch in ARCHS.items():
            kind = arch.ffn or self.ffn_layer
            hidden = ffn_hidden(arch.embed_dim, arch.ffn_ratio, kind)
            sizes = (arch.embed_dim, arch.depth, arch.num_heads, hidden)
            same_kind = kind.startswith("swiglu") == (self.ffn_layer == "swiglu")
            if same_kind and sizes == (self.embed_dim, self.depth, self.num_heads, self.ffn_hidden):
                return name
        return "custom"

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for a model card."""
        return {"arch": self.arch, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ViTSettings":
        """The inverse of as_dict."""
        return cls(**{key: value for key, value in values.items() if key != "arch"})


def ffn_hidden(embed_dim: int, ratio: float, kind: str) -> int:
    """Width inside the FFN: ratio·D, or for swiglu[N] two thirds of it, rounded up to a multiple of N (default 8)."""
    hidden = int(embed_dim * ratio)
    if not kind.startswith("swiglu"):
        return hidden
    multiple = int(kind.removeprefix("swiglu") or 8)
    return -(-int(hidden * 2 / 3) // multiple) * multiple


def settings_from_config(student: "StudentConfig") -> ViTSettings:
    """The backbone that the `student` section of a recipe asks for.

    Raises:
        ConfigError: Unknown arch, or RoPE periods that are given neither by a base nor by both ends.
    """
    if student.arch not in ARCHS:
        raise ConfigError(f"student.arch is {student.arch!r}; choose one of {', '.join(ARCHS)}")
    arch = ARCHS[student.arch]
    kind = arch.ffn or student.ffn_layer
    ends = (student.pos_embed_rope_min_period, student.pos_embed_rope_max_period)
    by_ends = all(end is not None for end in ends)
    if not by_ends and (any(end is not None for end in ends) or student.pos_embed_rope_base is None):
        raise ConfigError("give student.pos_embed_rope_base, or both pos_embed_rope_min_period and _max_period")
    return ViTSettings(
        embed_dim=arch.embed_dim,
        depth=arch.depth,
        num_heads=arch.num_heads,
        ffn_hidden=ffn_hidden(arch.embed_dim, arch.ffn_ratio, kind),
        ffn_layer="swiglu" if kind.startswith("swiglu") else "mlp",
        patch_size=student.patch_size,
        in_chans=student.in_chans,
        num_storage_tokens=student.n_storage_tokens,
        qkv_bias=student.qkv_bias,
        proj_bias=student.proj_bias,
        ffn_bias=student.ffn_bias,
        mask_k_bias=student.mask_k_bias and student.qkv_bias,
        norm_layer=student.norm_layer,
        layerscale=student.layerscale or None,
        untie_cls_and_patch_norms=student.untie_cls_and_patch_norms,
        untie_global_and_local_cls_norm=student.untie_global_and_local_cls_norm,
        rope_base=None if by_ends else student.pos_embed_rope_base,
        rope_min_period=ends[0] if by_ends else None,
        rope_max_period=ends[1] if by_ends else None,
        rope_normalize_coords=student.pos_embed_rope_normalize_coords,
        rope_dtype=student.pos_embed_rope_dtype,
        rope_shift=student.pos_embed_rope_shift_coords,
        rope_jitter=student.pos_embed_rope_jitter_coords,
        rope_rescale=student.pos_embed_rope_rescale_coords,
        drop_path_rate=student.drop_path_rate,
    )
