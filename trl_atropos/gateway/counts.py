"""What a gateway counts, and how it is shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .turns import Turn


@dataclass
class GatewayCounts:
    """Since the start of the gateway.

    `num_turns` were recorded, of which `num_roots` began a conversation, `num_spliced` continue one with the tokens that were
    sampled, and `num_branches` come from a history that was rewritten. `num_sampled_tokens` are of sessions that ended,
    `masked_tokens` those of them that are not trained, by reason. `changed` counts what agents asked for and did not get,
    by name. The text of `num_streamed` answers was passed on as it was sampled. `num_passed` requests of environments were passed on and answered.
    """

    num_sessions: int = 0
    num_sessions_ended: int = 0
    num_sessions_discarded: int = 0
    num_turns: int = 0
    num_roots: int = 0
    num_spliced: int = 0
    num_branches: int = 0
    num_streamed: int = 0
    num_replayed: int = 0
    num_cancelled: int = 0
    num_refused: int = 0
    num_passed: int = 0
    num_sampled_tokens: int = 0
    num_groups_sent: int = 0
    num_groups_lost: int = 0
    masked_tokens: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of_values(cls, values: Mapping[str, Any]) -> GatewayCounts:
        """The counts that `values` shows, out of JSON. What else stands there is left out."""
        counts = cls(**{known.name: values[known.name] for known in fields(cls)})
        counts.masked_tokens, counts.changed = Counter(counts.masked_tokens), Counter(counts.changed)
        return counts

    def __add__(self, other: GatewayCounts) -> GatewayCounts:
        """Those of two gateways."""
        return GatewayCounts(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    @property
    def spliced_share(self) -> float:
        """Of the turns that go on with a conversation, those that continue what was sampled; 1 before there are any."""
        num_continued = self.num_spliced + self.num_branches
        return self.num_spliced / num_continued if num_continued else 1.0

    def note_turn(self, is_continued: bool, is_rewritten: bool) -> None:
        """Count a turn that was recorded."""
        self.num_turns += 1
        if is_rewritten:
            self.num_branches += 1
        elif is_continued:
            self.num_spliced += 1
        else:
            self.num_roots += 1

    def note_session(self, turns: Sequence[Turn]) -> None:
        """Count what a session that ended has sampled."""
        self.num_sessions_ended += 1
        for turn in turns:
            self.num_sampled_tokens += len(turn.sampled)
            if turn.why_masked:
                self.masked_tokens[turn.why_masked] += len(turn.sampled)

    def values(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {**vars(self), "spliced_share": self.spliced_share}


def render_metrics(values: dict[str, Any]) -> str:
    """Numbers and counts by name, in the text format of Prometheus."""
    lines = []
    for name, value in values.items():
        metric = f"trl_atropos_gateway_{name}"
        if isinstance(value, dict):
            label = "reason" if name == "masked_tokens" else "name"
            lines += [f'{metric}{{{label}="{key}"}} {number}' for key, number in sorted(value.items())]
        elif isinstance(value, (int, float)):
            lines.append(f"{metric} {value}")
    return "\n".join(lines) + "\n"
