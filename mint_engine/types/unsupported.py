"""The SDK's types of what is not here. Scripts may name them, as in an isinstance; to make one is an error."""

from __future__ import annotations

from typing import Any, ClassVar

from mint_engine.errors import UserError


class Unsupported:
    """`because`: what the error says."""

    because: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise UserError(f"{type(self).__name__}: {self.because}")


class ImageChunk(Unsupported):
    because = "image and audio inputs are not supported: models read text only"


class ImageAssetPointerChunk(Unsupported):
    because = ImageChunk.because


class DmelChunk(Unsupported):
    because = ImageChunk.because


class DimuonOptimizerConfig(Unsupported):
    because = "the optimiser dimuon is not here: use AdamOptimizerConfig"


class DimuonParams(Unsupported):
    because = "the optimiser dimuon is not here: use AdamParams"


class PromptProvenanceSpan(Unsupported):
    because = "only the loss stable_reinforce reads where tokens come from, and it is not here"


class SampledProvenanceSpan(Unsupported):
    because = PromptProvenanceSpan.because
