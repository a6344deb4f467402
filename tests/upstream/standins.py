"""Small data sets of our own with the schema of those that upstream's files load, and what an oracle knows of them.

They lie where the files look for them: in directories of the names of a hub and in files beside, relative to the working
directory. All tasks are made here; nothing is copied from the data sets for which they stand.
"""

from __future__ import annotations

import csv
import itertools
import json
import random
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes import LETTERS


Row = Mapping[str, Any]
Facts = dict[str, dict[str, str]]

WORDS = ("cat", "dog", "sun", "moon", "tree", "river", "stone", "cloud", "bread", "apple", "horse", "letter", "summer")
MAX_FIGHTS = 400
"""More are not fought while a file runs."""

MODEL_TEXT = "The cat sat on the mat and looked at the moon over the river. "
PYDANTIC_CLASS = "from pydantic import BaseModel\n\nclass User(BaseModel):\n    name: str\n    age: int\n"
SIGMA_RULE = "title: x\ndetection:\n  selection:\n    EventID: 1\n  condition: selection\n"
ISSUE = (
    "You will be provided with a partial code base and an issue statement explaining a problem to resolve.\n<issue>\n"
    "Make a 2.\n</issue>\n<code>\n[start of x.py]\n1 a = 1\n[end of x.py]\n</code>\n"
)
PATCH = "--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-a = 1\n+a = 2\n"


