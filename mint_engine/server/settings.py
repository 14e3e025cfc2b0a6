"""Every setting of the server, in one place: flags, environment (``MINT_SERVER_PORT``, ...) or a TOML file."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from mint_engine.errors import UserError
from mint_engine.fair_share import DEFAULT_SAMPLING_SHARE

ENV_PREFIX = "MINT_SERVER_"


class Settings(BaseSettings):
    """A flag wins over the environment, that over the TOML file, that over the default."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", env_ignore_empty=True)

    # ---- where, what
    host: str = Field(default="127.0.0.1", description="Address to listen on. Anything but loopback needs keys.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    models: Annotated[list[str], NoDecode] = Field(
        default_factory=list,
        description="A base model to serve: a Hugging Face name, a directory, or smollm2-135m. May be given more than "
        "once; clients can name no other.",
    )
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="Compute dtype: bfloat16 or float32.")
    weights: Literal["int8", "once", "twice"] | None = Field(
        default=None,
        description="How base models are kept for sampling on a CPU. int8: rounded to int8 per output channel; once: "
        "as they are; twice: with a copy in the order in which decode steps read it. Default: twice if it takes at "
        "most an eighth of the memory.",
    )
    device: str | None = Field(
        default=None,
        description="Where to compute: cpu, cuda or cuda:1; default MINT_DEVICE, else cpu.",
    )
    deterministic: bool | None = Field(
        default=None,
        description="Give a training call the same bits in any company, one client per pass; default only in float32.",
    )
    masked_logprobs: bool = Field(
        default=True,
        description="Report the log-probabilities of positions that a loss masks; without them (NaN instead) "
        "forward_backward is faster.",
    )
    home: Path | None = Field(
        default=None,
        description="Where runs, checkpoints, database and keys are kept; default MINT_HOME, else ~/.mint-engine.",
    )
    database_url: str | None = Field(
        default=None,
        description="A PostgreSQL URL, such as postgresql+psycopg://user@host/db; default SQLite in the home.",
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of the kernels; default torch's own choice."
    )
    kv_cache_bytes: int | None = Field(
        default=None,
        ge=1 << 16,
        description="KV cache of each base model; default a quarter of the machine's memory, or of the GPU's.",
    )
    activation_bytes: int | None = Field(
        default=None,
        ge=1 << 20,
        description="Memory a training pass may take beside the weights; default 2 GiB. Larger calls take several.",
    )
    sampling_share: float = Field(
        default=DEFAULT_SAMPLING_SHARE,
        gt=0,
        lt=1,
        description="The part of the device's time that sampling gets while training waits, and training the rest.",
    )
    speculation: int = Field(
        default=0, ge=0, description="Tokens a sample may propose in a step, where text repeats itself; 0 for none."
    )
    public_url: str | None = Field(
        default=None,
        description="The URL under which clients reach the server, if not the one it listens on; used in links.",
    )
    allow_anonymous: bool = Field(
        default=False,
        description="Serve callers without a key, and listen on any address, though no key is configured.",
    )

    # ---- limits of one key, where the key has none of its own
    max_request_bytes: int = Field(
        default=256 << 20, ge=1024, description="Largest request body, decompressed, in bytes."
    )
    max_concurrent_requests: int = Field(
        default=1024, ge=1, description="Requests of one key handled at once; polls that only wait are not counted."
    )
    max_resident_models: int = Field(default=256, ge=1, description="Training models of one key in memory at once.")
    max_disk_bytes: int | None = Field(
        default=None, ge=0, description="Bytes of checkpoints one key may keep; default no limit."
    )

    # ---- back-pressure
    memory_budget_bytes: int = Field(
        default=1 << 30,
        ge=1 << 20,
        description="Bytes of waiting requests and kept results; above it clients are told 429.",
    )
    sample_queue_limit: int = Field(
        default=4096, ge=1, description="Sample requests that may wait for the sampler; above it clients are told 429."
    )
    sample_max_concurrent_requests: int = Field(
        default=1024, ge=1, description="Sample calls a 0.38 SDK keeps in flight at once (each holds a connection)."
    )
    max_resident_samplers: int = Field(
        default=64,
        ge=1,
        description="Samplers kept in memory, and unnamed ones of a session kept on disk; those used least recently go "
        "to disk and come back.",
    )

    # ---- times
    session_timeout_s: float = Field(
        default=600,
        gt=0,
        description="Seconds without a heartbeat or request after which a session's models go to disk.",
    )
    gap_timeout_s: float = Field(
        default=330, gt=0, description="Seconds a request waits for one with a lower seq_id; the SDKs retry for 300."
    )
    result_ttl_s: float = Field(default=3600, gt=0, description="Seconds an unfetched result is kept.")
    fetched_ttl_s: float = Field(default=600, gt=0, description="Seconds a result is kept after it was fetched.")
    long_poll_s: float = Field(
        default=25, gt=0, lt=45, description="Seconds a poll for a result is held; the SDKs give up at 45."
    )
    shutdown_grace_s: float = Field(
        default=30, ge=0, description="Seconds to finish what is running at SIGTERM before the models go to disk."
    )
    park_on_shutdown: bool = Field(
        default=True,
        description="Write the models to disk at the end, so that a restarted server goes on where this one was.",
    )

    # ---- what 0.38 SDKs are told
    cancel_samples: bool = Field(default=True, description="Have SDKs report abandoned samples, so that they stop.")
    join_samplers: bool = Field(
        default=True, description="Have pickled sampling clients ask for a number of their own."
    )
    batch_polling: bool = Field(
        default=False, description="Have sampling clients poll for all their samples in one request."
    )
    compress_uploads: bool = Field(default=False, description="Have SDKs compress training data; for slow networks.")
    inline_result_bytes: int = Field(
        default=32 << 20,
        ge=1,
        description="Larger results are announced first, so that a client can wait for memory.",
    )

    # ---- logs
    log_format: Literal["text", "json"] = Field(default="text", description="Log lines as text or as JSON objects.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe log line shown."
    )

    @field_validator("models", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        """The environment has one string: names with commas between them."""
        if isinstance(value, str):
            value = value.split(",")
        return [name.strip() for name in value if name.strip()] if isinstance(value, list) else value

    @field_validator("public_url")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("expected a URL that begins with http:// or https://")
        return value and value.rstrip("/")

    @classmethod
    def load(cls, config: Path | None = None, **flags: Any) -> Self:
        """Settings from flags, environment and the TOML file ``config``, in this order of precedence.

        Raises:
            UserError: there is no such file, or the first value that is wrong.
        """
        if config is not None and not Path(config).is_file():
            raise UserError(f"config: there is no file {config}")

        class WithFile(cls):  # type: ignore[valid-type,misc]
            model_config = SettingsConfigDict(toml_file=config)

        try:
            return WithFile(**flags)
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"config: {config} is not TOML: {error}") from None
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"])
            raise UserError(f"{where}: {problem['msg']}, got {problem['input']!r}") from None

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource, dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:  # fmt: skip
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @property
    def home_directory(self) -> Path:
        return Path(self.home or os.environ.get("MINT_HOME") or Path.home() / ".mint-engine").expanduser().resolve()
