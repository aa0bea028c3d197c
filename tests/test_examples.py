"""The examples run, and do what they print."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel

from mmvae import (
    MMVAE,
    ImageVAE,
    ImageVAEConfig,
    ImageVAEImageProcessor,
    MMVAEConfig,
    MMVAEProcessor,
    TextVAE,
    TextVAEConfig,
    TopicVAE,
    TopicVAEConfig,
    TopicVAEVectorizer,
)
from mmvae.processing import train_tokenizer

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


TOKENIZER = train_tokenizer(["a big red heart", "a small blue square"])
IMAGE = ImageVAEConfig(image_size=8, hidden_channels=[4], latent_dim=4)
TEXT = TextVAEConfig(vocab_size=len(TOKENIZER), embedding_size=4, hidden_size=4, latent_dim=4)
PICTURES = ImageVAEImageProcessor(size={"height": 8, "width": 8}, num_channels=3)


@pytest.fixture
def folders(tmp_path):
    """Of a joint model, one of pictures and one of texts."""
    torch.manual_seed(0)
    joint = MMVAEConfig(modalities={"image": IMAGE, "text": TEXT}, latent_dim=3)
    made = {"joint": (MMVAE(joint), MMVAEProcessor({"image": PICTURES, "text": TOKENIZER}))}
    made |= {"image": (ImageVAE(IMAGE), PICTURES), "text": (TextVAE(TEXT), TOKENIZER)}
    for name, parts in made.items():
        for part in parts:
            part.save_pretrained(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("joint", {"image": None, "text": "a big heart"}),
        ("joint", {"image": Image.new("RGB", (20, 9), "red"), "text": ""}),
        ("image", {"": Image.new("RGB", (20, 9), "red")}),
        ("text", {"": "a big heart"}),
    ],
)
def test_the_demo_answers_what_is_given(name, given, folders):
    player = example("demo").Player(str(folders / name))
    nothing = dict.fromkeys(player.kinds)
    for values in (given, nothing):
        drawn = player.answer(values, 3, False, 0)
        assert drawn == player.answer(values, 3, False, 0) != player.answer(values, 3, False, 1)
        kinds = {each: str if kind == "text_vae" else Image.Image for each, kind in player.kinds.items()}
        assert {each: {*map(type, made)} for each, made in drawn.items()} == {each: {kind} for each, kind in kinds.items()}
        assert all(len(made) == 3 for made in drawn.values())
    assert player.answer(given, 3, True, 0) == player.answer(given, 3, True, 1), "the likeliest needs no seed"
    line = player.between(given, given)
    assert all(len(made) == 8 and all(each == made[0] for each in made) for made in line.values())


def test_the_demo_refuses_models_of_what_it_cannot_show(tmp_path):
    module, words = example("demo"), ["big", "heart"]
    TopicVAE(TopicVAEConfig(vocabulary=words, latent_dim=2)).save_pretrained(tmp_path / "topics")
    TopicVAEVectorizer(words).save_pretrained(tmp_path / "topics")
    with pytest.raises(ValueError, match="topics: received a model of topic_vae, expected pictures or texts, with a latent"):
        module.Player(str(tmp_path / "topics"))


PAGE = """
import importlib.util, sys
from gradio_client import Client, handle_file
spec = importlib.util.spec_from_file_location("demo", sys.argv[1])
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)
_, url, _ = demo.page(demo.Player(sys.argv[2])).launch(prevent_thread_lock=True, quiet=True)
client = Client(url, verbose=False)
pictures, texts = client.predict(None, "a big heart", 3, False, 0, api_name="/make")
print("made", len(pictures), texts.count(chr(10)) + 1)
pictures, texts = client.predict(None, "a big heart", None, "a small square", api_name="/between")
print("between", len(pictures))
try:
    client.predict(None, "a big heart", None, "", api_name="/between")
except Exception as error:
    print("refused", error)
for given in ((handle_file(sys.argv[3]), ""), (None, 2000 * "a")):
    try:
        client.predict(*given, 3, False, 0, api_name="/make")
        print("answered what is too large")
    except Exception as error:
        print("refused, too:", "more than 1000 characters" in str(error) or "raised an exception" in str(error))
"""


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is of the extra [demo]")
def test_the_page_of_the_demo_serves_what_it_makes(folders):
    """By HTTP, from a process of its own, as gradio leaves sockets to the end of it."""
    Image.new("L", (5000, 4000)).save(folders / "bomb.png")
    command = [sys.executable, "-c", PAGE, str(EXAMPLES / "demo.py"), str(folders / "joint"), str(folders / "bomb.png")]
    told = subprocess.run(command, env=os.environ | {"GRADIO_ANALYTICS_ENABLED": "False"}, capture_output=True, text=True, timeout=120)
    for line in (
        "made 3 3",
        "between 8",
        "refused received nothing of one of them, expected something of both",
        2 * "refused, too: True\n",
    ):
        assert line in told.stdout, told.stdout + told.stderr


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
