"""What the jobs of pictures are told while planning: which places of which slides are shown at the scale of cells."""

import functools
import hashlib
from dataclasses import dataclass
from types import SimpleNamespace

from dinoscope.errors import ConfigError
from dinoscope.names import nearest
from dinoscope.plan import Plan

__all__ = ["PictureJobs", "PlannedRegion"]

_AUTO = "_auto"


@dataclass(frozen=True)
class PlannedRegion:
    """A place of a slide; `x` is None where it is looked for."""

    name: str
    slide: str
    x: int | None
    y: int | None
    size_px: int
    mpp: float | None
    points: tuple[tuple[int, int], ...] = ()


class PictureJobs:
    """Regions of a plan, by name, and the arguments of their jobs."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._settings = plan, plan.config["pca"]

    @functools.cached_property
    def regions(self) -> dict[str, PlannedRegion]:
        """Those that the config lists, then those that are looked for.

        Raises:
            ConfigError: A slide is unknown, or a region is listed twice.
        """
        found: dict[str, PlannedRegion] = {}
        for region in [*self._listed(), *self._looked_for()]:
            if region.name in found:
                raise ConfigError(f"config: pca.regions lists {region.name} twice; remove one")
            found[region.name] = region
        return found

    def region(self, name: str) -> PlannedRegion:
        """The region of that name; raises ConfigError with the nearest known name."""
        if name not in self.regions:
            raise ConfigError(f"there is no region {name!r} in pca.regions{nearest(name, self.regions)}")
        return self.regions[name]

    def wildcards(self, name: str) -> SimpleNamespace:
        """What stands for the wildcards of a job of the region's slide."""
        return SimpleNamespace(slide=self.region(name).slide)

    def arguments(self, name: str) -> list[str]:
        """Arguments of pca_regions.py that say where to look, all but the tiles."""
        region = self.region(name)
        if region.x is None:
            return ["--size-px", str(region.size_px), "--seed", str(self._settings["seed"])]
        mpp = region.mpp or self._plan.config["tiling"]["sets"][self._plan.config["features"]["set"]]["mpp"]
        where = ["--region", *map(str, (region.x, region.y, region.size_px, mpp))]
        points = [["--point", str(x), str(y)] for x, y in region.points]
        return where + [part for point in points for part in point]

    def _listed(self) -> list[PlannedRegion]:
        regions = []
        for listed in self._settings["regions"]:
            slide = self._plan.slide(listed["slide"]).slide_id
            size_px = listed.get("size_px", self._settings["region_px"])
            mpp = listed.get("mpp")
            name = f"{slide}_x{listed['x']}_y{listed['y']}_{size_px}px" + (f"_{mpp:g}mpp" if mpp else "")
            points = tuple((x, y) for x, y in listed.get("points", ()))
            regions.append(PlannedRegion(name, slide, listed["x"], listed["y"], size_px, mpp, points))
        return regions

    def _looked_for(self) -> list[PlannedRegion]:
        """Slides are drawn by seed and name; those that were shown before stay when others come."""
        folder = self._plan.results / "pca" / "regions"
        shown = {path.parent.name for path in folder.glob(f"*{_AUTO}/colors.png")}
        seed = self._settings["seed"]

        def rank(slide: str) -> tuple[bool, bytes]:
            return f"{slide}{_AUTO}" not in shown, hashlib.sha256(f"{seed} {slide}".encode()).digest()

        drawn = set(sorted(self._plan.feature_slides, key=rank)[: self._settings["auto_regions"]])
        return [
            PlannedRegion(f"{slide}{_AUTO}", slide, None, None, self._settings["region_px"], None)
            for slide in self._plan.feature_slides
            if slide in drawn
        ]