class Standins:
    """All of them, in one directory.

    Args:
        root (`Path`):
            The directory, empty or not there.
        model (`Path`):
            What stands for models that files load by themselves.

    Attributes:
        facts (`dict[str, dict[str, str]]`): of every question what an answer may need, as `Answers` of the oracle reads it.
        variables (`dict[str, str]`): environment variables with which files find what does not lie in the directory.
    """

    def __init__(self, root: Path, model: Path):
        self.root = root
        self.random = random.Random(0)
        self.facts: Facts = {}
        self.variables: dict[str, str] = {}
        self._sums()
        self._tools()
        self._questions()
        self._texts()
        self._rules()
        self._tables()
        self._words()
        for name in ("Qwen/Qwen3-1.7B-Base",):
            (self.root / name).parent.mkdir(exist_ok=True)
            (self.root / name).symlink_to(model.resolve())

    def _put(self, name: str, splits: Mapping[str, Iterable[Row]], config: str | None = None) -> None:
        directory = self.root / name
        directory.mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            _write_lines(directory / f"{split}.jsonl", rows)
        if config is not None:
            files = "".join(f"      - split: {split}\n        path: {split}.jsonl\n" for split in splits)
            (directory / "README.md").write_text(
                f"---\nconfigs:\n  - config_name: {config}\n    data_files:\n{files}---\n"
            )

    def _pairs(self, count: int) -> list[tuple[int, int]]:
        return [(self.random.randint(1, 9), self.random.randint(1, 9)) for _ in range(count)]

    def _sum(self, first: int, second: int) -> str:
        question = f"What is {first}+{second}?"
        self.facts[question] = {"answer": str(first + second), "wrong": str(first + second + 1)}
        return question

    def _sums(self) -> None:
        def rows(count: int, question: str, answer: str, **more: Any) -> list[Row]:
            return [{question: self._sum(a, b), answer: str(a + b), **more} for a, b in self._pairs(count)]

        def steps(count: int) -> list[Row]:
            return [
                {"question": self._sum(a, b), "answer": f"{a}+{b}={a + b}\n#### {a + b}"}
                for a, b in self._pairs(count)
            ]

        self._put("gsm8k", {"train": steps(60), "test": steps(60)}, "main")
        deep = {"difficulty": 1.0, "topic": "sums", "r1_solution_1": "x"}
        self._put("zwhe99/DeepMath-103K", {"train": rows(60, "question", "final_answer", **deep)})
        self._put("HuggingFaceH4/aime_2024", {"train": rows(4, "problem", "answer", solution="x")})
        self._put("HuggingFaceH4/math-500", {"test": rows(4, "problem", "answer", solution="x")})
        for name in ("math-ai/amc23", "math-ai/minervamath"):
            self._put(name, {"test": rows(4, "question", "answer")})
        olympiad = [{"question": self._sum(a, b), "final_answer": [str(a + b)]} for a, b in self._pairs(4)]
        self._put("math-ai/olympiadbench", {"test": olympiad})
        reasoning = {"generated_solution": "x", "problem_type": "has_answer_extracted", "pass_rate_72b_tir": "0.5"}
        self._put("nvidia/OpenMathReasoning", {"cot": rows(60, "problem", "expected_answer", **reasoning)}, "default")
        self._put("nvidia/AceReason-Math", {"train": rows(60, "problem", "answer")})
        self._put("local/sums", {"train": rows(60, "question", "answer")})

    def _tools(self) -> None:
        system = {"from": "system", "value": "You have a tool: add(a, b)."}

        def call(first: int, second: int) -> str:
            return json.dumps({"name": "add", "arguments": {"a": first, "b": second}})

        def said(first: int, second: int) -> dict[str, str]:
            return {
                "from": "gpt",
                "value": f"<think>\nI add.\n</think>\n<tool_call>\n{call(first, second)}\n</tool_call>",
            }

        def returned(value: int) -> dict[str, str]:
            return {"from": "tool", "value": f"<tool_response>\n{value}\n</tool_response>"}

        def know(question: str, first: int, second: int) -> str:
            self.facts[question] = {
                "call": call(first, second),
                "wrong": call(0, second + 1),
                "answer": str(first + second),
            }
            return question

        def once(first: int, second: int) -> list[dict[str, str]]:
            question = know(f"Add {first} and {second}.", first, second)
            return [system, {"from": "human", "value": question}, said(first, second)]

        def twice(number: int, first: int, second: int) -> list[dict[str, str]]:
            question = know(f"Add {first} and {second}, then add {second} to it. Number {number}.", first, second)
            return [
                *(system, {"from": "human", "value": question}, said(first, second), returned(first + second)),
                *(said(first + second, second), returned(first + 2 * second)),
                {"from": "gpt", "value": f"<think>\nDone.\n</think>\nIt is {first + 2 * second}."},
            ]

        self._put(
            "NousResearch/XLAM-Atropos", {"train": [{"conversations": once(*p)} for p in self._pairs(200)]}, "default"
        )
        for name in ("toolace_hermes_sequential_tool_use", "hermes_reasoning_tool_use", "salesforce_hermes_thinking"):
            rows = [
                {"conversations": twice(number, *pair), "task": str(number), "scenario_category": "multistep"}
                for number, pair in enumerate(self._pairs(60))
            ]
            self._put(f"interstellarninja/{name}", {"train": rows})
        mcp = [
            {
                "user_prompt_text": know(f"Add {a} and {b}.", a, b),
                "expected_mcp_call": {"tool_name": "add", "arguments": {"a": a, "b": b}},
            }
            for a, b in self._pairs(100)
        ]
        (self.root / "my_mcp_dataset.json").write_text(json.dumps(mcp))

    def _questions(self) -> None:
        directions = ("maintained", "raised", "reduced")
        outlooks = [
            {
                "context": "Revenue rose.",
                "answer": directions[i % 3],
                "magnitude": "5.0",
                "fundamental_metric": "revenue",
            }
            for i in range(200)
        ]
        self._put("NousResearch/company-fundamentals-prediction-lite", {"train": outlooks}, "default")
        choices = [
            {
                "prompt": f"{self._sum(a, b)}\nA. {a + b}\nB. {a + b + 1}\nC. 0\nD. 100",
                "answer": 0,
                "ground_truth": "A",
                "options": [str(a + b), str(a + b + 1), "0", "100"],
            }
            for a, b in self._pairs(200)
        ]
        self._put("NousResearch/AcademicMCQA", {"train": choices}, "default")
        hands = [
            {
                "game_stage": "preflop",
                "pokergpt_prompt": "You hold aces. What do you do?",
                "formatted_winning_action": "raise 3",
                "winning_action": "raise 3",
                "hand_id": str(i),
                "bb_won": 1.0,
            }
            for i in range(40)
        ]
        self._put("yoniebans/6max-nlh-poker", {"train": hands, "test": hands})

    def _texts(self) -> None:
        said = [
            [{"from": "human", "value": f"Say {a}."}, {"from": "gpt", "value": str(a)}] for a, _ in self._pairs(60)
        ]
        self._put("AlignmentLab-AI/open-instruct-sharegpt", {"train": [{"conversations": each} for each in said]})
        chats = [
            {
                "conversation": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": str(i)}],
                "id": i,
                "language": "English",
            }
            for i in range(1200)
        ]
        self._put("allenai/WildChat", {"train": chats})
        words = [f"{self.random.choice(WORDS)}{i}" for i in range(60)]
        self.facts |= {word: {"answer": word[::-1]} for word in words}
        _write_lines(self.root / "text.jsonl", [{"text": word} for word in words])
        self._put(
            "wikitext",
            {split: [{"text": MODEL_TEXT * 8} for _ in range(200)] for split in ("train", "validation", "test")},
            "wikitext-2-raw-v1",
        )
        answers = [
            {
                "id": str(i),
                "prompt": "Say hi.",
                "chosen": ["Hi."],
                "rejected": ["No.", "Bad.", "Ugh."],
                "subset": "Focus",
                "num_correct": 1,
                "num_incorrect": 3,
            }
            for i in range(8)
        ]
        # A list has no place on a command line of Atropos.
        (self.root / "dataset_env.yaml").write_text("env: {reward_funcs: [accuracy]}\n")
        # Of its 114 formats one that an answer can have.
        (self.root / "answer_format.yaml").write_text("env: {supported_formats: [xml]}\n")
        _write_lines(self.root / "prompts.jsonl", [{"uid": str(i), "prompt": f"Say {i}."} for i in range(20)])
        _write_lines(self.root / "baselines.jsonl", [{"uid": str(i), "answer": f"{i}, I say."} for i in range(20)])
        proofs = [
            {"id": str(i), "header": "import Mathlib", "formal_statement": f"theorem a : {i} = {i} := sorry"}
            for i in range(20)
        ]
        self._put("brando/minif2f-lean4", {"validation": proofs, "test": proofs})
        questions = [
            {"title": f"Why did the {word} cross the road?", "selftext": "Because of the moon.", "score": 100}
            for word in WORDS
        ]
        self._put("SocialGrep/one-million-reddit-jokes", {"train": questions})
        self._put("allenai/reward-bench-2", {"test": answers})
        pairs = [{"prompt": "Say hi.", "chosen": "Hi.", "rejected": "No."} for _ in range(40)]
        _write_lines(self.root / "pair.jsonl", pairs)

    def _rules(self) -> None:
        rules = [{"prompt": f"Write a sigma rule for event {a}.", "rule": SIGMA_RULE} for a, _ in self._pairs(40)]
        self.facts["Write a sigma rule for event"] = {
            "say": f"<think>x</think>\n\\boxed{{{SIGMA_RULE}}}",
            "wrong": f"<think>x</think>\n\\boxed{{{SIGMA_RULE.replace('EventID: 1', 'EventID: 5')}}}",
        }
        # What the judge of such rules is asked.
        self.facts["Answer with only one character"] = {"say": "1", "wrong": "0"}
        self._put("mmaisel1/nous-rl-hackathon-sigma", {"train": rules, "test": rules})
        lower = [
            {
                "messages": [{"role": "user", "content": f"Name {a} fruits. Use lower case."}],
                "ground_truth": json.dumps({"func_name": "validate_lowercase", "N": None}),
                "constraint": "Use lower case.",
                "constraint_type": "lower",
                "dataset": "ifeval",
            }
            for a, _ in self._pairs(100)
        ]
        self._put("allenai/RLVR-IFeval", {"train": lower})
        info = json.dumps({"pydantic_config": PYDANTIC_CLASS, "model_name": "User"})
        schemas = [
            {"prompt": "Create a User.", "verification_info": info, "problem_id": str(i), "task_type": "generation"}
            for i in range(60)
        ]
        self._put("justus27/pydantic-adherance-test", {"train": schemas})
        issues = [
            {"instance_id": f"x{i}", "text": ISSUE, "patch": PATCH, "problem_statement": "Make a 2."}
            for i in range(40)
        ]
        self._put("NousResearch/SWE-smith-oracle", {"train": issues})
        self._put("princeton-nlp/SWE-bench_Lite_oracle", {"test": issues})

    def _tables(self) -> None:
        """WikiSQL's archive, unpacked where its loader keeps it."""
        data = self.root / "wikisql" / "data"
        data.mkdir(parents=True)
        for split in ("train", "dev", "test"):
            rows = [[word, number] for number, word in enumerate(WORDS)]
            tables, questions = [], []
            with sqlite3.connect(data / f"{split}.db") as database:
                for index in range(20):
                    name = f"1-{index}"
                    tables.append({"id": name, "header": ["Name", "Number"], "types": ["text", "real"], "rows": rows})
                    database.execute(f'CREATE TABLE "table_{name.replace("-", "_")}" (col0 TEXT, col1 REAL)')
                    database.executemany(f'INSERT INTO "table_{name.replace("-", "_")}" VALUES (?, ?)', rows)
                    word = WORDS[index % len(WORDS)]
                    question = f"Which number has {word}?"
                    self.facts[question] = {"answer": f"SELECT Number FROM data WHERE Name = '{word}'"}
                    questions.append(
                        {
                            "phase": 1,
                            "table_id": name,
                            "question": question,
                            "sql": {"sel": 1, "agg": 0, "conds": [[0, 0, word]]},
                        }
                    )
            _write_lines(data / f"{split}.tables.jsonl", tables)
            _write_lines(data / f"{split}.jsonl", questions)
        self.variables["WIKISQL_CACHE_DIR"] = str(self.root / "wikisql")

    def _words(self) -> None:
        """NLTK's list of words, and what files read from directories of the repository in which it does not lie."""
        corpus = self.root / "nltk_data" / "corpora" / "words"
        corpus.mkdir(parents=True)
        (self.root / "letters.txt").write_text("\n".join(LETTERS) + "\n")
        (corpus / "en").write_text("\n".join(WORDS) + "\n")
        self.variables["NLTK_DATA"] = str(self.root / "nltk_data")

    def read_fights(self, path: Path) -> None:
        """Know who won the fights of a table in the repository."""
        with path.open(encoding="utf-8") as file:
            for row in itertools.islice(csv.DictReader(file), MAX_FIGHTS):
                names = [row["r_fighter"], row["b_fighter"]]
                winner, loser = names if row["winner"] == "Red" else reversed(names)
                self.facts[f"in the blue corner:\nName: {row['b_fighter']}\n"] = {"answer": winner, "wrong": loser}

    def add_missing_files(self, environments: Path) -> list[str]:
        """Write what files read from their own directories and what is not in the repository; return the paths."""
        jokes = [
            {"question": f"Tell joke {i}.", "response": "ha", "model": "x", "comedian": "x", "format": "haiku"}
            for i in range(20)
        ]
        written = []
        pages = [
            {
                "id": str(i),
                "issues_to_fix": ["missing_alt_text"],
                "html": f"<html><body><img src='{i}.png'></body></html>",
            }
            for i in range(20)
        ]
        state = {
            "kingdom_current_state": {"Piety": 50, "Stability": 50, "Power": 50, "Wealth": 50},
            "choice_history": [],
        }
        for path, text in {
            "community/humor_generation/humor_dataset.jsonl": "".join(json.dumps(joke) + "\n" for joke in jokes),
            "community/accessibility_env/data/accessibility_dataset.jsonl": "".join(
                json.dumps(p) + "\n" for p in pages
            ),
            "community/meteorology_forecast/data/20250314/KAAA/KAAA_RAP_20250314_12Z.buf_default_llm_optimized.jsonl": (
                "".join(
                    json.dumps({"tm": f"250314/{hour:02d}00", "temperature": 20}) + "\n" for hour in (6, 9, 12, 15, 18)
                )
            ),
            "community/dynastai/dynastai_cards.json": json.dumps([{"input": state} for _ in range(20)]),
        }.items():
            file = environments / path
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
                written.append(path)
        return written


def _write_lines(path: Path, rows: Iterable[Row] | Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
