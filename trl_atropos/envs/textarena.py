"""`textarena:GAME`: games in text for one player, https://github.com/LeonGuertler/TextArena."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from .random_state import RandomState
from .seeded import SeededSource
from .source import EpisodeStep


VARIANTS = ("-raw", "-train")
"""Ends of names of games that differ from the game without them by what wraps its observations."""

ASK_FOR_MOVE = "Your next move?"
"""What the policy is told when a game says nothing after a move."""


def task_names() -> list[str]:
    """Names of all games for one player, each once."""
    from textarena.envs.registration import ENV_REGISTRY

    return sorted(
        name for name, spec in ENV_REGISTRY.items() if not name.endswith(VARIANTS) and _is_for_one(spec.entry_point)
    )


def _is_for_one(entry_point: Any) -> bool:
    # Without importing the game, which may load data from the network. Its state says for how many it is.
    package, _, file = str(entry_point).partition(":")[0].rpartition(".")
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec else None
    paths = [Path(place) / f"{file}.py" for place in places or []]
    return any(path.is_file() and "SinglePlayerState" in path.read_text(encoding="utf-8") for path in paths)


class TextArena(SeededSource):
    """A game of textarena for one player. The evaluation has boards of its own.

    Args:
        name (`str`):
            Name of the game, such as `GuessTheNumber-v0`.
        options (`dict[str, Any]`):
            Keyword arguments of the game, such as `{"max_number": 9}`.
    """

    def open(self, task: int) -> TextArenaEpisode:
        """Begin the game with the board of a seed."""
        return TextArenaEpisode(self._name, self._options, task)


class TextArenaEpisode:
    """One game. The policy is told what is new after each of its moves; what it wrote itself is in the conversation.

    Args:
        name (`str`), options (`dict[str, Any]`):
            As of [`TextArena`].
        seed (`int`):
            Of the board.
    """

    def __init__(self, name: str, options: dict[str, Any], seed: int):
        import textarena
        from textarena.envs.registration import ENV_REGISTRY
        from textarena.wrappers import ActionFormattingWrapper

        self._own_action = textarena.ObservationType.PLAYER_ACTION
        # The game as it is: its other variants repeat the whole history in every observation.
        raw = f"{name}-raw"
        game = textarena.make(raw if raw in ENV_REGISTRY else name, **options)
        formats = ActionFormattingWrapper in (ENV_REGISTRY[name].default_wrappers or [])
        self._game = ActionFormattingWrapper(game) if formats else game
        self._random = RandomState(seed)
        with self._random:
            self._game.reset(num_players=1, seed=seed)
            self.messages = [{"role": "user", "content": self._observe()}]

    def _observe(self) -> str:
        _, messages = self._game.get_observation()
        if isinstance(messages, str):
            return messages
        return "\n".join(str(text) for _, text, kind in messages if kind is not self._own_action).strip()

    def step(self, text: str) -> EpisodeStep:
        """Make a move. The reward comes with the last one."""
        with self._random:
            is_done, _ = self._game.step(text)
            if is_done:
                rewards, _ = self._game.close()
                reward = (rewards or {}).get(0, 0.0)
                # Some games end with their reason in the reward's place.
                return EpisodeStep(None, float(reward) if isinstance(reward, (int, float)) else 0.0)
            return EpisodeStep(self._observe() or ASK_FOR_MOVE, 0.0)

    def close(self) -> None:
        """There is nothing to give back."""
