"""Model folders: what is damaged, incomplete or hostile is refused by name; a save is whole or refused; old folders load."""

import json
import math
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from folder_mutations import CONFIGS, IMAGE, TEXT, TOPICS, every_field, run
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

import mmvae
from mmvae import (
    MMVAE,
    ImageVAE,
    ImageVAEConfig,
    ImageVAEForImageClassification,
    ImageVAEImageProcessor,
    MMVAEConfig,
    MMVAEProcessor,
    StackedVAE,
    TextVAE,
    TextVAEConfig,
    TopicVAE,
    TopicVAEConfig,
    TopicVAEVectorizer,
)
from mmvae.density_fitting import fit_densities
from mmvae.folder import FolderError, verify
from mmvae.processing import train_tokenizer

GOLDEN = sorted(Path(__file__).parent.glob("golden/*/*/config.json"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of a small image VAE."""
    ImageVAE(ImageVAEConfig(**IMAGE)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_damaged_folders_are_refused_by_name():
    counts, failed = run(68, seed=3)
    assert not failed
    assert counts["refused by name"] > 50


def with_tensors(folder, change):
    (folder / "manifest.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["to_moments.bias"].fill_(math.nan), "tensor 'to_moments.bias': received values from nan to nan, expected finite ones"),
        (lambda t: t["to_moments.bias"][:1].fill_(-math.inf), "tensor 'to_moments.bias': received values from -inf to"),
        (lambda t: t.pop("to_moments.bias"), r"model.safetensors: tensor 'to_moments.bias' is missing, expected \(4,\)"),
        (lambda t: t.update(more=torch.zeros(1)), "model.safetensors: tensor 'more': expected none of this name in a ImageVAE"),
        (lambda t: t.update({"to_moments.bias": torch.zeros(5)}), r"tensor 'to_moments.bias': received shape \(5,\), expected \(4,\)"),
        (lambda t: t.update({"to_moments.bias": torch.zeros(4).int()}), "tensor 'to_moments.bias': received I32, expected BF16 or"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    with_tensors(folder, change)
    for model_class in (ImageVAE, AutoModel, ImageVAEForImageClassification):
        shown = message.replace("'to_", "'(image_vae.)?to_").replace("'more", "'(image_vae.)?more")
        with pytest.raises(FolderError, match=shown):
            model_class.from_pretrained(folder)


def test_what_does_not_fit_can_be_made_new_on_purpose(folder):
    with_tensors(folder, lambda tensors: tensors.pop("to_moments.bias"))
    model, info = ImageVAE.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True)
    assert set(info["missing_keys"]) == {"to_moments.bias"} and model.to_moments.bias.isfinite().all()


def test_a_changed_bit_is_seen(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(FolderError, match=r"model.safetensors: the content is not that of manifest.json .* delete manifest.json"):
        ImageVAE.from_pretrained(folder)
    (folder / "manifest.json").unlink()
    assert ImageVAE.from_pretrained(folder)


def headers(data: bytes) -> dict[str, bytes]:
    """Files whose header is not what it should be, made of a good one."""
    size = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    first, second = [name for name in header if name != "__metadata__"][:2]

    def written(changed: dict) -> bytes:
        text = json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + rest

    end = header[first]["data_offsets"][1]
    return {
        "seven bytes": data[:7],
        "cut in the header": data[: 8 + size // 2],
        "a terabyte of header": (2**40).to_bytes(8, "little") + data[8:],
        "more header than a number holds": b"\xff" * 8 + data[8:],
        "no JSON": data[:8] + bytes(size) + rest,
        "overlapping tensors": written(header | {second: header[second] | {"data_offsets": header[first]["data_offsets"]}}),
        "a tensor beyond the end": written(header | {first: header[first] | {"data_offsets": [end, end + 2**40], "shape": [2**38]}}),
        "bytes after the last tensor": data + bytes(8),
    }


def test_a_damaged_header_is_refused_without_memory(folder):
    (folder / "manifest.json").unlink()
    cases = headers((folder / "model.safetensors").read_bytes())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for damaged in cases.values():
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(FolderError, match="model.safetensors: damaged, or no safetensors"):
            ImageVAE.from_pretrained(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


def test_no_pickle_is_asked_for(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FolderError, match=r"model.safetensors: not found.*pytorch_model.bin is not read, because pickles can run code"):
        ImageVAE.from_pretrained(folder)
    with pytest.raises(ValueError, match="use_safetensors: received False"):
        ImageVAE.from_pretrained(folder, use_safetensors=False)


def test_a_folder_of_another_model_is_named(folder):
    with pytest.raises(FolderError, match="config.json: model_type: received 'image_vae', expected 'text_vae' for TextVAE"):
        TextVAE.from_pretrained(folder)


def test_a_configuration_takes_no_more_memory_than_its_file_has_weights(folder):
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"latent_dim": 65_536, "hidden_channels": [4096], "num_blocks": 8}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FolderError, match="received shape"):
        ImageVAE.from_pretrained(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    densities = {"latent": {"kind": "mixture", "num_components": 10**6}}
    (folder / "config.json").write_text(json.dumps(config | {"latent_dim": 65_536, "densities": densities}))
    with pytest.raises(ValueError, match="num_components: received 1000000, which makes"):
        ImageVAE.from_pretrained(folder)


def test_links_lead_nowhere_else_but_in_the_cache_of_the_hub(folder, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    assert ImageVAE.from_pretrained(snapshot)
    linked = tmp_path / "linked"
    shutil.copytree(snapshot, linked, symlinks=True)
    with pytest.raises(FolderError, match=r"config.json: (the file is missing|leads to .*, expected a file inside the folder)"):
        ImageVAE.from_pretrained(linked)
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()
    (tmp_path / "out" / "config.json").symlink_to(folder / "config.json")
    with pytest.raises(FolderError, match=r"config.json: leads to .*/model/config.json, expected a file inside the folder"):
        ImageVAE.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_of_a_file_refuses_hostile_values_by_name(name):
    counts, failed = every_field(name, ["4", -1, 10**12, math.nan, [], {}])
    assert not failed
    assert counts["refused by name"] > 100


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation_internal", "auto_map", "quantization_config"])
@pytest.mark.parametrize("kind", ["joint", "stacked"])
def test_a_configuration_inside_another_may_say_no_more_than_alone(kind, name):
    values = CONFIGS[kind].to_dict()
    (values["below"] if kind == "stacked" else values["modalities"]["image"])[name] = "evil/kernels"
    with pytest.raises(ValueError, match=rf"(below|modalities\['image'\]): .*{name}: received 'evil/kernels', expected none in a file"):
        type(CONFIGS[kind]).from_dict(values)


# ---- saving


def old_and_new() -> tuple[ImageVAE, ImageVAE]:
    torch.manual_seed(1)
    return ImageVAE(ImageVAEConfig(**IMAGE)), ImageVAE(ImageVAEConfig(**IMAGE, scale=0.7))


def what_loads(folder: Path, models: dict[str, ImageVAE]) -> str:
    """The name of the model that a folder holds, every bit of it, or "refused"."""
    try:
        model = ImageVAE.from_pretrained(folder)
    except FolderError as error:
        return "refused" if "manifest.json" in str(error) else str(error)
    name = next(name for name, one in models.items() if model.config.scale == one.config.scale)
    return name if all(map(torch.equal, model.parameters(), models[name].parameters())) else "a mixture"


def die_before(operation: int) -> None:
    """Let SIGKILL come before the n-th flush, move or deletion of files."""
    left = iter(range(operation - 1))

    def counted(function):
        def call(*args, **options):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for name in ("fsync", "replace", "unlink", "rmdir", "chmod"):
        setattr(os, name, counted(getattr(os, name)))


def test_a_kill_before_any_operation_of_a_save_leaves_old_or_new_or_a_refusal(tmp_path):
    """SIGKILL before the n-th flush, move or deletion of a save over another model, for every n; with and without an old manifest."""
    old, new = old_and_new()
    old.save_pretrained(tmp_path / "warm")
    found = []
    for crash in range(1, 100):
        place = tmp_path / str(crash)
        old.save_pretrained(place)
        (place / "manifest.json").unlink() if crash % 2 else None
        if not (child := os.fork()):
            die_before(crash)
            new.save_pretrained(place)
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        found.append(what_loads(place, {"old": old, "new": new}))
        new.save_pretrained(place)
        assert verify(place) and not list(place.glob(".tmp*"))
        if not killed:
            break
    assert found == sorted(found, key=["old", "refused", "new"].index) and set(found) == {"old", "refused", "new"}


def test_a_full_disk_leaves_the_old_model(tmp_path):
    old, new = old_and_new()
    old.save_pretrained(tmp_path)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{tmp_path}: cannot write the model"):
            new.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert ImageVAE.from_pretrained(tmp_path).config.scale == old.config.scale
    assert sorted(os.listdir(tmp_path)) == ["config.json", "manifest.json", "model.safetensors"]


def test_a_model_with_adapters_does_not_take_the_place_of_its_base(tmp_path):
    model, _ = old_and_new()
    model.save_pretrained(tmp_path)
    model._hf_peft_config_loaded = True  # what add_adapter and load_adapter of transformers set
    with pytest.raises(ValueError, match="holds a model, received a ImageVAE with adapters, expected another folder"):
        model.save_pretrained(tmp_path)
    assert verify(tmp_path)


def test_a_round_trip_changes_no_byte_and_shards_go(folder, tmp_path):
    model = ImageVAE.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again", max_shard_size=500)
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 2
    ImageVAE.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "again")
    names = sorted(os.listdir(folder))
    assert sorted(os.listdir(tmp_path / "again")) == names == ["config.json", "manifest.json", "model.safetensors"]
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


@pytest.mark.parametrize("config", GOLDEN, ids=lambda path: "/".join(path.parts[-3:-1]))
def test_folders_of_older_versions_give_the_same_figures(config):
    """`expected.json` holds what was given when the folder was saved: latents, logits, log-densities, and what a processor made."""
    architecture = json.loads(config.read_text())["architectures"][0]
    received = golden_figures(getattr(mmvae, architecture).from_pretrained(config.parent), config.parent)
    expected = json.loads((config.parent / "expected.json").read_text())
    assert received.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            torch.tensor(received[name]), torch.tensor(value), rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_models_inside_of_others_tell_no_path_and_get_the_dtype_that_is_asked_for(folder, tmp_path):
    part = ImageVAE.from_pretrained(folder)
    joint, stacked = MMVAE(MMVAEConfig(modalities={"image": part.config})), StackedVAE.over(part, num_classes=2, latent_dim=2)
    joint.save_pretrained(tmp_path / "joint"), stacked.save_pretrained(tmp_path / "stacked")
    older = next(path.parent for path in GOLDEN if path.parent.name == "joint")
    assert '"dtype": "float32",\n      "hidden_channels"' in (older / "config.json").read_text(), "as folders of older versions have it"
    for place in (tmp_path / "joint", tmp_path / "stacked", older):
        assert place is older or str(folder) not in (place / "config.json").read_text()
        model = AutoModel.from_pretrained(place, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model(pixel_values=golden_inputs(model)["pixel_values"]).loss.isfinite()
    again = MMVAE(AutoModel.from_pretrained(tmp_path / "joint", dtype=torch.bfloat16).config)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}


def golden_inputs(model) -> dict[str, torch.Tensor]:
    """Fixed inputs of the small models of `golden/`."""
    inputs = {"pixel_values": torch.linspace(0, 1, 128).view(2, 1, 8, 8), "input_ids": torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0]])}
    inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
    inputs["word_counts"] = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]])
    return {name: value for name, value in inputs.items() if name in model.input_names}


def golden_figures(model, place: Path) -> dict[str, list]:
    """What a model gives of fixed inputs, and what the processor that lies beside it makes of fixed data."""
    inputs = golden_inputs(model)
    figures = {"latent_mean": model.base_model.posterior(**inputs).mixture.mean}
    if "Classification" in type(model).__name__:
        figures["logits"] = model(**inputs).logits
    for name, density in model.base_model.densities.items():
        size, given = model.density_dims(name)
        figures[f"densities/{name}"] = density.log_prob(
            torch.linspace(-1, 1, 3 * size).view(3, size), torch.ones(3, given) if given else None
        )
    if any((place / name).exists() for name in ("preprocessor_config.json", "processor_config.json")):
        image = torch.arange(300, dtype=torch.uint8).view(3, 10, 10)
        given = {"text": ["goal vote goal", "a game"]} if "word_counts" in inputs else {"images": [image, image.flip(2)]}
        given |= {"text": ["goal vote", "game"]} if "input_ids" in inputs else {}
        figures |= AutoProcessor.from_pretrained(place)(**given, return_tensors="pt")
    return {name: value.tolist() for name, value in figures.items()}


def golden_models() -> dict[str, tuple]:
    """Small models of every kind with the processors that are saved beside them."""
    image, text = ImageVAEConfig(**IMAGE), TextVAEConfig(**TEXT)
    images, texts = ImageVAEImageProcessor(size={"height": 8, "width": 8}, num_channels=1), train_tokenizer(["goal vote game"])
    joint = MMVAE(
        MMVAEConfig(modalities={"image": ImageVAEConfig(**IMAGE | {"latent_dim": 3}), "text": text}, latent_dim=2, aggregation="poe")
    )
    rows = {"pixel_values": torch.rand(40, 1, 8, 8), "input_ids": torch.randint(4, 20, (40, 4)), "attention_mask": torch.ones(40, 4).long()}
    flow = {"kind": "flow", "transforms": 1, "hidden_sizes": [4], "training": {"steps": 5}}
    fit_densities(joint, [rows], {"shared": {"kind": "mixture", "num_components": 2}, "private_image": flow})
    words = TopicVAEVectorizer.fit(["goal game", "vote goal", "game vote"])
    return {
        "image": (ImageVAE(image),),
        "text": (TextVAE(text),),
        "joint": (MMVAE(MMVAEConfig(modalities={"image": image, "text": text})),),
        "topics": (TopicVAE(TopicVAEConfig(**TOPICS | {"vocabulary": words.vocabulary})), words),
        "stacked": (StackedVAE.over(ImageVAE(image), num_classes=3, latent_dim=2, hidden_size=4),),
        "head": (ImageVAEForImageClassification(ImageVAEConfig(**IMAGE, num_labels=3)), images),
        "densities": (joint, MMVAEProcessor({"image": images, "text": texts})),
    }


def make_golden(place: Path) -> None:
    """Write folders of a release that are missing: ``python -c "from test_folder import *; make_golden(Path('tests/golden/0.1'))"``."""
    torch.manual_seed(0)
    for name, parts in golden_models().items():
        if not (place / name).exists():
            for part in parts:
                part.save_pretrained(place / name)
            (place / name / "expected.json").write_text(json.dumps(golden_figures(parts[0].eval(), place / name)))
