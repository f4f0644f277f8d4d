"""DeepSeek-VL2 (``deepseek_vl_v2``), which transformers lacks, as classes for its Auto classes.

The layout of its checkpoints (names of tensors and settings, order of image tokens) is that of
https://github.com/deepseek-ai/DeepSeek-VL2; the code is ours. The config
and the processor are registered with transformers' Auto classes when these are imported after
``mcsharp_sdk``, and the model as soon as there is a config.
"""
