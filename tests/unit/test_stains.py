"""Stains that distortions go by are part of what a run is sealed with."""

from pathlib import Path

from dinoscope.data.dataset import stains_digest
from dinoscope.data.tiles import open_tiles
from dinoscope.recipe import resolve_recipe
from tiny_slides import write_manifest, write_slide


def test_the_digest_follows_stains_where_they_count(tmp_path: Path) -> None:
    slides = [write_slide(tmp_path / f"s{seed}.tiff", seed, side=256) for seed in (1, 2)]
    write_manifest(tmp_path / "train.parquet", [slide.stem for slide in slides], slide_px=256, tile_px=128)

    def digest(stains: list[str], recipe: str = "pathology") -> str | None:
        rows = "".join(f"{slide.stem}\t{slide}\t{stain}\n" for slide, stain in zip(slides, stains, strict=True))
        (tmp_path / "slides.tsv").write_text(f"slide_id\tpath\tstain\n{rows}")
        images = open_tiles(tmp_path / "train.parquet", str(tmp_path / "slides.tsv"))
        return stains_digest(images, resolve_recipe([("test", {"augmentation": {"recipe": recipe}})], "test"))

    first = digest(["HE", "IHC:CD3"])
    assert first == digest(["HE", "IHC:Ki67"])  # the marker changes nothing
    assert first != digest(["HE", "HE"])
    assert digest(["HE", "HE"], "dinov3") is None
