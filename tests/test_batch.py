"""Batches and passes of both tasks, through real dense models: rows, targets, stand-ins, losses that are Hugging Face's.

Legend: see `fedmoe_ds.model.batch`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, LlamaConfig

from fedmoe_ds.config import FoundationConfig
from fedmoe_ds.data import Sequences, digits
from fedmoe_ds.data.tokenizer import train_tokenizer
from fedmoe_ds.foundation import Foundation, load_foundation
from fedmoe_ds.foundation.builtin.presets import find_preset
from fedmoe_ds.kernels.per_client import Segment
from fedmoe_ds.model.adapter_bank import Bank
from fedmoe_ds.model.batch import Rows, make_batch
from fedmoe_ds.model.dispatcher import Pool
from fedmoe_ds.model.forward import AdaptedModel, PassResult, segment_sums
from fedmoe_ds.model.pass_context import Execution, Pass
from fedmoe_ds.model.router import Demand

CPU = torch.device("cpu")
POSITIONS = 17
VOCAB = 300


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    AutoModelForImageClassification.from_config(find_preset("nano-vit").config()).save_pretrained(folder)
    return load_foundation(folder, FoundationConfig(), 1, 0, "cpu")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=VOCAB, initializer_range=0.2, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    train_tokenizer(["import this"], VOCAB).save_pretrained(folder)
    return load_foundation(folder, FoundationConfig(), 1, 0, "cpu")


@pytest.fixture(scope="module")
def images() -> Sequences:
    federated = digits.split()[1]
    return Sequences.of_images(federated.pixels_NCHW, federated.labels_N)


def run(foundation: Foundation, rows: list[Rows]) -> tuple[Any, PassResult]:
    """One pass without any adapter."""
    execution = Execution(Bank([], 1, 2), Pool(None, 1, 1, 2, merge=True), 1.0)
    batch = make_batch(rows, CPU, foundation.images)
    with torch.no_grad():
        return batch, AdaptedModel(foundation, execution).forward(batch, None)


def test_images_of_two_clients(classifier: Foundation, images: Sequences) -> None:
    first, second = range(3), [10, 7]
    allowed = np.array([[True, False], [True, True]])  # of two layers
    rows = [Rows.of(1, 4, images, first, allowed, classifier.images), Rows.of(0, 2, images, second, None, classifier.images)]
    assert [len(part) for part in rows] == [part.targets for part in rows] == [3, 2]
    assert [part.tokens for part in rows] == [3 * POSITIONS, 2 * POSITIONS]
    batch = make_batch(rows, CPU, classifier.images)
    assert batch.pixels_BCHW is not None and batch.pixels_BCHW.shape == (5, 1, 8, 8) and batch.input_ids.shape == (5, 0)
    assert images.labels is not None and batch.labels_N.tolist() == images.labels[[0, 1, 2, 10, 7]].tolist()
    assert batch.segments == [Segment(1, 0, 3, POSITIONS), Segment(0, 3, 5, POSITIONS)] and batch.targets == [3, 2]
    assert batch.slot_T.tolist() == [1] * 3 * POSITIONS + [0] * 2 * POSITIONS
    assert batch.cap_T.tolist() == [4] * 3 * POSITIONS + [2] * 2 * POSITIONS
    assert batch.valid_T.all() and len(batch.valid_T) == 5 * POSITIONS
    assert batch.predict_N.tolist() == [b * POSITIONS for b in range(5)]
    plain = [Demand(3 * POSITIONS, 4), Demand(2 * POSITIONS, 2)]
    assert batch.demands == plain and batch.masks is not None
    for place, mask in enumerate(allowed.tolist()):
        assert batch.masks.rows(place).tolist() == [mask] * 3 * POSITIONS + [[True, True]] * 2 * POSITIONS
        assert batch.masks.demands(place, plain) == [Demand(3 * POSITIONS, 4, sum(mask)), plain[1]]


def test_loss_and_logits_of_images_are_hugging_faces(classifier: Foundation, images: Sequences) -> None:
    rows = [Rows.of(slot, 1, images, range(slot * 4, slot * 4 + 4), images=classifier.images) for slot in range(2)]
    batch, result = run(classifier, rows)
    theirs = AutoModelForImageClassification.from_pretrained(classifier.path).eval()
    with torch.no_grad():
        for part, own in zip(rows, segment_sums(result.nll_N, batch), strict=True):
            assert part.pixels is not None and part.labels is not None
            output = theirs(pixel_values=torch.from_numpy(part.pixels.copy()), labels=torch.from_numpy(part.labels.copy()))
            assert float(own) / part.targets == pytest.approx(float(output.loss), rel=1e-5)
            chosen = slice(rows.index(part) * 4, rows.index(part) * 4 + 4)
            assert (result.logits_NV[chosen] - output.logits).abs().max() <= 1e-5
    assert result.hidden_BSD.shape == (8, POSITIONS, classifier.hidden_size) and result.logits_NV.shape == (8, 10)
    assert len(result.run.valid_T) == 8 * POSITIONS


@pytest.mark.parametrize("kind", ["classifier", "language_model"])
def test_an_idle_rank_takes_part_with_nothing_valid(kind: str, request: pytest.FixtureRequest) -> None:
    foundation: Foundation = request.getfixturevalue(kind)
    batch, result = run(foundation, [])
    assert batch.segments == [] and batch.targets == [] and not batch.valid_T.any() and not len(batch.predict_N)
    assert batch.valid_T.shape == batch.slot_T.shape == (POSITIONS if foundation.images else 1,)
    assert result.nll_N.shape == (0,) and float(result.hidden_BSD.sum() * 0.0) == 0.0


def test_text_on_a_dense_model(language_model: Foundation) -> None:
    draw = np.random.default_rng(0)
    ids = [draw.integers(2, VOCAB, size=length) for length in (9, 5, 12)]
    masks = [np.arange(len(seq)) > 2 for seq in ids]
    data = Sequences(ids, masks)
    rows = [Rows.of(0, 1, data, [0, 2]), Rows.of(1, 1, data, [1])]
    assert [part.tokens for part in rows] == [21, 5] and [part.targets for part in rows] == [15, 2]
    direct = [Rows(0, 1, [ids[0], ids[2]], [masks[0], masks[2]]), Rows(1, 1, [ids[1]], [masks[1]])]
    batch, result = run(language_model, rows)
    assert torch.equal(result.nll_N, run(language_model, direct)[1].nll_N)
    theirs = AutoModelForCausalLM.from_pretrained(language_model.path).eval()
    expected = []
    with torch.no_grad():
        for i in (0, 2, 1):
            logits_SV = theirs(input_ids=torch.from_numpy(ids[i])[None]).logits[0]
            nll_S = torch.nn.functional.cross_entropy(logits_SV[:-1], torch.from_numpy(ids[i][1:]), reduction="none")
            expected.append(nll_S[torch.from_numpy(masks[i][1:])])
    assert torch.allclose(result.nll_N, torch.cat(expected), atol=1e-5)
    assert batch.pixels_BCHW is None and batch.input_ids.shape == (3, 12)


def test_text_never_meets_an_image_classifier(classifier: Foundation, images: Sequences) -> None:
    text = Sequences([np.arange(4)], [np.ones(4, dtype=bool)])
    with pytest.raises(AssertionError, match="of one task"):
        Rows.of(0, 1, text, [0], images=classifier.images)
    with pytest.raises(AssertionError, match="of one task"):
        Rows.of(0, 1, images, [0])
    with pytest.raises(AssertionError, match="text in a pass"):
        make_batch([Rows(0, 1, text.input_ids, text.loss_mask)], CPU, classifier.images)


def test_a_folder_is_enough(classifier: Foundation, tmp_path: Path) -> None:
    """What `save_pretrained` writes is loaded again as it is."""
    theirs = AutoModelForImageClassification.from_pretrained(classifier.path)
    theirs.save_pretrained(tmp_path)
    assert load_foundation(tmp_path, FoundationConfig(), 1, 0, "cpu").fingerprint == classifier.fingerprint


def test_members_that_share_a_pass_are_one_segment_of_rows() -> None:
    """Their demands are two, of half of the segment's rows each."""
    valid_T = torch.ones(12, dtype=torch.bool)
    run = Pass([Segment(0, 0, 4, 3)], None, valid_T, valid_T, valid_T, demands=[Demand(6, 1), Demand(6, 1)])
    (places,) = run.places(12)
    assert torch.equal(torch.arange(12)[places], torch.arange(12))
