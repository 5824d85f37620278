"""The dense branch: geometry, any size, phrases, boxes out of maps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from model_server.model.config import ModelConfig, debug, nano
from model_server.model.dense import (
    DenseBranch,
    Found,
    SizeError,
    box_iou,
    cell_centres,
    early_maps,
    leaders,
    objects_of,
    start_branch,
    suppress,
    to_pixels,
    upsample2,
    vote,
)
from model_server.model.vision import Backbone, SameConv


def parts(seed: int = 0) -> tuple[Backbone, DenseBranch]:
    torch.manual_seed(seed)
    config = debug()
    backbone = Backbone(config.backbone).eval().fold_norms()
    branch = DenseBranch(config).eval()
    start_branch(branch, backbone)
    return backbone, branch


def picture(height: int = 64, width: int = 96, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (1, 3, height, width), generator=torch.manual_seed(seed), dtype=torch.uint8)


def looked(image: Tensor, phrases: Tensor) -> tuple[Found, Tensor]:
    backbone, branch = parts()
    with torch.no_grad():
        features = branch.features(branch.maps(early_maps(backbone, image, branch.config.shared)))
        return branch.detect(features, phrases), branch.segment(features, phrases)


def strided(x: Tensor, times: int) -> Tensor:
    """The middle tap of a padded convolution of stride 2, again and again: which pixel a cell is about."""
    conv = SameConv(1, 1, 3, 2, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[..., 1, 1] = 1
        for _ in range(times):
            x = conv(x)
    return x


def test_cells_lie_where_the_padded_convolutions_look() -> None:
    columns = torch.arange(64.0).expand(1, 1, 64, 64) + 0.5  # centres of the pixels
    x, y = cell_centres(16, 16)
    assert torch.equal(strided(columns, 2)[0, 0, 3], x)
    assert torch.equal(strided(columns.transpose(2, 3), 2)[0, 0, :, 3], y)


def test_upsampling_puts_a_coarse_map_back_onto_the_finer_cells() -> None:
    columns = torch.arange(64.0).expand(1, 1, 64, 64)
    coarse, fine = strided(columns, 3), strided(columns, 2)
    inner = (..., slice(2, -2), slice(2, -2))  # at the rim there is nothing to interpolate between
    torch.testing.assert_close(upsample2(coarse)[inner], fine[inner])
    torch.testing.assert_close(to_pixels(fine)[..., 8:-8, 8:-8], columns[..., 8:-8, 8:-8])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 160), (96, 64)])
def test_any_multiple_of_32_gives_stride_4_maps(height: int, width: int) -> None:
    found, mask = looked(picture(height, width), torch.randn(1, 3, 24))
    assert found.heat.shape == mask.shape == (1, 3, height // 4, width // 4)
    assert found.boxes().shape == (1, 4, height // 4, width // 4)
    assert to_pixels(mask).shape == (1, 3, height, width)


def test_other_sizes_are_refused_with_the_reason() -> None:
    backbone, branch = parts()
    with pytest.raises(SizeError, match="multiples of 32"):
        early_maps(backbone, picture(64, 50), branch.config.shared)


def test_a_phrase_is_answered_the_same_alone_and_beside_others() -> None:
    phrases = torch.randn(1, 3, 24, generator=torch.manual_seed(1))
    together, masks = looked(picture(), phrases)
    alone, mask = looked(picture(), phrases[:, 1:2])
    torch.testing.assert_close(together.heat[:, 1:2], alone.heat)
    torch.testing.assert_close(masks[:, 1:2], mask)
    assert not torch.allclose(masks[:, 0], masks[:, 1])


def test_the_branch_starts_with_the_backbone_s_own_maps() -> None:
    backbone, branch = parts()
    with torch.no_grad():
        mine = branch.maps(early_maps(backbone, picture(), branch.config.shared))
        theirs, _ = backbone(picture())
    assert mine.keys() == theirs.keys()
    for stride, m in mine.items():
        torch.testing.assert_close(m, theirs[stride])


def test_change_sees_both_images_and_gradients_reach_every_part() -> None:
    backbone, branch = parts()
    before, after = picture(), picture(seed=1)
    early = [early_maps(backbone, x, branch.config.shared) for x in (before, after)]
    maps = [branch.maps(e) for e in early]
    change = branch.change(*maps)
    assert change.shape == (1, 16, 24)
    assert not torch.allclose(change, branch.change(maps[0], maps[0]))
    features, phrases = branch.features(maps[0]), torch.randn(1, 2, 24)
    found = branch.detect(features, phrases)
    total = change.sum() + found.heat.sum() + found.boxes().sum() + found.quality.sum()
    (total + branch.segment(features, phrases).sum()).backward()
    assert [name for name, p in branch.named_parameters() if p.grad is None] == []


def test_a_config_without_dense_part_has_no_branch() -> None:
    with pytest.raises(ValueError, match="no dense branch"):
        DenseBranch(dataclasses.replace(debug(), dense=None))


def test_configs_keep_their_dense_part_through_json_and_old_ones_have_none() -> None:
    assert ModelConfig.from_json(nano().to_json()) == nano()
    old = dataclasses.replace(nano(), dense=None)
    assert ModelConfig.from_json(old.to_json()) == old


def peak_map(at: dict[tuple[int, int], float], boxes: dict[tuple[int, int], tuple[float, ...]]) -> Found:
    heat, distances = torch.full((1, 1, 16, 16), -9.0), torch.ones(1, 4, 16, 16)
    for (row, column), value in at.items():
        heat[0, 0, row, column] = value
    for (row, column), sides in boxes.items():
        distances[0, :, row, column] = torch.tensor(sides)
    return Found(heat, distances, torch.full((1, 16, 16), 9.0))


def test_an_object_s_box_reaches_from_its_cell_s_centre() -> None:
    objects = objects_of(peak_map({(2, 5): 4.0}, {(2, 5): (3.5, 1.5, 2.5, 4.5)}), 0, 0)
    assert objects.boxes.tolist() == [[20.0, 10.0, 26.0, 16.0]]  # the centre is at (23.5, 11.5)
    assert objects.scores[0] == pytest.approx(0.991, abs=1e-3)


def test_two_peaks_on_one_object_give_one_box_and_two_objects_two() -> None:
    big = (30.0, 30.0, 30.0, 30.0)
    same = peak_map({(7, 6): 3.0, (7, 8): 2.0}, {(7, 6): big, (7, 8): big})
    assert len(objects_of(same, 0, 0).boxes) == 1
    apart = peak_map({(3, 3): 3.0, (12, 12): 2.0}, {(3, 3): (8.0,) * 4, (12, 12): (8.0,) * 4})
    scores = objects_of(apart, 0, 0).scores
    assert len(scores) == 2
    assert scores[0] > scores[1]


def test_nothing_there_is_no_object() -> None:
    assert objects_of(peak_map({}, {}), 0, 0).boxes.shape == (0, 4)


def test_suppression_keeps_the_best_of_those_that_overlap() -> None:
    boxes = torch.tensor([[0, 0, 10, 10], [1, 0, 11, 10], [40, 40, 50, 50]]).float()
    assert suppress(boxes, 0.5).tolist() == [0, 2]


def test_a_box_belongs_to_the_best_free_one_that_it_overlaps() -> None:
    torch.manual_seed(0)
    corner = torch.rand(200, 2) * 100
    boxes = torch.cat((corner, corner + 5 + torch.rand(200, 2) * 30), 1)
    boxes[7, 2:] = boxes[7, :2]  # of no area
    expected = [-1] * 200
    iou = box_iou(boxes, boxes)
    for i in range(200):
        if expected[i] < 0:
            expected[i] = i
            for j in range(i + 1, 200):
                if expected[j] < 0 and iou[i, j] > 0.5:
                    expected[j] = i
    assert leaders(boxes, 0.5).tolist() == expected
    assert 20 < len(set(expected)) < 180


def test_votes_move_a_box_to_the_mean_of_those_that_agree() -> None:
    box = torch.tensor([[0, 0, 10, 10]]).float()
    voters = torch.tensor([[0, 0, 10, 10], [0, 0, 12, 10], [90, 90, 99, 99]]).float()
    assert vote(box, voters, torch.tensor([1.0, 1.0, 1.0])).tolist() == [[0, 0, 11, 10]]
    assert vote(box, voters[2:], torch.ones(1)).tolist() == box.tolist()
