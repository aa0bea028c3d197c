"""Poses: what is turned by an angle is found at that angle, and the latent of a pose is the pose."""

import math

import numpy as np
import pytest
import torch

from mmvae.data import sprites
from mmvae.pose import POSES, Pose, grid, jittered, sample

ANGLES = torch.linspace(-3, 3, 7)
SHIFTS = torch.stack([torch.linspace(-0.6, 0.6, 7), torch.linspace(0.5, -0.3, 7)], 1)


def hearts(rows: int = 60) -> dict:
    drawn = sprites(3, "test", rows)
    kept = [i for i, shape in enumerate(drawn["shape"]) if shape in (2, "heart")]
    return drawn.select(kept)


@pytest.mark.parametrize("kind", ["rotation", "rotation+shift"])
def test_the_latent_of_a_pose_is_the_pose(kind):
    pose = Pose(kind, (8, 8))
    g = pose.latent(ANGLES, SHIFTS)
    angle, shift = pose.split(g)
    assert g.shape == (7, POSES[kind])
    torch.testing.assert_close(angle, ANGLES)
    torch.testing.assert_close(shift, SHIFTS if kind == "rotation+shift" else torch.zeros(7, 2))
    torch.testing.assert_close(torch.atan2(g[:, -1], g[:, -2]), ANGLES)  # last, where a joint model's private dimensions are


def test_the_prior_of_angle_and_shift_is_uniform():
    angle, shift = Pose("rotation+shift", (8, 8)).split(torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0)))
    for value, low, high in ((angle, -math.pi, math.pi), (shift[:, 0], -1, 1), (shift[:, 1], -1, 1)):
        counts = torch.histc(value, 8, low, high)
        assert (counts / 2500 - 1).abs().max() < 0.1


def test_a_quarter_turn_is_rot90_clockwise():
    picture = torch.rand(1, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    turned = sample(picture, grid(torch.tensor([math.pi / 2]), torch.zeros(1, 2), (6, 6), 1.0))
    torch.testing.assert_close(turned, torch.rot90(picture, -1, (2, 3)), atol=1e-5, rtol=0)


def test_a_shift_by_whole_pixels_moves_the_picture():
    mask = torch.full((1, 1, 4, 4), 20.0)
    front = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pose = Pose("rotation+shift", (8, 8), window=0.5)
    g = pose.latent(torch.zeros(1), torch.tensor([[0.25, -0.5]]))  # 1 pixel to the right, 2 up
    placed = pose.place(front, mask, torch.tensor([[0.1, 0.2, 0.3]]), g)
    torch.testing.assert_close(placed[:, :, 0:4, 3:7], front, atol=1e-4, rtol=0)
    torch.testing.assert_close(placed[0, :, 6, 0], torch.tensor([0.1, 0.2, 0.3]), atol=1e-3, rtol=0)


def test_cutting_out_undoes_placing():
    pose = Pose("rotation+shift", (64, 64), window=0.5)
    down, across = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    smooth = torch.exp(-6 * ((across - 0.3) ** 2 + down**2)).expand(7, 1, 32, 32)
    g = pose.latent(ANGLES, 0.5 * SHIFTS)
    placed = pose.place(smooth, torch.full((7, 1, 32, 32), 20.0), torch.zeros(7, 1), g)
    cut = pose.cut(placed, 0.5 * SHIFTS, ANGLES)
    torch.testing.assert_close(cut[..., 6:-6, 6:-6], smooth[..., 6:-6, 6:-6], atol=0.03, rtol=0)


def test_a_sprite_is_located_and_its_angle_matched():
    rows = hearts()
    pixels = torch.stack([torch.from_numpy(np.array(image)).movedim(-1, 0) for image in rows["image"]]).float() / 255
    pose = Pose("rotation+shift", (64, 64), window=0.5)
    shift, _ = pose.locate(pixels)
    seen = pose.cut(pixels, shift, torch.zeros(len(pixels)))
    truth = torch.tensor(rows["angle"])
    for one in range(5):  # a heart in the pose that it has, matched to other hearts of its size and colour
        same = [i for i, caption in enumerate(rows["caption"]) if caption == rows["caption"][one]]
        angle = pose.match(seen[same], seen[one].expand(len(same), -1, -1, -1))
        error = (angle - (truth[same] - truth[one]) + math.pi) % (2 * math.pi) - math.pi
        assert error.abs().max() < math.radians(6), one


def test_a_heading_turns_with_the_picture_whatever_the_background_and_points_to_the_heavier_end():
    down, across = torch.meshgrid(torch.linspace(-1, 1, 40), torch.linspace(-1, 1, 40), indexing="ij")
    wedge = ((across > -0.5) & (across < 0.6) & (down.abs() < 0.3 * (0.7 - across))).float().expand(7, 3, 40, 40)
    turned = sample(wedge, grid(ANGLES, torch.zeros(7, 2), (40, 40), 1.0), "zeros")
    pose = Pose("rotation", (40, 40))
    for behind in (0.0, 0.4, 1.0):
        _, heading = pose.locate(behind + turned * (0.7 - behind))
        error = (heading - ANGLES + math.pi) % (2 * math.pi) - math.pi - math.pi  # its thick end is at the left
        assert ((error + math.pi) % (2 * math.pi) - math.pi).abs().max() < math.radians(2), behind


def test_a_heading_is_finite_where_nothing_has_one():
    flat, dot = torch.full((1, 1, 8, 8), 0.5), torch.zeros(1, 1, 9, 9)
    dot[..., 4, 4] = 1.0
    for kind in ("rotation", "rotation+shift"):
        for picture in (flat, dot):
            shift, heading = Pose(kind, tuple(picture.shape[2:])).locate(picture)
            assert shift.isfinite().all() and heading.isfinite().all()


def test_jitter_turns_scales_and_shifts_a_little_and_each_picture_by_itself():
    square = torch.zeros(400, 1, 32, 32)
    square[:, :, 12:20, 12:20] = 1.0
    torch.testing.assert_close(jittered(square, 0.0), square)
    moved = jittered(square, 1.0)
    across = (torch.arange(32) + 0.5) / 16 - 1
    mass = moved.sum((1, 2, 3))
    middle = torch.stack([(moved.sum((1, 2)) * across).sum(1) / mass, (moved.sum((1, 3)) * across).sum(1) / mass], 1)
    assert middle.abs().max() < 0.5  # an eighth of the picture, and by turn and scale a little more
    assert middle.std(0).min() > 0.05 and middle.mean(0).abs().max() < 0.05
    assert 0.3 < mass.min() / 64 < 0.8 < 1.3 < mass.max() / 64 < 2.2  # 40 % smaller or larger across and down
    assert 0 <= moved.min() and moved.max() <= 1
    torch.manual_seed(3)
    once = jittered(square[:5], 0.5)
    torch.manual_seed(3)
    assert torch.equal(jittered(square[:5], 0.5), once)
