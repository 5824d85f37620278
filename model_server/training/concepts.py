"""What the dense branch is taught to find: concepts, the words for them, and which set can say what is absent.

A concept gathers labels of the sets that one phrase means. `said` are the phrasings of training; `held_out` are seen
by no training and tell how well other words are understood. A phrase is a counter-example on an image only where
that set would have labelled the thing, or cannot hold it: `UNLABELLED` lists what may be there without a label.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from model_server.training.records import Record


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

# Things that no set shows or that a set with complete labels would have named: always "not here" for the named sets.
DISTRACTORS = (
    "wind turbine", "swimming pool", "tennis court", "baseball field", "basketball court", "roundabout", "helicopter",
    "solar panels", "greenhouse", "stadium", "football field", "golf course", "windmill", "elephant", "snow",
    "railway station", "oil rig", "oil platform", "chimney", "water tower", "playground", "glacier", "volcano",
)  # fmt: skip

# What may be in a set's images without being labelled; concepts that overlap a labelled one belong here, too.
UNLABELLED: dict[str, frozenset[str]] = {
    "inshore_ships": frozenset(
        "car, vehicle, bus, truck, large vehicle, airplane, building, tree, road, water, land, forest".split(", ")
    ),
    "estonia_aerial": frozenset("tree, road, water, land, forest".split(", ")),
    "neon_trees": frozenset({"forest", "land"}),
    "hrsid_sar": frozenset("building, vehicle, car, truck, large vehicle, road, water, land, look-alike".split(", ")),
    "epfl_roads": frozenset(
        "water, forest, land, ship, car, vehicle, bus, truck, large vehicle, building, tree".split(", ")
    ),
    "flood": frozenset(
        "road, forest, land, ship, car, vehicle, bus, truck, large vehicle, building, tree".split(", ")
    ),
    "amazon_forest": frozenset("road, water, land, building, tree, ship".split(", ")),
    "oil_spill_sar": frozenset("ship, forest, building, tree, road".split(", ")),
}
DISTRACTOR_SETS = frozenset({"neon_trees", "hrsid_sar", "amazon_forest", "oil_spill_sar"})  # hold nothing of the list

# What the pixels of a labelled thing are not, even where a set does not label that.
RIVALS: dict[str, tuple[str, ...]] = {
    "road": ("water", "forest", "building"),
    "water": ("road", "forest", "building", "land"),
    "forest": ("road", "water", "building"),
}

# Masks that follow from other classes of a set: in a radar image of the sea, all that is not land or ship is water.
DERIVED: dict[str, dict[str, frozenset[str]]] = {
    "oil_spill_sar": {"water": frozenset({"background", "oil_spill", "look_alike"})},
}

# Presence labels of whole images: a label that is said to be absent, and the concepts that are then absent.
ABSENT_WITH: dict[str, tuple[str, ...]] = {
    "ship": ("ship",),
    "airplane": ("airplane",),
    "cars": ("car", "vehicle", "bus", "truck", "large vehicle"),
    "buildings": ("building",),
    "trees": ("tree", "forest"),
}
# Scenes that are one concept throughout, or cannot hold one.
FULL_SCENES = {"forest": "forest"}
ABSENT_IN_SCENE: dict[str, tuple[str, ...]] = {
    "forest": ("road", "ship", "airplane"),
    "chaparral": ("road", "water", "forest"),
    "agricultural": ("forest", "water"),
    "airplane": ("water", "forest"),
    "runway": ("water", "forest"),
    "storage_tanks": ("water", "forest"),
    "parking_lot": ("water", "forest"),
    "dense_residential": ("water", "forest"),
    "beach": ("road", "forest", "oil spill"),
    "harbor": ("forest", "road"),
}


def boxed(record: Record) -> set[str]:
    """Concepts whose every object has a box on this image (also those with none)."""
    known = {"inshore_ships": {"ship"}, "hrsid_sar": {"ship"}, "neon_trees": {"tree"},
             "estonia_aerial": {"car", "building", "watercraft", "bus", "truck", "airplane"}}  # fmt: skip
    labels = known.get(record.set, set())
    return {c.name for c in CONCEPTS.values() if c.labels & labels}


def masked(record: Record) -> dict[str, frozenset[int]]:
    """Concepts that the record's mask delineates, and the pixel values that are theirs."""
    unasked = UNLABELLED.get(record.set, frozenset())
    classes = {
        c.name: frozenset(v for v, name in record.mask_classes.items() if name in c.labels)
        for c in CONCEPTS.values()
        if c.name not in unasked
    }
    for name, members in DERIVED.get(record.set, {}).items():
        classes[name] = frozenset(v for v, label in record.mask_classes.items() if label in members)
    return {name: values for name, values in classes.items() if values}


def absent(record: Record) -> set[str]:
    """Concepts that are certainly nowhere on this image."""
    if record.presence or record.set == "ucm":
        by_label = {c for label, there in record.presence.items() if not there for c in ABSENT_WITH.get(label, ())}
        water = ("water",) if not any(record.presence.get(k, True) for k in ("water", "sea")) else ()
        return by_label | set(water) | set(ABSENT_IN_SCENE.get(record.scene or "", ())) | {"oil spill", "look-alike"}
    there = {label for o in record.objects for label in (o.label,)}
    labelled = boxed(record) | set(masked(record))
    out = set(CONCEPTS) - UNLABELLED.get(record.set, frozenset()) - labelled
    return {name for name in out if not CONCEPTS[name].labels & there}


def every_phrase(held_out: bool = False) -> list[str]:
    """All phrases of training, or all that are held out; sorted."""
    concepts: Iterable[Concept] = CONCEPTS.values()
    if held_out:
        return sorted({p for c in concepts for p in c.held_out})
    return sorted({p for c in concepts for p in c.said} | set(DISTRACTORS))
