"""Which bands make the picture that the model sees, and what kind of measurement a raster holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rs_tools.errors import InputError
from rs_tools.results import Modality

# Red, green, blue of the products that most often have this many bands and no names:
# 3-4 RGB(N) aerial, but see below; 5-6 and 9-11 blue first (RapidEye, Landsat TM, Sentinel-2 without 60 m bands);
# 7 Landsat 8-9 surface reflectance; 8 WorldView; 12-13 Sentinel-2. Beyond that nothing is common.
_DEFAULT_RGB: dict[int, tuple[int, int, int]] = {
    3: (1, 2, 3),
    4: (1, 2, 3),
    5: (3, 2, 1),
    6: (3, 2, 1),
    7: (4, 3, 2),
    8: (5, 3, 2),
    9: (3, 2, 1),
    10: (3, 2, 1),
    11: (3, 2, 1),
    12: (4, 3, 2),
    13: (4, 3, 2),
}
# Four of more than eight bits are a satellite's: PlanetScope, WorldView, Sentinel-2 at 10 m.
_FOUR_OF_SATELLITES = (3, 2, 1)
_POLARISATIONS = {"vv", "vh", "hh", "hv"}
_SAR_WORDS = _POLARISATIONS | {"sar", "sigma0", "gamma0", "beta0", "backscatter", "s1a", "s1b", "s1c", "sentinel1"}
_ELEVATION_WORDS = {"dem", "dsm", "dtm", "elevation", "height", "altitude", "srtm", "chm"}


@dataclass(frozen=True)
class BandInfo:
    """One band as the file declares it. `index` counts from 1; `scaled`: its numbers have a scale or an offset."""

    index: int
    description: str
    color: str
    dtype: str
    scaled: bool = False


@dataclass(frozen=True)
class BandChoice:
    """One band (grey or palette) or three (red, green, blue), and how they were found.

    `declared` says that the file itself calls them its colours. `warning` is empty unless the choice is a guess.
    """

    indexes: tuple[int, ...]
    declared: bool
    warning: str = ""


def choose_bands(bands: Sequence[BandInfo], explicit: Sequence[int] = ()) -> BandChoice:
    """Explicit bands, else colour interpretation, else descriptions, else the commonest order with a warning.

    Raises:
        InputError: explicit bands are not one or three existing band numbers.
    """
    if explicit:
        return _explicit(bands, explicit)
    by_color = {band.color: band.index for band in reversed(bands)}
    if "palette" in by_color:
        return BandChoice((by_color["palette"],), declared=True)
    if {"red", "green", "blue"} <= by_color.keys():
        return BandChoice((by_color["red"], by_color["green"], by_color["blue"]), declared=True)
    shown = _shown(bands)
    return _by_description(shown) or _by_count(shown)


def guess_modality(
    bands: Sequence[BandInfo], choice: BandChoice, name: str, sample: np.ndarray | None
) -> tuple[Modality, str]:
    """The likeliest kind of measurement, and what the guess rests on.

    Args:
        bands: the raster's bands.
        choice: the bands shown.
        name: file name, whose words are a clue.
        sample: float [C, N] valid values of the chosen bands, scaled as the file says; None where none were needed.
    """
    words = _words(name)
    described = set().union(*(_words(band.description) for band in bands))
    if any(band.color == "palette" for band in bands):
        return "classified", "the band has a colour palette"
    if found := (described | words) & _SAR_WORDS:
        where = "band descriptions mention" if found & described else "the file name mentions"
        return "sar", f"{where} {', '.join(sorted(found))}"
    if any(band.dtype.startswith("complex") for band in bands):
        return "sar", "the values are complex"
    shown = _shown(bands)
    if len(shown) == 1:
        return _one_band(shown[0], described | words, sample)
    if len(shown) == 2:
        return "unknown", "two bands without names"
    if len(shown) == 3:
        return "optical", "three bands shown as red, green and blue"
    return "multispectral", f"{len(shown)} bands; {_listed(choice.indexes)} are shown as red, green and blue"


def _shown(bands: Sequence[BandInfo]) -> Sequence[BandInfo]:
    """The bands that hold a picture: all but alpha, which is one only where there is nothing else."""
    return [band for band in bands if band.color != "alpha"] or bands


def _one_band(band: BandInfo, words: set[str], sample: np.ndarray | None) -> tuple[Modality, str]:
    if found := words & _ELEVATION_WORDS:
        return "elevation", f"the band's description or the file name mentions {', '.join(sorted(found))}"
    if sample is None or sample.size == 0 or (band.dtype in {"uint8", "int8"} and not band.scaled):
        return "grayscale", "one band without a description"
    low, median, high = np.percentile(sample, [2, 50, 99.5])
    if -60 < low < -5 and median < 0 and high < 30:
        return "sar", f"one band with values from {low:.1f} to {high:.1f}, as decibels have"
    if heavy_tailed(sample):
        return "sar", f"one band with a few very bright values ({high / median:.0f} times the median)"
    if band.dtype.startswith("float"):
        return "unknown", "one band of decimal values without a description"
    return "grayscale", "one band without a description"


def heavy_tailed(sample: np.ndarray) -> bool:
    """Whether values are spread as radar amplitudes or intensities are: none negative, a few far above the rest."""
    if sample.size == 0 or sample.min() < 0:
        return False
    median, high = np.percentile(sample, [50, 99.5])
    return bool(median > 0 and high > 6 * median)


def _explicit(bands: Sequence[BandInfo], explicit: Sequence[int]) -> BandChoice:
    if len(explicit) not in (1, 3) or any(not 1 <= index <= len(bands) for index in explicit):
        raise InputError(
            f"bands must be one band number or three (red, green, blue) from 1 to {len(bands)}; got {list(explicit)}."
        )
    return BandChoice(tuple(explicit), declared=False)


def _by_description(bands: Sequence[BandInfo]) -> BandChoice | None:
    words = {band.index: _words(band.description) for band in bands}
    named = [_named(words, names) for names in ({"red", "r"}, {"green", "g"}, {"blue", "b"})]
    if all(named):
        return BandChoice(tuple(named), declared=False)
    numbered = [_named(words, names) for names in ({"b4", "b04"}, {"b3", "b03"}, {"b2", "b02"})]
    if all(numbered):
        warning = "B4, B3, B2 are shown as red, green, blue, as Sentinel-2 and Landsat 8-9 number them."
        return BandChoice(tuple(numbered), declared=False, warning=warning)
    for index, found in words.items():
        if found & _POLARISATIONS:
            return BandChoice((index,), declared=False)
    return None


def _by_count(bands: Sequence[BandInfo]) -> BandChoice:
    if len(bands) <= 2:
        return BandChoice((bands[0].index,), declared=False)
    positions = _DEFAULT_RGB.get(len(bands), (1, 2, 3))
    if len(bands) == 4 and bands[0].dtype != "uint8":
        positions = _FOUR_OF_SATELLITES
    chosen = tuple(bands[position - 1].index for position in positions)
    warning = (
        f"The file does not say which of its bands are colours; {_listed(chosen)} are shown as red, green, blue. "
        "Colours are false if that is wrong."
    )
    return BandChoice(chosen, declared=False, warning=warning)


def _named(words: dict[int, set[str]], names: set[str]) -> int:
    """The first band whose description has one of these words, 0 where none has. Red edge is not red."""
    return next((index for index, found in words.items() if found & names and not found & {"edge", "rededge"}), 0)


def _words(text: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", text.lower())) - {""}


def _listed(indexes: Sequence[int]) -> str:
    return ", ".join(map(str, indexes))
