"""What a joint model makes of its modalities: a model that knows everything, one that knows nothing, and rows that lack something."""

from types import SimpleNamespace

import datasets
import pytest
import torch
from accelerate import Accelerator
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel

from mmvae import MMVAE, ImageVAEImageProcessor, MMVAEConfig, MMVAEProcessor
from mmvae.coherence import (
    _recalls,
    class_coherence,
    cross_generated,
    evaluate_joint,
    joint_generated,
    retrieval,
    sprites_accuracy,
    text_coherence,
    without_densities,
)
from mmvae.data import ImageColumn, Rows, TextColumn, as_modalities, sprites
from mmvae.data.sprites import ATTRIBUTES
from mmvae.distributions import DiagNormal
from mmvae.evaluation import evaluate_conditional
from mmvae.judge import Judge, Verdict
from mmvae.models.base import VAEConfig
from mmvae.models.joint_generation import crowding, overlap
from mmvae.models.unimodal import VAEModel
from mmvae.processing import train_tokenizer

WORDS = {"en": [f"word{i:02d} here" for i in range(40)], "de": [f"wort{i:02d} hier" for i in range(40)]}


@strict
class WordsConfig(VAEConfig):
    model_type = "coherence_words"

    latent_dim: int = 2
    vocab_size: int = 50
    eos_token_id: int = 2


@strict
class PicturesConfig(VAEConfig):
    model_type = "coherence_pictures"

    latent_dim: int = 2
    num_pictures: int = 3


class Table(VAEModel):
    """Entry i of a table has its own place in the latent space, ``codes[i]``: nothing is learned, nothing is confused."""

    input_modalities = ("text",)

    def __init__(self, config, size: int):
        super().__init__(config)
        angle = torch.arange(size) * 2 * torch.pi / size
        self.codes = nn.Parameter(torch.stack([angle.cos(), angle.sin()], 1))
        self.latent_prior = self.build_prior()
        self.post_init()

    def encode(self, **inputs):
        return DiagNormal(codes := self.codes[self.number(**inputs)].detach(), torch.full_like(codes, -12.0))

    def nearest(self, z):
        return torch.cdist(z, self.codes).argmin(1)


class Words(Table):
    """Entries are the first words of sentences of two; the vocabulary is in the order of the rows."""

    config: WordsConfig
    main_input_name = "input_ids"
    input_names = ("input_ids", "attention_mask")

    def __init__(self, config: WordsConfig):
        super().__init__(config, config.vocab_size)
        self.last = config.eos_token_id

    def number(self, input_ids, attention_mask):
        return input_ids[:, 1]

    def render(self, z, **options):
        first = self.nearest(z)
        bos, last, eos = (torch.full_like(first, value) for value in (1, self.last, 2))
        return torch.stack([bos, first, last, eos], 1)


class Pictures(Table):
    """Entries are pictures."""

    config: PicturesConfig
    main_input_name = "pixel_values"
    input_names = ("pixel_values",)

    def __init__(self, config: PicturesConfig):
        super().__init__(config, config.num_pictures)
        self.pictures = nn.Parameter(torch.zeros(config.num_pictures, 3, 64, 64), requires_grad=False)

    def number(self, pixel_values):
        return torch.cdist(pixel_values.float().flatten(1) / 255, self.pictures.flatten(1)).argmin(1)

    def render(self, z):
        return self.pictures[self.nearest(z)]


for config, model in ((WordsConfig, Words), (PicturesConfig, Pictures)):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)


def tokenizer(sentences):
    """One whose words are numbered as the sentences are; the second word, which all have, is the last."""
    made = train_tokenizer([" ".join(dict.fromkeys(sentence.split()[0] for sentence in sentences)) + " " + sentences[0].split()[1]])
    vocabulary = made.get_vocab()
    numbers = [vocabulary[sentence.split()[0]] for sentence in sentences]
    return made, torch.tensor(numbers), vocabulary[sentences[0].split()[1]]


def translator(missing=()):
    """A model that translates without fault, its processor, and rows; ``missing`` are (language, row)."""
    texts = {name: [None if (name, i) in missing else text for i, text in enumerate(values)] for name, values in WORDS.items()}
    model = MMVAE(MMVAEConfig(modalities={name: WordsConfig(vocab_size=45) for name in WORDS}, latent_dim=2)).eval()
    parts, columns = {}, {}
    angle = torch.arange(40) * 2 * torch.pi / 40
    for name, values in WORDS.items():
        parts[name], numbers, last = tokenizer(values)
        codes = torch.full((45, 2), 9.0)
        codes[numbers] = torch.stack([angle.cos(), angle.sin()], 1)
        model.vaes[name].codes.data, model.vaes[name].last = codes, last
        columns[name] = TextColumn(name, parts[name])
    return model, MMVAEProcessor(parts), Rows(datasets.Dataset.from_dict(texts), as_modalities(columns)), texts


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


