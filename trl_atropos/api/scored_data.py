"""A posted group, `ScoredData`: checked against what a trainer can use, and kept as it came.

Shape letters: G rollouts of one group, T tokens of one rollout, K entries of a teacher at one token.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from isal import isal_zlib as zlib

from .refusals import RequestRefused


Integer = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]

OPTIONAL_FIELDS = (
    "advantages",
    "ref_logprobs",
    "messages",
    "generation_params",
    "inference_logprobs",
    "overrides",
    "group_overrides",
    "images",
    "env_id",
    "distill_token_ids",
    "distill_logprobs",
)
"""Those of atroposlib's `ScoredData`. Its API answers null where a group does not have one."""

MIN_COMPRESSED_BYTES = 1024
"""Plain bodies from here on are compressed before they are stored, as BaseEnv compresses what it sends."""

_INFLATE_BYTES = 1 << 20


class _Columns(msgspec.Struct, forbid_unknown_fields=True):
    """A group with its long columns still as text: each list is read and let go by itself, so that no group holds the
    interpreter for long.
    """

    tokens: list[msgspec.Raw]
    masks: list[msgspec.Raw]
    scores: list[float]
    advantages: list[msgspec.Raw] | msgspec.UnsetType | None = msgspec.UNSET
    ref_logprobs: list[msgspec.Raw] | msgspec.UnsetType | None = msgspec.UNSET
    messages: list[list[dict[str, Any]]] | msgspec.UnsetType | None = msgspec.UNSET
    generation_params: dict[str, Any] | msgspec.UnsetType | None = msgspec.UNSET
    inference_logprobs: list[msgspec.Raw] | msgspec.UnsetType | None = msgspec.UNSET
    overrides: list[dict[str, Any]] | msgspec.UnsetType | None = msgspec.UNSET
    group_overrides: dict[str, Any] | msgspec.UnsetType | None = msgspec.UNSET
    images: Any = msgspec.UNSET
    env_id: Integer | msgspec.UnsetType | None = msgspec.UNSET
    distill_token_ids: list[msgspec.Raw] | msgspec.UnsetType | None = msgspec.UNSET
    distill_logprobs: list[msgspec.Raw] | msgspec.UnsetType | None = msgspec.UNSET


class _ScoredData(msgspec.Struct):
    """The same with everything read. Fields that are not here are dropped, as atroposlib's API drops them."""

    tokens: list[list[Integer]]
    masks: list[list[Integer]]
    scores: list[float]
    advantages: list[list[float]] | msgspec.UnsetType | None = msgspec.UNSET
    ref_logprobs: list[list[float]] | msgspec.UnsetType | None = msgspec.UNSET
    messages: list[list[dict[str, Any]]] | msgspec.UnsetType | None = msgspec.UNSET
    generation_params: dict[str, Any] | msgspec.UnsetType | None = msgspec.UNSET
    inference_logprobs: list[list[float]] | msgspec.UnsetType | None = msgspec.UNSET
    overrides: list[dict[str, Any]] | msgspec.UnsetType | None = msgspec.UNSET
    group_overrides: dict[str, Any] | msgspec.UnsetType | None = msgspec.UNSET
    images: Any = msgspec.UNSET
    env_id: Integer | msgspec.UnsetType | None = msgspec.UNSET
    distill_token_ids: list[list[list[Integer]]] | msgspec.UnsetType | None = msgspec.UNSET
    distill_logprobs: list[list[list[float]]] | msgspec.UnsetType | None = msgspec.UNSET


_COLUMNS = msgspec.json.Decoder(_Columns)
# Not strict: the API of atroposlib reads 5.0 and "5" as 5.
_SCORED_DATA = msgspec.json.Decoder(_ScoredData, strict=False)
_INTEGERS = msgspec.json.Decoder(list[Integer])
_FLOATS = msgspec.json.Decoder(list[float])
_NESTED_INTEGERS = msgspec.json.Decoder(list[list[Integer]])
_NESTED_FLOATS = msgspec.json.Decoder(list[list[float]])
_GROUPS = msgspec.json.Decoder(list[msgspec.Raw])

_GROUP_WHY = "A trainer needs it in every group, and one bad group costs the batch that it is in."
_FILL_FIX = "In the environment, look at how the `ScoredDataGroup` is filled in `collect_trajectories`."
_FINITE_FIX = "In the environment, mend the function that computes it, or leave such a group out."


@dataclass(frozen=True)
class ReceivedGroup:
    """A group that passed the checks. `body` is its JSON, compressed if `is_gzipped`; `missing` as in `QueuedGroup`."""

    num_rollouts: int
    env_id: int | None
    body: bytes
    is_gzipped: bool
    missing: int


def inflate(data: bytes, max_bytes: int) -> bytes:
    """Unpack a gzip file of one or more members.

    Raises:
        RequestRefused: It is damaged (400), or unpacks to more than `max_bytes` bytes (413).
    """
    return b"".join(inflated_parts(data, max_bytes))


