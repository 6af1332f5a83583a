"""Routing: which rows go through which parameters, and the low-rank map the vision parameters are made of.

A batch of token rows is split once per forward into two streams, the language rows and the vision rows, packed without
padding. Norms, projections and MLPs run on streams; only keys and values are put back into the sequence.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

LANGUAGE, VISION, PADDING = 0, 1, 2

# Queries that meet their keys in one call of masked attention. Masks are this many rows high whatever the length, and
# keys after the block are not read. The CPU kernel of sdpa takes its larger tiles from 192 queries on.
QUERY_BLOCK = 192


class Block(NamedTuple):
    """Columns `[begin, end)` of a rectangle of queries, and the lowest and highest place of the sequence among them."""

    begin: int
    end: int
    low: int
    high: int


class Run(NamedTuple):
    """
    Queries of one modality that follow each other.

    Args:
        row (`int`): of the batch.
        begin, end (`int`): their places in the sequence, past included: `[begin, end)`.
        first (`int`): the first place they see.
        seen (`torch.LongTensor`, *optional*): on the CPU, the places they see when padding lies between these.
    """

    row: int
    begin: int
    end: int
    first: int
    seen: torch.Tensor | None


class Stream(NamedTuple):
    """
    The rows of one modality, packed in reading order over the batch.

    As queries they also form a rectangle `(batch, width)`: each row's own from the left, filled up on the right.

    Args:
        rows (`torch.LongTensor` of shape `(rows,)`): where they are in the flattened batch.
        counts (`list[int]`): how many of them each row of the batch has.
        places (`torch.LongTensor` of shape `(batch or 1, width)`):
            Where the queries of the rectangle are in the sequence, past included. Fillers repeat a query of their row.
            One row when all rows are alike.
        drawn (`torch.LongTensor` of shape `(batch, width)`, *optional*):
            Which packed row is where in the rectangle. `None` when all rows have as many.
        cells (`torch.LongTensor` of shape `(rows,)`, *optional*): where packed rows are in the flattened rectangle.
        blocks (`list[Block]`): the columns of the rectangle, cut for masked attention.
        runs (`list[Run]`): the queries, cut where another modality, padding or another row lies between.
    """

    rows: torch.Tensor
    counts: list[int]
    places: torch.Tensor
    drawn: torch.Tensor | None
    cells: torch.Tensor | None
    blocks: list[Block]
    runs: list[Run]

    def select(self, states: torch.Tensor) -> torch.Tensor:
        """The rows of this stream, `(rows, ...)`, out of `(batch, length, ...)`; a batch of 1 stands for all rows."""
        states = states.expand(len(self.counts), *states.shape[1:])
        return states.flatten(0, 1).index_select(0, self.rows)

    def rectangle(self, packed: torch.Tensor) -> torch.Tensor:
        """From `(rows, ...)` to `(batch, width, ...)`."""
        if self.drawn is None:
            return packed.unflatten(0, (len(self.counts), self.counts[0]))
        return packed.index_select(0, self.drawn.flatten()).unflatten(0, self.drawn.shape)

    def pack(self, rectangle: torch.Tensor) -> torch.Tensor:
        """From `(batch, width, ...)` to `(rows, ...)`."""
        flat = rectangle.flatten(0, 1)
        return flat if self.cells is None else flat.index_select(0, self.cells)


class Routing(NamedTuple):
    """
    How a batch is split into streams. Planned once per forward.

    Args:
        shape (`tuple[int, int]`): batch and length.
        pieces (`list[tuple[int, int]]`):
            The flattened batch in order, as kind (language, vision, padding) and number of rows.
        language, vision ([`Stream`]): the rows of each modality.
        total_length (`int`): length of the sequence, past included.
        valid (`torch.BoolTensor` of shape `(batch, total_length)`, *optional*): False on padding; `None` without any.
        starts (`torch.LongTensor` of shape `(batch, length)`, *optional*):
            The first place each token may look at, when several sequences are packed into one row.
        triangles (`dict[torch.dtype, torch.Tensor]`): see [`Routing.triangle`].
        last ([`Routing`], *optional*): of the last token of each row alone, seeing what it sees here.
    """

    shape: tuple[int, int]
    pieces: list[tuple[int, int]]
    language: Stream
    vision: Stream
    total_length: int
    valid: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    triangles: dict[torch.dtype, torch.Tensor] | None = None
    last: "Routing | None" = None

    def select_last(self, language: torch.Tensor, vision: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the packed rows of both streams those of `last`."""
        assert self.last is not None
        pairs = (self.language, self.last.language, language), (self.vision, self.last.vision, vision)
        first, second = (packed[torch.searchsorted(stream.rows, last.rows)] for stream, last, packed in pairs)
        return first, second

    def triangle(self, queries: int, keys: int, dtype: torch.dtype) -> torch.Tensor:
        """
        The additive mask of `queries` that follow each other, the last of which sees the last of `keys`: `(1, 1, queries,
        keys)`, 0 or -inf. All of them are the bottom right corner of one, which a forward makes once, two blocks high.
        """
        triangles = {} if self.triangles is None else self.triangles
        if dtype not in triangles:
            hidden = torch.full((2 * QUERY_BLOCK, self.total_length), float("-inf"), dtype=dtype)
            triangles[dtype] = hidden.triu(self.total_length - 2 * QUERY_BLOCK + 1).to(self.language.rows.device)
        return triangles[dtype][None, None, -queries:, -keys:]

    def unpack(self, language: torch.Tensor, vision: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """
        Puts both streams back into the sequence.

        Args:
            language, vision (`torch.Tensor`): the packed rows of each stream, counted along `dim`.
            dim (`int`, *optional*, defaults to 0): of the rows.

        Returns:
            `torch.Tensor`: `batch` and `length` in place of `dim`; zeros at padding.
        """
        lengths = [[count for kind, count in self.pieces if kind == side] for side in (LANGUAGE, VISION)]
        sources = [iter(language.split(lengths[LANGUAGE], dim)), iter(vision.split(lengths[VISION], dim))]
        shape = list(language.shape)
        ordered = []
        for kind, shape[dim] in self.pieces:
            ordered.append(language.new_zeros(shape) if kind == PADDING else next(sources[kind]))
        return torch.cat(ordered, dim).unflatten(dim, self.shape)


def plan_routing(
    is_vision: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    past_length: int = 0,
    starts: torch.Tensor | None = None,
    with_last: bool = False,
) -> Routing:
    """
    Plans the two streams of a forward. This is the one place where the host waits for the device.

    Args:
        is_vision (`torch.BoolTensor` of shape `(batch, length)`): the modality of each token.
        attention_mask (`torch.Tensor` of shape `(batch, past_length + length)`, *optional*): 0 on padding.
        past_length (`int`, *optional*, defaults to 0): tokens in the cache.
        starts (`torch.LongTensor` of shape `(batch, length)`, *optional*): see [`Routing`].
        with_last (`bool`, *optional*, defaults to `False`): whether to plan `last`, too.

    Returns:
        [`Routing`]

    Raises:
        ValueError: for an attention mask of another shape.
    """
    batch, length = is_vision.shape
    device = is_vision.device
    kinds, valid = is_vision.long(), None
    if attention_mask is not None:
        if attention_mask.shape != (batch, past_length + length):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; with images it must be 2D, one number for each "
                f"token of the cache and of input_ids: ({batch}, {past_length} + {length})."
            )
        valid = attention_mask.cpu() != 0
        kinds = kinds.cpu().masked_fill(~valid[:, past_length:], PADDING)
    kinds = kinds.cpu()
    if valid is not None:
        valid = None if valid.all() else valid | ~valid.any(dim=1, keepdim=True)
    device_valid = None if valid is None else valid.to(device)

    def plan(kinds, shown, last=None):
        language, vision = (
            _plan_stream(kinds, kind, past_length, valid, starts, device) for kind in (LANGUAGE, VISION)
        )
        shape, total_length = (batch, shown.shape[1]), past_length + length
        return Routing(shape, _cut_pieces(shown), language, vision, total_length, device_valid, starts, {}, last)

    if not with_last:
        return plan(kinds, kinds)
    only_last = kinds.clone()
    only_last[:, :-1] = PADDING
    return plan(kinds, kinds, plan(only_last, kinds[:, -1:]))


