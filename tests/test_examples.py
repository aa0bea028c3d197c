"""The examples run, and do what they print."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel

from mmvae import MMVAE, ImageVAE, ImageVAEConfig, ImageVAEImageProcessor

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str):
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def strings():
    """Imported once: its modality is registered when it is."""
    return example("add_a_modality")


def test_the_judge_hears_what_was_plucked_and_nothing_else(strings):
    captions = 20 * strings.CAPTIONS
    assert strings.listen(strings.pluck(captions)) == captions
    assert len(set(strings.listen(strings.pluck(captions).flip(1)))) < len(strings.CAPTIONS)  # its energy comes late: none is short


def test_a_modality_of_ones_own_is_generated_from_words_and_named_by_them(strings, capsys):
    captions, sounds = strings.main(250)
    assert captions > 0.9
    assert sounds > 0.6  # chance is 1/6
    assert "right captions" in capsys.readouterr().out


def test_a_modality_of_ones_own_is_saved_and_loaded(strings, tmp_path):
    model = strings.StringVAE(strings.StringVAEConfig(latent_dim=3)).eval()
    x = strings.pluck(strings.CAPTIONS)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is strings.StringVAE
    assert torch.equal(again(waveform=x).loss, model(waveform=x).loss)
    assert again.log_marginal(num_samples=3, waveform=x).shape == (len(x),)


def test_cross_modal_trains_saves_loads_and_draws(tmp_path, capsys):
    module = example("cross_modal")
    true, made = module.main(None, 3, str(tmp_path / "run"))
    assert len(true) == len(made) == 8
    assert (tmp_path / "run" / "cross_modal.png").stat().st_size > 1000
    assert list(MMVAE.from_pretrained(tmp_path / "run").modalities) == ["image", "text"]
    assert module.main(str(tmp_path / "run"), 0, str(tmp_path / "again")) == (true, made)
    assert (tmp_path / "again" / "cross_modal.png").is_file()
    assert "a picture of" in capsys.readouterr().out


def test_what_readme_says_runs(tmp_path, monkeypatch):
    """Every block of Python in its order, with the training of the first cut short; but not what pushes to the Hub."""
    monkeypatch.chdir(tmp_path)
    for folder in ("outputs/pictures", "my-image-vae"):
        ImageVAE(ImageVAEConfig(hidden_channels=[4], latent_dim=3)).save_pretrained(folder)
        ImageVAEImageProcessor().save_pretrained(folder)
    names = {
        "picture": Image.new("RGB", (80, 60), "red"),
        "texts": 6 * ["sour red apples fall", "soft green pears grow", "sweet blue plums rest"],
    }
    names["picture"].save("cat.png")
    blocks = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        if "num_channels=1" in block:
            names |= {"pixels": torch.randint(2, (3, 1, 28, 28)).float(), "labels": torch.tensor([3, -100, 7])}
        if "ForImageClassification" in block:
            names |= {"pixels": torch.rand(2, 3, 64, 64), "labels": torch.tensor([0, 1])}
        if "push(" not in block:
            exec(block.replace("range(700)", "range(1)").replace("min_df=5, max_df=0.5", "min_df=2"), names)  # noqa: S102
    assert len(blocks) > 6 and len(names["model"].config.id2label) == 2
