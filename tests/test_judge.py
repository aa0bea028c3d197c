"""The judge of sprites: the template test is geometry, what it learns from is what it says, and strict means strict."""

import json
import sys
from unittest import mock

import pytest
import torch
from recipe_runs import recipe

from mmvae.data import sprites
from mmvae.data.sprites import ATTRIBUTES, render
from mmvae.judge import Judge, locate, look, parse_caption, smallest_iou, strict_captions
from mmvae.negatives import KINDS, blur, examples
from mmvae.templates import covered_by_object, template_iou

LEVELS = [1, 2, 3, 4, 5]
CAPTIONS = ["heart", "big heart", "big red heart", "big red heart at top left", "big red heart at top left on dark"]


def pictures(level: int, rows: int = 16) -> tuple[torch.Tensor, dict]:
    """Test rows: pixels (B,3,64,64) uint8, and the columns."""
    table = sprites(level, "test", rows)[:]
    return torch.from_numpy(table["image"]).movedim(-1, 1), table


def drawn(shape: str, size: str = "big", x: float = 0.5, y: float = 0.5, angle: float = 0.3, colour: str = "red") -> torch.Tensor:
    index = (ATTRIBUTES["shape"].index(shape), ATTRIBUTES["size"].index(size), ATTRIBUTES["colour"].index(colour), 1)
    return render(*(torch.tensor([value]) for value in (*index, x, y, angle)))[0].movedim(-1, 1)


def fit(pixels: torch.Tensor, shape: str = "square", size: str = "big", colour: str = "red") -> float:
    named = {"shape": shape, "size": size, "colour": colour}
    index = [torch.tensor([ATTRIBUTES[name].index(value)]) for name, value in named.items()]
    return template_iou(pixels.float() / 255, *index).item()


# ---- captions


@pytest.mark.parametrize("level", LEVELS)
def test_a_caption_belongs_to_one_level(level):
    assert [parse_caption(text, level) is not None for text in CAPTIONS] == [other == level for other in LEVELS]
    assert list(parse_caption(CAPTIONS[level - 1], level)) == list(ATTRIBUTES)[:level]
    assert parse_caption(CAPTIONS[level - 1] + " heart", level) is None
    with pytest.raises(ValueError, match="level must be"):
        parse_caption("heart", 6)


def test_strict_captions_counts_each_attribute():
    truths = ["big red heart"] * 4
    found = strict_captions(["big red heart", "small red heart", "red heart", "big red heart at top left"], truths, 3)
    assert found["strict"].tolist() == [True, False, False, False]
    assert found["size"].tolist() == [True, False, False, False]
    assert found["colour"].tolist() == found["shape"].tolist() == [True, True, False, False]
    with pytest.raises(ValueError, match="captions of level 3"):
        strict_captions(["big heart"], ["big heart"], 3)


# ---- templates


@pytest.mark.parametrize("level", [1, 4, 5])
def test_rendered_sprites_fit_their_template(level):
    pixels, table = pictures(level)
    iou = template_iou(pixels.float() / 255, *(torch.tensor(table[name]) for name in ("shape", "size", "colour")))
    assert iou.min() > 0.92, "of what is left to the search and to pixels, less than a tenth"


def test_the_mask_is_that_of_the_data():
    pixels, table = pictures(5)
    mask = covered_by_object(pixels.float() / 255, torch.tensor(table["colour"]))
    wrong = ((mask >= 0.5) != torch.from_numpy(table["mask"]).bool()).flatten(1).sum(1)
    assert wrong.max() <= 8, "pixels that the texture turns over"


@pytest.mark.parametrize("angle", [0.0, 2.0, 4.4])
def test_every_turn_and_place_is_found(angle):
    for shape in ATTRIBUTES["shape"]:
        for size in ("small", "big"):
            assert fit(drawn(shape, size, 0.31, 0.68, angle), shape, size) > 0.92