def _cut_pieces(kinds):
    """`pieces` of a [`Routing`]. Each modality has one even without rows: in training its parameters must be in the graph."""
    distinct, counts = torch.unique_consecutive(kinds.flatten(), return_counts=True)
    return [*zip(distinct.tolist(), counts.tolist()), (LANGUAGE, 0), (VISION, 0)]


def packed_starts(position_ids: torch.Tensor) -> torch.Tensor | None:
    """
    Where packed sequences begin: positions that do not go on counting mark a new one, as everywhere in transformers.

    Args:
        position_ids (`torch.LongTensor` of shape `(batch, length)`).

    Returns:
        `torch.LongTensor` of shape `(batch, length)`: for each token the place where its sequence begins. `None` when
        no row holds more than one.
    """
    begins = position_ids.diff(dim=1) != 1  # (batch, length - 1)
    if not begins.any():
        return None
    places = torch.arange(1, position_ids.shape[1], device=position_ids.device)
    starts = torch.where(begins, places, 0).cummax(dim=1).values
    return torch.nn.functional.pad(starts, (1, 0))


def _plan_stream(kinds, kind, past_length, valid, starts, device):
    """The [`Stream`] of one kind of rows; all of its plan but `rows` and `places` stays on the host."""
    rows = (kinds == kind).flatten().nonzero().squeeze(1)
    counts = (kinds == kind).sum(dim=1)
    places, blocks = _plan_rectangle(kinds, kind, rows, past_length)
    drawn, cells = None, None
    if len(counts.unique()) > 1:
        drawn, cells = (index.to(device) for index in _plan_packing(counts))
    runs = _cut_runs(rows, kinds.shape[1], past_length, valid, starts)
    return Stream(rows.to(device), counts.tolist(), places.to(device), drawn, cells, blocks, runs)


