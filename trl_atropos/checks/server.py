"""What a vLLM server and the trainer must agree on before training."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ..weight_sync.transports.backends import (
    NCCL_BACKEND,
    NO_TRANSPORT_FIX,
    NO_TRANSPORT_WHY,
    SHARED_MEMORY_BACKEND,
    describe_no_transport,
    find_backend,
)
from .finding import GIB, NOT_ASKED, PreflightCheck, Unread, known
from .tokenizers import TokenizerFacts, other_special_ids, other_tokens


@dataclass(frozen=True)
class TrainerSide:
    """What a server is compared with. Each field may be [`Unread`].

    Args:
        max_length (`int`):
            Longest rollout, in tokens.
        device (`str`):
            Type of the device that sends the weights: `"cpu"` or `"cuda"`.
        weight_sync_mode (`str`):
            The option.
        tokenizer ([`TokenizerFacts`]):
            Of the trainer.
        chat_ids (`tuple[int, ...]`, *optional*):
            Tokens of a short conversation; None if the tokenizer has no chat template.
        model (`dict[str, Any]`):
            Fields of its config that must be equal.
        num_parameters (`int`):
            Of the model.
    """

    max_length: int | Unread = NOT_ASKED
    device: str | Unread = NOT_ASKED
    weight_sync_mode: str | Unread = NOT_ASKED
    tokenizer: TokenizerFacts | Unread = NOT_ASKED
    chat_ids: tuple[int, ...] | Unread | None = NOT_ASKED
    model: dict[str, Any] | Unread = NOT_ASKED
    num_parameters: int | Unread = NOT_ASKED


@dataclass(frozen=True)
class ServerConfigFacts(TrainerSide):
    """What `/server_info` and a few requests show of a vLLM server, beside what the trainer has.

    Each field but `url` and `served_name` may be [`~checks.finding.Unread`].

    Args:
        url (`str`):
            Of the server.
        backend (`str`, *optional*):
            Its weight transfer backend.
        has_tokenizer (`bool`):
            Whether it was started with one.
        logprobs_mode (`str`):
            Which logprobs it reports.
        max_model_len (`int`):
            Longest sequence that it generates, in tokens.
        knows_policy_versions (`bool`):
            Whether it remembers which policy sampled a rollout.
        has_lora (`bool`):
            Whether it was started with `--enable-lora`.
        served_name (`str`):
            Path or id of its checkpoint.
        served_model (`dict[str, Any]`):
            Fields of that checkpoint's config.
        accepts_foreign_ids (`bool`):
            Whether it takes the first token id beyond the trainer's vocabulary.
        loads_adapters (`bool`):
            Whether `VLLM_ALLOW_RUNTIME_LORA_UPDATING` is set.
        served_tokenizer ([`TokenizerFacts`]):
            Of the server.
        served_chat_ids (`tuple[int, ...]`, *optional*):
            As `chat_ids`, made by the server.
        dtype (`str`):
            The dtype that it serves in, by torch's name.
        segment_bytes (`int`):
            Size of a policy in that dtype.
        free_shared_memory_bytes (`int`):
            What `/dev/shm` has left.
    """

    url: str = field(kw_only=True)
    backend: str | Unread | None = NOT_ASKED
    has_tokenizer: bool | Unread = NOT_ASKED
    logprobs_mode: str | Unread = NOT_ASKED
    max_model_len: int | Unread = NOT_ASKED
    knows_policy_versions: bool | Unread = NOT_ASKED
    has_lora: bool | Unread = NOT_ASKED
    served_name: str = field(kw_only=True)
    dtype: str | Unread = NOT_ASKED
    served_model: dict[str, Any] | Unread = NOT_ASKED
    accepts_foreign_ids: bool | Unread = NOT_ASKED
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
    return f"The vLLM server at {facts.url} has no weight transfer engine." if facts.backend is None else None


def _foreign_backend(facts: ServerConfigFacts) -> str | None:
    backend, device = known(facts.backend), known(facts.device)
    # A server without any is the trap `weight_transfer_backend`.
    if backend is None or find_backend(backend, device) is not None:
        return None
    return describe_no_transport(facts.url, backend, device)


def _no_tokenizer(facts: ServerConfigFacts) -> str | None:
    return (
        None
        if known(facts.has_tokenizer)
        else f"The vLLM server at {facts.url} was started with --skip-tokenizer-init."
    )


def _other_model(facts: ServerConfigFacts) -> str | None:
    ours, theirs = known(facts.model), known(facts.served_model)
    wrong = [
        f"{name}={theirs.get(name)}, the trainer's model has {name}={value}"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    return f"The server at {facts.url} serves {facts.served_name} with {'; '.join(wrong)}." if wrong else None


def _other_vocabulary(facts: ServerConfigFacts) -> str | None:
    if not known(facts.accepts_foreign_ids):
        return None
    return (
        f"The server at {facts.url} accepts token id {known(facts.model)['vocab_size']}, the trainer's vocabulary ends before "
        "it."
    )


def _raw_logprobs(facts: ServerConfigFacts) -> str | None:
    if facts.logprobs_mode == "processed_logprobs":
        return None
    return f"The server's logprobs mode is {facts.logprobs_mode}: logprobs before temperature."


def _no_policy_versions(facts: ServerConfigFacts) -> str | None:
    if known(facts.knows_policy_versions):
        return None
    return "The server does not say which policy sampled a rollout, so staleness is unknown."


def _longer_than_max_length(facts: ServerConfigFacts) -> str | None:
    if known(facts.max_model_len) <= known(facts.max_length):
        return None
    return f"The server generates up to {facts.max_model_len} tokens, the trainer takes up to {facts.max_length}."


def _no_runtime_lora(facts: ServerConfigFacts) -> str | None:
    if known(facts.weight_sync_mode) != "adapter" or (known(facts.has_lora) and known(facts.loads_adapters)):
        return None
    missing = "--enable-lora" if not facts.has_lora else "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
    return f"weight_sync_mode is adapter, and the vLLM server at {facts.url} was started without {missing}."


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

SERVER_CHECKS: tuple[PreflightCheck[ServerConfigFacts], ...] = (
    PreflightCheck(
        "weight_transfer_backend",
        "error",
        _no_backend,
        "Without one it serves the starting checkpoint for ever.",
        f"""Start it with --weight-transfer-config '{{"backend": "{NCCL_BACKEND}"}}', or "{SHARED_MEMORY_BACKEND}" on a CPU.""",
        needs=("backend",),
        describe=lambda facts: f"The server receives weights over {facts.backend}.",
    ),
    PreflightCheck(
        "weight_transport",
        "error",
        _foreign_backend,
        NO_TRANSPORT_WHY,
        NO_TRANSPORT_FIX,
        needs=("backend", "device"),
        describe=lambda facts: f"The trainer on {facts.device!r} can send to it.",
    ),
    PreflightCheck(
        "server_tokenizer",
        "error",
        _no_tokenizer,
        "Without a tokenizer it does not check token ids: one beyond its vocabulary ends its engine, and environments cannot "
        "send text.",
        "Start it without --skip-tokenizer-init.",
        needs=("has_tokenizer",),
        describe=lambda facts: "The server has a tokenizer.",
    ),
    PreflightCheck(
        "model_config",
        "error",
        _other_model,
        "The policy cannot be loaded into another architecture.",
        SAME_MODEL,
        needs=("model", "served_model"),
        describe=lambda facts: ", ".join(f"{name} {value}" for name, value in known(facts.model).items()) + ".",
    ),
    PreflightCheck(
        "vocabulary_size",
        "error",
        _other_vocabulary,
        "Rollouts could carry tokens that the trainer has no embedding for.",
        SAME_MODEL,
        needs=("model", "accepts_foreign_ids"),
        describe=lambda facts: f"The server refuses token id {known(facts.model)['vocab_size']}.",
    ),
    PreflightCheck(
        "tokenizer",
        "error",
        lambda facts: other_tokens(known(facts.tokenizer), known(facts.served_tokenizer), "the server"),
        "The same token ids mean other text on both sides.",
        SAME_TOKENIZER,
        needs=("tokenizer", "served_tokenizer"),
        describe=lambda facts: f"Vocabulary of server and trainer: hash {known(facts.tokenizer).vocabulary[:8]}.",
    ),
    PreflightCheck(
        "special_ids",
        "warning",
        lambda facts: other_special_ids(known(facts.tokenizer), known(facts.served_tokenizer), "the server"),
        "Completions end at another token than the one that the trainer knows as the end.",
        SAME_TOKENIZER,
        needs=("tokenizer", "served_tokenizer"),
        describe=lambda facts: f"Begin and end of a sequence: ids {known(facts.tokenizer).special_ids}.",
    ),
    PreflightCheck(
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
    PreflightCheck(
        "logprobs_mode",
        "warning",
        _raw_logprobs,
        "At temperatures other than 1 the importance ratio is not that of the sampling distribution.",
        "Start the server with --logprobs-mode processed_logprobs, which is the default of `trl vllm-serve`.",
        needs=("logprobs_mode",),
        describe=lambda facts: f"The server reports {facts.logprobs_mode}.",
    ),
    PreflightCheck(
        "policy_versions",
        "warning",
        _no_policy_versions,
        "Old rollouts can neither be dropped nor counted.",
        "Start it with --middleware trl_atropos.serving.generate_endpoint.GenerateEndpoint.",
        needs=("knows_policy_versions",),
        describe=lambda facts: "The server remembers which policy sampled a rollout.",
    ),
    PreflightCheck(
        "max_model_len",
        "warning",
        _longer_than_max_length,
        "Environments drop groups with a longer rollout.",
        "Set --max_length, or the server's --max_model_len.",
        needs=("max_length", "max_model_len"),
        describe=lambda facts: (
            f"max_model_len {facts.max_model_len} of the server, max_length {facts.max_length} (tokens)."
        ),
    ),
    PreflightCheck(
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
    PreflightCheck(
        "shared_memory",
        "error",
        _no_room_for_segment,
        "The policy travels to the server through it.",
        "Enlarge it (mount -o remount,size=..., or --shm-size / --ipc=host for a container).",
        needs=("backend", "segment_bytes", "free_shared_memory_bytes"),
        describe=_describe_segment,
    ),
)
"""What a vLLM server and the trainer must agree on."""
