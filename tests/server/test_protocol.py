"""The wire contract: what a request must hold, and arrays that come back as they were sent."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load, save

from model_server.protocol import (
    MAX_CLASSES,
    MAX_MASK_BYTES,
    ModelInfo,
    PerceiveRequest,
    PerceiveResponse,
    TileChange,
    TileMasks,
    TileObjects,
    WireError,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
)

INFO = ModelInfo(model="m", weights_digest="0", attention_backend="sdpa", precision="float32", device="cpu")


def tile(height: int = 4, width: int = 4, colour: int = 0) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def body_of(request: dict[str, object], *tiles: np.ndarray) -> bytes:
    tensors = {f"tile_{i}": t for i, t in enumerate(tiles or (tile(),))}
    return save(tensors, metadata={"request": json.dumps(request)})


def response(**answers: object) -> PerceiveResponse:
    common = {"model": INFO, "task_token": "[SEG]", "expert": "pixel", "elapsed_s": 0.1}
    return PerceiveResponse.model_validate({**common, **answers})


def test_a_header_is_not_parsed_that_would_take_many_times_its_bytes() -> None:
    names = (f'"{n}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for n in range(30_000))
    header = f'{{"__metadata__":{{"request":"{{}}"}},{",".join(names)}}}'.encode()
    with pytest.raises(WireError, match="header may have 1048576 bytes"):
        decode_request(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize(
    ("request_fields", "message"),
    [
        ({"task": "ground"}, "phrase"),
        ({"task": "ground", "text": "  "}, "phrase"),
        ({"task": "segment"}, "1 to 16 classes"),
        ({"task": "segment", "labels": ["a"] * (MAX_CLASSES + 1)}, "this one has 17"),
        ({"task": "segment", "labels": ["road", " "]}, "blank"),
        ({"task": "ground", "text": "ship", "gsd_m": 0}, "greater than 0"),
        ({"task": "ground", "text": "ship", "gsd_m": -1.5}, "greater than 0"),
        ({"task": "ground", "text": "ship", "modality": "lidar"}, "'optical' or 'sar'"),
    ],
)
def test_a_dense_request_that_lacks_something_is_told_what(request_fields: dict[str, object], message: str) -> None:
    with pytest.raises(WireError, match=message):
        decode_request(body_of(request_fields))


def test_change_needs_pairs() -> None:
    with pytest.raises(WireError, match=r"pairs of tiles .* this request has 3"):
        decode_request(encode_request(PerceiveRequest(task="detect_change"), [tile()] * 3))


def test_the_two_tiles_of_a_pair_have_one_shape_while_pairs_may_differ() -> None:
    request = PerceiveRequest(task="detect_change")
    fine = [tile(4, 6), tile(4, 6, 1), tile(5, 5), tile(5, 5, 1)]
    decoded, tiles = decode_request(encode_request(request, fine))
    assert decoded == request
    assert [t.shape for t in tiles] == [t.shape for t in fine]
    with pytest.raises(WireError, match="tile_2 is 5x5 and tile_3 6x5"):
        decode_request(encode_request(request, [*fine[:3], tile(5, 6)]))


def test_masks_that_no_answer_could_carry_are_refused() -> None:
    side = 1024
    most = MAX_MASK_BYTES // side**2
    labels = [f"class {i}" for i in range(MAX_CLASSES)]
    request = PerceiveRequest(task="segment", labels=labels)
    large = tile(side, side)
    decode_request(encode_request(request, [large] * (most // MAX_CLASSES)))
    with pytest.raises(WireError, match="fewer tiles"):
        decode_request(encode_request(request, [large] * (most // MAX_CLASSES + 1)))


def test_scale_and_modality_cross_the_wire() -> None:
    request = PerceiveRequest(task="ground", text="ship", gsd_m=0.5, modality="sar")
    assert decode_request(encode_request(request, [tile()]))[0] == request
    assert PerceiveRequest(task="ground", text="ship").gsd_m is None


def test_arrays_come_back_on_the_answers_they_belong_to() -> None:
    rng = np.random.default_rng(0)
    planes = [rng.integers(0, 256, (2, h, w), np.uint8) for h, w in ((3, 5), (4, 4))]
    masks = [
        TileMasks(labels=["road", "sea"], thresholds=[0.4, 0.5], known=[True, False], scale=1, probabilities=p)
        for p in planes
    ]
    changed = rng.integers(0, 256, (7, 9), np.uint8)
    changes = [TileChange(threshold=0.3, scale=2, probabilities=changed.T)]  # not contiguous
    body = encode_response(response(masks=masks, changes=changes))
    assert sorted(load(body)) == ["change_0", "empty", "mask_0", "mask_1"]
    decoded = decode_response(body)
    for mine, sent in zip(decoded.masks, planes, strict=True):
        np.testing.assert_array_equal(mine.probabilities, sent)
        assert (mine.labels, mine.known, mine.scale) == (["road", "sea"], [True, False], 1)
    np.testing.assert_array_equal(decoded.changes[0].probabilities, changed.T)


def test_boxes_come_back_as_they_were() -> None:
    boxes = [(0.5, 1.0, 9.25, 8.0), (2.0, 2.0, 3.0, 3.0)]
    objects = TileObjects(boxes=boxes, scores=[0.9, 0.06], threshold=0.4, known=True, scale=1)
    decoded = decode_response(encode_response(response(objects=[objects])))
    assert decoded.objects == [objects]
    with pytest.raises(ValueError, match="1 boxes with 2 scores"):
        TileObjects(boxes=[(0, 0, 1, 1)], scores=[0.9, 0.8], threshold=0.4, known=True, scale=1)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "mask_0 is missing"),
        ({"mask_0": np.zeros((1, 4, 4), np.float32)}, "uint8 of 3 dimensions"),
        ({"mask_0": np.zeros((4, 4), np.uint8)}, "uint8 of 3 dimensions"),
        ({"mask_0": np.zeros((2, 4, 4), np.uint8)}, "2 planes for 1 labels"),
    ],
)
def test_an_answer_whose_arrays_do_not_fit_is_refused(tensors: dict[str, np.ndarray], message: str) -> None:
    answer = response(masks=[TileMasks(labels=["road"], thresholds=[0.5], known=[True], scale=1)])
    body = save({"empty": np.zeros(0, np.uint8), **tensors}, metadata={"response": answer.model_dump_json()})
    with pytest.raises(WireError, match=message):
        decode_response(body)
