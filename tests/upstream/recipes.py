"""How each environment of upstream is run, and which cannot be: one `Recipe` or one sentence a file.

Paths are those inside of `environments/`. `$answer` and the like in an answer are what the stand-in's task says.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass


THINK = "<think>\nI think about it.\n</think>\n"
TOOL_CALL = f"{THINK}<tool_call>\n$call\n</tool_call>"
WRONG_TOOL_CALL = f"{THINK}<tool_call>\n$wrong\n</tool_call>"
SUM = "The answer after adding both numbers is \\boxed{$answer} as you can see here."
WRONG_SUM = "The answer after adding both numbers is \\boxed{$wrong} as you can see here."
PATCH = f"{THINK}### x.py\n<<<<<<< SEARCH\na = 1\n=======\na = 2\n>>>>>>> REPLACE"
CARD = '```json\n{"componentType": "metricCard", "props": {"title": "Revenue", "value": "1", "description": "long enough"}}\n```'
SCENARIO = (
    '{"Character": "King", "Prompt": "Hi?", "Left_Choice": "No", "Left_Piety": 1, "Left_Stability": 1, "Left_Power": 1, '
    '"Left_Wealth": 1, "Right_Choice": "Yes", "Right_Piety": 1, "Right_Stability": 1, "Right_Power": 1, "Right_Wealth": 1, '
    '"category": "piety"}'
)
LETTERS = ["".join(letters) for letters in itertools.permutations("EATSO", 3)]
"""What can be found on a board of letters."""

BOXED_RULE = "<think>x</think>\n\\boxed{title: x\ndetection:\n  %s:\n    EventID: %d\n  condition: %s\n}"


@dataclass(frozen=True)
class Recipe:
    """How a file is run.

    `right` and `wrong` are what the oracle answers; `options` come behind those that every file gets, with the oracle's URL
    for `ORACLE`; `variables` are environment variables. `max_tokens` is `--env.max_token_length`, `num_rollouts`
    `--env.group_size`. `needs` says what stands in for data, and which packages the file imports beyond the pinned ones.
    With `from_repository` the root of the checkout is on Python's path. A file that `waits_for_a_step` sends when another
    environment's group was fetched.
    """

    right: tuple[str, ...]
    wrong: tuple[str, ...]
    options: tuple[str, ...] = ()
    max_tokens: int = 192
    num_rollouts: int = 4
    needs: str = ""
    from_repository: bool = False
    variables: tuple[tuple[str, str], ...] = ()
    waits_for_a_step: bool = False


def _move(tool: str, **arguments: str) -> str:
    told = ", ".join(f'"{name}": "{value}"' for name, value in arguments.items())
    return f'<think>x</think>\n<tool_call>\n{{"name": "{tool}", "arguments": {{{told}}}}}\n</tool_call>'


def _cube(move: str) -> str:
    arguments = f'{{"move": "{move}", "strategy": "Layer-by-Layer"}}'
    return f'<think>x</think>\n<tool_call>\n{{"arguments": {arguments}, "name": "apply_move"}}\n</tool_call>'


XLAM = "data: NousResearch/XLAM-Atropos"
OWN_TEXTS = ("--env.eval_split", "train")

RECIPES: dict[str, Recipe] = {
    "gsm8k_server.py": Recipe((SUM,), (WRONG_SUM,), max_tokens=64, needs="data: gsm8k"),
    "gsm8k_server_axolotl.py": Recipe(
        (SUM,), (WRONG_SUM,), ("--openai.server_type", "openai"), max_tokens=64, needs="data: gsm8k"
    ),
    "math_server.py": Recipe(
        (f"{THINK}The answer is \\boxed{{$answer}}",),
        (f"{THINK}The answer is \\boxed{{$wrong}}",),
        max_tokens=6000,
        needs="data: nvidia/OpenMathReasoning, nvidia/AceReason-Math and others",
    ),
    "math_server_zero.py": Recipe(
        ("I add the two numbers. </think> <answer> The final answer is \\boxed{$answer} </answer>",),
        ("I add the two numbers. </think> <answer> The final answer is \\boxed{$wrong} </answer>",),
        ("--env.start_tok_length", "100"),
        max_tokens=420,
        needs="data: zwhe99/DeepMath-103K and others",
    ),
    "answer_format_environment/answer_format_environment.py": Recipe(
        (f"{THINK}<answer>$answer</answer>",),
        (f"{THINK}$answer",),
        ("--config", "answer_format.yaml"),
        needs="data: gsm8k; a file with `env: {supported_formats: [xml]}`",
    ),
    "fundamental_prediction_environment.py": Recipe(
        (f"{THINK}The revenue will be: raised and the magnitude will be: 5.0%",),
        (
            f"{THINK}The revenue will be: reduced and the magnitude will be: 5.0%",
            f"{THINK}The revenue will be: maintained and the magnitude will be: 5.0%",
        ),
        num_rollouts=4,
        needs="data: NousResearch/company-fundamentals-prediction-lite",
    ),
    "mcqa_thinking_env.py": Recipe(
        (f"{THINK}The best answer is: A",), (f"{THINK}The best answer is: B",), needs="data: NousResearch/AcademicMCQA"
    ),
    "tool_calling_server.py": Recipe((TOOL_CALL,), (WRONG_TOOL_CALL,), needs=XLAM),
    "tool_use_turnlevel_advantage_server.py": Recipe(
        (TOOL_CALL,), (f"{THINK}No.",), max_tokens=1500, needs="data: interstellarninja/hermes_reasoning_tool_use"
    ),
    "tool_use_multiturn_server.py": Recipe(
        (TOOL_CALL,),
        (f"{THINK}No.",),
        ("--env.scenario_category", "single"),
        max_tokens=1500,
        needs="data: interstellarninja/toolace_hermes_sequential_tool_use",
    ),
    "tool_use_interleaved_thinking.py": Recipe(
        (f"{THINK}\\boxed{{$answer}}",),
        (f"{THINK}\\boxed{{$wrong}}",),
        max_tokens=600,
        needs="data: nvidia/AceReason-Math",
    ),
    "text_reversal_environment.py": Recipe(
        (f"{THINK}<reversed_text>\n$answer\n</reversed_text>",),
        (f"{THINK}<reversed_text>\nzzz\n</reversed_text>",),
        ("--env.train_dataset", "text.jsonl", "--env.eval_dataset", "text.jsonl", *OWN_TEXTS),
        max_tokens=256,
        needs="a file of texts",
    ),
    "instruction_following_algorithm_environment.py": Recipe(
        (f"{THINK}apple pear plum",), (f"{THINK}APPLE Pear Plum",), needs="langdetect; data: allenai/RLVR-IFeval"
    ),
    "pydantic_schema_following_environment/pydantic_schema_following_environment.py": Recipe(
        (f'{THINK}<json_output>\n{{"name": "x", "age": 3}}\n</json_output>',),
        (f'{THINK}{{"name": "x"}}',),
        needs="xmltodict, toml; data: justus27/pydantic-adherance-test",
    ),
    "swe_rl_env.py": Recipe(
        (PATCH,), (f"{THINK}nothing",), max_tokens=2000, needs="data: NousResearch/SWE-smith-oracle and another"
    ),
    "rlaif_server.py": Recipe(
        ("Hello there, I say it, and more than once, too. \\boxed{A}",),
        ("Yo, that is all that I have to say about it today. \\boxed{B}",),
        num_rollouts=2,
        needs="data: allenai/WildChat",
    ),
    "sft_loader_server.py": Recipe(
        ("It is not asked.",),
        ("It is not asked.",),
        num_rollouts=1,
        max_tokens=400,
        needs="another environment beside it: it sends after each step; data: AlignmentLab-AI/open-instruct-sharegpt",
        waits_for_a_step=True,
    ),
    "letter_counting_environment/letter_counting_environment.py": Recipe(
        (f"{THINK}<answer>1</answer>",), (f"{THINK}<answer>0</answer>",), max_tokens=400, needs="NLTK's words"
    ),
    "dataset_environment/dataset_env.py": Recipe(
        ("The answer is \\boxed{$answer}",),
        ("The answer is \\boxed{$wrong}",),
        (
            *("--env.dataset_name", "local/sums", "--env.prompt_field", "question", "--env.answer_field", "answer"),
            *("--env.max_tokens", "48", "--config", "dataset_env.yaml"),
        ),
        needs="data: any; a file with `env: {reward_funcs: [accuracy]}`",
    ),
    "eval_environments/pairwise_judgement_environment.py": Recipe(
        ("<think>\nx\n</think>\n[[A]]",),
        ("<think>\nx\n</think>\n[[B]]",),
        ("--env.train_dataset", "pair.jsonl", "--env.eval_dataset", "pair.jsonl", *OWN_TEXTS),
        needs="a file of pairs",
    ),
    "eval_environments/arena_hard_environment.py": Recipe(
        ("I know it well, and say so. [[A>B]]", "I know it as well, and say so. [[A=B]]"),
        ("I do not know it at all. [[B>A]]",),
        (
            *("--env.judge_base_url", "ORACLE/v1", "--env.judge_api_key_env", "JUDGE_KEY"),
            *("--env.train_prompt_dataset", "prompts.jsonl", "--env.train_baseline_dataset", "baselines.jsonl"),
            *("--env.eval_prompt_dataset", "prompts.jsonl", "--env.eval_baseline_dataset", "baselines.jsonl"),
            *("--env.train_split", "train", "--env.eval_split", "train"),
        ),
        needs="a judge behind OpenAI's API; data: prompts, baselines",
        variables=(("JUDGE_KEY", "x"),),
    ),
    "eval_environments/refusalbench_environment.py": Recipe(
        ("I say it: yes, of course. No refusal.",),
        ("I'm sorry, I cannot help with that. Yes.",),
        (
            *("--env.judge_base_url", "ORACLE/v1", "--env.judge_api_key_env", "JUDGE_KEY"),
            *("--env.judge_rate_limit_delay", "0"),
            *("--env.train_dataset", "prompts.jsonl", "--env.eval_dataset", "prompts.jsonl"),
            *("--env.train_split", "train", "--env.eval_split", "train"),
        ),
        needs="a judge behind OpenAI's API; data: prompts",
        variables=(("JUDGE_KEY", "x"),),
    ),
    "community/meteorology_forecast/meteorology_env.py": Recipe(
        ("<think>Warm.</think>\nFORECAST_SUMMARY: Sun.\nREASONING_SCORE: 5\nTOTAL_SCORE: 5",),
        (
            "FORECAST_SUMMARY: Rain.\nREASONING_SCORE: 1\nTOTAL_SCORE: 1",
            "FORECAST_SUMMARY: Snow.\nREASONING_SCORE: 2\nTOTAL_SCORE: 2",
        ),
        max_tokens=600,
        needs="a judge, here the server that is trained; files that are not in the repository: soundings",
    ),
    "community/lean_proof_env/lean_env.py": Recipe(
        ("theorem a : 1 = 1 := by\n  rfl",),
        ("theorem a : 1 = 1 := by\n  sorry",),
        needs="data: brando/minif2f-lean4. Proofs are checked by a stand-in in the file",
    ),
    "reasoning_gym_environment/reasoning_gym_environment.py": Recipe(
        (f"{THINK}<answer>1</answer>", f"{THINK}<answer>Yes</answer>"),
        (f"{THINK}<answer>0</answer>", f"{THINK}<answer>No</answer>"),
        max_tokens=256,
        num_rollouts=4,
        needs="reasoning-gym",
    ),
    "infinimath/infinimath_env.py": Recipe(
        ("I add them.\n</think>\n\\boxed{1}", "I add them.\n</think>\n\\boxed{2}"),
        ("I add them.\n</think>\n1 or 2",),
        max_tokens=400,
        num_rollouts=4,
        needs="mathgenerator",
    ),
    "game_environments/gymnasium/gym_taxi.py": Recipe(
        (_move("move", direction="north"),), ("no",), max_tokens=1400, needs="gymnasium 1.2.3"
    ),
    "game_environments/gymnasium/blackjack/blackjack_env_no_thinking.py": Recipe(
        (_move("take_action", action="stick").removeprefix("<think>x</think>\n"),),
        (_move("take_action", action="hit").removeprefix("<think>x</think>\n"),),
        max_tokens=1400,
        needs="gymnasium 1.2.3",
    ),
    "game_environments/gymnasium/blackjack/blackjack_env_thinking.py": Recipe(
        (_move("take_action", action="stick"),),
        (_move("take_action", action="hit"),),
        max_tokens=1400,
        needs="gymnasium 1.2.3",
    ),
    "game_environments/textworld_env/textworld_env.py": Recipe(
        (_move("execute_command", command="look", expected_outcome="x"),),
        ("I do not know what to do.",),
        max_tokens=1400,
        needs="textworld 1.7.0; the repository's root on PYTHONPATH",
        from_repository=True,
    ),
    "community/accessibility_env/accessibility_env.py": Recipe(
        ("<html><body><img src='a.png' alt='x'></body></html>",),
        ("<html><body><img src='a.png'></body></html>",),
        max_tokens=400,
        needs="beautifulsoup4, lxml; a file that is not in the repository: its data set",
    ),
    "community/cat_behavior_env/catbot_arena.py": Recipe((SUM,), (WRONG_SUM,), max_tokens=64, needs="data: gsm8k"),
    "community/conversational_style_dpo/gsmk8k_conversational_style_dpo_env.py": Recipe(
        ("Yes.",), ("No.",), max_tokens=400, needs="data: gsm8k"
    ),
    "community/cybersecurity_sigma/jaccard_reward_env.py": Recipe(
        (BOXED_RULE % ("selection", 1, "selection"),),
        (BOXED_RULE % ("other", 5, "other"),),
        max_tokens=400,
        needs="scikit-learn; data: mmaisel1/nous-rl-hackathon-sigma",
    ),
    "community/cybersecurity_sigma/llm_judge_env.py": Recipe(
        ("$say",),
        ("$wrong",),
        max_tokens=400,
        needs="data: mmaisel1/nous-rl-hackathon-sigma",
    ),
    "community/dynastai/dynastai_server.py": Recipe(
        (SCENARIO,),
        ("no it is not a card at all, sorry",),
        max_tokens=600,
        num_rollouts=4,
        needs="a file that is not in the repository: dynastai_cards.json",
    ),
    "community/goofy_math/goofy_math_server.py": Recipe(
        ("<think>x</think> Woohoo \\boxed{$answer}",),
        ("<think>x</think> \\boxed{$wrong}",),
        max_tokens=400,
        needs="data: gsm8k",
    ),
    "community/humor_generation/humor_env.py": Recipe(
        ("A joke that is a haiku. It counts.\nScore: 2", "A joke that is a sonnet. It counts less.\nScore: 1"),
        ("I do not know any.\nScore: 0",),
        max_tokens=400,
        needs="a file that is not in the repository: humor_dataset.jsonl",
    ),
    "community/mcp_tool_calling/tool_calling_server.py": Recipe((TOOL_CALL,), (WRONG_TOOL_CALL,), needs=XLAM),
    "community/wikipedia_research/tool_calling_server.py": Recipe((TOOL_CALL,), (WRONG_TOOL_CALL,), needs=XLAM),
    "community/metric_card_generator/metric_card_generator.py": Recipe(
        (CARD,), (CARD.replace("metricCard", "card"),), max_tokens=400
    ),
    "community/philosophical_rlaif_env.py": Recipe(
        ("<think>x</think> \\boxed{A}, and so oxed{A}",),
        ("<think>x</think> \\boxed{B}, and so oxed{B}",),
        max_tokens=1900,
        num_rollouts=2,
        needs='data: allenai/WildChat. Its pattern of a verdict is r"\\boxed{(A/B)}", which a \\boxed{A} does not match',
    ),
    "community/punchline_vrcli/punchline_env.py": Recipe(
        (f"{THINK}Because of the moon.",),
        ("I know no joke.",),
        max_tokens=400,
        needs="data: SocialGrep/one-million-reddit-jokes; model: Qwen/Qwen3-1.7B-Base",
    ),
    "community/quantum_hybrid/atopos_quant.py": Recipe(
        ("the cat sat on the mat",), ("x",), max_tokens=200, needs="pennylane; data: wikitext"
    ),
    "community/regex_generation/regex_env.py": Recipe(
        ('<answer>^".*"$</answer>', "<answer>^\\d+$</answer>"),
        ("<answer>^[a-z]+$</answer>", "<answer>^.*\\d.*$</answer>"),
        max_tokens=128,
        num_rollouts=4,
    ),
    "community/selcube/rubiks_cube_environment.py": Recipe((_cube("U"),), (_cube("R"),), max_tokens=900),
    "community/solitaire_winning_probability/solitaire_server.py": Recipe(
        ("<formula>1/2</formula> It is as likely as not. \\boxed{1/2}",),
        ("<formula>1/4</formula> I counted all cards of the deck, and then I counted them once more. \\boxed{1/4}",),
        max_tokens=1000,
        num_rollouts=4,
        needs="asteval; the repository as working directory",
    ),
    "community/sql_query_env/sql_query_env.py": Recipe(
        (f"{THINK}\\boxed{{$answer}}",),
        (f"{THINK}\\boxed{{SELECT Name FROM data}}",),
        needs="data: WikiSQL, unpacked in WIKISQL_CACHE_DIR",
    ),
    "community/ufc_prediction_env/ufc_server.py": Recipe(
        ("What a fight it will be, and who wins it is \\boxed{$answer}",),
        ("What a fight it will be, and who wins it is \\boxed{$wrong}",),
        max_tokens=400,
    ),
    "community/word_hunt/word_hunt_env.py": Recipe(
        (", ".join(LETTERS),),
        ("CAT, DOG",),
        ("--env.dictionary_path", "letters.txt"),
        max_tokens=600,
        needs="a list of words",
    ),
}

NEEDS_MORE: dict[str, str] = {
    "code_execution_server/coding_server.py": "modal, with an account: programs run in its sandboxes",
    "community/bleuberi/bleuberi_env.py": "the code of BLEUBERI, which is a submodule of the repository, and its data",
    "community/ethereum_virtual_machine/evm_server.py": "anvil of foundry, a key of OpenAI",
    "community/helpful_doctors/doctor.py": "a key of x.ai, which plays the patient",
    "community/openvla_robotics/open_robot_env.py": "robosuite, OpenVLA and a GPU",
    "community/options_iv_prediction/options_iv_prediction.py": "yahooquery and the network: prices of the day",
    "community/pay_to_play/pay_to_play_env.py": "web3, eth_account and a wallet with USDC: judges are paid",
    "community/physical_space_stl/physical_env.py": "pyrender with OpenGL, CLIP, files of objects",
    "community/playwright_agent_env.py": "playwright with a browser, a key of Gemini, a model that sees",
    "community/pokemon-showdown/pokemon_env_self_play.py": "poke_env and a server of Pokemon Showdown",
    "community/pokemon-showdown/pokemon_environment.py": "poke_env and a server of Pokemon Showdown",
    "community/protein_design/protein_env.py": "a key of NVIDIA NIM, whose models fold; its data",
    "community/ufc_prediction_env/ufc_image_env.py": "a model that sees, behind a key of OpenAI",
    "community/wikipedia_research/wikipedia_article_creator.py": "smolagents, a key of Tavily and the network",
    "game_environments/diplomacy_environment/diplomacy_env_minimal.py": "AI_Diplomacy, which is cloned beside it",
    "intern_bootcamp/intern_bootcamp_env.py": "InternBootcamp, from its repository",
    "kernelbench_env/kernelbench_env.py": "KernelBench from its repository, and CUDA",
    "multimodal_dpo/clevr_cogen_a_train.py": "a model that sees, and its data; groups with images are refused by the trainer",
    "multimodal_dpo/clevr_complex.py": "a model that sees, and its data; groups with images are refused by the trainer",
    "multimodal_dpo/ocr_vqa.py": "a model that sees, and its data; groups with images are refused by the trainer",
    "multimodal_dpo/pixmo_clocks.py": "a model that sees, and its data; groups with images are refused by the trainer",
    "multimodal_dpo/pixmo_count.py": "a model that sees, and its data; groups with images are refused by the trainer",
    "multimodal_dpo/pixmo_point_explanations.py": "a model that sees, and its data; groups with images are refused by the trainer",
    "smolagents_integration/smolagents_env.py": "smolagents, GAIA's data behind an account, tools of the network",
    "t1_tool_planning/t1_env.py": "the hub: it lists the files of capitalone/T1 by the hub's API, so that no local directory stands for it",
    "verifiers_server.py": "verifiers before 0.4, which has `load_environment`; `trl-atropos env verifiers:NAME` runs those of 0.4",
}
"""What a file needs that the recipes do not have."""

CANNOT_RUN: dict[str, str] = {
    "community/cat_behavior_env/cat_server.py": "it reads cat_scenarios.json, which is not in the repository, and its `score` returns None for all",
    "community/conversational_style_dpo/conversational_style_dpo_env.py": "it imports `tokenize_for_trainer_dpo`, which no atroposlib has",
    "community/dynastai/src/dynastai_env.py": "it is what another file imports: no `cli()`",
    "community/poker_holdem/poker_env.py": "each rollout is a list in a list, which the API refuses; all of its tokens are masked",
    "community/pytorch_optimizer_coding/optimizer_benchmark_environmenr.py": "it imports a package `atropos` that does not exist; no `cli()`",
    "community/pytorch_optimizer_coding/run_optimizer_benchmark.py": "it imports a package `atropos` that does not exist; no `cli()`",
    "community/quantum_hybrid/atropos.py": "its own tokenizer has no `decode`, which Atropos calls for each group",
    "community/sanskrit_poetry/sanskrit_poetry_env.py": "no `cli()`, and no `evaluate`, without which its class cannot be made",
    "community/starmap_compression/starmap_compression.py": "no `cli()`, and it samples nothing: its actions are numbers",
    "community/xitter_env/xitter_env.py": "no `cli()`, and no `evaluate`, without which its class cannot be made",
    "gsm8k_server_teacher_distill.py": "it needs a newer atroposlib than 0.4.0; with that of the repository its constructor does not take what the command line gives it",
    "mcp_env.py": "its `dataset_path` is no option of `BaseEnvConfig`, which drops it",
}
"""What is wrong with a file, whatever it is given."""
