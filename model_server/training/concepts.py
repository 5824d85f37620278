"""What each set's labels say of the concepts of the dense branch: what has boxes or masks, and what is absent.

A phrase is a counter-example on an image only where that set would have labelled the thing, or cannot hold it:
`UNLABELLED` lists what may be there without a label.
"""

from __future__ import annotations

from model_server.text.concepts import CONCEPTS, DISTRACTORS, Concept
from model_server.training.records import Record

__all__ = [
    "ABSENT_IN_SCENE", "ABSENT_WITH", "CONCEPTS", "DERIVED", "DISTRACTORS", "DISTRACTOR_SETS", "FULL_SCENES", "RIVALS",
    "UNLABELLED", "Concept", "absent", "boxed", "masked",
]  # fmt: skip

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
