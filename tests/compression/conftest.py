"""The trained ViT, and the digits it was trained on, which the tests of this folder share."""

import compressible
import pytest


@pytest.fixture(scope="package")
def digits():
    return compressible.load_digits()


@pytest.fixture(scope="package")
def trained(digits):
    return compressible.train(digits, seed=0)
