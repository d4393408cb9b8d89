"""A sweep that is under way."""

import random

import pytest
from support.schedules import finish

from sweeps.search.schedule import Schedule


@pytest.fixture
def underway(small_cells):
    """A schedule and its records, after some of its trials have ended."""

    def build(stop_after, causes=lambda spec: None):
        schedule = Schedule(small_cells()[1])
        return schedule, finish(schedule, {}, random.Random(5), causes, stop_after)

    return build