def inflated_parts(data: bytes, max_bytes: int) -> Iterator[bytes]:
    """The same in parts of a megabyte or less.

    Raises:
        RequestRefused: It is damaged (400), or unpacks to more than `max_bytes` bytes (413).
    """
    num_bytes = 0
    while data:
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            try:
                part = member.decompress(data, min(_INFLATE_BYTES, max_bytes - num_bytes + 1))
            except zlib.error as exc:  # type: ignore[misc]  # its stub gives the class as an instance
                raise _bad_gzip(str(exc)) from exc
            num_bytes += len(part)
            if num_bytes > max_bytes:
                raise RequestRefused(
                    f"The body unpacks to more than {max_bytes} bytes.",
                    "The API reads a post in memory, so its size is limited.",
                    "Post fewer or smaller groups at once, or raise `--max_unpacked_bytes` of `trl-atropos api`.",
                    status_code=413,
                )
            if not part and not member.eof and not member.unconsumed_tail:
                raise _bad_gzip("it ends too early")
            yield part
            data = member.unconsumed_tail
        data = member.unused_data


def digest_of(text: bytes) -> bytes:
    """16 bytes by which a post is recognised when it comes again. Of the JSON: a gzip file has the time in its head."""
    return hashlib.blake2b(text, digest_size=16).digest()


def read_group(text: bytes, as_sent: bytes | None = None) -> ReceivedGroup:
    """Check the JSON of one group. `as_sent` is the same compressed, if it came so.

    Raises:
        RequestRefused: It is no group that can be trained.
    """
    try:
        return _stored_form(text, as_sent, _checked(_decode(_COLUMNS, text)))
    except msgspec.ValidationError:
        # Fields that `ScoredData` does not have, or numbers written as text: kept in the form in which others give them.
        text = msgspec.json.encode(_read_whole(text))
        return _stored_form(text, None, _checked(_COLUMNS.decode(text)))


def read_groups(text: bytes) -> list[ReceivedGroup]:
    """Check the JSON of a list of groups.

    Raises:
        RequestRefused: It is no list, or one of them is no group that can be trained.
    """
    try:
        parts = _decode(_GROUPS, text)
    except msgspec.ValidationError as exc:
        raise _wrong_type(exc) from exc
    groups = []
    for index, part in enumerate(parts):
        try:
            groups.append(read_group(bytes(part)))
        except RequestRefused as exc:
            raise RequestRefused(
                f"Group {index} of the list: {exc.what}",
                exc.why,
                exc.fix,
                status_code=exc.status_code,
                field=exc.field,
            ) from exc
    return groups


def completed_parts(parts: Iterable[bytes], missing: int) -> Iterator[bytes]:
    """The JSON of a group, in parts, with null in the fields that are `missing` as in `QueuedGroup`."""
    nulls = b"".join(b'"%b":null,' % name.encode() for bit, name in enumerate(OPTIONAL_FIELDS) if missing >> bit & 1)
    for part in parts:
        start = part.find(b"{") + 1
        if start and nulls:
            yield part[:start] + nulls
            yield part[start:]
            nulls = b""
        else:
            yield part


def _stored_form(text: bytes, as_sent: bytes | None, columns: _Columns) -> ReceivedGroup:
    missing = sum(1 << bit for bit, name in enumerate(OPTIONAL_FIELDS) if getattr(columns, name) is msgspec.UNSET)
    body, is_gzipped = (text, False) if as_sent is None else (as_sent, True)
    if not is_gzipped and len(text) >= MIN_COMPRESSED_BYTES:
        body, is_gzipped = zlib.compress(text, 1, wbits=31), True
    env_id = columns.env_id
    return ReceivedGroup(
        num_rollouts=len(columns.tokens),
        env_id=env_id if isinstance(env_id, int) else None,
        body=body,
        is_gzipped=is_gzipped,
        missing=missing,
    )


def _decode(decoder: msgspec.json.Decoder[Any], text: bytes) -> Any:
    """Read JSON; a wrong type leaves as msgspec's `ValidationError`."""
    try:
        return decoder.decode(text)
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise _malformed(text, exc) from exc
    except RecursionError as exc:
        raise RequestRefused(
            "The body is nested too deeply.",
            "Whoever reads the batch would end with the same error.",
            "Send `messages`, `images` and the like as flat objects.",
        ) from exc


def _read_whole(text: bytes) -> _ScoredData:
    try:
        scored_data: _ScoredData = _decode(_SCORED_DATA, text)
    except msgspec.ValidationError as exc:
        raise _wrong_type(exc) from exc
    return scored_data