def test_what_fits_badly():
    square = drawn("square")
    assert fit(square, size="small") < 0.5
    assert fit(square, "ellipse") < 0.85 and fit(square, "heart") < 0.85 and fit(drawn("heart"), "ellipse") < 0.85
    both = torch.maximum(drawn("square", x=0.25), drawn("square", "small", x=0.75, colour="blue"))
    assert fit(both) < 0.8
    assert fit(torch.full((1, 3, 64, 64), 30, dtype=torch.uint8)) == 0


@pytest.mark.parametrize("size", ["small", "big"])
def test_a_disc_does_not_pass_for_a_square(size):
    radius = {"small": 0.085, "big": 0.155}[size] * 64 * 1.08
    place = torch.arange(64) + 0.5
    covered = (0.5 - (torch.hypot(place - 32.2, place.unsqueeze(1) - 31.9) - radius)).clamp(0, 1)
    disc = 30 + covered * (torch.tensor([220.0, 40.0, 40.0]).view(1, 3, 1, 1) - 30)
    assert 0.7 < fit(disc, size=size) < smallest_iou(3)


def test_a_soft_edge_and_another_shade_still_fit():
    square = drawn("square", "small").float()
    soft = blur(square[0], torch.full((3,), 0.8)).unsqueeze(0) * 0.93 + 6
    assert fit(soft, size="small") > 0.9


def test_templates_refuse_what_they_cannot_read():
    with pytest.raises(ValueError, match="H a multiple of 8"):
        template_iou(torch.rand(1, 3, 32, 30), *(torch.zeros(1, dtype=torch.int64),) * 3)


# ---- examples


def test_an_example_is_a_function_of_its_number():
    whole, part = examples(torch.arange(40)), examples(torch.tensor([33, 2]))
    assert torch.equal(whole.pixels[[33, 2]], part.pixels) and torch.equal(whole.kinds[[33, 2]], part.kinds)
    others = [examples(torch.arange(40), 1).pixels, examples(torch.arange(40), split="test").pixels]
    assert not any((whole.pixels == other).flatten(1).all(1).any() for other in others)
    with pytest.raises(ValueError, match="split"):
        examples(torch.arange(2), split="validation")


def test_mild_sprites_show_their_labels():
    found = examples(torch.arange(60), negatives=0.0)
    iou = template_iou(found.pixels.float() / 255, *(found.labels[name] for name in ("shape", "size", "colour")))
    assert (found.kinds == -1).all() and iou.mean() > 0.93 and (iou < 0.85).float().mean() < 0.05
    assert {len(values.unique()) for values in found.labels.values()} == {len(values) for values in ATTRIBUTES.values()}


def test_negatives_are_of_every_kind_and_as_many_as_asked():
    found = examples(torch.arange(300), negatives=0.5)
    assert found.kinds.unique().tolist() == list(range(-1, len(KINDS)))
    assert (found.kinds >= 0).float().mean().item() == pytest.approx(0.5, abs=0.09)


def test_negatives_that_geometry_sees_misfit():
    found = examples(torch.arange(120), negatives=1.0)
    iou = template_iou(found.pixels.float() / 255, *(found.labels[name] for name in ("shape", "size", "colour")))
    share = {name: (iou[found.kinds == i] < 0.85).float().mean().item() for i, name in enumerate(KINDS)}
    assert min(share[name] for name in ("empty", "incomplete", "between")) > 0.9, share


def test_blur_keeps_the_sum_inside_and_zero_changes_nothing():
    dot = torch.zeros(2, 64, 64)
    dot[:, 30, 33] = 1
    soft = blur(dot, torch.tensor([0.0, 2.0]))
    assert torch.allclose(soft[0], dot[0]) and soft[1].sum().item() == pytest.approx(1, abs=1e-4)
    place = torch.arange(64.0)
    assert ((place - 33).square() * soft[1].sum(0)).sum().item() == pytest.approx(4, rel=0.01), "the variance is the square of 2"


