"""What an inference server and the trainer must agree on before training."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..weight_sync.http import SGLANG, VLLM
from ..weight_sync.transports.backends import (
    NCCL_BACKEND,
    NO_TRANSPORT_FIX,
    NO_TRANSPORT_WHY,
    SHARED_MEMORY_BACKEND,
    describe_no_transport,
    find_backend,
)
from ..weight_sync.transports.shm_segment import ENLARGE
from .finding import GIB, NOT_ASKED, Check, Unread, known
from .tokenizers import TokenizerFacts, other_special_ids, other_tokens
from .vllm import EXCEEDS_MAX_LENGTH, WITHOUT_POLICY_VERSIONS


@dataclass(frozen=True)
class TrainerSide:
    """What a server is compared with. Each field may be [`~checks.finding.Unread`].

    `max_length` is the longest rollout, in tokens. `device` is the type of the device that sends the weights, `"cpu"`
    or `"cuda"`. `chat_ids` are the tokens of a short conversation, None if the tokenizer has no chat template. `model`
    holds those fields of the model's config that must be equal, `num_parameters` counts its weights. `longrope_boundary` is the
    number of tokens up to which a model of that kind has its short frequencies, None for another.
    """

    max_length: int | Unread = NOT_ASKED
    device: str | Unread = NOT_ASKED
    weight_sync_mode: str | Unread = NOT_ASKED
    vllm_enable_sleep_mode: bool | Unread = NOT_ASKED
    tokenizer: TokenizerFacts | Unread = NOT_ASKED
    chat_ids: tuple[int, ...] | Unread | None = NOT_ASKED
    model: dict[str, Any] | Unread = NOT_ASKED
    num_parameters: int | Unread = NOT_ASKED
    longrope_boundary: int | Unread | None = NOT_ASKED


@dataclass(frozen=True)
class ServerConfigFacts(TrainerSide):
    """What an inference server of some `kind` says of itself, beside what the trainer has.

    Each field but `url`, `kind` and `served_name` may be [`~checks.finding.Unread`]. `backend` is that of weight transfer,
    None without one. `max_model_len` is the longest sequence that the server generates, in tokens. `served_name` is
    the path or id of its checkpoint, `served_model` has the fields of that checkpoint's config, and `dtype` is the one
    that it serves in, by torch's name. `has_lora` is whether it was started with `--enable-lora`, `loads_adapters`
    whether `VLLM_ALLOW_RUNTIME_LORA_UPDATING` is set. `served_chat_ids` are `chat_ids` as the server makes them.
    `segment_bytes` is the size of a policy in the server's dtype, and `free_shared_memory_bytes` what `/dev/shm` has
    left.
    """

    url: str = field(kw_only=True)
    kind: str = field(default=VLLM, kw_only=True)
    backend: str | Unread | None = NOT_ASKED
    has_tokenizer: bool | Unread = NOT_ASKED
    logprobs_mode: str | Unread = NOT_ASKED
    max_model_len: int | Unread = NOT_ASKED
    knows_policy_versions: bool | Unread = NOT_ASKED
    has_lora: bool | Unread = NOT_ASKED
    served_name: str = field(kw_only=True)
    dtype: str | Unread = NOT_ASKED
    served_model: dict[str, Any] | Unread = NOT_ASKED
    loads_adapters: bool | Unread = NOT_ASKED
    served_tokenizer: TokenizerFacts | Unread = NOT_ASKED
    served_chat_ids: tuple[int, ...] | Unread | None = NOT_ASKED
    segment_bytes: int | Unread = NOT_ASKED
    free_shared_memory_bytes: int | Unread = NOT_ASKED

    @classmethod
    def beside(cls, trainer: TrainerSide, **seen: Any) -> ServerConfigFacts:
        """The facts of a server together with those of the trainer."""
        return cls(**{known.name: getattr(trainer, known.name) for known in fields(trainer)}, **seen)


def _no_backend(facts: ServerConfigFacts) -> str | None:
    return f"The {facts.kind} server at {facts.url} has no weight transfer engine." if facts.backend is None else None


def _foreign_backend(facts: ServerConfigFacts) -> str | None:
    backend, device = known(facts.backend), known(facts.device)
    # A server without any is the trap `weight_transfer_backend`.
    if backend is None or find_backend(backend, device) is not None:
        return None
    return describe_no_transport(facts.url, backend, device)


def _nccl_on_one_gpu(facts: ServerConfigFacts) -> str | None:
    if facts.backend != NCCL_BACKEND or not known(facts.vllm_enable_sleep_mode):
        return None
    return f"vllm_enable_sleep_mode is on, and the {facts.kind} server at {facts.url} receives weights over NCCL."


def _no_sleep_mode(facts: ServerConfigFacts) -> str | None:
    if facts.kind != SGLANG or not known(facts.vllm_enable_sleep_mode):
        return None
    return f"vllm_enable_sleep_mode is on, and the server at {facts.url} is {facts.kind}."


def _no_tokenizer(facts: ServerConfigFacts) -> str | None:
    return (
        None
        if known(facts.has_tokenizer)
        else f"The {facts.kind} server at {facts.url} was started with --skip-tokenizer-init."
    )


def _other_model(facts: ServerConfigFacts) -> str | None:
    ours, theirs = known(facts.model), known(facts.served_model)
    wrong = [
        f"{name}={theirs.get(name)}, the trainer's model has {name}={value}"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    return f"The server at {facts.url} serves {facts.served_name} with {'; '.join(wrong)}." if wrong else None


def _other_frequencies(facts: ServerConfigFacts) -> str | None:
    boundary, served, trained = known(facts.longrope_boundary), known(facts.max_model_len), known(facts.max_length)
    if boundary is None or (served > boundary) == (trained > boundary):
        return None
    return (
        f"The server's max_model_len is {served} and the trainer's max_length {trained}; the model has other rotary frequencies "
        f"above {boundary} tokens (longrope)."
    )


def _raw_logprobs(facts: ServerConfigFacts) -> str | None:
    if facts.logprobs_mode == "processed_logprobs":
        return None
    return f"The server's logprobs mode is {facts.logprobs_mode}: logprobs before temperature."


def _no_runtime_lora(facts: ServerConfigFacts) -> str | None:
    if known(facts.weight_sync_mode) != "adapter" or (known(facts.has_lora) and known(facts.loads_adapters)):
        return None
    missing = "--enable-lora" if not facts.has_lora else "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
    return f"weight_sync_mode is adapter, and the {facts.kind} server at {facts.url} was started without {missing}."


def _no_room_for_segment(facts: ServerConfigFacts) -> str | None:
    free = known(facts.free_shared_memory_bytes)
    if facts.backend != SHARED_MEMORY_BACKEND or free >= known(facts.segment_bytes):
        return None
    return f"/dev/shm has {free / GIB:.2f} GiB left, the policy takes {known(facts.segment_bytes) / GIB:.2f} GiB."


def _describe_segment(facts: ServerConfigFacts) -> str:
    if facts.backend != SHARED_MEMORY_BACKEND:
        return f"Weights do not travel through /dev/shm, but over {facts.backend}."
    free = known(facts.free_shared_memory_bytes)
    return f"/dev/shm has {free / GIB:.2f} GiB left for a policy of {known(facts.segment_bytes) / GIB:.2f} GiB."


def _other_rendering(facts: ServerConfigFacts) -> str | None:
    ours, theirs = known(facts.chat_ids), known(facts.served_chat_ids)
    if ours == theirs:
        return None
    if ours is None or theirs is None:
        return f"Only {'the server' if ours is None else 'the trainer'} has a chat template."
    return f"The server turns the same conversation into {len(theirs)} tokens, the trainer into {len(ours)} or other ones."


SAME_MODEL = "Start server and trainer with the same --model / --model_name_or_path."
SAME_TOKENIZER = "Start server and trainer with the same tokenizer; `trl vllm-serve --tokenizer` names another one."

SERVER_CHECKS: tuple[Check[ServerConfigFacts], ...] = (
    Check(
        "weight_transfer_backend",
        "error",
        _no_backend,
        "Without one it serves the starting checkpoint for ever.",
        f"""Start it with --weight-transfer-config '{{"backend": "{NCCL_BACKEND}"}}', or "{SHARED_MEMORY_BACKEND}" on a CPU.""",
        needs=("backend",),
        describe=lambda facts: f"The server receives weights over {facts.backend}.",
    ),
    Check(
        "weight_transport",
        "error",
        _foreign_backend,
        NO_TRANSPORT_WHY,
        NO_TRANSPORT_FIX,
        needs=("backend", "device"),
        describe=lambda facts: f"The trainer on {facts.device!r} can send to it.",
    ),
    Check(
        "sleep_mode_transport",
        "error",
        _nccl_on_one_gpu,
        "Sleep mode is for a server on the trainer's GPU, and NCCL joins no GPU twice.",
        f"""Start the server with --weight-transfer-config '{{"backend": "{SHARED_MEMORY_BACKEND}"}}'.""",
        needs=("backend", "vllm_enable_sleep_mode"),
        describe=lambda facts: (
            "Weights reach a server on the trainer's GPU through shared memory."
            if known(facts.vllm_enable_sleep_mode)
            else "The server keeps its memory while the trainer trains."
        ),
    ),
    Check(
        "sleep_mode_server",
        "error",
        _no_sleep_mode,
        "Its memory is given back and taken in another way, which trl_atropos does not use.",
        "Leave --vllm_enable_sleep_mode off and give server and trainer a GPU each.",
        needs=("vllm_enable_sleep_mode",),
        describe=lambda facts: (
            f"{facts.kind} sleeps while the trainer trains."
            if known(facts.vllm_enable_sleep_mode)
            else "No server is asked to sleep."
        ),
    ),
    Check(
        "server_tokenizer",
        "error",
        _no_tokenizer,
        "Without a tokenizer it does not check token ids: one beyond its vocabulary ends its engine, and environments cannot "
        "send text.",
        "Start it without --skip-tokenizer-init.",
        needs=("has_tokenizer",),
        describe=lambda facts: "The server has a tokenizer.",
    ),
    Check(
        "model_config",
        "error",
        _other_model,
        "The policy cannot be loaded into another architecture.",
        SAME_MODEL,
        needs=("model", "served_model"),
        describe=lambda facts: ", ".join(f"{name} {value}" for name, value in known(facts.model).items()) + ".",
    ),
    Check(
        "tokenizer",
        "error",
        lambda facts: other_tokens(known(facts.tokenizer), known(facts.served_tokenizer), "the server"),
        "The same token ids mean other text on both sides.",
        SAME_TOKENIZER,
        needs=("tokenizer", "served_tokenizer"),
        describe=lambda facts: f"Vocabulary of server and trainer: hash {known(facts.tokenizer).vocabulary[:8]}.",
    ),
    Check(
        "special_ids",
        "warning",
        lambda facts: other_special_ids(known(facts.tokenizer), known(facts.served_tokenizer), "the server"),
        "Completions end at another token than the one that the trainer knows as the end.",
        SAME_TOKENIZER,
        needs=("tokenizer", "served_tokenizer"),
        describe=lambda facts: f"Begin and end of a sequence: ids {known(facts.tokenizer).special_ids}.",
    ),
    Check(
        "chat_template",
        "warning",
        _other_rendering,
        "What environments send as messages is rendered in another way than the saved model will expect.",
        "Start the server with the trainer's template: --chat-template FILE.",
        needs=("chat_ids", "served_chat_ids"),
        describe=lambda facts: (
            "Neither server nor trainer has a chat template: environments must send text."
            if facts.chat_ids is None
            else "Server and trainer render messages into the same tokens."
        ),
    ),
    Check(
        "logprobs_mode",
        "warning",
        _raw_logprobs,
        "At temperatures other than 1 the importance ratio is not that of the sampling distribution.",
        "Start the server with --logprobs-mode processed_logprobs, which is the default of `trl vllm-serve`.",
        needs=("logprobs_mode",),
        describe=lambda facts: f"The server reports {facts.logprobs_mode}.",
    ),
    replace(WITHOUT_POLICY_VERSIONS, name="policy_versions"),
    replace(EXCEEDS_MAX_LENGTH, name="max_model_len"),
    Check(
        "longrope_frequencies",
        "error",
        _other_frequencies,
        "Both sides take one set for all sequences, by the longest that they allow: logprobs would be those of another model.",
        "Set --max_length and the server's --max_model_len both above that number, or both up to it.",
        needs=("longrope_boundary", "max_model_len", "max_length"),
        describe=lambda facts: (
            "The model's rotary frequencies do not depend on length."
            if facts.longrope_boundary is None
            else f"Server and trainer have the same frequencies of longrope (boundary {facts.longrope_boundary} tokens)."
        ),
    ),
    Check(
        "runtime_lora",
        "error",
        _no_runtime_lora,
        "Each policy is an adapter of its own, which it must load while it runs.",
        "Start it with --enable-lora, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment, or set --weight_sync_mode "
        "merged.",
        needs=("weight_sync_mode", "has_lora", "loads_adapters"),
        describe=lambda facts: (
            "The server loads adapters while it runs."
            if known(facts.weight_sync_mode) == "adapter"
            else f"weight_sync_mode {facts.weight_sync_mode} does not need it."
        ),
    ),
    Check(
        "shared_memory",
        "error",
        _no_room_for_segment,
        "The policy travels to the server through it.",
        ENLARGE,
        needs=("backend", "segment_bytes", "free_shared_memory_bytes"),
        describe=_describe_segment,
    ),
)
"""What an inference server and the trainer must agree on."""