def _plan_packing(counts):
    """`drawn` and `cells` of a [`Stream`]. Fillers are copies, as in `places`: of the last query of their row, if any."""
    columns, ends = torch.arange(int(counts.max())), counts.cumsum(0)[:, None]
    drawn = (ends - counts[:, None] + columns).clamp(max=ends - 1).clamp(min=0)  # (batch, width)
    return drawn, (columns < counts[:, None]).flatten().nonzero().squeeze(1)


def _plan_rectangle(kinds, kind, rows, past_length):
    """`places` and `blocks` of a [`Stream`], on the CPU."""
    is_member = kinds == kind  # (batch, length)
    counts = is_member.sum(dim=1, keepdim=True)
    columns = torch.arange(kinds.shape[1])
    # Fillers stand on a real token, so that they see something and their (unused) rows are finite.
    stand_ins = torch.where(counts > 0, is_member, kinds != PADDING) * columns
    places = stand_ins.amax(dim=1, keepdim=True).repeat(1, int(counts.max()))  # (batch, width)
    places[columns[: places.shape[1]] < counts] = rows % kinds.shape[1]
    places = places + past_length
    blocks = _cut_blocks(places.amin(dim=0).tolist(), places.amax(dim=0).tolist())
    return (places[:1] if (places == places[:1]).all() else places), blocks


def _cut_blocks(low: list[int], high: list[int]) -> list[Block]:
    """Blocks of about `QUERY_BLOCK` columns; a new one also begins where the places jump, to spare the keys between."""
    jumps = [column for column in range(1, len(high)) if high[column] - high[column - 1] >= QUERY_BLOCK]
    blocks = []
    for begin, end in zip([0, *jumps], [*jumps, len(high)]):
        parts = max(1, (end - begin) // QUERY_BLOCK)
        cuts = [begin + (end - begin) * part // parts for part in range(parts + 1)]
        blocks += [Block(a, b, min(low[a:b]), max(high[a:b])) for a, b in pairwise(cuts) if b > a]
    return blocks


def _cut_runs(rows, length, past_length, valid, starts):
    """`runs` of a [`Stream`]."""
    if not len(rows):
        return []
    follows = (rows.diff() == 1) & (rows[1:] % length > 0)
    if starts is not None:
        follows &= starts.cpu().flatten()[rows].diff() == 0
    cuts = [0, *((~follows).nonzero().squeeze(1) + 1).tolist(), len(rows)]
    runs = []
    for row, place, count in [(*divmod(int(rows[a]), length), b - a) for a, b in pairwise(cuts)]:
        begin, end = past_length + place, past_length + place + count
        first, seen = 0 if starts is None else int(starts[row, place]), None
        if valid is not None:
            seen = valid[row, :end].nonzero().squeeze(1)
            first = int(seen[0])
            seen = None if len(seen) == end - first else seen
        runs.append(Run(row, begin, end, first, seen))
    return runs


class LowRankLinear(nn.Module):
    """
    A linear map of rank `rank` without bias, `x -> B(A(x))`: the building block of expert and bridge.

    It starts as wide as the dense map it stands for: the elements of the product `B A` have the standard deviation
    `text_config.initializer_range`, and the inner width has the scale of the input. So the expert begins as a fresh layer
    of the language model would: every layer adds to the vision rows by the same measure, and gets a gradient of the
    same size, whatever the width. The bridge begins closed: text and images read each other through plain keys and
    values, until its B, which has a gradient from the first step on, opens it.

    Args:
        in_features (`int`): width of the input.
        out_features (`int`): width of the output.
        rank (`int`): inner width.
        zero_init (`bool`, *optional*, defaults to `False`):
            Whether B starts at zero, so that the map starts as zero (the bridge does).
    """

    def __init__(self, in_features: int, out_features: int, rank: int, zero_init: bool = False):
        super().__init__()
        self.A = nn.Linear(in_features, rank, bias=False)
        self.B = nn.Linear(rank, out_features, bias=False)
        # The product B A has the spread of the dense matrix it replaces, N(0, std): with std(A) = 1/sqrt(in) the inner
        # width has the scale of the input, and B, in units of that std, makes up for the smaller sum: sqrt(in / rank).
        # On the halves, because transformers initialises no module that lacks parameters of its own.
        self.A.low_rank_std = in_features**-0.5  # type: ignore[assignment]
        gain = 0.0 if zero_init else (in_features / rank) ** 0.5
        self.B.low_rank_gain = gain  # type: ignore[assignment]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """From `(..., in_features)` to `(..., out_features)`."""
        return self.B(self.A(hidden_states))
