"""mmvae: variational autoencoders over images, text, bags of words, or several of them, for the Hugging Face ecosystem.

Importing it registers its models and processors with ``AutoConfig``, ``AutoModel``, ``AutoImageProcessor`` and so ``AutoProcessor``.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    AutoModelForSequenceClassification,
    AutoProcessor,
)

from mmvae.joint_processing import MMVAEProcessor
from mmvae.models.heads import (
    ImageVAEForImageClassification,
    MMVAEForClassification,
    TextVAEForSequenceClassification,
    TopicVAEForSequenceClassification,
)
from mmvae.models.image_vae import ImageVAE, ImageVAEConfig
from mmvae.models.mmvae import MMVAE, MMVAEConfig
from mmvae.models.segmentation import ImageVAEForSemanticSegmentation
from mmvae.models.stacked import StackedVAE, StackedVAEConfig
from mmvae.models.text_vae import TextVAE, TextVAEConfig
from mmvae.models.topic_vae import TopicVAE, TopicVAEConfig
from mmvae.processing import ImageVAEImageProcessor, ImageVAEImageProcessorPil
from mmvae.vectorizer import TopicVAEVectorizer

__version__ = "0.1.0"
__all__ = [
    "MMVAE", "ImageVAE", "ImageVAEConfig", "ImageVAEForImageClassification", "ImageVAEForSemanticSegmentation", "ImageVAEImageProcessor",
    "MMVAEConfig", "MMVAEForClassification", "MMVAEProcessor", "StackedVAE", "StackedVAEConfig", "TextVAE", "TextVAEConfig",
    "TextVAEForSequenceClassification", "TopicVAE", "TopicVAEConfig", "TopicVAEForSequenceClassification", "TopicVAEVectorizer",
]  # fmt: skip

_MODELS = {
    ImageVAEConfig: ImageVAE, TextVAEConfig: TextVAE, TopicVAEConfig: TopicVAE, MMVAEConfig: MMVAE, StackedVAEConfig: StackedVAE,
}  # fmt: skip
for _config, _model in _MODELS.items():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
AutoModelForImageClassification.register(ImageVAEConfig, ImageVAEForImageClassification, exist_ok=True)
AutoModelForSequenceClassification.register(TextVAEConfig, TextVAEForSequenceClassification, exist_ok=True)
AutoModelForSequenceClassification.register(TopicVAEConfig, TopicVAEForSequenceClassification, exist_ok=True)
AutoModelForSemanticSegmentation.register(ImageVAEConfig, ImageVAEForSemanticSegmentation, exist_ok=True)
AutoImageProcessor.register(
    ImageVAEConfig,
    image_processor_classes={"torchvision": ImageVAEImageProcessor, "pil": ImageVAEImageProcessorPil},
    exist_ok=True,
)
AutoProcessor.register(MMVAEConfig, MMVAEProcessor, exist_ok=True)
AutoProcessor.register(TopicVAEConfig, TopicVAEVectorizer, exist_ok=True)
