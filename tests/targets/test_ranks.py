"""Ranks by key, as insert takes them from Python."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from lora_fx import Adapter, LoraFxError, LowRank
from lora_fx.targets.rank_plan import given_ranks

WRONG_PLANS: dict[str, tuple[Any, str]] = {
    "a text as rank": ({"fc.weight": "x"}, "rank of 'fc.weight' is 'x'"),
    "a fraction as rank": ({"fc.weight": {"rank": 1.5}}, "rank of 'fc.weight' is 1.5"),
    "a truth as rank": ({"fc.weight": True}, "rank of 'fc.weight' is True"),
    "nothing as rank": ({"fc.weight": None}, "rank of 'fc.weight' is None"),
    "an object as rank": ({"fc.weight": object()}, "rank of 'fc.weight' is of type object"),
    "a text as alpha": ({"fc.weight": {"rank": 2, "alpha": "q"}}, "alpha of 'fc.weight' is 'q'"),
    "another field": ({"fc.weight": {"rank": 2, "scale": 1.0}}, "'scale' of 'fc.weight'"),
    "an adapter": (
        Adapter({"fc.weight": LowRank(np.ones((2, 4), "f4"), np.ones((3, 2), "f4"), 2.0)}),
        "rank of 'fc.weight' is of type LowRank",
    ),
    "a list": ([1], "the plan has the type list"),
    "a number": (3, "the plan has the type int"),
}


@pytest.mark.parametrize("name", WRONG_PLANS)
def test_a_wrong_plan_is_refused_by_name(name: str) -> None:
    given, message = WRONG_PLANS[name]
    with pytest.raises(LoraFxError, match=re.escape(message)):
        given_ranks(given)


def test_numbers_of_numpy_are_numbers() -> None:
    ranks, _ = given_ranks(
        {"fc.weight": np.int64(4), "w": {"rank": np.int32(2), "alpha": np.float32(3)}}
    )
    assert ranks == {"fc.weight": {"rank": 4}, "w": {"rank": 2, "alpha": 3.0}}
