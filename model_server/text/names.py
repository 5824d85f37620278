"""Names of labels."""


def readable(name: str) -> str:
    """A label as people write it: `storage_tanks` -> `storage tanks`."""
    return name.replace("_", " ").strip().lower()
