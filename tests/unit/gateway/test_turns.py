"""Conversations as they are sampled and recorded: what continues, what branches, and what is trained of it."""

from __future__ import annotations

from typing import Any

from gateway_agents import ADD, CALL, ask, in_session, prompts, renderings, tool, user
from token_server import TokenServer

from trl_atropos.gateway.gateway import GatewaySession


def trained(rollout: Any) -> list[int]:
    return [label for label in rollout.masks if label != -100]


def test_a_conversation_with_tools_stays_one_sequence_of_what_was_sampled():
    async def agent(session: GatewaySession) -> None:
        messages = [user("add three to nothing")]
        for _ in range(2):
            choice = await ask(session.base_url, messages, tools=[ADD])
            assert choice.finish_reason == "tool_calls"
            (call,) = messages[-1]["tool_calls"]
            assert (call["function"]["name"], call["function"]["arguments"]) == ("add", '{"a": 3}')
            messages.append(tool(call, "there it is"))
        assert (await ask(session.base_url, messages, tools=[ADD])).message.content == "the sum is three"

    with TokenServer() as server:
        server.replies = [CALL, f"here\n{CALL}", "the sum is three"]
        replies = [[*server.sampled_ids(text), server.end] for text in server.replies]
        session, gateway = in_session(server, agent)
        sampled_from, rendered = prompts(server), renderings(server)
        (rollout,) = session.finished().rollouts
        assert server.text(rollout.tokens).count("<|im_end|>") == 6
    # Each prompt begins with the one before and exactly what was sampled for it.
    assert sampled_from[0] == rendered[0]
    for before, reply, prompt, own in zip(sampled_from, replies, sampled_from[1:], rendered[1:], strict=False):
        assert prompt[: len(before) + len(reply)] == [*before, *reply]
        assert prompt != own
        # What is behind the reply is the template's.
        tail = prompt[len(before) + len(reply) :]
        assert own[-len(tail) :] == tail
    assert rollout.tokens == [*sampled_from[-1], *replies[-1]]
    assert trained(rollout) == [token for reply in replies for token in reply]
    # The script's: exact in float32.
    expected = [1.0 if label == -100 else -(label % 64) / 64 for label in rollout.masks]
    assert rollout.inference_logprobs == expected
    assert rollout.policy_version == 3
    counts = gateway.counts
    assert (counts.num_turns, counts.num_roots, counts.num_spliced, counts.num_branches) == (3, 1, 2, 0)
    assert counts.spliced_share == 1.0
    assert counts.changed == {"tools.strict": 3}


def test_parallel_calls_and_two_agents_in_one_session_are_each_trained_once():
    async def agent(session: GatewaySession) -> None:
        first, second = [user("one")], [user("two")]
        await ask(session.base_url, first, tools=[ADD])
        await ask(session.base_url, second)
        calls = first[-1]["tool_calls"]
        assert len({call["id"] for call in calls}) == 2
        first += [tool(call, "done") for call in calls]
        await ask(session.base_url, first, tools=[ADD])

    with TokenServer() as server:
        server.replies = [CALL + CALL, "yes", "so it is"]
        num_sampled = sum(len(server.sampled_ids(text)) + 1 for text in server.replies)
        session, gateway = in_session(server, agent)
    rollouts = session.finished().rollouts
    assert [len(trained(rollout)) for rollout in rollouts] == [4, num_sampled - 4]
    assert gateway.counts.num_roots == 2


def test_a_reply_that_the_client_rewrote_is_not_continued_but_what_came_before_is():
    async def agent(session: GatewaySession) -> None:
        messages = [user("tell")]
        await ask(session.base_url, messages)
        messages.append(user("more"))
        await ask(session.base_url, messages)
        messages[-1] = {"role": "assistant", "content": "something else"}
        messages.append(user("and then"))
        await ask(session.base_url, messages)

    with TokenServer() as server:
        server.replies = ["a thousand", "a line that is lost", "the rest"]
        replies = [[*server.sampled_ids(text), server.end] for text in server.replies]
        session, gateway = in_session(server, agent)
        sampled_from = prompts(server)
        assert "something else" in server.text(sampled_from[-1])
    assert sampled_from[2][: len(sampled_from[0]) + len(replies[0])] == [*sampled_from[0], *replies[0]]
    first, second = session.finished().rollouts
    # The first reply is in both sequences, and is trained in one.
    assert trained(first) == [*replies[0], *replies[1]]
    assert trained(second) == replies[2]
    assert second.tokens[: len(sampled_from[0]) + len(replies[0])] == [*sampled_from[0], *replies[0]]
    assert (gateway.counts.num_spliced, gateway.counts.num_branches) == (1, 1)


