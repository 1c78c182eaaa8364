"""Forms of images: pure functions of whose an image is and the seed, stored with their scores, part of what data are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from every import every
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.ndimage import gaussian_filter

from fedmoe_ds.config.data_form_section import DataFormConfig
from fedmoe_ds.config.data_section import DataConfig, PartitionConfig
from fedmoe_ds.data import FederatedData, Sequences, check_task, digits, prepare
from fedmoe_ds.data.dealing import NOBODY
from fedmoe_ds.data.forms import FORMS, Dealt
from fedmoe_ds.data.forms.colours import in_any_colours, painted
from fedmoe_ds.data.forms.degraded import degraded, severities
from fedmoe_ds.data.forms.grey_and_colour import grey_and_colour, hues
from fedmoe_ds.data.forms.spurious_colour import inks, spurious_colour
from fedmoe_ds.data.task import ImageInput
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.builtin.presets import PRESETS

FORM_KEYS = {key for key in DataFormConfig.model_fields if key != "kind"}
OTHER: dict[str, list[dict[str, Any]]] = {
    "plain": [{}],
    "degraded": [{"kind": "degraded"}, {"blur": 2.0}, {"noise": 0.1}, {"skew": 0.9}],
    "low-resolution": [{}],
    "spurious-colour": [
        {"kind": "spurious-colour"},
        {"agreement": [0.5]},
        {"holdout_agreement": 0.5},
        {"tied_to": "class"},
    ],
    "grey-and-colour": [{"kind": "grey-and-colour"}, {"spread": 0.1}],
}
"""By kind: what each gives other data than the ones before it."""


def config(form: dict[str, Any] | None = None, **data: Any) -> DataConfig:
    partition = PartitionConfig(kind="iid", clients=4)
    return DataConfig(source="digits", partition=partition, form=DataFormConfig(**(form or {})), **data)


def dealt(seed: int = 0, clients: int = 3, images: int = 12) -> Dealt:
    given = digits.split()[1]
    client_N = np.arange(images) % (clients + 1) - 1
    return Dealt(given.pixels_NCHW[:images], given.labels_N[:images], client_N, clients, seed)


def owners(data: FederatedData) -> list[Sequences]:
    clients = range(len(data))
    return [*map(data.train, clients), *map(data.holdout, clients), data.global_holdout()]


def test_every_kind_and_key_is_in_the_table() -> None:
    assert OTHER.keys() == FORMS.keys()
    shown = {key for changes in OTHER.values() for change in changes for key in change} - {"kind"}
    assert shown == FORM_KEYS


@pytest.mark.parametrize("kind", OTHER)
def test_a_form_decides_the_data_by_kind_key_and_seed(kind: str, tmp_path: Path) -> None:
    prints = {prepare(config(), 0, None, tmp_path).fingerprint}
    forms = [{"kind": kind, **change} for change in OTHER[kind]]
    if kind != "plain":
        for form in forms:
            prints.add(prepare(config(form), 0, None, tmp_path).fingerprint)
        assert len(prints) == 1 + len(forms)
    # The same again is found, and another seed gives another form.
    again = prepare(config(forms[0]), 0, None, tmp_path)
    assert again.fingerprint in prints
    assert prepare(config(forms[0]), 1, None, tmp_path).fingerprint not in prints


def test_scores_are_stored_beside_their_images(tmp_path: Path) -> None:
    plain, formed = (prepare(config(form), 0, None, tmp_path) for form in ({}, {"kind": "degraded"}))
    for before, after in zip(owners(plain), owners(formed), strict=True):
        # Dealt alike: a form changes what is seen, not who has it.
        assert np.array_equal(before.labels, after.labels) and before.scores is None and after.scores is not None
        assert len(after.scores) == len(after) and ((after.scores >= 0) & (after.scores <= 1)).all()
        chosen = after.select([0])
        assert chosen.scores is not None and chosen.scores[0] == after.scores[0]


def test_degradation_is_a_blur_and_noise_in_proportion() -> None:
    given, form = dealt(), DataFormConfig(kind="degraded", blur=1.5, noise=0.0)
    made = degraded(given, form)
    assert made.scores_N is not None
    for before, after, severity in zip(given.pixels_NCHW[:, 0], made.pixels_NCHW[:, 0], made.scores_N, strict=True):
        assert np.allclose(after, gaussian_filter(before, 1.5 * float(severity), mode="nearest"), atol=1e-6)
    # Noise is what is left between the two, as strong as an image's severity says.
    noisy = degraded(dealt(images=400), DataFormConfig(kind="degraded", blur=0.0, noise=0.02))
    assert noisy.scores_N is not None
    away_NP = (noisy.pixels_NCHW - dealt(images=400).pixels_NCHW).reshape(400, -1)
    inner_NP = np.abs(dealt(images=400).pixels_NCHW.reshape(400, -1)) < 0.9
    strength = [away[inner].std() / score for away, inner, score in zip(away_NP, inner_NP, noisy.scores_N, strict=True)]
    assert np.mean(strength) == pytest.approx(0.02, rel=0.05)
    none = degraded(given, DataFormConfig(kind="degraded", blur=0.0, noise=0.0))
    assert np.array_equal(none.pixels_NCHW, given.pixels_NCHW)


@given(st.integers(0, 2**31), st.floats(0, 1), st.integers(1, 5))
def test_severities_have_a_clients_level(seed: int, skew: float, clients: int) -> None:
    given = dealt(seed, clients)
    severity_N = severities(given, skew)
    assert severity_N.dtype == np.float32 and (severity_N >= 0).all() and (severity_N <= 1).all()
    alike = severities(given, 1.0)
    for client in range(clients):
        own = alike[given.client_N == client]
        assert (own == own[0]).all()
    # A part of the images is formed as all of them are: no draw depends on what comes after.
    assert len(set(alike[given.client_N == NOBODY].tolist())) == np.count_nonzero(given.client_N == NOBODY)


@pytest.mark.parametrize("tied_to", ["parity", "class"])
def test_colours_agree_with_labels_as_often_as_the_environment_says(tied_to: str) -> None:
    given = digits.split()[1]
    client_N = np.arange(len(given)) % 4 - 1
    form = DataFormConfig(kind="spurious-colour", agreement=[1.0, 0.7], holdout_agreement=0.1, tied_to=tied_to)
    made = spurious_colour(Dealt(given.pixels_NCHW, given.labels_N, client_N, 3, 0), form)
    assert made.scores_N is not None and set(made.scores_N.tolist()) == {0.0, 1.0}
    share = [made.scores_N[client_N == client].mean() for client in (0, 2, 1, NOBODY)]
    assert share[:2] == [1.0, 1.0] and share[2:] == pytest.approx([0.7, 0.1], abs=0.06)
    # The ink is where grey is 1; paper is the same for all.
    count = 2 if tied_to == "parity" else 10
    inked = given.pixels_NCHW[:, 0] == 1.0
    has = inked.any((1, 2))
    place = inked.reshape(len(inked), -1).argmax(1)
    seen_NC = made.pixels_NCHW.reshape(len(inked), 3, -1)[np.arange(len(inked)), :, place]
    colour_N = np.abs(seen_NC[:, None] - inks(count)).sum(2).argmin(1)
    agrees_N = colour_N == given.labels_N % count
    assert has.mean() > 0.9 and np.array_equal(agrees_N[has], made.scores_N[has] == 1.0)
    # Who does not agree has any other colour.
    assert len(set((colour_N - given.labels_N)[has & ~agrees_N] % count)) == count - 1


def test_two_views_share_the_class_and_nothing_else() -> None:
    """The shape in white on black; a blank whose colour is that of the class, as near as the spread says."""
    given = dealt(images=400)
    for spread in (0.0, 0.2):
        made = grey_and_colour(given, DataFormConfig(kind="grey-and-colour", spread=spread)).pixels_NCHW
        grey, blank = made[:, :3], made[:, 3:]
        assert every(np.array_equal(grey[:, channel], given.pixels_NCHW[:, 0]) for channel in range(3))
        assert np.array_equal(blank, np.broadcast_to(blank[:, :, :1, :1], blank.shape)) and np.abs(blank).max() <= 1
        away_N3 = blank[:, :, 0, 0] - hues()[given.labels_N]
        assert np.abs(away_N3).max() == 0 if spread == 0 else 0.5 < float(away_N3[away_N3 != 0].std()) / spread < 1.1
    apart = [np.abs(one - other).max() for place, one in enumerate(hues()) for other in hues()[:place]]
    assert min(apart) > 0.5, "no two classes have one colour"


def test_paint_goes_from_paper_to_ink() -> None:
    grey_NHW = np.array([[[-1.0, 0.0, 1.0]]], np.float32)
    ink_N3, paper_N3 = np.array([[1, 0, 0.5]], np.float32), np.array([[-1, -1, 0.5]], np.float32)
    painted_N3HW = painted(grey_NHW, ink_N3, paper_N3)
    assert painted_N3HW[0, :, 0].tolist() == [[-1, 0, 1], [-1, -0.5, 0], [0.5, 0.5, 0.5]]
    own, _ = digits.split()
    coloured = in_any_colours(own, 0)
    assert coloured.pixels_NCHW.shape == (len(own), 3, 8, 8) and np.array_equal(coloured.labels_N, own.labels_N)
    # Ink is lighter than paper everywhere: a sum of channels orders pixels as grey does.
    sums, inks = coloured.pixels_NCHW.sum(1).reshape(len(own), -1), own.pixels_NCHW.reshape(len(own), -1)
    assert every(np.corrcoef(a, b)[0, 1] > 0.999 for a, b in zip(sums, inks, strict=True))


def test_a_preset_that_sees_colours_has_been_trained_on_them() -> None:
    preset = PRESETS["nano-vit-rgb"]
    first, again, other = (preset.images(Path(), seed) for seed in (0, 0, 1))
    assert first.pixels_NCHW.shape[1:] == (3, 8, 8) and first.digest() == again.digest() != other.digest()


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"blur": 2.0}, "data.form.blur: 2.0: only data.form.kind=degraded has it, and it is plain"),
        ({"kind": "degarded"}, "degraded"),
        ({"kind": "spurious-colour", "agreement": [0.9, 1.1]}, "data.form.agreement: 1.1: a probability"),
    ],
)
def test_keys_of_another_kind_are_refused(form: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataFormConfig(**form)


def test_text_has_no_form_and_colours_no_grey_foundation() -> None:
    text = DataConfig(form=DataFormConfig(kind="degraded"))
    with pytest.raises(UserError, match=r"data\.form\.kind: degraded: for images only, and data\.source: stdlib is text"):
        check_task("causal_lm", text)
    with pytest.raises(UserError, match=r"images .* \[1, 8, 8\] in 10 classes, and the foundation takes \[3, 8, 8\]"):
        check_task("image_classification", config(), ImageInput(3, 8, 8, 10, 17))
