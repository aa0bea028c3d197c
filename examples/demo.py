"""A page in the browser to play with a model of pictures, of texts or of both: what it makes of what is given, and what lies between two.

pip install "mmvae[demo]"
python examples/demo.py outputs/demo     # a model folder or a Hub id; `make demo` makes this one

As ``app.py`` of a Space, with ``mmvae[demo]`` among its requirements and the model's id in its variable ``MODEL``, it is the same page.
"""

import argparse
import os
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from transformers import AutoModel, AutoProcessor

from mmvae import MMVAE, ImageVAEConfig, TextVAEConfig
from mmvae.models.base import seeded
from mmvae.processing import decode_text

PICTURE, TEXT = ImageVAEConfig.model_type, TextVAEConfig.model_type
STEPS, MOST, LONGEST = 8, 32, 1000


class Player:
    """A model with its processor, for raw values by the names of modalities.

    Raises:
        ValueError: a model of anything but pictures and texts, of classes, or without a latent.
    """

    def __init__(self, place: str) -> None:
        self.model, self.processor = AutoModel.from_pretrained(place).eval(), AutoProcessor.from_pretrained(place)
        config = self.model.config
        self.joint = isinstance(self.model, MMVAE)
        self.kinds = {name: child.model_type for name, child in config.modalities.items()} if self.joint else {"": config.model_type}
        if not {*self.kinds.values()} <= {PICTURE, TEXT} or getattr(config, "num_classes", 0) or not config.latent_dim:
            found = ", ".join(dict.fromkeys(self.kinds.values()))
            raise ValueError(f"{place}: received a model of {found}, expected pictures or texts, with a latent and without classes")

    def inputs(self, *rows: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """What the model takes of rows that each have something; a modality that none of them has is left out."""
        columns = {name: [row.get(name) or None for row in rows] for name in self.kinds}
        columns = {name: values for name, values in columns.items() if any(values)}
        if self.joint:
            return self.processor(**columns)
        padding = {"padding": True} if self.kinds[""] == TEXT else {}
        return self.processor(columns[""], return_tensors="pt", **padding)

    def options(self, likeliest: bool) -> dict[str, Any]:
        """How words are chosen."""
        if TEXT not in self.kinds.values():
            return {}
        return {"num_beams": 4, "do_sample": False} if likeliest else {"do_sample": True, "top_k": 0}

    @torch.no_grad()
    def answer(self, given: Mapping[str, Any], number: int, likeliest: bool, seed: int) -> dict[str, list[Any]]:
        """Every modality from those that are given, ``number`` times; pairs that belong together where nothing is."""
        some, generator = any(given.values()), torch.Generator().manual_seed(seed)
        inputs, options = self.inputs(given) if some else {}, self.options(likeliest)
        if self.joint:
            return self.shown(self.model.generate(list(self.kinds), number, generator, not likeliest, **inputs, **options))
        if not some:
            return self.shown({"": self.model.sample(number, generator, **options)})
        with seeded(generator):
            q = self.model.posterior(**inputs).mixture
            return self.shown({"": self.model.render(q.mean if likeliest else q.sample((number,))[:, 0], **options)})

    @torch.no_grad()
    def between(self, start: Mapping[str, Any], end: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Every modality on the straight line between what two rows are most likely to mean."""
        q, made = self.model.posterior(**self.inputs(start, end)), {}
        ends = q.mixture.components.mean[q.fullest(), torch.arange(2)]
        for name, kind in self.kinds.items():
            options = ({"target": name} if self.joint else {}) | (self.options(True) if kind == TEXT else {})
            made[name] = self.model.interpolate(ends[:1], ends[1:], STEPS, **options)
        return self.shown(made)

    def shown(self, made: Mapping[str, Tensor]) -> dict[str, list[Any]]:
        """Pictures and sentences for a reader."""
        texts = {name: self.processor.parts[name] if self.joint else self.processor for name, kind in self.kinds.items() if kind == TEXT}
        return {
            name: decode_text(texts[name], values) if name in texts else [to_pil_image(pixels.clamp(0, 1)) for pixels in values]
            for name, values in made.items()
        }


def page(player: Player) -> Any:
    """Two tabs, a ``gradio.Blocks``: what the model makes of what is given, and what lies between two."""
    import gradio

    Image.MAX_IMAGE_PIXELS = 8_000_000  # beyond twice as many Pillow refuses what a stranger sends, before it is decoded

    def fields(which: str = "") -> list[Any]:
        """One for each modality, which may stay empty."""
        return [
            gradio.Image(label=(name or "picture") + which, type="pil", height=200)
            if kind == PICTURE
            else gradio.Textbox(label=(name or "text") + which, max_length=LONGEST)
            for name, kind in player.kinds.items()
        ]

    def results() -> list[Any]:
        return [
            gradio.Gallery(label=name or "pictures", columns=STEPS, height=300, object_fit="contain", format="png")
            if kind == PICTURE
            else gradio.Textbox(label=name or "texts", lines=STEPS)
            for name, kind in player.kinds.items()
        ]

    def told(made: Mapping[str, list[Any]]) -> Any:
        values = [made[name] if kind == PICTURE else "\n".join(made[name]) for name, kind in player.kinds.items()]
        return values if len(values) > 1 else values[0]

    def row(values: Any) -> dict[str, Any]:
        if any(isinstance(value, str) and len(value) > LONGEST for value in values):
            raise gradio.Error(f"received a text of more than {LONGEST} characters")
        return dict(zip(player.kinds, values, strict=True))

    def answer(*values: Any) -> Any:
        *given, number, likeliest, seed = values
        return told(player.answer(row(given), min(int(number), MOST), likeliest, int(seed)))

    def between(*values: Any) -> Any:
        start, end = row(values[: len(player.kinds)]), row(values[len(player.kinds) :])
        if not any(start.values()) or not any(end.values()):
            raise gradio.Error("received nothing of one of them, expected something of both")
        return told(player.between(start, end))

    with gradio.Blocks(title="mmvae", delete_cache=(3600, 3600)) as blocks:
        with gradio.Tab("Make"):
            gradio.Markdown("Give any of it, or nothing.")
            with gradio.Row():
                given = fields()
            with gradio.Row():
                number = gradio.Slider(1, MOST, STEPS, step=1, label="how many")
                likeliest = gradio.Checkbox(label="the likeliest instead of draws")
                seed = gradio.Number(0, label="seed", precision=0)
            button = gradio.Button("Make", variant="primary")
            button.click(answer, [*given, number, likeliest, seed], results(), api_name="make")
        with gradio.Tab("Between"):
            gradio.Markdown("Give something of both.")
            with gradio.Row():
                start = fields(" at the start")
            with gradio.Row():
                end = fields(" at the end")
            button = gradio.Button("Go", variant="primary")
            button.click(between, [*start, *end], results(), api_name="between")
    return blocks


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default=os.environ.get("MODEL", "outputs/demo"), help="model folder or Hub id")
    page(Player(parser.parse_args().model)).launch(max_file_size="10mb")