def test_a_reply_cut_by_its_length_gets_the_end_that_the_template_writes():
    async def agent(session: GatewaySession) -> None:
        messages = [user("tell")]
        choice = await ask(session.base_url, messages, max_tokens=5)
        assert (choice.finish_reason, choice.message.content) == ("length", "a tho")
        messages.append(user("more"))
        await ask(session.base_url, messages)

    with TokenServer() as server:
        server.replies = ["a thousand", "the rest"]
        session, _ = in_session(server, agent)
        _, second = prompts(server)
        assert server.text(second) == server.text(renderings(server)[1])
    (rollout,) = session.finished().rollouts
    position = rollout.tokens.index(server.end, len(prompts(server)[0]))
    # The policy did not sample that end.
    assert rollout.masks[position - 1 : position + 1] == [rollout.tokens[position - 1], -100]


def test_a_reply_cut_by_a_stop_string_is_shown_without_it_and_branches():
    async def agent(session: GatewaySession) -> None:
        messages = [user("tell")]
        choice = await ask(session.base_url, messages, stop=["stop"])
        assert (choice.finish_reason, choice.message.content) == ("stop", "on and ")
        messages.append(user("more"))
        await ask(session.base_url, messages)

    with TokenServer() as server:
        server.replies = ["on and stop and on", "the rest"]
        session, gateway = in_session(server, agent)
    first, second = session.finished().rollouts
    assert trained(first) == server.sampled_ids("on and stop")
    assert trained(second) == [*server.sampled_ids("the rest"), server.end]
    assert gateway.counts.num_branches == 1


def test_a_reply_that_spells_the_end_of_a_turn_branches():
    # Sampled as letters; the template's rendering has the special token in its place, and would end there.
    async def agent(session: GatewaySession) -> None:
        messages = [user("tell")]
        await ask(session.base_url, messages)
        messages.append(user("more"))
        await ask(session.base_url, messages)

    with TokenServer() as server:
        spelled = "the mark <|im_end|> is an end"
        letters = [token for letter in spelled for token in server.tokenizer.encode(letter, add_special_tokens=False)]
        server.sampled_ids = lambda text: letters if text == spelled else TokenServer.sampled_ids(server, text)  # type: ignore[method-assign]
        server.replies = [spelled, "yes"]
        session, gateway = in_session(server, agent)
        assert prompts(server)[1] == renderings(server)[1]
    assert len(session.finished().rollouts) == 2
    assert gateway.counts.num_branches == 1


def test_thoughts_are_continued_where_the_template_shows_them_and_branch_where_it_does_not():
    # Like Qwen3's: thoughts are shown until the next message of the user.
    template = (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['reasoning'] and loop.index0 > ns.last %}<think>\n{{ m['reasoning'] }}\n</think>\n{% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )

    def agent_of(role: str) -> Any:
        async def agent(session: GatewaySession) -> None:
            messages = [user("tell")]
            choice = await ask(session.base_url, messages)
            assert choice.message.model_dump()["reasoning"] == "so it is"
            messages.append({"role": role, "content": "more", **({"tool_call_id": "1"} if role == "tool" else {})})
            await ask(session.base_url, messages)

        return agent

    for role, thinking, num_branches in (("tool", "template", 0), ("user", "template", 1), ("user", "keep", 0)):
        with TokenServer(template, parses_thoughts=True) as server:
            server.replies = ["<think>\nso it is\n</think>\nyes", "no"]
            _, gateway = in_session(server, agent_of(role), thinking=thinking)
        assert gateway.counts.num_branches == num_branches


def test_a_turn_under_a_grammar_is_context_and_not_trained():
    async def agent(session: GatewaySession) -> None:
        messages = [user("tell")]
        await ask(session.base_url, messages, tools=[ADD], tool_choice="required")
        messages.append(tool(messages[-1]["tool_calls"][0], "done"))
        await ask(session.base_url, messages, tools=[ADD])

    with TokenServer() as server:
        server.replies = [CALL, "yes"]
        session, gateway = in_session(server, agent)
    (rollout,) = session.finished().rollouts
    assert trained(rollout) == [*server.sampled_ids("yes"), server.end]
    assert gateway.counts.masked_tokens == {"grammar": len(server.sampled_ids(CALL)) + 1}


def test_a_version_that_is_unknown_stays_unknown_and_that_of_an_adapter_comes_from_its_header():
    async def agent(session: GatewaySession) -> None:
        await ask(session.base_url, [user("tell")])

    for version, headers, expected in (
        ("7", {}, 7),
        ("default", {}, None),
        ("9", {"X-Atropos-Policy-Version": "8"}, 8),
    ):
        with TokenServer() as server:
            server.replies, server.version, server.headers = ["yes"], version, headers
            session, _ = in_session(server, agent)
        assert session.finished().rollouts[0].policy_version == expected


def test_a_rollout_is_as_old_as_its_oldest_trained_turn():
    with TokenServer() as server:

        async def agent(session: GatewaySession) -> None:
            messages = [user("tell")]
            for version in ("4", "6"):
                server.version = version
                await ask(session.base_url, messages)
                messages.append(user("more"))

        server.replies = ["yes", "no"]
        session, _ = in_session(server, agent)
    assert session.finished().rollouts[0].policy_version == 4