# ---- retrieval


def test_a_candidate_that_is_near_to_everything_crowds_nobody_out():
    queries = DiagNormal(torch.tensor([[0.0], [1.0]]), torch.full((2, 1), 0.3).square().log())
    candidates = DiagNormal(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [3.0]]).square().log())
    figures = _recalls(queries, candidates, (1,))
    assert figures == {"recall_at_1": 0.5, "balanced_recall_at_1": 1.0}
    louder = overlap(queries, candidates) + torch.tensor([7.0, -2.0])  # a constant of a candidate's own changes nothing
    louder = louder - louder.logsumexp(0)
    torch.testing.assert_close(louder.diff(dim=1), (overlap(queries, candidates) - crowding(queries, candidates)).diff(dim=1))


def test_a_perfect_model_finds_every_other_half(accelerator):
    model, _, rows, _ = translator()
    figures = retrieval(accelerator, model, rows, "en", "de")
    for way in ("en_to_de", "de_to_en"):
        assert [figures[f"{way}/recall_at_{k}"] for k in (1, 5, 10)] == [1, 1, 1]
        assert [figures[f"{way}/chance_at_{k}"] for k in (1, 5, 10)] == [1 / 40, 5 / 40, 10 / 40]
        assert figures[f"{way}/candidates"] == 40


def test_a_collapsed_model_retrieves_by_chance(accelerator):
    model, _, rows, _ = translator()
    for vae in model.vaes.values():
        vae.codes.data.zero_()
    figures = retrieval(accelerator, model, rows, "en", "de")
    assert {k: figures[f"en_to_de/recall_at_{k}"] for k in (1, 5, 10)} == pytest.approx({1: 1 / 40, 5: 5 / 40, 10: 10 / 40})


def test_latents_that_know_nothing_of_each_other_retrieve_about_by_chance(accelerator):
    found = []
    for seed in range(8):
        model, _, rows, _ = translator()
        torch.manual_seed(seed)
        for vae in model.vaes.values():
            vae.codes.data.normal_()
        found.append(retrieval(accelerator, model, rows, "en", "de")["en_to_de/recall_at_10"])
    assert sum(found) / 8 == pytest.approx(0.25, abs=0.1)


def test_rows_that_lack_one_are_no_candidates(accelerator):
    model, _, rows, _ = translator({("en", 3), ("de", 5), ("de", 6)})
    figures = retrieval(accelerator, model, rows, "en", "de", ks=(1, 37))
    assert (figures["en_to_de/recall_at_1"], figures["en_to_de/candidates"], figures["en_to_de/chance_at_37"]) == (1, 37, 1)
    model, _, rows, _ = translator({("en" if i % 2 else "de", i) for i in range(40)})
    assert retrieval(accelerator, model, rows, "en", "de") == {}


# ---- words


def test_a_perfect_model_translates_word_for_word(accelerator):
    model, processor, rows, texts = translator({("en", 3), ("de", 5)})
    figures = text_coherence(accelerator, model, processor, rows, texts)
    scores = {"exact_match": 1, "bleu": 100, "chrf": 100}
    assert figures == pytest.approx({f"{way}/{name}": value for way in ("de_to_en", "en_to_de") for name, value in scores.items()})
    model.vaes["de"].codes.data = model.vaes["de"].codes.roll(1, 0)  # every word means its neighbour
    wrong = text_coherence(accelerator, model, processor, rows, {"en": texts["en"]}, num_rows=30)
    assert list(wrong) == ["de_to_en/exact_match", "de_to_en/bleu", "de_to_en/chrf"]
    assert wrong["de_to_en/exact_match"] < 0.1 and 0 < wrong["de_to_en/chrf"] < 90


