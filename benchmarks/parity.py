"""How closely the backbone agrees with other implementations, with the same random weights in float32.

    python benchmarks/parity.py [--blocks 4] [--archs vit_small vit_base]

Prints a table: the largest absolute difference over the largest absolute value, for CLS, storage and patch tokens. The
references are transformers, timm (both as installed by requirements-test.txt) and plain float64 formulas. timm computes
the same float32 operations in the same order as we do while its attention is fused, so that zero there means the same
bits; the rows against timm in float64 show how far rounding carries both.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "workflow_scripts")]

from dinoscope.config import StudentConfig  # noqa: E402
from dinoscope.models.registry import ARCHS, settings_from_config  # noqa: E402
from dinoscope.models.weights import load_backbone  # noqa: E402
from naive_vit import naive_forward  # noqa: E402
from other_libraries import (  # noqa: E402
    random_backbone,
    relative_error,
    require,
    save_transformers,
    timm_model,
    tokens_of,
    transformers_model,
)

SIZES = [(224, 224), (96, 96), (160, 256)]
NAIVE = {
    "as published": {},
    "rmsnorm": {"norm_layer": "rmsnorm"},
    "untied norms": {"untie_cls_and_patch_norms": True, "untie_global_and_local_cls_norm": True},
    "RoPE periods 0.7 to 40": {"rope_base": None, "rope_min_period": 0.7, "rope_max_period": 40.0},
    "coordinates by the longer side": {"rope_normalize_coords": "max"},
    "coordinates by the shorter side": {"rope_normalize_coords": "min"},
    "no biases, no storage tokens": {
        "qkv_bias": False,
        "mask_k_bias": False,
        "proj_bias": False,
        "ffn_bias": False,
        "num_storage_tokens": 0,
    },
}


def errors(found: torch.Tensor, expected: torch.Tensor, storage: int) -> list[float | None]:
    """Relative errors of CLS, storage and patch tokens."""
    parts = (slice(0, 1), slice(1, 1 + storage), slice(1 + storage, None))
    return [relative_error(found[:, p], expected[:, p]) if found[:, p].numel() else None for p in parts]


def images(size: tuple[int, int]) -> torch.Tensor:
    """One normalised image."""
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))


def against_libraries(arch: str, blocks: int) -> Iterator[tuple]:
    """Rows for transformers and timm, whose models are written to disk and read by load_backbone."""
    depth = min(blocks, ARCHS[arch].depth)
    name = arch if depth == ARCHS[arch].depth else f"{arch}, {depth} blocks"
    with tempfile.TemporaryDirectory() as folder:
        for library in ("transformers", "timm"):
            if library == "transformers":
                theirs = transformers_model(arch, num_hidden_layers=depth)
                save_transformers(theirs, f"{folder}/hf")
                ours = load_backbone(f"{folder}/hf")
            else:
                theirs = timm_model(arch, suffix="" if arch == "vit_large" else "_qkvb", depth=depth)
                torch.save(theirs.state_dict(), f"{folder}/timm.pth")
                ours = load_backbone(f"{folder}/timm.pth")
            reference = f"{library} {require(library).__version__}"
            found = {size: tokens_of(ours, images(size)) for size in SIZES}
            for size in SIZES:
                yield name, reference, size, errors(found[size], tokens_of(theirs, images(size)), storage=4)
            if library == "timm":
                theirs.double()
                for size in SIZES:
                    expected = tokens_of(theirs, images(size).double())
                    yield name, f"{reference}, in float64", size, errors(found[size], expected, storage=4)


def against_formulas(arch: str) -> Iterator[tuple]:
    """Rows for the float64 formulas; two blocks, small images: they are slow."""
    student = StudentConfig(arch=arch, n_storage_tokens=4, mask_k_bias=True, norm_layer="layernormbf16")
    published = dataclasses.replace(settings_from_config(student), depth=2, rope_dtype="fp32")
    for name, changes in NAIVE.items():
        model = random_backbone(dataclasses.replace(published, **changes))
        for size in ((64, 128), (160, 96)):  # not square: the side that divides the coordinates counts
            expected = torch.from_numpy(naive_forward(model, images(size)[0]))[None]
            found = errors(tokens_of(model, images(size)), expected, model.num_storage_tokens)
            yield f"{arch}, 2 blocks: {name}", "float64 formulas", size, found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    libraries = ["vit_small", "vit_small_plus", "vit_base", "vit_large"]
    parser.add_argument("--archs", nargs="+", default=libraries, choices=libraries, help="for transformers and timm")
    parser.add_argument("--blocks", type=int, default=1000, help="at most so many blocks of each")
    arguments = parser.parse_args()
    print("| backbone | reference | image, px | CLS | storage | patches |\n|---|---|---|---:|---:|---:|")
    rows = [row for arch in arguments.archs for row in against_libraries(arch, arguments.blocks)]
    rows += [row for arch in ("vit_tiny", "vit_small_plus") for row in against_formulas(arch)]
    for name, reference, (height, width), found in rows:
        values = " | ".join("–" if value is None else f"{value:.1e}" for value in found)
        print(f"| {name} | {reference} | {height}×{width} | {values} |")


if __name__ == "__main__":
    main()
