"""Models: embedding, a stack of blocks, a head; under the contract of a cell."""

from .backbone import BACKBONES, backbone
from .lm import LM
from .sequence import BlockStack, Classifier, Tagger

__all__ = ["BACKBONES", "LM", "BlockStack", "Classifier", "Tagger", "backbone"]
