"""What transformers' Trainer does with models, and with their tokenizers and processors; and that folders which it leaves can be read."""

import json

import pytest
import torch
from transformers import Trainer, TrainingArguments

from mmvae import (
    MMVAE,
    ImageVAEConfig,
    ImageVAEImageProcessor,
    MMVAEConfig,
    MMVAEProcessor,
    StackedVAE,
    TextVAE,
    TextVAEConfig,
)
from mmvae.processing import train_tokenizer

TOKENIZER = train_tokenizer(["a big red heart", "a small blue square"])
TEXT = {"input_ids": torch.tensor([[1, 4, 5, 2], [1, 6, 2, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}
PIXELS = {"pixel_values": torch.rand(2, 1, 8, 8)}


def image_config() -> ImageVAEConfig:
    return ImageVAEConfig(image_size=8, num_channels=1, hidden_channels=[4], latent_dim=2)


def text_config() -> TextVAEConfig:
    return TextVAEConfig(vocab_size=len(TOKENIZER), embedding_size=4, hidden_size=4, latent_dim=2)


def joint() -> MMVAE:
    return MMVAE(MMVAEConfig(modalities={"image": image_config(), "text": text_config()}))


def stacked() -> StackedVAE:
    return StackedVAE.over(TextVAE(text_config()), num_classes=2, latent_dim=2, hidden_size=4)


def trained(model, inputs: dict[str, torch.Tensor], folder, **options) -> Trainer:
    """A Trainer after one step on two rows."""
    rows = [{name: column[i] for name, column in inputs.items()} for i in range(2)]
    arguments = {"max_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=str(folder), remove_unused_columns=False, **arguments)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize(("build", "inputs"), [(joint, PIXELS | TEXT), (stacked, TEXT)], ids=["joint", "stacked"])
def test_a_folder_can_be_read_after_a_trainer_that_was_given_a_tokenizer(build, inputs, tmp_path):
    trainer = trained(build(), inputs, tmp_path, processing_class=TOKENIZER)
    trainer.model.config.note = "of the author's"
    trainer.save_model(tmp_path / "saved")
    assert {"eos_token_id", "pad_token_id", "note"}.isdisjoint(json.loads((tmp_path / "saved" / "config.json").read_text()))
    again = type(trainer.model).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("texts", [("text",), ()], ids=["with text", "pictures alone"])
def test_a_joint_model_trains_with_its_processor(texts, tmp_path):
    names = ("image", "text") if texts else ("left", "right")
    model = joint() if texts else MMVAE(MMVAEConfig(modalities=dict.fromkeys(names, image_config())))
    images = ImageVAEImageProcessor(size={"height": 8, "width": 8}, num_channels=1)
    processor = MMVAEProcessor({name: TOKENIZER if name in texts else images for name in names})
    inputs = PIXELS | TEXT if texts else {f"{name}_pixel_values": PIXELS["pixel_values"] for name in names}
    trained(model, inputs, tmp_path, processing_class=processor).save_model(tmp_path / "saved")
    assert MMVAE.from_pretrained(tmp_path / "saved").modalities == MMVAEProcessor.from_pretrained(tmp_path / "saved").modalities == names
    assert not texts or processor.tokenizer is TOKENIZER


def test_a_stacked_model_tells_its_loss_and_takes_what_transformers_passes(tmp_path):
    model, labels = stacked(), {"labels": torch.tensor([0, -100])}
    for inputs in (TEXT, TEXT | labels):
        trainer = trained(model, inputs, tmp_path)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(model(**inputs).loss.item(), rel=1e-4)
    expected = model.eval()(**TEXT, beta=0.5).loss
    assert torch.equal(model(**TEXT, beta=0.5, token_type_ids=torch.zeros(2, 4), return_dict=False)[0], expected)
    assert torch.equal(model(TEXT["input_ids"], 0.5, attention_mask=TEXT["attention_mask"]).loss, expected)
    for wrong, nearest in (("num_sampels", "num_samples"), ("input_idds", "input_ids"), ("main_input", "input_ids")):
        with pytest.raises(TypeError, match=f"StackedVAE.forward: unknown argument '{wrong}'; the nearest one is '{nearest}'"):
            model(**TEXT, **{wrong: 5})
