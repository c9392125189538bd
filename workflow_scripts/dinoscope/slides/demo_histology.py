"""Draws stained tissue sections: epithelium in glands or nests, fibrous stroma, fat, lymphocytes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import cv2
import numpy as np

from dinoscope.slides.demo_texture import (
    COARSE,
    Packing,
    coarse_noise,
    draw_nuclei,
    jittered_points,
    magnified,
    pack,
    stain,
    tiling_noise,
    wrapped,
)

__all__ = ["Section", "draw_section", "draw_textures"]

_BAND = 64


@dataclass(frozen=True)
class Section:
    """What a section looks like; lengths in pixels of 0.5 um.

    Attributes:
        gland_px: Distance of the centres of neighbouring glands or nests.
        lumen: Share of glands that are hollow; 0 for solid nests.
        epithelium, fat, lymphoid: Share of the tissue, roughly.
        strength: Amount of dye against the usual.
        ground: Colour of the bare glass.
        ihc: Whether the epithelium is marked in brown (DAB) on a blue counterstain, instead of H&E.
    """

    gland_px: float = 280
    lumen: float = 0.85
    epithelium: float = 0.45
    fat: float = 0.12
    lymphoid: float = 0.06
    strength: float = 1.0
    ground: tuple[int, int, int] = (244, 243, 246)
    ihc: bool = False


@dataclass
class _Plan:
    """Where everything is: fields on the coarse grid, and nuclei drawn at full size."""

    tissue: np.ndarray
    gland: np.ndarray
    lumen: np.ndarray
    fat: np.ndarray
    lymphoid: np.ndarray
    marked: np.ndarray
    loose: np.ndarray
    adipose: np.ndarray
    bend: np.ndarray
    slant: float
    nuclei: np.ndarray
    membranes: np.ndarray
    noise: dict[str, np.ndarray] = field(default_factory=dict)


def draw_section(
    section: Section,
    height: int,
    width: int,
    seed: tuple[int, ...],
    textures: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:
    """Draws a section; uint8 (height, width, 3), RGB. Height and width are multiples of 64.

    Args:
        section: What it looks like.
        height: Of the image.
        width: Of the image.
        seed: Another one gives other tissue.
        textures: What fibres and cytoplasm are made of (`draw_textures`); drawn from the seed when not given, which
            takes most of the time of a small section.
    """
    rng = np.random.default_rng(seed)
    plan = _plan(section, height, width, rng)
    plan.noise = dict(textures or draw_textures(rng))
    image = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, _BAND):
        rows = min(_BAND, height - top)
        image[top : top + rows] = _colour_band(section, plan, top, rows, width)
    return image


def draw_textures(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Noise of fibres and of cytoplasm, by name; float32, square, without a seam."""
    return {
        "fibre": tiling_noise(rng, 2048, 34, 2.0),
        "coarse fibre": tiling_noise(rng, 2048, 90, 7),
        "fine": tiling_noise(rng, 1024, 1.1, 1.1),
        "cloud": tiling_noise(rng, 1024, 6, 6),
    }


