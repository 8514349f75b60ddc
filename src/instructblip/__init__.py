"""Instruction tuning of vision-language models: from a BLIP-2 to an InstructBLIP, end to end."""

__version__ = "0.1.0"
