"""The joint processor: every modality to the model's inputs, any of them missing; folders, the Hub, and what does not fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast, Wav2Vec2FeatureExtractor

from mmvae import ImageVAEConfig, ImageVAEImageProcessor, MMVAEConfig, MMVAEProcessor, TextVAE, TextVAEConfig, TopicVAE, TopicVAEConfig
from mmvae.data import ImageColumn, Loader, Rows, TextColumn, as_modalities
from mmvae.folder import FolderError
from mmvae.modalities import read_columns
from mmvae.processing import load_tokenizer, train_tokenizer
from mmvae.vectorizer import TopicVAEVectorizer

ENGLISH = train_tokenizer(["a big red heart", "a small blue square"])
GERMAN = train_tokenizer(["ein großes rotes Herz", "ein kleines Quadrat"])
SIZE = {"height": 8, "width": 8}
RED = Image.new("RGB", (10, 12), (250, 20, 10))


def pair():
    return MMVAEProcessor({"image": ImageVAEImageProcessor(size=SIZE), "text": ENGLISH})


def languages():
    return MMVAEProcessor({"en": ENGLISH, "de": GERMAN})


def config(**changes):
    text = {"vocab_size": len(ENGLISH), "latent_dim": 4} | changes.pop("text", {})
    image = {"image_size": 8, "latent_dim": 4} | changes.pop("image", {})
    return MMVAEConfig(modalities={"image": ImageVAEConfig(**image), "text": TextVAEConfig(**text)})


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_each_kind_alone_and_both():
    processor = pair()
    images, text = processor(images=[RED, RED]), processor(text=["a heart", "a big red heart"])
    assert set(images) == {"pixel_values"} and images["pixel_values"].shape == (2, 3, 8, 8)
    assert torch.equal(images["pixel_values"], processor.parts["image"]([RED, RED], return_tensors="pt")["pixel_values"])
    assert torch.equal(text["input_ids"], ENGLISH(["a heart", "a big red heart"], padding=True, return_tensors="pt")["input_ids"])
    assert same(processor(images=[RED, RED], text=["a heart", "a big red heart"]), images | text)
    assert same(processor(image=RED, text="a heart"), processor(images=[RED], text=["a heart"]))
    assert "present" not in images | text
    assert set(processor.model_input_names) == {"pixel_values", "input_ids", "attention_mask", "present"}


def test_none_in_a_list_is_a_missing_modality():
    processor = pair()
    mixed = processor(images=[RED, None, RED], text=[None, "a big red heart", "a heart"])
    assert mixed["present"].tolist() == [[True, False], [False, True], [True, True]]
    whole = processor(images=[RED] * 3, text=["a heart", "a big red heart", "a heart"])
    for name in whole:
        there = mixed["present"][:, 0 if name == "pixel_values" else 1]
        assert torch.equal(mixed[name][there], whole[name][there]), "what is present does not depend on what is not"
    assert not mixed["pixel_values"][1].any()
    assert mixed["input_ids"][0].tolist() == [1, 2, 0, 0, 0, 0]
    arrays = processor(images=[np.zeros((8, 8), np.uint8), None], text=[None, "a heart"])
    assert arrays["present"].tolist() == [[True, False], [False, True]], "an array without channels may come first"
    nothing = processor(images=[None, None], text=["a", "a"])
    assert nothing["pixel_values"].shape == (2, 3, 8, 8) and nothing["present"].tolist() == [[False, True]] * 2
    assert processor(text=["a", ""], images=[None, RED])["present"].tolist() == [[False, True], [True, True]], "an empty text is a text"


def test_columns_of_data_sets_and_data_frames_are_lists():
    processor, texts = pair(), ["a big red heart", None, "a heart"]
    pictures = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    data = datasets.Dataset.from_dict({"image": [RED, RED, None], "text": texts}, features=pictures)
    expected = processor(images=data["image"][:], text=texts)
    assert expected["present"].tolist() == [[True, True], [True, False], [False, True]]
    assert same(processor(images=data["image"], text=data["text"]), expected)
    for column in (np.array(texts, object), data.to_pandas()["text"], data.to_pandas()["text"].astype("string")):
        assert same(processor(images=data["image"][:], text=column), expected)
    assert same(processor(text=np.array(["a heart", "a red"])), processor(text=["a heart", "a red"]))


def test_rows_and_the_processor_agree():
    data = [{"image": RED, "text": None}, {"image": None, "text": "a big heart"}]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_list(data, features=features)
    columns = as_modalities({"image": ImageColumn("image", 8), "text": TextColumn("text", ENGLISH)})
    (batch,) = Loader(Rows(rows, columns), 2, shuffle=False, pool=0).batches(0)
    made = pair()(images=[RED, None], text=[None, "a big heart"])
    assert set(made) <= set(batch)
    assert torch.equal(batch["pixel_values"] / 255, made["pixel_values"])
    assert all(torch.equal(batch[name], made[name]) for name in ("input_ids", "attention_mask", "present"))


def test_two_text_modalities():
    processor = languages()
    batch = processor(en=["a heart", None], de=["ein Herz", "ein kleines Quadrat"])
    assert set(batch) == {"en_input_ids", "en_attention_mask", "de_input_ids", "de_attention_mask", "present"}
    assert processor.batch_decode(batch["de_input_ids"], "de") == ["ein Herz", "ein kleines Quadrat"]
    assert processor.decode(batch["en_input_ids"][0], modality="en") == "a heart"
    assert set(processor(de="ein Herz")) == {"de_input_ids", "de_attention_mask"}
    with pytest.raises(ValueError, match=r"text: expected the only modality with a tokenizer, but several have one, \['en', 'de'\]"):
        processor(text=["a heart"])
    with pytest.raises(ValueError, match="several have one"):
        processor.batch_decode(batch["de_input_ids"])
    with pytest.raises(ValueError, match=r"images: .* none of \['en', 'de'\] has one"):
        processor(images=[RED])


def test_of_a_tokenizer_the_model_gets_what_it_reads():
    names = ["input_ids", "token_type_ids", "attention_mask"]
    more = PreTrainedTokenizerFast(tokenizer_object=ENGLISH.backend_tokenizer, model_input_names=names, **ENGLISH.special_tokens_map)
    assert "token_type_ids" in more("a heart")
    processor, given = MMVAEProcessor({"en": more, "de": GERMAN}), {"en": ["a heart", None], "de": ["ein Herz", "Herz"]}
    assert same(processor(**given), languages()(**given))
    assert processor.model_input_names == languages().model_input_names


def test_documents_of_topics_beside_sentences(tmp_path):
    processor = MMVAEProcessor({"en": ENGLISH, "topics": TopicVAEVectorizer(["heart", "red", "square"])})
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.kinds == {"en": "tokenizer", "topics": "vectorizer"}
    batch = loaded(en=["a heart", None], topics=[None, "red on red, a square"])
    assert same(batch, processor(en=["a heart", None], topics=[None, "red on red, a square"]))
    assert batch["word_counts"].tolist() == [[0, 0, 0], [0, 2, 1]]
    assert batch["present"].tolist() == [[True, False], [False, True]]
    assert same(loaded(text="a heart"), loaded(en="a heart")), "text is the sentences'"
    assert loaded.parts["topics"].words(batch["word_counts"]) == ["", "red square"]

    def model(*words: str) -> MMVAEConfig:
        topics = TopicVAEConfig(vocabulary=list(words), latent_dim=4, prior="standard_normal")
        return MMVAEConfig(modalities={"en": TextVAEConfig(vocab_size=len(ENGLISH), latent_dim=4), "topics": topics}, latent_dim=4)

    loaded.check(model("heart", "red", "square"))
    told = r"processor of 'topics': got vocabulary of 3 words, number {}, expected the model's, of {} words, number {}"
    for words, message in ((("heart", "red"), ("2 'square'", 2, "2 None")), (("heart", "round", "square"), ("1 'red'", 3, "1 'round'"))):
        with pytest.raises(ValueError, match=told.format(*message)):
            loaded.check(model(*words))


def test_sounds_of_a_feature_extractor_beside_sentences(tmp_path):
    reader, rate = Wav2Vec2FeatureExtractor(sampling_rate=8000), {"audio_kwargs": {"sampling_rate": 8000}}
    processor = MMVAEProcessor({"sound": reader, "text": ENGLISH})
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.kinds == {"sound": "feature_extractor", "text": "tokenizer"}
    sounds = [np.sin(np.arange(size)).astype(np.float32) for size in (5, 9)]
    batch = loaded(sound=[sounds[0], None, sounds[1]], text=["a heart", "a heart", None], **rate)
    assert batch["present"].tolist() == [[True, True], [False, True], [True, False]]
    alone = reader(sounds, padding=True, return_tensors="pt", sampling_rate=8000)["input_values"]
    assert torch.equal(batch["sound_input_values"][[0, 2]], alone), "both have an attention_mask, so both names come first"
    assert not batch["sound_input_values"][1].any()
    one = loaded(sound=sounds[0], text="a heart", **rate)
    assert torch.equal(one["sound_input_values"], reader(sounds[0], return_tensors="pt", sampling_rate=8000)["input_values"])
    assert same(batch, processor(sound=[sounds[0], None, sounds[1]], text=["a heart", "a heart", None], **rate))
    with pytest.raises(ValueError, match="8000"):
        loaded(sound=sounds, audio_kwargs={"sampling_rate": 16000})
    loaded.check(
        MMVAEConfig(modalities={"sound": ImageVAEConfig(latent_dim=4), "text": TextVAEConfig(vocab_size=len(ENGLISH), latent_dim=4)})
    )


def test_options_reach_the_tokenizers_and_the_image_processors():
    batch = pair()(images=[RED], text=["a big red heart"], max_length=4, truncation=True, images_kwargs={"do_rescale": False})
    assert batch["input_ids"].shape == (1, 4)
    assert batch["pixel_values"].dtype == torch.uint8
    assert pair()(text=["a"], padding="max_length", max_length=7)["input_ids"].shape == (1, 7)
    assert isinstance(pair()(images=[RED], text=["a"], return_tensors="np")["pixel_values"], np.ndarray)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"txt": ["a"]}, r"got the modality 'txt', expected one of \['image', 'text'\]; the nearest is 'text'"),
        ({}, "got no input"),
        ({"text": []}, "text: got an empty list"),
        ({"images": [RED], "image": [RED]}, "got both images and image"),
        ({"images": [RED], "text": ["a", "a"]}, r"different numbers of rows, \{'image': 1, 'text': 2\}"),
        ({"images": [RED, None], "text": ["a", None]}, "row 1: got no modality"),
        ({"images": [None]}, "row 0: got no modality"),
    ],
)
def test_bad_input(given, message):
    with pytest.raises(ValueError, match=message):
        pair()(**given)


def test_bad_parts():
    with pytest.raises(TypeError, match=r"modalities\['text'\]: got str, expected an image processor, a tokenizer, a vectorizer"):
        MMVAEProcessor({"text": "bert"})
    with pytest.raises(ValueError, match="got none"):
        MMVAEProcessor({})
    with pytest.raises(ValueError, match=r"got the name '../text'"):
        MMVAEProcessor({"../text": ENGLISH})
    with pytest.raises(ValueError, match=r"modality: got 'image', expected one of \['text'\]"):
        pair().batch_decode([[1, 2]], "image")


@pytest.mark.parametrize("load", [MMVAEProcessor.from_pretrained, AutoProcessor.from_pretrained])
def test_round_trip_in_the_models_folder(tmp_path, load):
    config().save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    processor = MMVAEProcessor({"photo": ImageVAEImageProcessor(size=SIZE, num_channels=1), "en": ENGLISH, "de": GERMAN})
    processor.save_pretrained(tmp_path)
    assert all(path.read_bytes() == content for path, content in before.items()), "the model's files are left alone"
    loaded = load(tmp_path)
    assert type(loaded) is MMVAEProcessor
    assert loaded.modalities == ("photo", "en", "de"), "the order is that of the columns of present"
    given = {"photo": [RED, None], "en": ["a heart", "a big heart"], "de": [None, "ein Herz"]}
    assert same(loaded(**given), processor(**given))
    assert AutoTokenizer.from_pretrained(tmp_path, subfolder="de").get_vocab() == GERMAN.get_vocab()


def test_a_folder_that_lies(tmp_path):
    pair().save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    for parts in (None, [["../text", "tokenizer"]], [["text", "pickle"]], "text"):
        file.write_text(json.dumps({"processor_class": "MMVAEProcessor", "parts": parts}))
        with pytest.raises(ValueError, match=r"processor_config.json has the parts"):
            AutoProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("how", ["cut", "a list", "too deep", "no UTF-8", "another kind of value", "empty"])
@pytest.mark.parametrize(
    ("read", "file"),
    [
        (MMVAEProcessor.from_pretrained, "processor_config.json"),
        (MMVAEProcessor.from_pretrained, "text/tokenizer.json"),
        (MMVAEProcessor.from_pretrained, "image/preprocessor_config.json"),
        (lambda folder: load_tokenizer(folder / "text"), "text/tokenizer_config.json"),
        (lambda folder: ImageVAEImageProcessor.from_pretrained(folder / "image"), "image/preprocessor_config.json"),
        (lambda folder: TopicVAEVectorizer.from_pretrained(folder / "topics"), "topics/preprocessor_config.json"),
    ],
)
def test_a_broken_file_is_named(tmp_path, read, file, how):
    pair().save_pretrained(tmp_path)
    TopicVAEVectorizer(["heart", "red"]).save_pretrained(tmp_path / "topics")
    whole = (tmp_path / file).read_bytes()
    read(tmp_path)
    wrong = {"size": "x", "parts": 5, "bos_token": 5, "added_tokens": 5, "vocabulary": 5}
    broken = {"cut": whole[: len(whole) // 2], "a list": b"[]", "too deep": b"[" * 200_000, "no UTF-8": b'{"a": "\xff"}', "empty": b""}
    broken["another kind of value"] = json.dumps(json.loads(whole) | wrong).encode()
    (tmp_path / file).write_bytes(broken[how])
    with pytest.raises((FolderError, OSError)) as caught:
        read(tmp_path)
    place, name = file.split("/") if "/" in file else ("", file)
    assert name in str(caught.value) and place in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": {"vocab_size": 4}}, rf"processor of 'text': got vocab_size {len(ENGLISH)}, expected the model's, 4"),
        ({"text": {"eos_token_id": 5}}, "processor of 'text': got eos_token_id 2, expected the model's, 5"),
        ({"image": {"image_size": 16}}, r"processor of 'image': got image_size \(8, 8\), expected the model's, \(16, 16\)"),
        ({"image": {"num_channels": 1}}, "processor of 'image': got num_channels 3, expected the model's, 1"),
    ],
)
def test_a_processor_that_does_not_fit(changes, message):
    pair().check(config())
    pair().check(config(text={"vocab_size": 99}))  # a model may know more tokens
    with pytest.raises(ValueError, match=message):
        pair().check(config(**changes))


def test_a_processor_that_does_not_fit_a_model_of_one_modality():
    data, words = datasets.Dataset.from_dict({"text": ["a red heart"]}), ["big", "heart", "red"]
    topics = TopicVAE(TopicVAEConfig(vocabulary=words, latent_dim=2))
    assert read_columns(topics, TopicVAEVectorizer(words), data)
    with pytest.raises(ValueError, match="got vocabulary of 3 words, number 0 'heart', expected the model's, of 3 words, number 0 'big'"):
        read_columns(topics, TopicVAEVectorizer(["heart", "big", "red"]), data)
    small = {"vocab_size": 99, "embedding_size": 4, "hidden_size": 4, "latent_dim": 2}
    assert read_columns(TextVAE(TextVAEConfig(**small)), ENGLISH, data)  # a model may know more tokens
    with pytest.raises(ValueError, match="tokenizer: got eos_token_id 2, expected the model's, 5"):
        read_columns(TextVAE(TextVAEConfig(**small, eos_token_id=5)), ENGLISH, data)


def test_a_processor_of_other_modalities():
    parts = pair().parts
    for other in (languages(), MMVAEProcessor({"text": parts["text"]}), MMVAEProcessor({"text": parts["text"], "image": parts["image"]})):
        with pytest.raises(ValueError, match=r"got the modalities .*, expected the model's, \['image', 'text'\], in their order"):
            other.check(config())
    with pytest.raises(ValueError, match=r"processor of 'image': got TokenizersBackend, expected one that suits a 'image_vae' model"):
        MMVAEProcessor({"image": ENGLISH, "text": ENGLISH}).check(config())


HUB = """
import json, os, sys
from localhub import LocalHub
os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_local_alice", "HF_HOME": sys.argv[1], "HF_HUB_OFFLINE": "0"}
with LocalHub() as hub:
    os.environ["HF_ENDPOINT"] = hub.url
    from transformers import AutoProcessor
    from mmvae import MMVAEProcessor
    local = MMVAEProcessor.from_pretrained(sys.argv[2])
    local.push_to_hub("alice/pair")
    remote = AutoProcessor.from_pretrained("alice/pair", revision="main")
    vocabularies = {name: len(remote.parts[name]) for name in remote.modalities}
    same = remote(en=["a heart", None], de=[None, "ein Herz"]).data
    assert all((same[k] == v).all() for k, v in local(en=["a heart", None], de=[None, "ein Herz"]).items())
    print(json.dumps([type(remote).__name__, vocabularies]))
"""


def test_to_the_hub_and_back(tmp_path):
    languages().save_pretrained(tmp_path / "pair")
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "HF_HUB_OFFLINE": "0"}
    environment |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HUB, str(tmp_path / "home"), str(tmp_path / "pair")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["MMVAEProcessor", {"en": len(ENGLISH), "de": len(GERMAN)}]
