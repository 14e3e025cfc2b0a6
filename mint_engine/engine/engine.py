"""The engine as its users see it.

Every call returns at once. Operations of one model run in the order of the calls; an error reaches exactly the future
it belongs to and leaves the model as it was. Method names and results follow the Tinker SDK's requests.
"""

from __future__ import annotations

import uuid
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from mint_engine.bases import BaseInfo
from mint_engine.engine.checkpoints import Checkpoints
from mint_engine.engine.core import EngineCore, Steps
from mint_engine.engine.models import Models
from mint_engine.engine.parking import Parking
from mint_engine.engine.together import Together
from mint_engine.engine.training import Training
from mint_engine.fair_share import DEFAULT_SAMPLING_SHARE
from mint_engine.off_thread import Apart
from mint_engine.stats import EngineStats, OnOperation, rss_bytes
from mint_engine.store import Store
from mint_engine.types import GetServerCapabilitiesResponse, SupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

alive: weakref.WeakSet[Engine] = weakref.WeakSet()


class Engine(Models, Training, Checkpoints, Parking):
    """LoRA training and sampling on one device.

    Args:
        dtype: "bfloat16" or "float32", the compute dtype. Masters, moments and log-probabilities are always fp32.
        device: "cpu", "cuda" or "cuda:1", where base models, adapters, optimiser state and KV cache live; default
            MINT_DEVICE, else the CPU. One that the machine lacks is refused with UserError.
        home: where runs, checkpoints and converted models are kept.
        activation_bytes: memory a training pass may take beside the weights; a call that needs more is cut into passes
            between its datums, with the same sums. It is kept until the last training client has gone. Default 2 GiB.
        kv_cache_bytes: size of each base model's KV cache; default a quarter of the machine's (the GPU's) memory.
        store: where metadata and checkpoints go; default a store under ``home``.
        deterministic: whether a training call's numbers are to be the same bits in any company, as samples always are
            where the C++ kernels run. If not, calls of different clients share passes over the base model
            (`trainer.run_together`), which is several times faster for many small ones and moves their numbers by
            roundings. Default: in float32, which is for exactness.
        masked_logprobs: whether forward_backward reports the log-probabilities of positions that its loss masks (weight
            or advantage 0). If not, they are NaN, and such positions skip the unembedding and, in the last layer, all
            but K and V. Loss and gradients are the same sums. `forward` and custom losses always report all.
        sampling_share: the part of the device's time that decode steps get while training operations wait, between 0
            and 1; the operations get the rest while there is something to sample. Who is alone gets everything.
        speculation: tokens that a sample may propose in a step, from text that repeats itself (docs/sampling.md);
            0 for none. What is sampled does not change.
        weights: how base models' weights are kept for decode steps on a CPU. "once": as they are. "twice": in bfloat16
            a model gets a second copy, in the order in which a step reads it, when it is first sampled: the same bits,
            faster. "int8": linear weights are rounded to int8 with a scale for each output channel; steps read these,
            half the bytes, everything else computes with the same values in ``dtype``, and both copies are kept. For
            sampling: it is another, slightly worse base model. Default: "twice" if the copy takes at most an eighth of
            the machine's memory, or of its container's limit, else "once".
    """

    def __init__(
        self, *, dtype: str = "bfloat16", device: str | None = None, home: Path, kv_cache_bytes: int | None = None,
        store: Store | None = None, deterministic: bool | None = None, masked_logprobs: bool = True,
        activation_bytes: int | None = None, sampling_share: float = DEFAULT_SAMPLING_SHARE,
        speculation: int = 0, weights: str | None = None,
    ) -> None:  # fmt: skip
        EngineCore.__init__(
            self, dtype=dtype, device=device, home=home, kv_cache_bytes=kv_cache_bytes, store=store,
            activation_bytes=activation_bytes, sampling_share=sampling_share, speculation=speculation,
            weights=weights,
        )  # fmt: skip
        self.deterministic = dtype == "float32" if deterministic is None else deterministic
        self.masked_logprobs = masked_logprobs
        self._together = Together(
            self._residents, self._recorder, share=not self.deterministic, masked_logprobs=masked_logprobs
        )
        self._references = OrderedDict()
        self._sampler_lane = self._executor.lane()
        self._sums_lane = self._executor.lane()
        alive.add(self)

    def create_session(
        self, *, session_id: str | None = None, owner: str | None = None, tags: Sequence[str] = (),
        user_metadata: dict[str, str] | None = None, project_id: str | None = None, display_name: str | None = None,
    ) -> str:  # fmt: skip
        """What models and samplers are made in. Its owner decides which checkpoints they may read.

        Raises:
            UserError: ``session_id`` is in use.
        """
        session_id = str(uuid.uuid4()) if session_id is None else session_id
        whose = self.store.owner if owner is None else owner
        self._view(whose).create_session(
            session_id, tags=list(tags), user_metadata=user_metadata, project_id=project_id, display_name=display_name
        )
        self._owners[session_id] = whose
        return session_id

    # ---- base models ---------------------------------------------------------------------------------------------

    def load_base(self, name: str) -> Future[None]:
        """Load a base model before somebody needs it."""

        def load() -> Steps[None]:
            yield Apart(lambda: self._bases.get(name))

        return self._submit("load_base", self._executor.lane(), load)

    def base_info(self) -> list[BaseInfo]:
        """The base models that are loaded."""
        return [base.info for base in self._bases.loaded]

    def tokenizer(self, base_model: str) -> PreTrainedTokenizerBase:
        """The tokenizer of a base model, by any name or directory it goes by. Loads the model if it is not."""
        return self._bases.get(base_model).tokenizer

    def capabilities(self) -> GetServerCapabilitiesResponse:
        """The base models that are loaded. Any other name a caller gives is resolved when it is asked for."""
        return GetServerCapabilitiesResponse(
            supported_models=[
                SupportedModel(
                    model_name=base.name,
                    max_context_length=base.limits.max_context_length,
                    trainable=True,
                    sampleable=True,
                )
                for base in self._bases.loaded
            ]
        )

    # ---- how it is doing, and the end ----------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Counters since the beginning and gauges of this moment."""
        samplers = [base.sampler for base in self._bases.loaded]
        operations, failures, tokens = self._recorder.counts()
        return EngineStats(
            operations=operations,
            failures=failures,
            tokens_trained=sum(n for kind, n in tokens.items() if kind.startswith("forward_backward")),
            tokens_scored=tokens.get("forward", 0),
            tokens_prefilled=sum(s.tokens_prefilled for s in samplers),
            tokens_sampled=sum(s.tokens_sampled for s in samplers),
            operations_waiting=self._executor.queued,
            samples_waiting=sum(s.load()[0] for s in samplers),
            samples_running=sum(s.running for s in samplers),
            kv_cache_bytes_used=sum(s.cache.blocks_used * s.cache.block_bytes for s in samplers),
            kv_cache_bytes_total=sum(s.cache.num_blocks * s.cache.block_bytes for s in samplers),
            resident_models=len(self._models),
            samplers=len(self._samplers),
            rss_bytes=rss_bytes(),
        )

    def on_operation(self, callback: OnOperation) -> None:
        """Call ``callback(kind, seconds, tokens, ok)`` when an operation or a sample has ended.

        ``seconds``: since it began to run, not since it was asked for. It is called on the thread that did the work,
        mostly the device's, before the future is settled: it must be quick.
        """
        self._recorder.listen(callback)

    def close(self, *, drain: bool = False) -> None:
        """Finish what is running; refuse what is waiting, or with ``drain`` do that first (samples excepted)."""
        self._executor.close(drain=drain)
