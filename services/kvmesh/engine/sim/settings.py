"""Settings of the simulated engine, and the profiles that it takes times from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_type_hints

from kvmesh.setting_values import ValueNotAllowedError, boolean
from kvmesh.v1 import worker_pb2 as wire


class SimSettingError(ValueError):
    """A setting is wrong. The text names the key and what is allowed."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Step times of a real engine."""

    source: str
    """Hardware, model and where the figures come from."""
    model: wire.StepModel
    layers: int
    """Pauses in a step."""


PROFILES: Mapping[str, Profile] = {
    "h100-8b": Profile(
        "8B model in bf16 on one H100, by arithmetic: 16 GB of weights and 128 KiB of KV a token "
        "at 2.6 TB/s; 16 GFLOP a prefill token at 450 TFLOPS",
        wire.StepModel(
            a_ms=6.2, b_ms=0.036, c_ms=1.2e-6, d_ms=0.02, e_ms=5e-5, saturating_chunk=1024
        ),
        layers=32,
    ),
    "cpu-135m": Profile(
        "SmolLM2-135M in fp32 on one AVX2 core: decode 61, 123, 178 ms for 1, 4, 8 streams at "
        "context 500, prefill 140 to 225 tokens/s (docs, measured figures)",
        wire.StepModel(a_ms=45.0, b_ms=4.6, c_ms=1.1e-3, d_ms=2.0, e_ms=0.03, saturating_chunk=128),
        layers=30,
    ),
    "step-10ms": Profile(
        "every step takes 10 ms, whatever it holds: for tests of everything else",
        wire.StepModel(a_ms=10.0, saturating_chunk=2048),
        layers=4,
    ),
}


@dataclass(frozen=True, slots=True)
class SimSettings:
    """How the simulated engine behaves."""

    profile: str = "h100-8b"
    """Whose step times it takes: a name of PROFILES."""
    speed: float = 1.0
    """How many times faster than the profile. inf: steps take no time."""
    like: str = "kvmesh"
    """Whose behaviour it has: kvmesh (streamed hand-off, first token from
    prefill, stops between layers) or vllm (hand-off on finish, first token
    from decode, stops between chunks)."""
    block_tokens: int = 16
    """KV block size, tokens: a multiple of 16."""
    block_bytes: int = 1024
    """Real bytes of a KV block: at least 8 a token, a multiple of 8 a token."""
    vocabulary: int = 2000
    """Number of token ids, at least 259."""
    end_of_text: int = 0
    """Mean number of tokens after which a text ends by itself. 0: never."""
    attempt_tokens: bool = False
    """Tokens also depend on the attempt, so that mixed attempts show."""
    context_length: int = 131_072
    """Most tokens of a sequence."""
    max_batch: int = 256
    """Most requests in a step."""
    stuck_while: str = ""
    """No step ends while a file of this name exists: shows what becomes of the
    streams of a stuck engine."""
    out_of_memory_while: str = ""
    """A step raises MemoryError while a file of this name exists: shows what becomes
    of the streams of an engine that gets no memory."""
    slow_while: str = ""
    """Steps take ten times as long while a file of this name exists: what is done
    to streams meanwhile finds them running."""
    dies_of: int = 0
    """A step that computes this token id ends the process at once: shows what
    becomes of a request of which workers die. 0: none does."""
    chat_template: str = ""
    """Jinja template of chats. Empty: ChatML. A bad one shows what routers do
    with it."""

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise SimSettingError(f"profile is {self.profile!r}; allowed are {', '.join(PROFILES)}")
        if self.like not in ("kvmesh", "vllm"):
            raise SimSettingError(f"like is {self.like!r}; allowed are kvmesh, vllm")
        if not self.speed > 0:
            raise SimSettingError(f"speed is {self.speed}; allowed is more than 0, or inf")
        if self.block_tokens <= 0 or self.block_tokens % 16:
            raise SimSettingError(
                f"block_tokens is {self.block_tokens}; allowed are multiples of 16"
            )
        if self.block_bytes <= 0 or self.block_bytes % (8 * self.block_tokens):
            raise SimSettingError(
                f"block_bytes is {self.block_bytes}; allowed are multiples of "
                f"{8 * self.block_tokens}, 8 bytes a token"
            )
        if self.vocabulary < 259:
            raise SimSettingError(f"vocabulary is {self.vocabulary}; allowed is 259 or more")
        for name in ("context_length", "max_batch"):
            if getattr(self, name) < 1:
                raise SimSettingError(f"{name} is {getattr(self, name)}; allowed is 1 or more")
        if self.end_of_text < 0:
            raise SimSettingError(f"end_of_text is {self.end_of_text}; allowed is 0 or more")

    @property
    def instant(self) -> bool:
        """Whether steps take no time."""
        return math.isinf(self.speed)

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, str]) -> SimSettings:
        """From text by name, as the command line gives it. Raises SimSettingError."""
        hints = get_type_hints(cls)
        known = [f.name for f in dataclasses.fields(cls)]
        values: dict[str, object] = {}
        for key, text in arguments.items():
            if key not in known:
                raise SimSettingError(
                    f"{key} is no setting of the sim engine; allowed are {', '.join(known)}"
                )
            try:
                if hints[key] is bool:
                    values[key] = boolean(key, text)
                else:
                    values[key] = hints[key](text)
            except ValueNotAllowedError as error:
                raise SimSettingError(str(error)) from error
            except ValueError as error:
                allowed = hints[key].__name__
                raise SimSettingError(f"{key} is {text!r}; allowed is {allowed}") from error
        return cls(**values)  # type: ignore[arg-type]
