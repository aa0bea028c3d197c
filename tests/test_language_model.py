"""A TextVAE with latent_dim 0: log p(x) exactly, by the same recipe and figures, and nothing that is about a latent."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from recipe_runs import TEXT, recipe, run, sentences

from mmvae import MMVAEConfig, StackedVAE, TextVAE, TextVAEConfig, TextVAEForSequenceClassification
from mmvae.baselines import linear_probe
from mmvae.data import Loader, Rows, TextColumn
from mmvae.density_fitting import unfitted
from mmvae.evaluation import evaluate_vae
from mmvae.processing import train_tokenizer
from mmvae.sentences import evaluate_sentences

SMALL = {"embedding_size": 6, "hidden_size": 8, "latent_dim": 0}
TEXTS = ["a b c", "a", "", "c b a b c a", "b b"] * 3
PAD, BOS, EOS = 0, 1, 2


def make(**options) -> TextVAE:
    model = TextVAE(TextVAEConfig(**{"vocab_size": 20} | SMALL | options)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
        model.decoder.embed_tokens.weight.mul_(5)
    return model


@pytest.fixture(scope="module")
def data():
    tokenizer = train_tokenizer(TEXTS)
    return tokenizer, Rows(Dataset.from_dict({"text": TEXTS, "label": [0, 1, 2] * 5}), TextColumn("text", tokenizer))


@pytest.mark.parametrize("options", [{}, {"decoder_layers": 2, "tie_word_embeddings": True}], ids=str)
def test_its_elbo_is_the_log_probability(options):
    model, longest = make(vocab_size=4, **options), 3
    words = [token for token in range(4) if token not in (PAD, EOS)]  # what is scored besides EOS
    complete = [[BOS, *w, EOS] for n in range(longest) for w in itertools.product(words, repeat=n)]
    unfinished = [[BOS, *w] for w in itertools.product(words, repeat=longest)]
    with torch.no_grad():
        model.lm_head.bias[PAD] = -100.0  # never said, so that the rest sums to one
    ids = torch.tensor([row + [PAD] * (longest + 1 - len(row)) for row in complete + unfinished])
    for sample in (True, False):
        out = model(input_ids=ids, noise_key=torch.arange(len(ids)), sample_posterior=sample)
        assert out.elbo.double().exp().sum().item() == pytest.approx(1, abs=1e-5)
        assert not out.kl.any() and torch.equal(out.elbo, out.log_px)
    torch.testing.assert_close(model.log_marginal(3, input_ids=ids), out.elbo)
    assert len(model.sample(5, do_sample=True, max_new_tokens=4)) == 5


def test_there_is_no_parameter_without_a_gradient(tmp_path):
    model = make().train()
    model(input_ids=torch.tensor([[BOS, 5, 6, EOS]])).loss.backward()
    assert all(p.grad is not None and p.numel() for p in model.parameters())
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"decoder", "lm_head"}
    model.save_pretrained(tmp_path)
    again, ids = TextVAE.from_pretrained(tmp_path), torch.tensor([[BOS, 7, EOS]])
    assert torch.equal(again(input_ids=ids).loss, model.eval()(input_ids=ids).loss)


def test_words_that_are_all_alike_have_the_perplexity_of_the_vocabulary(data):
    tokenizer, rows = data
    model = make(vocab_size=len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight.zero_(), model.lm_head.bias.zero_()
    figures = evaluate_vae(Accelerator(cpu=True), model, Loader(rows, 4, shuffle=False), num_samples=5)
    tokens = sum(len(text.split()) + 1 for text in TEXTS) / len(TEXTS)  # EOS is one
    assert figures["tokens"] == pytest.approx(tokens)
    assert figures["nll_nats"] == pytest.approx(tokens * math.log(len(tokenizer)), rel=1e-5)
    assert figures["perplexity"] == pytest.approx(len(tokenizer), rel=1e-5)
    assert figures["nll_nats"] == figures["neg_elbo_nats"] and figures["kl_nats"] == 0
    assert not figures.keys() & {"active_units", "mutual_information_nats", "importance_samples"}
    written = evaluate_sentences(Accelerator(cpu=True), model, tokenizer, rows, TEXTS, num_generated=5)
    assert {name.split("/")[0] for name in written} == {"samples"}


OF_A_LATENT = [{"latent_skip": True}, {"prior": "vamp"}, {"mean_scale": 0.5}, {"bow_weight": 1.0}, {"num_classes": 3}, {"pooling": "max"}]
OF_A_LATENT += [{"densities": {"latent": {"kind": "mixture"}}}, {"bidirectional": True}, {"encoder_dropout": 0.2}, {"encoder_layers": 2}]


@pytest.mark.parametrize("options", [*OF_A_LATENT, {"share_embeddings": True}], ids=lambda options: next(iter(options)))
def test_what_is_of_a_latent_is_refused_by_name(options):
    with pytest.raises(StrictDataclassError, match=rf"TextVAEConfig\.{next(iter(options))}: received "):
        TextVAEConfig(**SMALL | options)
    TextVAEConfig(**SMALL | options | {"latent_dim": 1})


def test_what_needs_a_latent_says_so(data):
    tokenizer, rows = data
    model, z = make(vocab_size=len(tokenizer)), torch.zeros(1, 0)
    ids, known = torch.tensor([[BOS, 5, EOS]]), [0, 1, 2] * 5
    for name, call in (
        ("reconstruct", lambda: model.reconstruct(input_ids=ids)),
        ("reconstruct", lambda: model.generate(input_ids=ids)),
        ("interpolate", lambda: model.interpolate(z, z)),
        ("TextVAEConfig.latent_dim", lambda: TextVAEForSequenceClassification(TextVAEConfig(**SMALL, num_labels=3))),
        ("StackedVAEConfig.below", lambda: StackedVAE.over(model, num_classes=3)),
        ("MMVAEConfig.latent_dim", lambda: MMVAEConfig(modalities={"text": model.config})),
        ("MMVAEConfig.modalities", lambda: MMVAEConfig(modalities={"text": model.config}, latent_dim=2)),
        ("label", lambda: linear_probe(Accelerator(cpu=True), model, rows, known, rows, known)),
        ("TextVAEConfig.densities", lambda: unfitted(model, {"latent": {"kind": "mixture"}})),
    ):
        with pytest.raises((ValueError, StrictDataclassError), match=name):
            call()


def test_the_recipes_train_it_and_give_both_perplexities(tmp_path, monkeypatch):
    words = sentences(tmp_path / "words")
    options = [*TEXT, "--max_steps", "4", "--latent_dim", "0"]
    figures = run("text_vae", ["--dataset", str(words), "--output_dir", str(tmp_path / "lm"), *options])["history"][-1]
    assert figures["eval/neg_elbo_nats"] == figures["eval/reconstruction_nats"] and "eval/active_units" not in figures
    card = (tmp_path / "lm" / "README.md").read_text()
    assert "model.sample(4)" in card and "model.encode" not in card and "Reconstructions" not in card
    written, evaluation = tmp_path / "samples.jsonl", recipe("evaluate")

    def evaluated(model: str, *argv: str) -> dict[str, float]:
        argv = ["--model", str(tmp_path / model), "--dataset", str(words), "--output", str(tmp_path / "figures.json"), *argv]
        monkeypatch.setattr("sys.argv", ["evaluate.py", *argv])
        evaluation.main()
        return json.loads((tmp_path / "figures.json").read_text())["metrics"]

    with pytest.raises((ValueError, OSError), match="words"):  # before anything is measured
        evaluated("lm", "--reference_lm", str(tmp_path / "words"), "--importance_samples", "1000000")
    with pytest.raises(ValueError, match="samples_file: received '.*', expected a file in a folder that exists"):
        evaluated("lm", "--samples_file", str(tmp_path / "no" / "samples.jsonl"))
    with pytest.raises(ValueError, match="conditional_samples: received 5 for a TextVAE, expected 0, or an MMVAE"):
        evaluated("lm", "--conditional_samples", "5")
    with pytest.raises(ValueError, match="reference_lm: 1 samples to score, expected at least 2"):
        evaluated("lm", "--reference_lm", str(tmp_path / "lm"), "--num_generated", "1")
    with pytest.raises(ValueError, match="num_generated: received 1 for a TextVAE, expected 0, or at least 2"):
        evaluated("lm", "--num_generated", "1")
    with pytest.raises(ValueError, match="label: received a model with latent_dim 0"):
        evaluated("lm", "--label", "label", "--importance_samples", "1000000", "--num_generated", "1000000")
    TextVAE.from_pretrained(tmp_path / "lm").save_pretrained(tmp_path / "untold")  # without its tokenizer
    with pytest.raises((ValueError, OSError), match="untold"):
        evaluated("lm", "--reference_lm", str(tmp_path / "untold"), "--num_generated", "1000000")
    forward = evaluated("lm", "--reference_lm", str(tmp_path / "lm"), "--samples_file", str(written), "--num_samples", "150")
    assert 1 < forward["samples/forward_perplexity"] < 20 and forward["samples/forward_unknown"] < 0.5
    assert len({json.loads(line)["text"] for line in written.read_text().splitlines()}) > 100
    reverse = ["--dataset", str(written), "--tokenizer", str(tmp_path / "lm"), "--output_dir", str(tmp_path / "reverse"), *options]
    run("text_vae", reverse)
    figures = evaluated("reverse")
    assert figures["tokens"] == forward["tokens"] and figures["perplexity"] == pytest.approx(
        math.exp(figures["nll_nats"] / figures["tokens"])
    )


def test_the_language_model_of_ptb_is_the_vae_without_its_latent():
    configs = Path(__file__).parent.parent / "recipes" / "configs"
    model, vae = (yaml.safe_load((configs / f"{name}_ptb.yaml").read_text()) for name in ("language_model", "text_vae"))
    same = ("vocab_size", "embedding_size", "hidden_size", "tie_word_embeddings", "batch_size")
    assert model["latent_dim"] == 0 and all(model[name] == vae[name] for name in same)


def test_a_tokenizer_of_more_words_than_the_model_knows_is_named(tmp_path):
    TextVAE(TextVAEConfig(vocab_size=6, embedding_size=2, hidden_size=2, latent_dim=2)).save_pretrained(tmp_path)
    train_tokenizer(["a b c d"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer: got vocab_size 8, expected the model's, 6"):
        run("evaluate", ["--model", str(tmp_path), "--dataset", str(sentences(tmp_path / "data"))])


def test_a_training_row_without_text_is_nothing_that_samples_repeat(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split, texts in (("train", ["a b", None, "c d"]), ("test", ["a b", "c"])):
        (data / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    TextVAE(TextVAEConfig(vocab_size=8, embedding_size=2, hidden_size=2, latent_dim=2)).save_pretrained(tmp_path)
    train_tokenizer(["a b c d"]).save_pretrained(tmp_path)
    run("evaluate", ["--model", str(tmp_path), "--dataset", str(data), "--importance_samples", "2", "--max_new_tokens", "5"])
    figures = json.loads((tmp_path / "evaluation-test.json").read_text())["metrics"]
    assert figures["samples/repeated"] == 0, "an untrained model writes neither of the two sentences"
