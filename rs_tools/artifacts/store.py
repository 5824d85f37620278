"""Files that answers refer to: masks (COG), vectors (GeoJSON) and previews (PNG)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from affine import Affine

from rs_tools.artifacts.features import Feature, write_geojson
from rs_tools.artifacts.folder import ArtifactFolder, reported
from rs_tools.artifacts.mask import MaskWriter
from rs_tools.results import Artifact, Provenance


class ArtifactStore(ArtifactFolder):
    """The folder, and what can be put into it."""

    def mask(
        self,
        size: tuple[int, int],
        classes: Mapping[int, str],
        crs_wkt: str | None = None,
        transform: Affine | None = None,
    ) -> MaskWriter:
        """A class mask to be written row by row; used in a `with` block, after which it has an `artifact`.

        Args:
            size: (width, height).
            classes: mask value (1 to 254) -> class name.
            crs_wkt, transform: of the mask's own grid; None for an image without.
        """
        return MaskWriter(self, size, classes, crs_wkt, transform)

    def vectors(
        self,
        features: Iterable[Feature],
        provenance: Provenance,
        warnings: Sequence[str] = (),
        *,
        lonlat: bool = True,
        gsd_m: float | None = None,
    ) -> Artifact:
        """Features as GeoJSON (RFC 7946) with provenance and warnings as members of the collection.

        Args:
            features: placed by `geometry.vectors.placed`.
            provenance, warnings: of the answer.
            lonlat: False where the image has no place on Earth: geometries are in pixels, the file says so and is
                named and typed as plain JSON, so that no map shows it at the Gulf of Guinea.
            gsd_m: metres per pixel; coordinates are rounded to about a fiftieth of that.
        """
        with self.writing("vectors", ".geojson" if lonlat else ".pixels.json") as (path, done), reported("vectors"):
            write_geojson(path, features, provenance, warnings, lonlat=lonlat, gsd_m=gsd_m)
            return done()

    def preview(self, png: bytes) -> Artifact:
        """A PNG of `rs_tools.preview`."""
        with self.writing("preview", ".png") as (path, done), reported("preview"):
            path.write_bytes(png)
            return done()
