"""What the tokenizers of trainer, server and environments must agree on before training."""

from __future__ import annotations

from dataclasses import dataclass

from .finding import Check, Unread, known


@dataclass(frozen=True)
class TokenizerFacts:
    """A tokenizer, as far as two of them must agree.

    `name` says where it comes from. `vocabulary` is a hash of all tokens with their ids, `chat_template` one of the
    template, None without one. `special_ids` are the ids of the begin and of the end of a sequence.
    """

    name: str
    vocabulary: str
    special_ids: tuple[int | None, int | None]
    chat_template: str | None


def other_tokens(ours: TokenizerFacts, theirs: TokenizerFacts, who: str) -> str | None:
    """Say that the vocabularies of the trainer and of somebody else differ; None if not."""
    if ours.vocabulary == theirs.vocabulary:
        return None
    return (
        f"The tokenizer of {who}, {theirs.name}, has another vocabulary (hash {theirs.vocabulary[:8]}) than the trainer's, "
        f"{ours.name} (hash {ours.vocabulary[:8]})."
    )


def other_special_ids(ours: TokenizerFacts, theirs: TokenizerFacts, who: str) -> str | None:
    """Say that begin or end of a sequence have other ids; None if not."""
    if ours.special_ids == theirs.special_ids:
        return None
    return (
        f"Begin and end of a sequence have the ids {theirs.special_ids} in the tokenizer of {who}, and {ours.special_ids} in "
        "the trainer's."
    )


@dataclass(frozen=True)
class EnvironmentFacts:
    """The tokenizer of the environment of this name, beside the trainer's."""

    name: str
    tokenizer: TokenizerFacts | Unread
    trainer_tokenizer: TokenizerFacts | Unread


def _other_environment_template(facts: EnvironmentFacts) -> str | None:
    ours, theirs = known(facts.trainer_tokenizer), known(facts.tokenizer)
    if ours.chat_template == theirs.chat_template:
        return None
    return f"The chat template of the environment {facts.name}, of {theirs.name}, is not that of {ours.name}."


ENVIRONMENT_CHECKS: tuple[Check[EnvironmentFacts], ...] = (
    Check(
        "environment_tokenizer",
        "error",
        lambda facts: other_tokens(
            known(facts.trainer_tokenizer), known(facts.tokenizer), f"the environment {facts.name}"
        ),
        "The trainer reads the environment's token ids as other text.",
        "Give the environment --env.tokenizer_name and --openai.tokenizer_name of the trainer's model.",
        needs=("tokenizer", "trainer_tokenizer"),
        describe=lambda facts: f"The environment {facts.name} has the trainer's vocabulary.",
    ),
    Check(
        "environment_chat_template",
        "warning",
        _other_environment_template,
        "The policy is trained on another rendering of messages than the one that is saved with it.",
        "Give the environment --env.tokenizer_name of the trainer's model.",
        needs=("tokenizer", "trainer_tokenizer"),
        describe=lambda facts: f"The environment {facts.name} has the trainer's chat template.",
    ),
)
"""What an environment and the trainer must agree on."""
