"""The example environments with a tool and with a data set: what they ask, and what they reward."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import calculator
import pytest
import reasoning
import word_problems


ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "envs").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_to_run_it(path):
    text = path.read_text()
    assert len(text.splitlines()) < 125
    assert f"examples/envs/{path.name} serve" in text.split('"""')[1]


class TestWordProblems:
    @pytest.mark.parametrize(
        ("completion", "reward"),
        [
            ("3 + 4 = 7.\n7", 1.0),
            ("The answer is 7.", 1.0),
            ("#### 7.0", 1.0),
            ("7 birds, or 8", 0.1),
            ("seven", 0.0),
            ("", 0.0),
        ],
    )
    def test_the_last_number_counts(self, completion, reward):
        assert word_problems.compute_reward(completion, "3 + 4 = 7\n#### 7") == reward

    def test_thousands_have_commas_in_gsm8k(self):
        assert word_problems.last_number("#### 1,234") == 1234.0

    def test_every_problem_of_the_sample_has_a_whole_number(self):
        lines = [json.loads(line) for line in word_problems.SAMPLE.read_text().splitlines()]
        assert len(lines) == 40 == len({line["question"] for line in lines})
        for line in lines:
            solution, answer = line["answer"].split("\n#### ")
            assert word_problems.last_number(solution) == int(answer) > 0

    def test_the_sample_is_loaded_in_an_order_that_repeats(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
        config, _ = word_problems.WordProblemsEnv.config_init()
        first, second = (word_problems.load_problems(config)["question"] for _ in range(2))
        assert list(first) == list(second)
        assert len(first) == 40


class TestReasoning:
    @pytest.mark.parametrize(
        ("completion", "answer"),
        [
            ("7", "7"),
            ("3 + 4 = 7", "7"),
            ("Let me see.\nThe answer is: 7.", "7"),
            ("It is\n\nolleh\n", "olleh"),
            ("", ""),
        ],
    )
    def test_the_last_line_is_the_answer(self, completion, answer):
        assert reasoning.find_answer(completion) == answer

    @pytest.mark.parametrize(
        ("task", "options"), [("basic_arithmetic", reasoning.ONE_DIGIT), ("spell_backward", "{}"), ("gcd", "{}")]
    )
    def test_a_task_scores_its_own_answers_and_repeats(self, task, options):
        config, _ = reasoning.ReasoningEnv.config_init()
        config = config.model_copy(update={"task": task, "task_config": options, "num_problems": 5})
        first, second = reasoning.make_problems(config), reasoning.make_problems(config)
        for problem, same in zip(first, second, strict=True):
            assert problem["question"] == same["question"]
            right = f"Let me think.\nThe answer: {problem['answer']}"
            assert first.score_answer(reasoning.find_answer(right), problem) == 1.0
            assert first.score_answer(reasoning.find_answer("no idea"), problem) < 0.5


class TestCalculator:
    @pytest.mark.parametrize(
        ("expression", "value"), [("3 * 4", 12), (" 2+3*4 ", 14), ("2 - 5", -3), ("7", 7)]
    )  # fmt: skip
    def test_sums_differences_and_products(self, expression, value):
        assert calculator.calculate(expression) == value

    @pytest.mark.parametrize(
        "expression", ["2 ** 99999999", "__import__('os')", "1.5 + 1", "True + 1", "3 *", "", "x", "9999999999 * 2", "4 / 2"]
    )  # fmt: skip
    def test_nothing_else_is_evaluated(self, expression):
        with pytest.raises(ValueError, match=r"is not"):
            calculator.calculate(expression)

    @pytest.mark.parametrize(
        ("answer", "num_calls", "reward"),
        [("It is 17.", 0, 1.0), ("17", 2, 1.0), ("It is 18.", 1, 0.2), ("It is 18.", 0, 0.0), ("17 or 18", 0, 0.0)],
    )
    def test_the_last_number_of_the_last_turn_counts(self, answer, num_calls, reward):
        assert calculator.compute_reward(answer, "3 * 5 + 2", num_calls) == reward

    def test_a_call_is_answered_and_the_conversation_goes_on(self):
        class Model:
            """Says what it is told to, and keeps what it was asked."""

            def __init__(self, *texts: str):
                self.texts = list(texts)
                self.asked: list[list[dict[str, str]]] = []

            async def chat_completion(self, messages, **_):
                self.asked.append(list(messages))
                message = type("Message", (), {"content": self.texts.pop(0)})
                return type("Answer", (), {"choices": [type("Choice", (), {"message": message})]})

        def converse(*texts: str) -> tuple[float, list[list[dict[str, str]]]]:
            env, model = calculator.CalculatorEnv.__new__(calculator.CalculatorEnv), Model(*texts)
            return asyncio.run(env._converse(model, "3 * 5 + 2")), model.asked

        reward, asked = converse("CALC(3 * 5 + 2)", "It is 17.")
        assert reward == 1.0
        assert [message["content"] for message in asked[1][1:]] == ["CALC(3 * 5 + 2)", "CALC: 17"]
        # A call that cannot be understood is answered with the reason, and earns nothing.
        reward, asked = converse("CALC(3 to 5)", "no")
        assert reward == 0.0
        assert asked[1][-1]["content"].startswith("CALC: error: ")
        # The last turn is never answered.
        reward, asked = converse(*["CALC(1 + 1)"] * calculator.MAX_TURNS)
        assert (reward, len(asked)) == (0.2, calculator.MAX_TURNS)