def _plan(section: Section, height: int, width: int, rng: np.random.Generator) -> _Plan:
    tissue = _outline(height, width, rng)
    inside = tissue > 0
    region = coarse_noise(rng, height, width, 2600)
    packing = pack(rng, height, width, section.gland_px, section.gland_px / 3, section.gland_px / 14)
    gland = _chosen_glands(packing, region > np.quantile(region[inside], 1 - section.epithelium), inside)
    depth = np.where(gland, packing.depth, 0)
    gap = 25 + 8 * np.clip(coarse_noise(rng, height, width, 900), -1, 2)
    depth = np.clip(depth - gap, 0, None).astype(np.float32)
    lumen = _lumens(section, packing, depth, rng)
    fat_field = (
        coarse_noise(rng, height, width, 1600) + 0.15 * coarse_noise(rng, height, width, 300) - 2.5 * (depth > 0)
    )
    fat_field = cv2.GaussianBlur(fat_field.astype(np.float32), (0, 0), 8)
    fat_cells = pack(rng, height, width, 120, 24, 7)
    is_fat = fat_field > np.quantile(fat_field[inside], 1 - section.fat) if section.fat else np.zeros_like(inside)
    fat = np.where(is_fat, np.clip((fat_cells.depth - 7) / 4, 0, 1), 0).astype(np.float32)
    lymph_field = coarse_noise(rng, height, width, 900) + 0.5 * coarse_noise(rng, height, width, 160)
    lymph_field -= 3.0 * ((depth > 0) | is_fat)
    lymphoid = (lymph_field > np.quantile(lymph_field[inside], 1 - section.lymphoid)).astype(np.float32)
    lymphoid = np.where(depth > 0, 0, cv2.GaussianBlur(lymphoid, (0, 0), 6)).astype(np.float32)
    marked = np.clip(0.75 + 0.35 * coarse_noise(rng, height, width, 1400), 0.05, 1.2)
    bend = 130 * coarse_noise(rng, height, width, 1300) + 9 * coarse_noise(rng, height, width, 190)
    plan = _Plan(
        tissue,
        np.clip(depth / 4, 0, 1),
        lumen,
        fat,
        lymphoid,
        marked,
        coarse_noise(rng, height, width, 1100),
        cv2.GaussianBlur(is_fat.astype(np.float32), (0, 0), 2),
        bend.astype(np.float32),
        float(rng.uniform(-0.6, 0.6)),
        np.zeros((height, width), np.uint8),
        np.zeros((height, width), np.uint8),
    )
    _add_nuclei(section, plan, depth, is_fat, rng)
    plan.nuclei = cv2.GaussianBlur(plan.nuclei, (0, 0), 0.8)
    plan.membranes = cv2.GaussianBlur(plan.membranes, (0, 0), 1.0)
    return plan


