"""Fixtures of the data tests."""

import logging

import pytest

from helpers.pictures import Picture, load_pictures


@pytest.fixture(scope="session")
def pictures() -> list[Picture]:
    """Six captioned pictures."""
    return load_pictures(6)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log messages of the package from level INFO."""
    caplog.set_level(logging.INFO, logger="likewise")
    return caplog
