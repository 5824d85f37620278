"""The words that boxes and masks are taught in: concepts, the phrases for them, and things that are never there.

A concept gathers labels of the sets that one phrase means. `said` are the phrasings of training; `held_out` are seen
by no training and tell how well other words are understood.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Concept:
    """One meaning. `labels` are names of objects or mask classes that it covers."""

    name: str
    labels: frozenset[str]
    said: tuple[str, ...]
    held_out: tuple[str, ...]


def _concept(name: str, labels: str, said: str, held_out: str) -> Concept:
    def split(text: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in text.split(","))

    return Concept(name, frozenset(labels.split()), split(said), split(held_out))


CONCEPTS = {
    c.name: c
    for c in (
        _concept(
            "ship", "ship watercraft",
            "ship, ships, a ship, the ships, boat, a boat, a large ship, cargo ship, cargo ships, ship at sea, vessel, "
            "moored ships, watercraft, ship in a harbour, naval ship, warships, ferry, fishing boat, yacht, "
            "ships at anchor, container ship, all ships in the image, small boats, sailing boat, barge, motorboat",
            "vessels, boats, tanker, freighter, marine vessel",
        ),
        _concept(
            "car", "car",
            "car, cars, a car, the cars, parked cars, passenger car, small vehicle, small vehicles, sedan, parked car, "
            "a small car, cars on the road, automobile, cars in a parking lot, van, moving cars, all cars",
            "automobiles, motor car, private cars",
        ),
        _concept(
            "vehicle", "car bus truck",
            "vehicle, vehicles, a vehicle, motor vehicles, road vehicle, cars and trucks, parked vehicles, "
            "all vehicles, wheeled vehicles, traffic",
            "cars and buses, road vehicles, motor vehicle",
        ),
        _concept("bus", "bus", "bus, buses, a bus, city bus, parked buses, coach", "public bus"),
        _concept("truck", "truck", "truck, trucks, a truck, lorry, large truck, heavy truck", "lorries"),
        _concept(
            "large vehicle", "bus truck", "large vehicle, large vehicles, buses and trucks, heavy vehicles",
            "big vehicles",
        ),
        _concept(
            "airplane", "airplane",
            "airplane, airplanes, plane, planes, a plane, aircraft on the ground, jet, parked airplane, passenger jet, "
            "small plane, aeroplane, parked planes, airliner, propeller plane",
            "aircraft, jets, aeroplanes",
        ),
        _concept(
            "building", "building",
            "building, buildings, a building, house, houses, a house, roof, rooftops, residential building, the roofs, "
            "industrial building, warehouse, apartment building, built structure, garage, all buildings, shed",
            "dwellings, homes, rooftop, edifice",
        ),
        _concept(
            "tree", "tree",
            "tree, trees, a tree, tree crown, tree crowns, single tree, treetop, individual trees, canopy of a tree, "
            "deciduous tree, conifer, the trees, pine tree, broadleaf tree, oak tree",
            "tree canopy, treetops, trees seen from above",
        ),
        _concept(
            "road", "road",
            "road, roads, a road, the road, street, streets, paved road, road network, asphalt road, city street, "
            "road surface, residential street, main road, avenue, lane, the roads in the image, driveway and road",
            "highway, roadway, motorway, streets and roads",
        ),
        _concept(
            "water", "water",
            "water, the water, water surface, flood water, flooded land, river, a river, water body, lake, flooding, "
            "flooded streets, standing water, sea, water bodies, pond, open water, floodwater in a village, ocean, "
            "inundated land, reservoir, canal, submerged land, areas under water",
            "flooded area, flood, flooded fields, surface water, rivers and lakes",
        ),
        _concept(
            "forest", "forest",
            "forest, forests, the forest, woodland, forest cover, tropical forest, rainforest, dense forest, "
            "tree cover, forested land, jungle, forest area, wooded land, untouched forest",
            "woods, forested area, rain forest, trees covering the land",
        ),
        _concept(
            "oil spill", "oil_spill",
            "oil spill, oil, an oil spill, oil slick, oil on water, oil pollution, oil film on the sea, spilled oil, "
            "oil spills, crude oil on the sea surface, marine oil pollution",
            "oil slicks, oil leak at sea, petroleum spill",
        ),
        _concept(
            "look-alike", "look_alike",
            "oil look-alike, look-alike, look alikes, dark area that is no oil, natural slick, biogenic film, "
            "low wind area, oil spill look-alike, false oil slick",
            "lookalike, natural film on the sea",
        ),
        _concept(
            "land", "land",
            "land, land area, dry land, the land, coast, island, land surface, mainland, shore",
            "landmass, islands",
        ),
    )
}

# Things that no set shows, or that a set with complete labels would have named: taught as "not here" only.
DISTRACTORS = (
    "wind turbine", "swimming pool", "tennis court", "baseball field", "basketball court", "roundabout", "helicopter",
    "solar panels", "greenhouse", "stadium", "football field", "golf course", "windmill", "elephant", "snow",
    "railway station", "oil rig", "oil platform", "chimney", "water tower", "playground", "glacier", "volcano",
)  # fmt: skip


def every_phrase(held_out: bool = False) -> list[str]:
    """All phrases of training, or all that are held out; sorted."""
    concepts: Iterable[Concept] = CONCEPTS.values()
    if held_out:
        return sorted({p for c in concepts for p in c.held_out})
    return sorted({p for c in concepts for p in c.said} | set(DISTRACTORS))
