"""Layers that differ by something that is no part of them: right or traced one by one, never wrong.

The table is tests/trust/hidden.py; the sixty that the slow test draws, and any others:

    python -m tests.trust.hidden 0 60
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import lora_fx
from tests.trust.hidden import EFFECTS, LENGTH, NEVER_ALIKE, PLACES, WIDTH, drawn, verdict

STILL = [place for place in PLACES if place not in NEVER_ALIKE]
FEW = (
    *(("shared_object", "length"), ("class_counter", "large"), ("vars", "far")),
    *(("hook_of_block", "mode"), ("environment", "length"), ("environment", "least")),
    *(("shared_list", "mode"), ("shared_queue", "length"), ("array_of_numpy", "least")),
    *(("array_of_bytes", "least"), ("array_of_c", "least"), ("event", "least")),
    ("metaclass", "least"),
)


@pytest.mark.parametrize(("place", "effect"), FEW)
def test_layers_that_differ_unseen_are_right(place: str, effect: str) -> None:
    found = verdict(place, effect)
    assert found.right, found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_sixty_drawn_models_are_right(seed: int) -> None:
    found = verdict(*drawn(seed))
    assert found.right, found


@pytest.mark.parametrize("place", ["shared_field", "vars", "closure"])
def test_layers_that_are_alike_are_traced_once(place: str) -> None:
    _alike(place, "value")


@pytest.mark.slow
@pytest.mark.parametrize("effect", ["length", "mode", "small"])
@pytest.mark.parametrize("place", STILL)
def test_every_place_that_holds_still_is_traced_once(place: str, effect: str) -> None:
    _alike(place, effect)


def _alike(place: str, effect: str) -> None:
    found = verdict(place, effect, moving=False)
    assert found.right, found
    assert found.copies == (2, 2)
    assert not found.notes


@pytest.mark.parametrize("place", ["shared_object", "class_counter", "vars"])
def test_insert_and_fold_are_right_beyond_the_example(place: str) -> None:
    """A clip of distances that only longer inputs reach, in layers of which each has its own."""
    torch.manual_seed(0)
    model = PLACES[place](EFFECTS["length"], 1).eval()
    x = torch.randn(2, LENGTH, WIDTH)
    inserted = lora_fx.insert(model, (x,), rank=2)
    for name, p in inserted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    adapter = inserted.adapter()
    changed = copy.deepcopy(model)
    for key, delta in adapter.deltas().items():
        changed.get_parameter(key).data += torch.from_numpy(delta).float()
    folded = lora_fx.fold(model, (x,), adapter=adapter)
    y = torch.randn(3, 4 * LENGTH, WIDTH)
    with torch.no_grad():
        want = changed(y)
        assert (want - model(y)).abs().max() > 0.05
        torch.testing.assert_close(inserted.eval()(y), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(folded(y), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["shared_list", "shared_queue"])
def test_a_model_that_cannot_be_copied_keeps_what_its_layers_share(place: str) -> None:
    """torch.export puts copies of lists in the places of those that the user's layers share."""
    torch.manual_seed(0)
    model = PLACES[place](EFFECTS["value"], 1).eval()
    model.lock = threading.Lock()
    model.seen = {"lists": [[1], (2, [3])]}
    x = torch.randn(2, LENGTH, WIDTH)
    want, thing, seen = model(x), model.layers[0].thing, model.seen
    cap = lora_fx.capture(model, (x,))
    assert cap.source.why
    assert all(layer.thing is thing for layer in model.layers)
    assert model.seen is seen and seen == {"lists": [[1], (2, [3])]}
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(lora_fx.insert(cap, rank=2)(x), want)
