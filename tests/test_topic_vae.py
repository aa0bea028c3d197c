"""Topics: what a bag of words weighs, that topics are found where there are some, and what the head and Trainer make of a TopicVAE."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from mmvae import MMVAE, ImageVAEConfig, MMVAEConfig, TopicVAE, TopicVAEConfig, TopicVAEForSequenceClassification
from mmvae.distributions import BagOfWords
from mmvae.noise import fold

WORDS = [f"{subject}{i}" for subject in ("sport", "money", "film") for i in range(12)]


def documents(rows: int = 240) -> torch.Tensor:
    """Of 30 words: those of one of three subjects, and now and then any other one."""
    subject = torch.arange(rows) % 3
    p = torch.full((rows, 3, 12), 0.05)
    p[torch.arange(rows), subject] = 1.0
    return torch.distributions.Multinomial(30, p.flatten(1)).sample()


def model(**options) -> TopicVAE:
    torch.manual_seed(0)
    return TopicVAE(TopicVAEConfig(**{"vocabulary": WORDS, "latent_dim": 3, "hidden_size": 16} | options))


def test_a_bag_of_words_has_the_probability_of_its_words_in_their_order():
    p = torch.tensor([0.5, 0.3, 0.2])
    order = [0, 2, 0, 1]  # one document
    expected = torch.stack([p[word] for word in order]).prod()
    assert BagOfWords(p.log() + 7).log_prob(torch.tensor([2, 1, 1])).exp() == pytest.approx(expected.item(), rel=1e-5)
    assert BagOfWords(p.log()).log_prob(torch.zeros(3)) == 0
    counts = torch.tensor([2.0, 1, 1])
    same = torch.distributions.Multinomial(4, p).log_prob(counts) - torch.tensor(12.0).log()  # its coefficient: 4! / 2!
    torch.testing.assert_close(BagOfWords(p.log()).log_prob(counts), same)


@pytest.mark.parametrize("mixing", ["product", "mixture"])
def test_topics_are_found_where_there_are_some(mixing):
    vae, counts = model(mixing=mixing), documents()
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.02)
    for _ in range(120):
        rows = torch.randperm(len(counts))[:60]
        loss = vae(counts[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    vae.eval()
    subjects = [{word.rstrip("0123456789") for word in topic} for topic in vae.topics(top_k=8)]
    assert sorted(map(len, subjects)) == [1, 1, 1] and len(set.union(*subjects)) == 3
    shares = vae.document_topics(counts)
    torch.testing.assert_close(shares.sum(1), torch.ones(len(counts)))
    told = shares.argmax(1)
    assert all((told[kind::3] == told[kind]).float().mean() > 0.95 for kind in range(3)) and len(set(told[:3].tolist())) == 3


def test_a_mixture_of_topics_is_the_mean_of_their_words_and_a_product_is_not():
    z = torch.tensor([[1.0, 0.0, -2.0]])
    for mixing, expected in (("mixture", True), ("product", False)):
        vae = model(mixing=mixing).eval()
        mean = z.softmax(-1) @ vae.topic_words().exp()
        assert torch.allclose(vae.render(z), mean, atol=1e-6) == expected
        torch.testing.assert_close(vae.topic_words().exp().sum(1), torch.ones(3))


def test_looking_at_topics_changes_nothing():
    vae = model()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    seen = vae.topic_words()
    assert vae.decoder.training and all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    torch.testing.assert_close(vae.eval().topic_words(), seen)


def test_one_document_trains_and_one_without_words_has_no_reconstruction_to_pay_for():
    vae = model()
    vae(documents(1)).loss.backward()  # a batch of one has no variance
    assert all(parameter.grad.isfinite().all() for parameter in vae.parameters())
    out = vae.eval()(torch.zeros(2, len(WORDS), dtype=torch.int64))
    assert out.log_px.tolist() == [0, 0] and (out.kl > 0).all()


@pytest.mark.parametrize("mixing", ["product", "mixture"])
def test_dropout_leaves_every_document_words(mixing):
    vae = model(mixing=mixing, dropout=0.9)
    assert vae(documents(60)).loss_rows.isfinite().all()


def test_counts_of_any_dtype_are_the_same_counts():
    vae, counts = model().eval(), documents(4)
    for dtype in (torch.int64, torch.uint8, torch.float64):
        assert torch.equal(vae(counts.to(dtype)).loss, vae(counts).loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary": ["goal"]}, "vocabulary: received 1 words, 1 of them different, expected at least 2, and each once"),
        ({"vocabulary": ["goal", "goal"]}, "vocabulary: received 2 words, 1 of them different"),
        ({"vocabulary": []}, "vocabulary: received 0 words"),
        ({"latent_dim": 1}, "latent_dim: received 1, expected 2 to"),
        ({"concentration": 0.0}, "concentration: received 0.0, expected 0.001 to"),
        ({"latent_dim": 2, "mixing": "mixture"}, "latent_dim: received 2 with mixing 'mixture', expected at least 3"),
        ({"mixing": "sum"}, "mixing: received 'sum', expected one of 'product', 'mixture'"),
    ],
)
def test_configurations_that_cannot_be_are_named(options, message):
    with pytest.raises(StrictDataclassError, match=message):
        model(**options)


def test_wrong_arguments_are_named():
    vae = model().eval()
    with pytest.raises(TypeError, match="word_counts: received a list, expected a tensor"):
        model().encode([[1.0] * len(WORDS)])
    with pytest.raises(ValueError, match=r"word_counts: received shape \(2, 35\), expected \(batch, 36\), the vocabulary's"):
        vae(torch.zeros(2, 35))
    for wrong in (-1.0, math.nan, math.inf):
        counts = torch.zeros(3, 36)
        counts[2, 4] = wrong
        with pytest.raises(ValueError, match=rf"word_counts: received {wrong:g} of {WORDS[4]!r} in row 2, expected 0 or more"):
            vae(counts)
    with pytest.raises(ValueError, match="top_k: received 37, expected 1 to 36, the words of the vocabulary"):
        vae.topics(top_k=37)
    with pytest.raises(ValueError, match="relevance: received 2, expected 0 to 1"):
        vae.topics(relevance=2)
    with pytest.raises(TypeError, match="unknown argument 'word_count'; the nearest one is 'word_counts'"):
        vae(documents(2), word_count=1)


def test_a_head_reads_the_topics(tmp_path):
    vae = model().eval()
    vae.save_pretrained(tmp_path)
    classifier = TopicVAEForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    counts, labels = documents(6), torch.arange(6) % 3
    assert torch.equal(classifier.topic_vae(counts).loss, vae(counts).loss)
    out = classifier(counts, labels=labels, alpha=10.0)
    torch.testing.assert_close(out.loss_rows, -out.elbo + 10 * out.cross_entropy)
    classifier.save_pretrained(tmp_path / "head")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "head")
    assert type(again) is TopicVAEForSequenceClassification
    assert torch.equal(again(counts).logits, classifier(counts).logits)


def test_topics_are_a_modality_of_a_joint_model():
    topic = TopicVAEConfig(vocabulary=WORDS, latent_dim=4, prior="standard_normal")
    joint = MMVAE(MMVAEConfig(modalities={"words": topic, "image": ImageVAEConfig(image_size=8, hidden_channels=[4], latent_dim=4)}))
    present = torch.tensor([[True, True], [True, False], [False, True]])
    out = joint(word_counts=documents(3), pixel_values=torch.rand(3, 3, 8, 8), present=present, noise_key=fold(0, torch.arange(3)))
    out.loss.backward()
    assert out.log_px_by_modality[2, 0] == 0
    assert joint.eval().generate("words", pixel_values=torch.rand(2, 3, 8, 8)).shape == (2, 36)
    with pytest.raises(StrictDataclassError, match=r"\['words'\].prior: received 'dirichlet', expected 'standard_normal'"):
        MMVAEConfig(modalities={"words": TopicVAEConfig(vocabulary=WORDS)})


def test_trainer_trains_it(tmp_path):
    rows = [{"word_counts": row} for row in documents(16)]
    args = TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=5, report_to=[], use_cpu=True, save_strategy="no")
    assert Trainer(model(), args, train_dataset=rows, eval_dataset=rows).train().training_loss > 0
