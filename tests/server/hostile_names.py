"""What a tenant has on the server, and good requests about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from api import Api, batch_json, prompt


@dataclass(frozen=True)
class Names:
    """Ids and paths of one tenant's."""

    base: str
    session: str
    model: str
    sampler: str
    state: str
    weights: str
    promise: str

    @classmethod
    def of(cls, api: Api, base: str) -> Names:
        """Make one of each."""
        session = api.session()
        model = api.model(base, session)
        state = api.result("save_weights", model_id=model, path="first")["path"]
        weights = api.result("save_weights_for_sampler", model_id=model, path="first")["path"]
        sampler = api.ok(
            "create_sampling_session", session_id=session, sampling_session_seq_id=0, model_path=weights
        )["sampling_session_id"]  # fmt: skip
        return cls(base, session, model, sampler, state, weights, api.ok("optim_step", model_id=model)["request_id"])

    def bodies(self) -> dict[str, dict[str, Any]]:
        """A good body of every POST but those that would end what the others need."""
        lora = {"rank": 4, "seed": 1, "train_mlp": True}
        params = {"max_tokens": 3, "seed": 1, "stop": ["a"], "temperature": 0.5, "top_k": 3, "top_p": 0.9}
        targets = {"data": [1, -1, 3, 4], "dtype": "int64", "shape": [2, 2]}
        datum = {
            "student_input": prompt(1, 2, 3), "reference_input": prompt(4, 1, 2, 3),
            "target_tokens": {"data": [2, 3], "dtype": "int64"}, "weights": {"data": [1.0, 1.0], "dtype": "float32"},
        }  # fmt: skip
        model = {"model_id": self.model, "seq_id": None}
        return {
            "client/config": {"sdk_version": "0.38.0"},
            "client/dynamic_config": {"sdk_version": "0.38.0"},
            "create_session": {"tags": ["a"], "user_metadata": {"a": "b"}, "sdk_version": "0", "display_name": "n"},
            "session_heartbeat": {"session_id": self.session},
            "sessions/search": {
                "display_name": "n", "owner": {"type": "own"}, "statuses": [{"type": "active"}], "limit": 5,
                "user_metadata": {"a": "b"}, "project_ids": ["p"],
            },
            "create_model": {
                "session_id": self.session, "model_seq_id": 7, "base_model": self.base, "lora_config": lora,
                "optimizer_config": {"type": "adamw"},
            },
            "get_info": {"model_id": self.model},
            "forward": batch_json(self.model, None, "forward_input", loss_fn_config={"a": 1.0}),
            "forward_backward": batch_json(self.model, None),
            "optim_step": {**model, "adam_params": {"learning_rate": 1e-4, "beta1": 0.9, "eps": 1e-8}},
            "save_weights": {**model, "path": "n", "ttl_seconds": 60, "overwrite": True, "user_metadata": {"a": "b"}},
            "save_weights_for_sampler": {**model, "path": "s", "overwrite": True, "kind": "snapshot"},
            "save_weights_external": {**model, "path": "e", "age_encryption_recipients": ["age1x"]},
            "load_weights": {**model, "path": self.state, "optimizer": True, "weights_access_token": None},
            "create_custom_loss": {"session_id": self.session},
            "create_sampling_session": {
                "session_id": self.session, "sampling_session_seq_id": 5, "model_path": self.weights,
            },
            "join_sampling_session": {"sampling_session_id": self.sampler},
            "asample": {
                "sampling_session_id": self.sampler, "seq_id": None, "num_samples": 2, "prompt": prompt(5, 6, 7),
                "sampling_params": params, "prompt_logprobs": True, "topk_prompt_logprobs": 2,
                "topk_sample_logprobs": 2,
                "target_prompt_logprobs": targets, "prompt_alt_tokens_k": 2, "prompt_logprobs_last_n": 2,
            },
            "retrieve_future": {"request_id": self.promise, "allow_metadata_only": True},
            "retrieve_futures": {
                "target": {"type": "sampling_session", "sampling_session_id": self.sampler, "cloned_sampler_id": 0},
                "prev_cursor": 0, "timeout": 0, "retrieved_request_ids": [self.promise],
            },
            "cancel_future": {"request_id": self.promise},
            "weights_info": {"tinker_path": self.weights},
            "copy_weights": {"source_path": self.state, "ttl_seconds": 60, "session_id": None, "model_seq_id": None},
            "mint/checkpoints/interpolate": {
                "source_paths": [self.weights, self.weights], "coefficients": [0.5, 0.5], "output_path": "mix",
            },
            "mint/forward_backward_reverse_kl": {
                **model, "reference_model_path": self.weights, "data": [datum], "temperature": 1.0,
            },
            "telemetry": {"events": [{"event": "x"}], "session_id": self.session},
            "../../v1/completions": {
                "model": self.base, "prompt": "a", "max_tokens": 3, "n": 2, "logprobs": 2, "echo": True,
                "stop": ["z"], "seed": 1, "temperature": 0.5, "top_p": 0.9, "stream": False,
            },
            "../../v1/chat/completions": {
                "model": self.weights, "messages": [{"role": "user", "content": "a"}], "max_tokens": 3,
                "logprobs": True, "top_logprobs": 2, "stream": True, "stream_options": {"include_usage": True},
                "tools": [],
                "chat_template_kwargs": {},
            },
        }  # fmt: skip