def test_a_row_is_made_from_what_is_seen_alone_and_left_out_where_there_is_nothing_to_see_or_compare(accelerator):
    model, _, rows, _ = translator({("en", 3), ("de", 5)})
    before = dict(_numbered(cross_generated(accelerator, model, rows, ["en"], "de", seed=1)))
    assert set(before) == set(range(40)) - {3, 5}
    far = lambda input_ids, **_: DiagNormal(torch.full((len(input_ids), 2), 50.0), torch.zeros(len(input_ids), 2))  # noqa: E731
    model.vaes["de"].encode = far  # the target is hidden: what it would say does not matter
    again = dict(_numbered(cross_generated(accelerator, model, rows, ["en"], "de", seed=1)))
    assert before == again
    assert set(dict(_numbered(cross_generated(accelerator, model, rows, ["en"], "de", num_rows=7)))) == {0, 1, 2, 4, 6}


def _numbered(chunks):
    return ((number, tuple(row)) for numbers, made in chunks for number, row in zip(numbers.tolist(), made.tolist(), strict=True))


def test_ranks_share_the_chunks_and_draw_what_one_would(monkeypatch):
    monkeypatch.setattr("mmvae.coherence.CHUNK", 7)
    model, _, rows, _ = translator({("en", 3)})
    for vae in model.vaes.values():
        vae.encode = lambda **inputs: DiagNormal(*torch.zeros(2, len(inputs["input_ids"]), 2))  # so wide that samples differ
    one, first, second = (SimpleNamespace(num_processes=n, process_index=i, device="cpu") for n, i in ((1, 0), (2, 0), (2, 1)))
    alone, *parts = (list(_numbered(cross_generated(rank, model, rows, ["en"], "de"))) for rank in (one, first, second))
    assert sorted(parts[0] + parts[1]) == sorted(alone)
    assert all(parts) and len({row for _, row in alone}) > 20
    assert alone != list(_numbered(cross_generated(one, model, rows, ["en"], "de", seed=1)))
    whole, *parts = ([made["en"] for made in joint_generated(rank, model, 30)] for rank in (one, first, second))
    assert [len(made) for made in whole] == [7, 7, 7, 7, 2]
    assert all(torch.equal(made, parts[n % 2][n // 2]) for n, made in enumerate(whole))


# ---- classes


def test_classes_of_a_perfect_model_agree(accelerator):
    model, processor, rows, _ = translator({("de", 5)})

    def classify(name):
        return lambda ids: torch.tensor([int(text.split()[0][4:]) for text in processor.batch_decode(ids, name)])

    classifiers = {name: classify(name) for name in WORDS}
    figures = class_coherence(accelerator, model, rows, classifiers, range(40), num_rows=20, num_generated=150)
    assert figures == {"de_to_en/coherence": 1, "en_to_de/coherence": 1, "joint/coherence": 1}
    labels = [0] * 10 + list(range(10, 40))
    wrong = class_coherence(accelerator, model, rows, {"de": classifiers["de"]}, labels, num_rows=20)
    assert wrong == pytest.approx({"en_to_de/coherence": 11 / 19})  # row 0 and ten more, of the twenty rows without row 5


def test_nothing_recognised_is_never_right(accelerator):
    model, _, rows, _ = translator()
    blind = dict.fromkeys(WORDS, lambda ids: torch.full((len(ids),), -1))
    assert set(class_coherence(accelerator, model, rows, blind, [-1] * 40).values()) == {0.0}


# ---- sprites


class Catalogue(Judge):
    """Knows the pictures of the model by heart, and refuses all others; judges by the real rules."""

    def __init__(self, pictures, shapes):
        super().__init__(8)
        self.pictures, self.shapes = pictures, shapes

    def judge(self, pixels):
        distance, number = torch.cdist(pixels.flatten(1), self.pictures.flatten(1)).min(1)
        seen = {name: torch.zeros_like(number) for name in ATTRIBUTES} | {"shape": self.shapes[number]}
        return Verdict(seen, (distance > 1e-3).float(), torch.ones(len(pixels)))


@pytest.fixture
def drawing():
    """A model that draws and names shapes without fault; judge, rows and captions."""
    data = sprites(1, "test", 12)
    shapes = torch.tensor(data["shape"])
    pictures = torch.from_numpy(data["image"]).movedim(-1, 1).float() / 255
    parts = {"image": ImageVAEImageProcessor(), "text": train_tokenizer(["square", "ellipse", "heart"])}
    children = {"image": PicturesConfig(num_pictures=12), "text": WordsConfig(vocab_size=7)}
    model = MMVAE(MMVAEConfig(modalities=children, latent_dim=2)).eval()
    codes = torch.tensor([[3.0, 0.0], [-3.0, 3.0], [-3.0, -3.0]])
    model.vaes["image"].pictures.data = pictures
    model.vaes["image"].codes.data = codes[shapes]
    words = [parts["text"].get_vocab()[name] for name in ATTRIBUTES["shape"]]
    model.vaes["text"].codes.data = torch.full((7, 2), 99.0).index_copy(0, torch.tensor(words), codes)
    columns = {"image": ImageColumn("image", 64), "text": TextColumn("caption", parts["text"])}
    return model, MMVAEProcessor(parts), Rows(data, as_modalities(columns)), Catalogue(pictures.clone(), shapes), data["caption"]


def test_a_perfect_model_of_sprites_is_strictly_right(accelerator, drawing):
    figures = sprites_accuracy(accelerator, *drawing, 1, num_generated=150)
    assert {name: value for name, value in figures.items() if name.endswith("/strict")} == {
        "text_to_image/strict": 1,
        "image_to_text/strict": 1,
        "joint/strict": 1,
    }
    assert figures["text_to_image/shape"] == figures["image_to_text/shape"] == 1
    assert figures["joint/refused"] == figures["joint/malformed"] == 0


def test_one_wrong_shape_costs_its_share(accelerator, drawing):
    model, _, _, _, captions = drawing
    share = captions.count("heart") / len(captions)
    assert 0 < share < 1
    heart = model.vaes["image"].codes[captions.index("heart")].clone()
    wrong = (model.vaes["image"].codes == heart).all(1)
    model.vaes["image"].pictures.data[wrong] = 0.5  # what it draws of a heart is grey
    figures = sprites_accuracy(accelerator, *drawing, 1, num_generated=12)
    assert figures["text_to_image/strict"] == pytest.approx(1 - share)
    assert figures["text_to_image/refused"] == pytest.approx(share)
    assert "joint/strict" in figures


def test_sprites_are_one_picture_and_one_text(accelerator, drawing):
    model, processor, rows, _ = translator()
    with pytest.raises(ValueError, match=r"received the modalities \{'en': 'tokenizer', 'de': 'tokenizer'\}, expected one picture"):
        sprites_accuracy(accelerator, model, processor, rows, drawing[3], [], 1)


def test_all_figures_at_once_also_without_what_was_fitted_afterwards(accelerator, drawing):
    model, processor, rows, judge, captions = drawing
    options = {"num_generated": 12, "judge": judge, "level": 1}
    plain = evaluate_joint(accelerator, model, processor, rows, {"text": captions}, **options)
    assert {"image_to_text/recall_at_1", "image_to_text/bleu", "joint/strict"} <= set(plain)
    assert not [name for name in plain if name.startswith("without")]

    class Nowhere(nn.Module):
        def sample(self, num_samples, generator=None):
            return torch.full((num_samples, 2), 1e4)  # nearest to a word that is no shape

    model.densities["shared"] = Nowhere()
    both = evaluate_joint(accelerator, model, processor, rows, {"text": captions}, **options)
    assert both["joint/strict"] == 0 and both["joint/malformed"] == 1
    assert both["without_densities/joint/strict"] == plain["joint/strict"] == 1
    assert set(evaluate_joint(accelerator, model, processor, rows, {"text": captions}, num_generated=0)) < set(plain)
    with without_densities(model):
        assert not len(model.densities)
    assert list(model.densities) == ["shared"]


# ---- likelihoods


def test_conditional_likelihoods_are_those_of_the_rows_that_have_both(accelerator):
    from test_mmvae import exact, linear_joint

    model, inputs = linear_joint(aggregation="poe")
    present = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 1], [1, 1], [1, 1]]).bool()
    batch = inputs | {"present": present, "row": torch.arange(6), "row_weight": torch.ones(6), "num_rows": torch.tensor(6)}
    loader = SimpleNamespace(batches=lambda epoch: iter([batch]), fingerprint="")
    figures = evaluate_conditional(accelerator, model, loader, num_samples=3000)
    both = present.all(1)
    for name, other in (("a", "b"), ("b", "a")):
        expected = (exact(model, inputs, (other,)) - exact(model, inputs))[both].mean().item()
        assert figures[f"conditional_nll_nats_{name}"] == pytest.approx(expected, abs=0.1)
    batch["present"] = torch.tensor([[1, 0], [0, 1]]).bool().repeat(3, 1)
    assert evaluate_conditional(accelerator, model, loader, num_samples=2) == {}