def test_only_what_a_kind_needs_is_drawn_and_it_is_the_same():
    """Rows drawn together, each by its kind, are those drawn one by one."""
    together = examples(torch.arange(24), negatives=1.0)
    assert len(together.kinds.unique()) > 6
    for row in range(24):
        assert torch.equal(examples(torch.tensor([row]), negatives=1.0).pixels[0], together.pixels[row])


# ---- what the judge looks at


@pytest.mark.parametrize(("size", "radius"), [("small", 0.085), ("big", 0.155)])
def test_the_object_is_located(size, radius):
    pixels = drawn("square", size, 0.31, 0.64)
    mask = covered_by_object(pixels.float() / 255, torch.zeros(1, dtype=torch.int64))
    centre, scale = locate(mask)
    assert centre[0].tolist() == pytest.approx([0.31, 0.64], abs=2e-3) and scale.item() == pytest.approx(radius, rel=0.02)


def test_of_two_objects_the_larger_is_located():
    big, small = (drawn("square", size, *place).float() / 255 for size, place in (("big", (0.26, 0.3)), ("small", (0.82, 0.84))))
    centre, _ = locate(covered_by_object(torch.maximum(big, small), torch.zeros(1, dtype=torch.int64)))
    assert centre[0].tolist() == pytest.approx([0.26, 0.3], abs=5e-3)


def test_a_turn_of_the_picture_turns_the_circles_and_a_shift_leaves_them():
    pixels = pictures(3)[0].float() / 255
    circles, _ = look(pixels)
    assert circles.std() > 0.1
    assert torch.allclose(look(pixels.rot90(1, (2, 3)))[0], circles.roll(-16, 2), atol=1e-3)
    one = drawn("heart", x=0.4, y=0.45).float() / 255
    shifted = look(one.roll((4, 8), (2, 3)))
    assert torch.allclose(shifted[0], look(one)[0], atol=1e-3)
    moved = (shifted[1] - look(one)[1])[0, 3:5]
    assert moved.tolist() == pytest.approx([10 * 8 / 64, 10 * 4 / 64], abs=1e-3), "ten times x and y of the centre"


def test_shape_does_not_depend_on_the_turn_and_what_lies_far_away_is_seen():
    torch.manual_seed(0)
    judge, pixels = Judge(8).eval(), pictures(3)[0].float() / 255
    with torch.no_grad():
        h, turned = (judge.around(look(x)[0]).amax(2) for x in (pixels, pixels.rot90(1, (2, 3))))
    assert torch.allclose(h, turned, atol=1e-3) and h.std() > 0.01
    alone = drawn("square", x=0.26, y=0.3).float() / 255
    both = torch.maximum(alone, drawn("square", "small", 0.82, 0.84).float() / 255)
    beyond = slice(-256 - 3, -256)
    assert look(alone)[1][0, beyond].max() < 0.01 and look(both)[1][0, beyond].min() > 0.5


def test_nothing_to_see_is_still_a_number():
    assert all(x.isfinite().all() for x in look(torch.full((2, 3, 64, 64), 0.5)))


# ---- the judge


def biased(**wanted: str) -> Judge:
    """A judge that sees the same in every picture and refuses nothing."""
    judge = Judge(8)
    with torch.no_grad():
        for name, head in [*judge.heads.items(), ("refuse", judge.refuse)]:
            head.weight.zero_()
            head.bias.fill_(-5.0)
            if name in wanted:
                head.bias[ATTRIBUTES[name].index(wanted[name])] = 5.0
    return judge


