"""The model that comes with the package, and the text to try it on."""

from mcsharp_sdk.embedded.location import model_directory
from mcsharp_sdk.embedded.text import calibration_text, evaluation_text, training_text

__all__ = ["calibration_text", "evaluation_text", "model_directory", "training_text"]
