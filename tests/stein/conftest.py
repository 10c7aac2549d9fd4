"""Where the tests of the public functions run: contract tests have every implementation."""

from collections.abc import Iterator

import pytest
import torch

from fekernels._runtime import backends
from tests.support.implementations import Place

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def backend(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Each device, and the backend that is taken there by itself."""
    yield Place(backends.choose(request.param, kernel="svgd_direction"), request.param)