def test_strict_needs_every_named_attribute_the_fit_and_no_refusal():
    judge = biased(shape="square", size="big", colour="red", position="top left", background="dark")
    pixels = torch.cat([drawn("square"), drawn("square"), drawn("ellipse"), drawn("square")])
    captions = ["big red square", "big blue square", "big red square", "red square"]
    found = judge.strict(pixels, captions, 3)
    assert found.right.tolist() == [True, False, False, False]
    assert found.fits.tolist() == [True, True, False, True] and found.malformed.tolist() == [False, False, False, True]
    assert found.attributes["shape"].tolist() == [True, True, True, False] and found.attributes["colour"].tolist() == [
        True,
        False,
        True,
        False,
    ]
    assert found.figures()["strict"] == 0.25 and "position" not in found.attributes
    assert judge.strict(pixels[:1], ["square"], 1).right.item(), "what is not named may vary"
    judge.refuse.bias.data.fill_(5.0)
    refused = judge.strict(pixels, captions, 3)
    assert not refused.right.any() and refused.refused.all() and torch.equal(refused.attributes["colour"], found.attributes["colour"])


def test_level_five_needs_less_of_the_fit():
    assert [smallest_iou(level) for level in LEVELS] == [0.85, 0.85, 0.85, 0.85, 0.8]


def test_a_verdict_is_the_picture_s_own_for_bytes_and_floats():
    judge = Judge(8).train()
    pixels, _ = pictures(5, 6)
    whole, alone, floats = judge.judge(pixels), judge.judge(pixels[2:3]), judge.judge(pixels.double() / 255)
    assert judge.training and {name: len(index) for name, index in whole.seen.items()} == dict.fromkeys(ATTRIBUTES, 6)
    for one, row in ((whole, 2), (floats, 2)):
        assert torch.allclose(one.refusal[row], alone.refusal[0], atol=1e-5) and one.iou[row] == alone.iou[0]
        assert all(index[row] == alone.seen[name][0] for name, index in one.seen.items())


@pytest.mark.parametrize(
    ("pixels", "message"),
    [(torch.rand(2, 3, 32, 32), "shape"), (torch.rand(2, 3, 64, 64) * 2, "expected uint8"), (torch.zeros(0, 3, 64, 64), "at least 1")],
)
def test_pictures_that_cannot_be_judged(pixels, message):
    with pytest.raises(ValueError, match=message):
        Judge(8).judge(pixels)


def test_as_many_captions_as_pictures():
    with pytest.raises(ValueError, match="captions: got 1 for 2"):
        Judge(8).strict(torch.rand(2, 3, 64, 64), ["heart"], 1)


def test_a_folder_gives_the_judge_back(tmp_path):
    judge = Judge(8).train()
    pixels, _ = pictures(3, 8)
    judge(pixels.float() / 255)  # moves the statistics of BatchNorm
    judge.save_pretrained(tmp_path)
    again = Judge.from_pretrained(tmp_path)
    assert not again.training and torch.equal(again.judge(pixels).refusal, judge.judge(pixels).refusal)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attributes": {"shape": ["square"]}}))
    with pytest.raises(ValueError, match="attributes: got"):
        Judge.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Judge.from_pretrained(tmp_path)


def test_the_recipe_learns_measures_and_refuses_to_be_trusted_too_early(tmp_path):
    module = recipe("sprites_judge")
    argv = ["--steps", "4", "--batch_size", "32", "--width", "8", "--rows", "6", "--mixed_precision", "no", "--output_dir"]
    with mock.patch.object(sys, "argv", ["recipes/sprites_judge.py", *argv, str(tmp_path)]), pytest.raises(SystemExit) as stopped:
        module.main()
    assert "not good enough to judge: shape" in str(stopped.value)
    told = json.loads((tmp_path / "metrics.json").read_text())
    assert set(told["metrics"]) == {*ATTRIBUTES, "negatives_refused", "clean_refused"}
    assert {"mild sprites", "all negatives"} < set(told["examples"]) <= {"mild sprites", "all negatives", *KINDS}
    assert Judge.from_pretrained(tmp_path).width == 8


def test_a_step_of_training_lowers_the_loss_of_its_rows():
    module = recipe("sprites_judge")
    judge, found = Judge(8).train(), examples(torch.arange(48))
    optimizer = torch.optim.AdamW(judge.parameters(), 4e-3)
    losses = []
    for _ in range(8):
        loss = module.loss_of(judge, found.pixels, found.labels, found.kinds >= 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
