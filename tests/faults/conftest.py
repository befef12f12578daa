"""The recipe of the run that fault tests disturb."""

import pytest

from tests.faults.undisturbed import recipe_of as written


@pytest.fixture
def recipe_of(write_recipe):
    """Return a function that writes the recipe of a run that has everything in it: dropout, micro-batches, warm-up."""
    return lambda tuned, backend="torch": written(write_recipe, tuned, backend)
