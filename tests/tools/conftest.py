"""What the tests of tools share."""

from __future__ import annotations

import pytest
from planted import PlantedModel


@pytest.fixture
def model() -> PlantedModel:
    return PlantedModel()
