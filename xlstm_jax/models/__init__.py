"""Models: embedding, a stack of blocks, a head; under the contract of a cell."""

from .backbone import BACKBONES, backbone
from .lm import LM
from .sequence import BlockStack, Classifier, FeatureTagger, Tagger
from .sizes import SIZES

__all__ = ["BACKBONES", "LM", "SIZES", "BlockStack", "Classifier", "FeatureTagger", "Tagger", "backbone"]
