"""The order of the zoo's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of a model follow each other, so that it is captured once (`checks.built`)."""
    places = [i for i, item in enumerate(items) if str(item.path).startswith(HERE)]
    models: dict[str, int] = {}

    def of(item: pytest.Item) -> int:
        call = getattr(item, "callspec", None)
        return models.setdefault(str(call and call.params.get("name")), len(models))

    for place, item in zip(places, sorted((items[i] for i in places), key=of), strict=True):
        items[place] = item
