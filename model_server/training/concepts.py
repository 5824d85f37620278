"""What each set's labels say of the concepts of the dense branch: what has boxes or masks, and what is absent.

A phrase is a counter-example on an image only where that set would have labelled the thing, or cannot hold it:
`UNLABELLED` lists what may be there without a label.
"""

from __future__ import annotations

from model_server.text.concepts import CONCEPTS, DISTRACTORS, Concept
from model_server.text.questions import askable_labels
from model_server.training.records import Record

__all__ = [
    "ABSENT_IN_SCENE", "ABSENT_WITH", "CONCEPTS", "DERIVED", "DISTRACTORS", "DISTRACTOR_SETS", "FULL_SCENES",
    "ONLY_IN_SCENE", "PRESENT_IN_SCENE", "PRESENT_WITH", "RIVALS", "SCENE_SETS", "UNLABELLED", "Concept", "absent",
    "boxed", "masked", "present",
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
    "parking_lot": ("water", "forest", "road"),
    "dense_residential": ("water", "forest"),
    "beach": ("road", "forest", "oil spill"),
    "harbor": ("forest", "road"),
    "desert": ("water", "forest", "road", "ship"),
    "bare_land": ("water", "forest", "ship"),
    "mountain": ("ship", "airplane", "car"),
    "meadow": ("ship", "airplane", "forest"),
    "square": ("forest", "ship"),
    "stadium": ("forest", "ship"),
    "railway_station": ("forest", "ship", "water"),
    "baseball_field": ("forest", "ship"),
    "parking": ("forest", "water", "ship"),
}
# Presence labels and scenes that say of a concept that it is somewhere, though not where.
PRESENT_WITH: dict[str, str] = {
    "water": "water", "sea": "water", "buildings": "building", "mobile_home": "building", "trees": "tree",
    "cars": "car", "airplane": "airplane", "ship": "ship",
}  # fmt: skip
PRESENT_IN_SCENE: dict[str, tuple[str, ...]] = {
    "freeway": ("road",), "overpass": ("road",), "intersection": ("road",), "viaduct": ("road",),
    "bridge": ("road", "water"), "river": ("water",), "pond": ("water",), "beach": ("water",),
    "port": ("water", "ship"), "harbor": ("water",),
}  # fmt: skip
SCENE_SETS = frozenset({"ucm", "rsicd_aid"})  # known by labels of the whole image only
# Where a scene's name is all that is known: the scenes that may hold a thing, which the others do not.
ONLY_IN_SCENE: dict[str, frozenset[str]] = {
    "airplane": frozenset({"airport"}),
    "ship": frozenset("beach bridge harbor industrial park pond port resort river storage_tanks viaduct".split()),
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
    if record.presence or record.set in SCENE_SETS:
        denied = [label for label in askable_labels(record.presence) if not record.presence[label]]
        by_label = {c for label in denied for c in ABSENT_WITH.get(label, ())}
        water = ("water",) if not any(record.presence.get(k, True) for k in ("water", "sea")) else ()
        elsewhere = {c for c, scenes in ONLY_IN_SCENE.items() if not record.presence and record.scene not in scenes}
        by_scene = set(ABSENT_IN_SCENE.get(record.scene or "", ()))
        return by_label | set(water) | by_scene | elsewhere | {"oil spill", "look-alike"}
    there = {label for o in record.objects for label in (o.label,)}
    labelled = boxed(record) | set(masked(record))
    out = set(CONCEPTS) - UNLABELLED.get(record.set, frozenset()) - labelled
    return {name for name in out if not CONCEPTS[name].labels & there}


def present(record: Record) -> set[str]:
    """Concepts that are somewhere on this image, by labels of the whole image."""
    by_label = {concept for label, concept in PRESENT_WITH.items() if record.presence.get(label)}
    return by_label | set(PRESENT_IN_SCENE.get(record.scene or "", ()))
