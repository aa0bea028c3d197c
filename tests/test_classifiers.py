"""Classifiers of what a joint model makes, on classes that pictures and texts show plainly."""

import datasets
import pytest
import torch
from accelerate import Accelerator
from test_coherence import WORDS, translator
from test_digits import digits
from torchvision.transforms.v2.functional import gaussian_blur

from mmvae.classifiers import PictureClassifier, labelled_coherence, picture_accuracy, picture_classifier, text_classifier
from mmvae.data import ImageColumn


def test_a_text_is_of_its_class_word_for_word():
    classify = text_classifier(["_ o n e", "o n e _", "t w o", "one or two", "one or two", None], [1, 1, 2, 1, 2, 2])
    assert classify(["o n e _", " t w  o", "o n e", "one or two", "t w o _", ""]).tolist() == [1, 2, -1, -1, -1, -1]
    assert classify([]).tolist() == []


def test_a_classifier_of_pictures_learns_and_is_measured_on_rows_that_it_did_not_see():
    column, data = ImageColumn("image", 8, 1), digits(400)
    model = picture_classifier(data, column, "label", num_epochs=15)
    assert not model.training and picture_accuracy(model, digits(30), column, "label", [str(i) for i in range(10)]) == 1
    again = picture_classifier(data, column, "label", num_epochs=15)
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    turned = digits(30).map(lambda row: {"label": (row["label"] + (row["label"] < 3)) % 10}, load_from_cache_file=False)
    assert picture_accuracy(model, turned, column, "label", [str(i) for i in range(10)]) == pytest.approx(0.7)


def test_what_is_soft_and_faint_is_told_too():
    column, sharp = ImageColumn("image", 8, 1), digits(40)
    model = picture_classifier(digits(400), column, "label", num_epochs=15)
    pixels = torch.stack([column.pack(column.prepare([image]))[0] for image in sharp["image"]])
    soft = 0.6 * gaussian_blur(pixels.float() / 255, [5, 5], [1.0, 1.0])
    assert (model.classify(soft) == torch.tensor(sharp["label"])).all()


def test_bytes_and_floats_are_the_same_picture():
    model = PictureClassifier(1, 3).eval()
    pixels = torch.randint(256, (5, 1, 9, 7), dtype=torch.uint8)
    torch.testing.assert_close(model(pixels), model(pixels / 255))
    assert model.classify(pixels).shape == (5,)


def test_a_faithful_translator_is_coherent_and_a_confused_one_by_its_share():
    model, processor, rows, texts = translator({("de", 5)})
    kinds = {"kind": [i % 4 for i in range(40)]}
    data, known = datasets.Dataset.from_dict(texts | kinds), datasets.Dataset.from_dict(WORDS | kinds)
    options = {"num_generated": 100}
    accelerator = Accelerator(cpu=True)
    figures = labelled_coherence(accelerator, model, processor, rows, data, known, "kind", **options)
    assert figures == {"en_to_de/coherence": 1, "de_to_en/coherence": 1, "joint/coherence": 1}
    one_off = data.map(lambda row, i: {"kind": (row["kind"] + (i < 10)) % 4}, with_indices=True, load_from_cache_file=False)
    gap = labelled_coherence(accelerator, model, processor, rows, data, data, "kind", **options)
    assert gap["joint/coherence"] < 1, "nobody knows the word that is missing"
    figures = labelled_coherence(accelerator, model, processor, rows, one_off, known, "kind", **options)
    assert figures["en_to_de/coherence"] == pytest.approx(30 / 39)
