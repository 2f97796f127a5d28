"""What several tests of verbs share."""

import pytest

from qlora import base_model


@pytest.fixture
def no_model_is_loaded(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(base_model, "load", load)
