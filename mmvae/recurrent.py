"""A GRU trunk for token sequences, and the vocabulary loss.

Shapes: ``B`` batch, ``T`` tokens, ``E`` embedding, ``H`` hidden, ``D`` latent, ``V`` vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def right_padded(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with what is real first, in its order, and the padding after it, wherever the padding was.

    Arguments:
        rows: (B, T, *).
        mask: (B, T), not 0 where a row is real.

    Returns:
        The rows (B, T, *) and their mask (B, T) bool.
    """
    real = mask != 0
    order = real.int().argsort(dim=1, descending=True, stable=True)
    return rows.take_along_dim(order.view(*order.shape, *[1] * (rows.dim() - 2)), 1), real.gather(1, order)


def sentences(
    input_ids: Tensor, attention_mask: Tensor | None, pad_token_id: int, ends: Sequence[int], vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Ids (B, T) with their padding moved to the right, and where they are real, (B, T) bool.

    Arguments:
        input_ids: (B, T) int64.
        attention_mask: (B, T), not 0 where they are real; made from ``pad_token_id`` when None.
        pad_token_id: of padding.
        ends: ids of BOS and EOS.
        vocab_size: the ids are below.

    Raises:
        TypeError: for ids or a mask that are not tensors.
        ValueError: for ids of another shape than (B, T), a mask of another shape than theirs, or none where padding is BOS or EOS; in the
            host's memory also for an id that there is not.
    """
    check_ids(input_ids)
    if input_ids.is_cpu and not torch.compiler.is_compiling() and ((input_ids < 0) | (input_ids >= vocab_size)).any():
        row, place = ((input_ids < 0) | (input_ids >= vocab_size)).nonzero()[0].tolist()
        expected = f"0 to {vocab_size - 1}: is the tokenizer the model's?"
        raise ValueError(f"input_ids: received {int(input_ids[row, place])} in row {row}, expected {expected}")
    shape = tuple(input_ids.shape)
    if attention_mask is None:
        if pad_token_id in ends:
            raise ValueError(f"attention_mask: received None, expected a mask since pad_token_id {pad_token_id} is also BOS or EOS")
        return right_padded(input_ids, input_ids != pad_token_id)
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask: received a {type(attention_mask).__name__}, expected a tensor")
    if attention_mask.shape != shape:
        raise ValueError(f"attention_mask: received shape {tuple(attention_mask.shape)}, expected {shape}")
    return right_padded(input_ids, attention_mask)


def check_ids(input_ids: Tensor | None) -> None:
    """Refuse ids that are no tensor (B, T) of at least one token; see :func:`sentences`."""
    if input_ids is not None and not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids: received a {type(input_ids).__name__}, expected a tensor")
    if input_ids is None or input_ids.dim() != 2 or not input_ids.shape[1]:
        shape = None if input_ids is None else tuple(input_ids.shape)
        raise ValueError(f"input_ids: received shape {shape}, expected (batch, tokens) with at least one token")


class GRUEncoder(nn.Module):
    """GRU over padded rows whose summary is exact: padding never enters a state, and rows keep their order.

    Arguments:
        input_size: E.
        hidden_size: H per direction.
        num_layers: number of layers.
        bidirectional: read every row backwards too, from its last real token.
        dropout: between layers.
        pooling: what the summary is made of, the last layer's states: the "last" one, or their "mean" or "max" over the row, which
            keeps what an early word said (Long et al., 2019, https://arxiv.org/abs/1911.03976).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        pooling: str = "last",
    ):
        super().__init__()
        self.pooling = pooling
        directions = 2 if bidirectional else 1
        sizes = [input_size] + [hidden_size * directions] * (num_layers - 1)
        self.forwards = nn.ModuleList(nn.GRU(size, hidden_size, batch_first=True) for size in sizes)
        self.backwards = nn.ModuleList(nn.GRU(size, hidden_size, batch_first=True) for size in sizes if bidirectional)
        self.dropout = nn.Dropout(dropout)
        self.states = nn.ModuleList(nn.Identity() for _ in sizes)  # each layer's, by a name for hooks
        self.output_size = hidden_size * directions

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Read rows.

        Arguments:
            x: (B, T, E).
            lengths: (B,) real tokens of each row, >= 1; the rest is padding at the right.

        Returns:
            The states (B, T, H * directions), arbitrary on padding, and the summary (B, H * directions); the "last" state is that after
            the last token, and for the backward direction after the first.
        """
        position = torch.arange(x.shape[1], device=x.device)
        mirror = (lengths.unsqueeze(1) - 1 - position).where(position < lengths.unsqueeze(1), position).unsqueeze(-1)
        last = (lengths - 1).view(-1, 1, 1)
        for i, gru in enumerate(self.forwards):
            x = self.dropout(x) if i else x
            y = gru(x)[0]
            ends = [y.gather(1, last.expand(-1, 1, y.shape[-1])).squeeze(1)]
            if self.backwards:
                back = self.backwards[i](x.gather(1, mirror.expand_as(x)))[0]
                ends.append(back.gather(1, last.expand(-1, 1, back.shape[-1])).squeeze(1))
                y = torch.cat([y, back.gather(1, mirror.expand_as(back))], -1)
            x = self.states[i](y)
        if self.pooling == "last":
            return x, torch.cat(ends, -1)
        padding = (position >= lengths.unsqueeze(1)).unsqueeze(-1)
        if self.pooling == "max":
            return x, x.masked_fill(padding, -math.inf).amax(1)
        return x, x.masked_fill(padding, 0.0).sum(1) / lengths.unsqueeze(1)


class SourceAttention(nn.Module):
    r"""What states read off the encoder's states of another row, the source: global attention with "general" scores.

        a_tn = softmax_n(s_n^T W h_t),    h_t + V sum_n a_tn s_n

    A source state that is all 0 is none: padding, or a row without a source, whose states stay as they are.

    Arguments:
        hidden_size: H.
        source_size: F, of the source's states.
        dropout: of training rows that do not see their source.

    References:
        Luong et al. (2015), Effective approaches to attention-based neural machine translation, §3.1, https://arxiv.org/abs/1508.04025
    """

    def __init__(self, hidden_size: int, source_size: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.to_query = nn.Linear(hidden_size, source_size, bias=False)
        self.from_source = nn.Linear(source_size, hidden_size, bias=False)

    def forward(self, states: Tensor, source: Tensor) -> Tensor:
        """(N, T, H) and (B, L, F) -> (N, T, H); N is a multiple of B, and row n reads source n modulo B."""
        if self.training and self.dropout:
            source = source * (torch.rand(len(source), 1, 1, device=source.device) >= self.dropout)
        rows = states.unflatten(0, (-1, len(source))).transpose(0, 1)  # (B, N / B, T, H): a source is not repeated
        scores = self.to_query(rows.flatten(1, 2)) @ source.transpose(1, 2)
        # a finite score of what is not there: with -inf a row without a source would be NaN, and so the weights are of zeros
        weights = scores.masked_fill(~source.any(-1).unsqueeze(1), torch.finfo(scores.dtype).min).softmax(-1)
        read = self.from_source(weights @ source).view_as(rows).transpose(0, 1).flatten(0, 1)
        return states + read


class GRUDecoder(nn.Module):
    """Token states given the tokens before and a latent, which is the initial state and part of every input.

    Arguments:
        vocab_size: V; embedding_size: E; hidden_size: H; latent_dim: D; where that is 0, the initial state is 0.
        num_layers: number of layers.
        embedding_dropout: on the embeddings.
        dropout: on the states and between layers.
        tied: make states of width E, to be compared with the embedding, also where H differs from E.
        skip: add a linear map of z to every state, too (Dieng et al., 2019, https://arxiv.org/abs/1807.04863).
        source_size, source_dropout: of :class:`SourceAttention`; there is none where the size is 0.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        hidden_size: int,
        latent_dim: int,
        num_layers: int = 1,
        embedding_dropout: float = 0.0,
        dropout: float = 0.0,
        tied: bool = False,
        skip: bool = False,
        source_size: int = 0,
        source_dropout: float = 0.0,
    ):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, embedding_size)
        self.embedding_dropout = nn.Dropout(embedding_dropout)
        self.to_state = nn.Linear(latent_dim, num_layers * hidden_size) if latent_dim else None
        between = dropout if num_layers > 1 else 0.0
        self.gru = nn.GRU(embedding_size + latent_dim, hidden_size, num_layers, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Linear(latent_dim, hidden_size, bias=False) if skip else None
        self.attention = SourceAttention(hidden_size, source_size, source_dropout) if source_size else None
        self.to_embedding = nn.Linear(hidden_size, embedding_size) if tied and hidden_size != embedding_size else nn.Identity()

    def forward(self, tokens: Tensor, z: Tensor, hidden: Tensor | None = None, source: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Read tokens.

        Arguments:
            tokens: (N, T) int64, BOS first.
            z: (N, D).
            hidden: (num_layers, N, H) to go on from; made from z when None.
            source: (B, L, F) to attend to; see :class:`SourceAttention`. None: nothing.

        Returns:
            The states to predict from, (N, T, H or E), and the last state (num_layers, N, H).
        """
        if hidden is None:
            hidden = z.new_zeros(len(z), self.gru.num_layers * self.gru.hidden_size) if self.to_state is None else self.to_state(z).tanh()
            hidden = hidden.unflatten(1, (self.gru.num_layers, -1)).transpose(0, 1).contiguous()
        x = self.embedding_dropout(self.embed_tokens(tokens))
        y, hidden = self.gru(torch.cat([x, z.unsqueeze(1).expand(-1, x.shape[1], -1).to(x.dtype)], -1), hidden.to(x.dtype))
        y = y if self.skip is None else y + self.skip(z).unsqueeze(1)
        y = y if source is None else self.attention(y, source.to(y.dtype))
        return self.to_embedding(self.dropout(y)), hidden


class GRUState:
    """What the decoder carries from one generated token to the next.

    Arguments:
        hidden: (layers, B, H).
        length: tokens read so far.
    """

    is_compileable = False

    def __init__(self, hidden: Tensor, length: int):
        self.hidden, self.length = hidden, length

    def get_seq_length(self) -> int:
        """Tokens read so far."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on from row ``beam_idx[i]``."""
        self.hidden = self.hidden.index_select(1, beam_idx)


class _LinearCrossEntropy(torch.autograd.Function):
    """Token losses with one reused buffer of logits.

    On a CPU, where fresh pages and extra products cost most, the forward pass also makes the gradient for an upstream gradient that is
    the same for every token (the usual case: rows of equal weight). Any other upstream gradient makes the logits again. Gradients of
    weight and bias are summed over the chunks in float32 at least: in bfloat16 a sum soon takes in no further chunk.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, chunk: int, trained: bool) -> Tensor:
        nll = torch.empty(len(x), dtype=torch.float32, device=x.device)
        early = x.device.type == "cpu" and trained and any(ctx.needs_input_grad)  # those are true without gradients too
        grads = _LinearCrossEntropy._empty_grads(x, weight, bias) if early else ()
        for part, logits in _LinearCrossEntropy._logits(x, weight, bias, chunk):
            wanted = target[part].unsqueeze(1)
            nll[part] = F.cross_entropy(logits, target[part], reduction="none")
            if early:
                _LinearCrossEntropy._accumulate(grads, part, logits, x, weight, wanted, None)
        ctx.chunk = chunk
        ctx.save_for_backward(x, weight, bias, target, *grads)
        return nll

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        if torch.is_grad_enabled():  # a gradient without a graph would count as a constant
            raise NotImplementedError("linear_cross_entropy: received create_graph=True, expected False: it has no second derivative")
        x, weight, bias, target, *early = ctx.saved_tensors
        if early and len(grad) and bool((grad == grad[0]).all()):
            grads = tuple(g * grad[0].to(g.dtype) for g in early)
        else:
            grads = _LinearCrossEntropy._empty_grads(x, weight, bias)
            for part, logits in _LinearCrossEntropy._logits(x, weight, bias, ctx.chunk):
                _LinearCrossEntropy._accumulate(grads, part, logits, x, weight, target[part].unsqueeze(1), grad[part])
        return grads[0], grads[1].to(weight.dtype), grads[2].to(bias.dtype), None, None, None

    @staticmethod
    def _empty_grads(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        summed = {"dtype": torch.promote_types(x.dtype, torch.float32)}
        return torch.empty_like(x), torch.zeros_like(weight, **summed), torch.zeros_like(bias, **summed)

    @staticmethod
    def _logits(x: Tensor, weight: Tensor, bias: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor]]:
        buffer = x.new_empty(min(chunk, len(x)), len(weight))
        for start in range(0, len(x), chunk):
            rows = x[start : start + chunk]
            yield slice(start, start + len(rows)), torch.addmm(bias, rows, weight.t(), out=buffer[: len(rows)]).float()

    @staticmethod
    def _accumulate(
        grads: tuple[Tensor, ...], part: slice, logits: Tensor, x: Tensor, weight: Tensor, wanted: Tensor, upstream: Tensor | None
    ) -> None:
        p = torch.softmax(logits, 1, out=logits)
        p.scatter_add_(1, wanted, p.new_full((len(p), 1), -1.0))
        p = (p if upstream is None else p.mul_(upstream.unsqueeze(1))).to(x.dtype)
        grads[0][part] = p @ weight
        if grads[1].dtype == x.dtype:
            grads[1].addmm_(p.t(), x[part])
        else:
            grads[1].add_(p.t() @ x[part])
        grads[2].add_(p.sum(0, dtype=grads[2].dtype))


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, max_logits: int = 1 << 24) -> Tensor:
    r"""Token losses :math:`-\log \mathrm{softmax}(W x + b)_{target}` in memory that does not grow with tokens times vocabulary.

    Arguments:
        x: (N, H); weight: (V, H); bias: (V,).
        target: (N,) int64 in [0, V).
        max_logits: the most logits that exist at once.

    Returns:
        (N,) float32, nats. Its gradient has no gradient where logits are made in chunks, as on a CPU always: NotImplementedError.
    """
    if x.device.type != "cpu" and x.shape[0] * weight.shape[0] <= max_logits:
        return F.cross_entropy(F.linear(x, weight, bias).float(), target, reduction="none")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        trained = torch.is_grad_enabled()
        if x.device.type == "cpu" and not trained:
            max_logits = min(max_logits, 1 << 20)  # 4 MB that stay in the cache: 1.7 times as fast as 64 MB
        return _LinearCrossEntropy.apply(x, weight, bias, target, max(1, max_logits // weight.shape[0]), trained)