def _checked(columns: _Columns) -> _Columns:
    """Check that all columns fit together.

    Raises:
        RequestRefused: They do not.
        ValidationError: A number is of the wrong type.
    """
    lengths = [len(_INTEGERS.decode(rollout)) for rollout in columns.tokens]
    if not lengths:
        raise _refused("tokens", "`tokens` is empty: the group has no rollouts.")
    for rollout, length in enumerate(lengths):
        if length == 0:
            raise _refused("tokens", f"Rollout {rollout} has no tokens.")
    if len(columns.scores) != len(lengths):
        raise _refused("scores", f"`scores` has {len(columns.scores)} entries, `tokens` has {len(lengths)} rollouts.")
    _check_column("masks", columns.masks, lengths, _INTEGERS)
    for name in ("advantages", "ref_logprobs", "inference_logprobs"):
        _check_column(name, getattr(columns, name), lengths, _FLOATS, is_optional=True)
    _check_column("distill_token_ids", columns.distill_token_ids, lengths, _NESTED_INTEGERS, is_optional=True)
    _check_column("distill_logprobs", columns.distill_logprobs, lengths, _NESTED_FLOATS, is_optional=True)
    _check_teacher(columns)
    if isinstance(columns.overrides, list) and len(columns.overrides) > len(lengths):
        raise _refused(
            "overrides", f"`overrides` has {len(columns.overrides)} entries, the group has {len(lengths)} rollouts."
        )
    _check_messages(columns.messages)
    return columns


def _check_column(
    name: str,
    column: Sequence[msgspec.Raw] | msgspec.UnsetType | None,
    lengths: Sequence[int],
    decoder: msgspec.json.Decoder[Any],
    is_optional: bool = False,
) -> None:
    """Check that a column has one entry a token. Of an optional one, `[]` means that there is none, also for one rollout."""
    if not isinstance(column, list) or (is_optional and not column):
        return
    if len(column) != len(lengths):
        raise _refused(name, f"`{name}` has {len(column)} entries, `tokens` has {len(lengths)} rollouts.")
    for rollout, (values, length) in enumerate(zip(column, lengths, strict=True)):
        found = len(decoder.decode(values))
        if found != length and not (is_optional and found == 0):
            raise _refused(name, f"Rollout {rollout}: `{name}` has {found} entries, `tokens` has {length}.")


def _check_teacher(columns: _Columns) -> None:
    ids, logprobs = columns.distill_token_ids, columns.distill_logprobs
    if not (isinstance(ids, list) and isinstance(logprobs, list) and ids and logprobs):
        return
    for rollout, (of_ids, of_logprobs) in enumerate(zip(ids, logprobs, strict=True)):
        num_ids = [len(entry) for entry in _NESTED_INTEGERS.decode(of_ids)]
        num_logprobs = [len(entry) for entry in _NESTED_FLOATS.decode(of_logprobs)]
        if num_ids != num_logprobs:
            raise _refused(
                "distill_logprobs",
                f"Rollout {rollout}: `distill_logprobs` has other lengths than `distill_token_ids`.",
            )


def _check_messages(messages: list[list[dict[str, Any]]] | msgspec.UnsetType | None) -> None:
    if not isinstance(messages, list):
        return
    for rollout, turns in enumerate(messages):
        for turn, message in enumerate(turns):
            if "role" not in message or "content" not in message:
                raise RequestRefused(
                    f"Rollout {rollout}, message {turn}: it lacks `role` or `content`.",
                    "Message must have 'role' and 'content' fields.",
                    _FILL_FIX,
                    field="messages",
                )


def _refused(field: str, what: str) -> RequestRefused:
    return RequestRefused(what, _GROUP_WHY, _FILL_FIX, field=field)


def _wrong_type(exc: msgspec.ValidationError) -> RequestRefused:
    found, _, path = str(exc).partition(" - at ")
    path = path.strip("`").removeprefix("$").removeprefix(".")
    where = f" at `{path}`" if path else ""
    return RequestRefused(
        f"The body has a wrong value{where}: {found}.",
        "A group is an object with `tokens`, `masks` and `scores`, and lists of numbers as long as these.",
        _FILL_FIX,
        field=re.split(r"[.\[]", path)[0],
    )


def _malformed(text: bytes, exc: Exception) -> RequestRefused:
    """The refusal of what is not JSON. Python writes NaN and infinity, and so do environments; JSON has neither."""
    match = re.search(r"byte (\d+)", str(exc))
    position = int(match[1]) if match and "invalid character" in str(exc) else None
    if position is not None:
        # msgspec names the character where it gave up: the first of NaN, the second of -Infinity.
        number = re.compile(rb"-?(?:NaN|Infinity)").match(text, max(position - 1, 0)) or re.compile(
            rb"NaN|Infinity"
        ).match(text, position)
        if number is not None:
            fields = re.findall(rb'"(\w+)"\s*:', text[:position])
            field = fields[-1].decode() if fields else ""
            return RequestRefused(
                f"`{field}` holds {number[0].decode()}.",
                "JSON has no such number: no trainer can read a batch with it, and no gradient survives it.",
                _FINITE_FIX,
                field=field,
            )
    return RequestRefused(
        f"The body is not JSON: {exc}.",
        "The API takes what `json.dumps` writes of finite numbers and whole characters.",
        _FILL_FIX,
    )


def _bad_gzip(reason: str) -> RequestRefused:
    # The first words are those of atroposlib's API.
    return RequestRefused(
        f"Invalid gzip payload: {reason}.",
        "The header says `Content-Encoding: gzip`.",
        "Compress the body with `gzip.compress`, or leave the header out.",
        status_code=400,
    )
