"""What a gateway makes of agents, through an optimizer step of the trainer: every sampled token is trained, and nothing else."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from gateway_agents import ask, gateway_of, user
from tiny_models import tiny_llama
from token_server import TokenServer

from trl_atropos import AtroposConfig, AtroposTrainer, Gateway
from trl_atropos.gateway.groups import FinishedSession, GroupMaker


GROUP_SIZE = 2


async def attempt(gateway: Gateway, reward: float, rewrites: bool) -> FinishedSession:
    async with gateway.session() as session:
        messages = [user("tell")]
        await ask(session.base_url, messages)
        if rewrites:
            messages[-1] = {"role": "assistant", "content": "something else"}
        messages.append(user("more"))
        await ask(session.base_url, messages)
        session.reward = reward
    return session.finished()


def test_sessions_are_trained_as_they_were_sampled(tmp_path: Path):
    async def run() -> list[dict[str, Any]]:
        maker = GroupMaker(GROUP_SIZE, 1.0)
        async with gateway_of(server) as gateway:
            plain = [await attempt(gateway, reward, False) for reward in (0.0, 1.0)]
            branched = [await attempt(gateway, 0.0, True), await attempt(gateway, 1.0, True)]
        return maker.add(plain) + maker.add(branched)

    with TokenServer() as server:
        server.replies = ["one", "a second"] * 4
        groups = asyncio.run(run())
        num_trained = 4 * (len("one") + 1 + len("a second") + 1)
    # Two sessions of one rollout each, and two of two.
    assert [len(group["tokens"]) for group in groups] == [2, 2, 2]
    path = tmp_path / "groups.jsonl"
    path.write_text("".join(json.dumps(group) + "\n" for group in groups))
    args = AtroposConfig(
        output_dir=str(tmp_path / "run"),
        data_path=str(path),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        max_length=512,
        per_device_train_batch_size=6,
        max_steps=1,
        logging_steps=1,
        inference_logprobs="use",
        max_staleness=None,
    )
    model = tiny_llama(vocab_size=len(server.tokenizer), max_position_embeddings=512)
    trainer = AtroposTrainer(model, args, processing_class=server.tokenizer)
    trainer.train()
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert logged["num_trained_tokens"] == num_trained
    assert logged["reward"] == 0.5
    # The server's version is 3, and this trainer has published nothing yet.
    assert (logged["staleness/mean"], logged["staleness/unknown_frac"]) == (3.0, 0.0)
    assert (logged["num_rollouts_trained"], logged["data/num_unknown_fields"]) == (6.0, 0.0)
    assert (logged["inference_logprobs/missing_frac"], logged["sampling/other_distribution_frac"]) == (0.0, 0.0)
    # What branches share is computed once.
    assert logged["perf/computed_tokens_frac"] < 0.5