def _outline(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Positive inside the tissue; a bent, ragged disc that fills most of the slide."""
    rows, columns = height // COARSE, width // COARSE
    y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j].astype(np.float32)
    lean = rng.uniform(-0.25, 0.25)
    x, y = x + lean * y, y - lean * x
    distance = (np.abs(x / 0.86) ** 2.6 + np.abs(y / 0.84) ** 2.6) ** (1 / 2.6)
    ragged = 0.065 * coarse_noise(rng, height, width, 2200) + 0.025 * coarse_noise(rng, height, width, 420)
    return (1 - distance + ragged + 0.006 * coarse_noise(rng, height, width, 90)).astype(np.float32)


def _chosen_glands(packing: Packing, wanted: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Where glands are: whole ones whose centre lies in a wanted place well inside the tissue."""
    deep = cv2.erode(inside.astype(np.uint8), np.ones((21, 21), np.uint8)).astype(bool)
    places = np.minimum((packing.centres / COARSE).astype(int), (wanted.shape[1] - 1, wanted.shape[0] - 1))
    chosen = (wanted & deep)[places[:, 1], places[:, 0]]
    chosen[0] = False
    return chosen[packing.labels] & inside


def _lumens(section: Section, packing: Packing, depth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How empty a place is, 0 to 1, on the coarse grid; nothing but the hollows of glands is."""
    count = len(packing.centres)
    height_of_cells = rng.uniform(44, 74, count)
    height_of_cells[rng.random(count) >= section.lumen] = np.inf
    ragged = 5 * coarse_noise(rng, depth.shape[0] * COARSE, depth.shape[1] * COARSE, 70)
    emptiness = np.clip((depth - height_of_cells[packing.labels] + ragged) / 6, 0, 1)
    return emptiness.astype(np.float32)


def _add_nuclei(section: Section, plan: _Plan, depth: np.ndarray, is_fat: np.ndarray, rng: np.random.Generator) -> None:
    height, width = plan.nuclei.shape
    inside = plan.tissue > 0.01

    def at(field: np.ndarray, points: np.ndarray) -> np.ndarray:
        places = (points / COARSE).astype(int)
        return field[np.minimum(places[:, 1], field.shape[0] - 1), np.minimum(places[:, 0], field.shape[1] - 1)]

    points = jittered_points(rng, height, width, 46)
    points = points[at(inside & (depth == 0) & ~is_fat & (plan.lymphoid < 0.5), points)]
    along = _fibre_angles(plan, points) + rng.normal(0, 9, len(points))
    draw_nuclei(plan.nuclei, rng, points, (17, 34), (3.2, 5.5), along, (0.6, 0.95))

    points = jittered_points(rng, height, width, 15)
    points = points[at(inside & (plan.lymphoid > 0.5), points)]
    draw_nuclei(plan.nuclei, rng, points, (11, 14.5), (1, 1.2), rng.uniform(0, 180, len(points)), (0.85, 1.0))

    lining = np.empty((0, 2))
    if section.lumen:
        lining, across = _lining(depth, spacing_px=12.5, depth_px=9, rng=rng)
        draw_nuclei(plan.nuclei, rng, lining, (17, 25), (1.6, 2.5), across, (0.6, 0.9))
    solid = (depth > (33 if section.lumen else 6)) & (plan.lumen == 0)
    if section.lumen:
        reach = cv2.dilate((plan.lumen > 0).astype(np.uint8), np.ones((17, 17), np.uint8)).astype(bool)
        solid &= ~reach
    cells = jittered_points(rng, height, width, 25)
    cells = cells[at(solid, cells)]
    draw_nuclei(plan.nuclei, rng, cells, (13, 24), (1.05, 1.6), rng.uniform(0, 180, len(cells)), (0.5, 0.9))
    _draw_membranes(plan.membranes, np.concatenate([lining, cells]))


def _fibre_angles(plan: _Plan, points: np.ndarray) -> np.ndarray:
    """Direction of the fibres at points, in degrees."""
    slope_y, slope_x = np.gradient(plan.bend, COARSE)
    places = (points / COARSE).astype(int)
    slope_x, slope_y = slope_x[places[:, 1], places[:, 0]], slope_y[places[:, 1], places[:, 0]]
    return np.degrees(np.arctan2(np.sin(plan.slant) - slope_x, np.cos(plan.slant) + slope_y))


def _lining(
    depth: np.ndarray, spacing_px: float, depth_px: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Points along the walls of glands at about the same depth, and the direction across the wall in degrees."""
    walls = cv2.findContours((depth > depth_px).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
    slope_x, slope_y = cv2.Sobel(depth, cv2.CV_32F, 1, 0, ksize=5), cv2.Sobel(depth, cv2.CV_32F, 0, 1, ksize=5)
    points, angles = [np.empty((0, 2))], [np.empty(0)]
    for wall in walls:
        path = wall[:, 0].astype(float)
        steps = np.hypot(*np.diff(path, axis=0, append=path[:1]).T)
        length = steps.sum() * COARSE
        if length < 4 * spacing_px:
            continue
        wanted = np.arange(0, length, spacing_px) / COARSE
        index = np.minimum(np.searchsorted(np.cumsum(steps), wanted), len(path) - 1)
        x, y = path[index].astype(int).T
        normal = np.stack([slope_x[y, x], slope_y[y, x]], axis=1)
        normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-6
        points.append((path[index] + 0.5) * COARSE + normal * rng.uniform(-1, 14, (len(index), 1)))
        angles.append(np.degrees(np.arctan2(normal[:, 1], normal[:, 0])))
    return np.concatenate(points), np.concatenate(angles)


def _draw_membranes(layer: np.ndarray, cells: np.ndarray) -> None:
    """Draws the borders between neighbouring cells into a uint8 layer."""
    height, width = layer.shape
    plane = cv2.Subdiv2D((0, 0, width, height))
    inside = ((cells >= 0) & (cells < (width, height))).all(axis=1)
    plane.insert(cells[inside].astype(np.float32).tolist())
    facets = [np.rint(facet * 8).astype(np.int32) for facet in plane.getVoronoiFacetList([])[0]]
    near = [facet for facet in facets if np.ptp(facet, axis=0).max() < 140 * 8]
    cv2.polylines(layer, near, True, 255, 2, cv2.LINE_AA, 3)


def _colour_band(section: Section, plan: _Plan, top: int, rows: int, width: int) -> np.ndarray:
    """Colours rows `top` to `top + rows`."""
    noise = {name: wrapped(plan.noise[name], top, rows, width) for name in ("fine", "cloud")}
    fibre = _fibres(plan, top, rows, width)
    fields = {
        name: magnified(getattr(plan, name), top, rows)
        for name in ("gland", "lumen", "fat", "lymphoid", "marked", "loose", "adipose")
    }
    outline = magnified(plan.tissue, top, rows) + 0.004 * noise["cloud"] + 0.004 * fibre
    tissue = np.clip(outline * 60, 0, 1)
    nuclei = plan.nuclei[top : top + rows] * np.float32(1 / 255)
    nuclei *= tissue * (1 + 0.22 * noise["fine"])
    membranes = plan.membranes[top : top + rows] * np.float32(1 / 255)
    gland = fields["gland"] * tissue
    full = tissue * (1 - fields["lumen"]) * (1 - fields["fat"])
    stroma = np.clip(full - gland, 0, 1)
    fibre -= np.clip(fields["loose"], 0, 1) * 0.5
    clefts = np.maximum(np.clip((fibre + 1.35) * 2.5, 0, 1), np.maximum(fields["lymphoid"], fields["adipose"]))
    collagen = stroma * clefts * (0.4 + 0.13 * fibre + 0.03 * noise["fine"]) * (1 - 0.5 * fields["lymphoid"])
    cytoplasm = gland * (1 - fields["lumen"]) * (1 + 0.16 * noise["cloud"] + 0.1 * noise["fine"])
    if section.ihc:
        dyes = _marked(fields["marked"], collagen, cytoplasm, membranes, nuclei)
    else:
        dyes = {
            "haematoxylin": 0.86 * nuclei + 0.17 * cytoplasm + 0.04 * collagen + 0.12 * stroma * fields["lymphoid"],
            "eosin": collagen + cytoplasm * (0.26 + 0.1 * membranes) - 0.1 * nuclei,
        }
    dyes = {name: section.strength * np.clip(amount, 0, None) for name, amount in dyes.items()}
    ground = np.array(section.ground, np.float32) + 0.8 * noise["fine"][..., None]
    return np.clip(np.rint(stain(dyes, ground)), 0, 255).astype(np.uint8)


def _marked(
    marked: np.ndarray, collagen: np.ndarray, cytoplasm: np.ndarray, membranes: np.ndarray, nuclei: np.ndarray
) -> dict[str, np.ndarray]:
    brown = marked * cytoplasm * (0.34 + 0.5 * membranes)
    return {"counterstain": 0.5 * nuclei + 0.14 * collagen, "dab": brown * (1 - 0.45 * np.clip(nuclei, 0, 1))}


def _fibres(plan: _Plan, top: int, rows: int, width: int) -> np.ndarray:
    """Collagen bundles that follow the bend of the tissue; deviation about 1."""
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(top, top + rows, dtype=np.float32))
    cos, sin = np.float32(np.cos(plan.slant)), np.float32(np.sin(plan.slant))
    along, across = cos * x + sin * y, -sin * x + cos * y + magnified(plan.bend, top, rows)
    options = {"interpolation": cv2.INTER_LINEAR, "borderMode": cv2.BORDER_WRAP}
    fine = cv2.remap(plan.noise["fibre"], along, across, **options)
    return 0.75 * fine + 0.55 * cv2.remap(plan.noise["coarse fibre"], along, across, **options)
