"""A plug-in for vLLM: ``vllm serve DIR`` for an InstructBLIP with a decoder language model.

vLLM finds ``register`` through the entry point group ``vllm.general_plugins`` and calls it in each
of its processes, so it imports neither torch nor the model.
"""


def register() -> None:
    """Register InstructBLIP with vLLM, by the architecture that an exported ``config.json`` has."""
    from vllm import ModelRegistry  # pyright: ignore[reportAttributeAccessIssue, reportMissingImports]

    ModelRegistry.register_model(
        "InstructBlipForConditionalGeneration", f"{__name__}.model:InstructBlipForVllm"
    )
